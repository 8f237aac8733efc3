"""Whose batch is applied next: a few at a time, one of a gateway at a time, gateways in turn.

Without it the pool of connections would serve whoever asked first, and a gateway with many requests would
hold connections that only wait for its own lock in the database.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cloud_sync.progress import Stage

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

_TURN_WITHIN_S = 1800.0  # every statement has a timeout of its own


class Turns:
    """Used from one event loop. The caller bounds how many wait."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._served: set[str] = set()
        self.stage = Stage("applying batches")
        self._queues: OrderedDict[str, deque[tuple[asyncio.Future[None], int]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Batches that wait for their turn."""
        return sum(map(len, self._queues.values()))

    @property
    def crowd(self) -> int:
        """Gateways that wait though nothing of theirs is being applied."""
        return len(self._queues.keys() - self._served)

    @property
    def waiting_rows(self) -> int:
        """Their rows."""
        return sum(rows for queue in self._queues.values() for _, rows in queue)

    @asynccontextmanager
    async def turn(self, name: str, rows: int) -> AsyncIterator[None]:
        """Wait for a turn of `name`, and hold it."""
        mine = asyncio.get_running_loop().create_future()
        self._queues.setdefault(name, deque()).append((mine, rows))
        self._serve()
        try:
            await mine
        except BaseException:
            if mine.done() and not mine.cancelled():
                self._leave(name)
            else:
                self._give_up(name, mine)
            raise
        try:
            yield
        finally:
            self._leave(name)

    def _serve(self) -> None:
        """Give the free places to the first gateways in line that are not being served."""
        for name in [n for n in self._queues if n not in self._served]:
            if self._free == 0:
                return
            queue = self._queues[name]
            mine, _ = queue.popleft()
            self._queues.move_to_end(name)
            if not queue:
                del self._queues[name]
            if mine.cancelled():
                continue
            self._free -= 1
            self._served.add(name)
            self.stage.works(within_s=_TURN_WITHIN_S)
            mine.set_result(None)

    def _leave(self, name: str) -> None:
        self._free += 1
        self._served.discard(name)
        if self._served:
            self.stage.works(within_s=_TURN_WITHIN_S)
        else:
            self.stage.rests()
        self._serve()

    def _give_up(self, name: str, mine: asyncio.Future[None]) -> None:
        """Take a request out of line whose sender does not wait any more."""
        queue = self._queues.get(name, deque())
        kept = deque(entry for entry in queue if entry[0] is not mine)
        if kept:
            self._queues[name] = kept
        else:
            self._queues.pop(name, None)
