"""What a running gateway can be told from outside: stop, reload, start again."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(slots=True, eq=False)
class Orders:
    """The orders that have come in.

    Attributes:
        config: the file that a reload reads; None when there is none.
        stop: stop in order.
        wake: an order has come.
        reload_asked: read the configuration again.
        again: after the stop, start again with the configuration that is in force then.
        given_up: a configuration on trial was given up already.
    """

    config: Path | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    reload_asked: bool = False
    again: bool = False
    given_up: bool = False

    def stop_now(self) -> None:
        """SIGTERM, SIGINT."""
        self.stop.set()
        self.wake.set()

    def reload(self) -> None:
        """SIGHUP."""
        self.reload_asked = True
        self.wake.set()

    def start_again(self) -> None:
        """SIGUSR1: stop in order and begin anew in the same process, for what a reload cannot change."""
        self.again = True
        self.stop_now()
