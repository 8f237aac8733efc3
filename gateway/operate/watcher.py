"""Who is told how far long work is: a progress bar, or nobody."""

from __future__ import annotations

from typing import Protocol


class Watcher(Protocol):
    """Told what is being done, how much there is to do, and what of it is done."""

    def name(self, title: str) -> None:
        """What is being done from now on."""
        ...

    def total(self, total: int) -> None:
        """How much there is to do in all."""
        ...

    def advance(self, done: int = 1) -> None:
        """So much more is done."""
        ...


class Nobody:
    """A watcher that does not look."""

    def name(self, title: str) -> None:
        """Nothing."""

    def total(self, total: int) -> None:
        """Nothing."""

    def advance(self, done: int = 1) -> None:
        """Nothing."""
