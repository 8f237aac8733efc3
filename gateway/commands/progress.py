"""A progress bar for long work: on a terminal only, on standard error, gone when the work is done."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHOWN_PER_S = 5


class Bar:
    """A `Watcher` that people see. Until its length is said it only moves."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def name(self, title: str) -> None:
        """Say what is being done."""
        self._progress.update(self._task, description=title)

    def total(self, total: int) -> None:
        """Say how much there is to do."""
        self._progress.update(self._task, total=total)

    def advance(self, done: int = 1) -> None:
        """Say that so much more is done."""
        self._progress.advance(self._task, done)


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """A bar that is shown while the block runs."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        refresh_per_second=_SHOWN_PER_S,
    ) as progress:
        yield Bar(progress, title)
