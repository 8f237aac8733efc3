"""How fast each gateway may drain its backlog while the database is busy. Pure: times are monotonic seconds.

The database's capacity is what was applied per second in which anything was being applied. A gateway
without a backlog sends little and is never held back; what is left is divided evenly among those that would
send more.
A credit is given only after gateways had to wait for one another, and asks for less than the capacity, so
that a queue that has formed gets shorter.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import TYPE_CHECKING

from cloud_sync.records import Credit

if TYPE_CHECKING:
    from collections.abc import Iterable

WINDOW_S = 10.0
"""Over which demand is counted; also how long a credit holds."""

_USED = 0.85
_LIGHT = 0.5
_LEAST_ROWS_PER_S = 100.0
_HALF_LIFE_BUSY_S = 10.0
_LONGEST_WAIT_S = 60


class Fairness:
    """Follows batches as they begin and end."""

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
        """A batch is being applied; `waiting` gateways would like to have one applied, and have none."""
        if self._since is None:
            self._since = at
        if self._in_progress == 0:
            self._busy_since = at
        self._in_progress += 1
        if waiting:
            self._crowded_until = at + WINDOW_S

    def end(self, gateway_id: str, rows: int, at: float) -> None:
        """It was applied, with so many rows; 0 when it failed or had been applied before."""
        self._in_progress -= 1
        elapsed_s, self._busy_since = max(0.0, at - self._busy_since), at
        kept = 0.5 ** (elapsed_s / _HALF_LIFE_BUSY_S)
        self._busy_s = self._busy_s * kept + elapsed_s
        self._rows = self._rows * kept + rows
        self._recent.append((at, gateway_id, rows))
        self._demand[gateway_id] += rows
        self._forget(at)

    def rows_per_s(self) -> float:
        """Rows the database takes per second; 0 when nothing is known."""
        return self._rows / self._busy_s if self._busy_s > 0 else 0.0

    def credit(self, at: float) -> Credit | None:
        """What a gateway with a backlog may send now; None when there is no limit."""
        capacity = self.rows_per_s()
        if self._since is None or at >= self._crowded_until or capacity == 0:
            return None
        self._forget(at)
        span_s = min(WINDOW_S, max(1.0, at - self._since))
        demands = [rows / span_s for rows in self._demand.values()]
        return Credit(max(_LEAST_ROWS_PER_S, round(fair_share(demands, _USED * capacity), 1)), WINDOW_S)

    def wait_s(self, waiting_rows: int) -> int:
        """Whole seconds after which so many rows will have been applied; at least 1, and 0 when unknown."""
        capacity = self.rows_per_s()
        if capacity == 0:
            return 0
        return min(_LONGEST_WAIT_S, 1 + int(waiting_rows / capacity))

    def _forget(self, at: float) -> None:
        while self._recent and self._recent[0][0] < at - WINDOW_S:
            _, gateway_id, rows = self._recent.popleft()
            self._demand[gateway_id] -= rows
            if self._demand[gateway_id] <= 0:
                del self._demand[gateway_id]


def fair_share(demands: Iterable[float], capacity: float) -> float:
    """What each of those that want much gets of `capacity`, when those that want little get it all.

    One that wants less than half of an even share wants little.
    """
    ascending = sorted(demands)
    for position, demand in enumerate(ascending):
        share = capacity / (len(ascending) - position)
        if demand >= _LIGHT * share:
            return share
        capacity -= demand
    return capacity
