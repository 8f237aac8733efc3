"""Whose batch is applied next, and how fast each gateway may drain its backlog.

A few batches at a time, one of a gateway, gateways in turn. Capacity is what was applied per second in
which anything was applied. A gateway without a backlog is never held back; the rest is divided evenly. A
credit is given only after gateways had to wait for each other. Times are monotonic seconds.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cloud_sync.model.records import Credit
from cloud_sync.runtime.watchdog import StageProgress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

_TURN_WITHIN_S = 1800.0  # every statement has a timeout of its own


class ApplyQueue:
    """Used from one event loop. The caller bounds how many wait."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._applying: set[str] = set()
        self.stage = StageProgress("applying batches")
        self._queues: OrderedDict[str, deque[tuple[asyncio.Future[None], int]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """How many batches."""
        return sum(map(len, self._queues.values()))

    @property
    def waiting_gateways(self) -> int:
        """Gateways that wait while nothing of theirs is being applied."""
        return len(self._queues.keys() - self._applying)

    @property
    def waiting_rows(self) -> int:
        """How many rows, of all batches that wait."""
        return sum(rows for queue in self._queues.values() for _, rows in queue)

    @asynccontextmanager
    async def turn(self, name: str, rows: int) -> AsyncIterator[None]:
        """Apply a batch of `name` inside the block, which begins when it is its turn."""
        turn = asyncio.get_running_loop().create_future()
        self._queues.setdefault(name, deque()).append((turn, rows))
        self._start_next()
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self._free_place(name)
            else:
                self._remove(name, turn)
            raise
        try:
            yield
        finally:
            self._free_place(name)

    def _start_next(self) -> None:
        """Give free places to the first gateways in the queue of which nothing is being applied."""
        for name in [n for n in self._queues if n not in self._applying]:
            if self._free == 0:
                return
            queue = self._queues[name]
            turn, _ = queue.popleft()
            self._queues.move_to_end(name)
            if not queue:
                del self._queues[name]
            if turn.cancelled():
                continue
            self._free -= 1
            self._applying.add(name)
            self.stage.begin_step(within_s=_TURN_WITHIN_S)
            turn.set_result(None)

    def _free_place(self, name: str) -> None:
        self._free += 1
        self._applying.discard(name)
        if self._applying:
            self.stage.begin_step(within_s=_TURN_WITHIN_S)
        else:
            self.stage.set_idle()
        self._start_next()

    def _remove(self, name: str, turn: asyncio.Future[None]) -> None:
        """The sender does not wait any more."""
        queue = self._queues.get(name, deque())
        remaining = deque(entry for entry in queue if entry[0] is not turn)
        if remaining:
            self._queues[name] = remaining
        else:
            self._queues.pop(name, None)


DEMAND_WINDOW_S = 10.0
"""Over which demand is counted; also how long a credit holds."""

_USABLE_FRACTION = 0.85
_LIGHT_DEMAND_FRACTION = 0.5
_MIN_ROWS_PER_S = 100.0
_CAPACITY_HALF_LIFE_S = 10.0
_MAX_WAIT_S = 60


class DrainCredit:
    """Measures the database's speed and each gateway's demand, batch by batch."""

    def __init__(self) -> None:
        self._in_progress = 0
        self._since: float | None = None
        self._busy_since = 0.0
        self._busy_s = 0.0
        self._rows = 0.0
        self._recent: deque[tuple[float, str, int]] = deque()
        self._demand: Counter[str] = Counter()
        self._crowded_until = 0.0

    def begin(self, at: float, waiting: int) -> None:
        """A batch is being applied; `waiting` gateways have none being applied and wait."""
        if self._since is None:
            self._since = at
        if self._in_progress == 0:
            self._busy_since = at
        self._in_progress += 1
        if waiting:
            self._crowded_until = at + DEMAND_WINDOW_S

    def end(self, gateway_id: str, rows: int, at: float) -> None:
        """It ended, with so many rows applied: 0 when it failed or had been applied before."""
        self._in_progress -= 1
        elapsed_s, self._busy_since = max(0.0, at - self._busy_since), at
        decay = 0.5 ** (elapsed_s / _CAPACITY_HALF_LIFE_S)
        self._busy_s = self._busy_s * decay + elapsed_s
        self._rows = self._rows * decay + rows
        self._recent.append((at, gateway_id, rows))
        self._demand[gateway_id] += rows
        self._forget(at)

    def rows_per_s(self) -> float:
        """The database's speed; 0 when nothing is known."""
        return self._rows / self._busy_s if self._busy_s > 0 else 0.0

    def credit(self, at: float) -> Credit | None:
        """What a gateway with a backlog may send now; None when there is no limit."""
        capacity = self.rows_per_s()
        if self._since is None or at >= self._crowded_until or capacity == 0:
            return None
        self._forget(at)
        span_s = min(DEMAND_WINDOW_S, max(1.0, at - self._since))
        demands = [rows / span_s for rows in self._demand.values()]
        share = round(fair_share(demands, _USABLE_FRACTION * capacity), 1)
        return Credit(max(_MIN_ROWS_PER_S, share), DEMAND_WINDOW_S)

    def wait_s(self, waiting_rows: int) -> int:
        """Whole seconds, 1 or more, until so many rows will have been applied; 0 when that is unknown."""
        capacity = self.rows_per_s()
        if capacity == 0:
            return 0
        return min(_MAX_WAIT_S, 1 + int(waiting_rows / capacity))

    def _forget(self, at: float) -> None:
        while self._recent and self._recent[0][0] < at - DEMAND_WINDOW_S:
            _, gateway_id, rows = self._recent.popleft()
            self._demand[gateway_id] -= rows
            if self._demand[gateway_id] <= 0:
                del self._demand[gateway_id]


def fair_share(demands: Iterable[float], capacity: float) -> float:
    """What each large demand gets of `capacity`; small ones, below half an even share, are met in full."""
    ascending = sorted(demands)
    for position, demand in enumerate(ascending):
        share = capacity / (len(ascending) - position)
        if demand >= _LIGHT_DEMAND_FRACTION * share:
            return share
        capacity -= demand
    return capacity
