"""How much may go over the link: bytes per second for all lanes, rows per second for the backfill. Pure.

A budget is spent when a batch has left, whatever its size, and may go into debt; who asks again waits until
the debt is paid, so the mean never exceeds the rate. Backfill waits for a level of zero. Live may borrow, so
that a large batch of backfill just sent does not hold it up. Times are monotonic seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloud_sync.lanes import Lane

if TYPE_CHECKING:
    from cloud_sync.records import Credit

LIVE_BORROWS_S = 10.0
"""Seconds of budget that the live lane may spend in advance."""
CREDIT_MAX_S = 3600.0
"""Longest that a destination's credit is believed."""


@dataclass(slots=True)
class TokenBucket:
    """Tokens that come at `rate_per_s` up to one second's worth, and may be overspent."""

    rate_per_s: float
    _level: float = 0.0
    _at: float | None = None

    def wait_s(self, at: float, *, debt_s: float = 0.0) -> float:
        """Seconds until the level is no lower than a debt of `debt_s` seconds' worth."""
        lacking = -debt_s * self.rate_per_s - self._filled(at)
        if lacking <= 0:
            return 0.0
        return lacking / self.rate_per_s if self.rate_per_s > 0 else float("inf")

    def spend(self, tokens: float, at: float) -> None:
        """Take tokens, in advance if need be."""
        self._level = self._filled(at) - tokens

    def _filled(self, at: float) -> float:
        if self._at is not None and at > self._at:
            self._level = min(self.rate_per_s, self._level + (at - self._at) * self.rate_per_s)
        self._at = at if self._at is None else max(at, self._at)
        return self._level


@dataclass(slots=True)
class Budget:
    """The budget of one destination: a configured rate of bytes, and the credit it gave last.

    Attributes:
        bytes_per_s: from the configuration; None is no limit.
    """

    bytes_per_s: float | None = None
    _bytes: TokenBucket | None = field(init=False, default=None)
    _rows: TokenBucket | None = field(init=False, default=None)
    _credit_until: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.bytes_per_s is not None:
            self._bytes = TokenBucket(self.bytes_per_s)

    def wait_s(self, lane: Lane | None, at: float) -> float:
        """Seconds until a batch of this lane may leave; 0 for now."""
        borrows_s = LIVE_BORROWS_S if lane is Lane.LIVE else 0.0
        wait_s = 0.0 if self._bytes is None else self._bytes.wait_s(at, debt_s=borrows_s)
        rows = self._credit_rows(at)
        if lane is not Lane.LIVE and rows is not None:
            wait_s = max(wait_s, min(rows.wait_s(at), self._credit_until - at))
        return wait_s

    def spend(self, lane: Lane | None, *, wire_bytes: int, rows: int, at: float) -> None:
        """Note a batch that has been sent, whether it was taken or not."""
        if self._bytes is not None:
            self._bytes.spend(wire_bytes, at)
        credit = self._credit_rows(at)
        if lane is not Lane.LIVE and credit is not None:
            credit.spend(rows, at)

    def grant(self, credit: Credit | None, at: float) -> None:
        """Take what the newest receipt says; None lifts the limit of the one before."""
        if credit is None or credit.valid_s <= 0:
            self._rows = None
            return
        rate = max(0.0, credit.rows_per_s)
        if self._credit_rows(at) is None:
            self._rows = TokenBucket(rate)
        elif self._rows is not None:
            self._rows.wait_s(at)
            self._rows.rate_per_s = rate
        self._credit_until = at + min(credit.valid_s, CREDIT_MAX_S)

    def max_rows_in(self, seconds: float, lane: Lane | None, bytes_per_row: float, at: float) -> float:
        """Rows that the budget lets through in so many seconds; infinity without a limit."""
        most = float("inf")
        if self.bytes_per_s is not None and bytes_per_row > 0:
            most = self.bytes_per_s * seconds / bytes_per_row
        rows = self._credit_rows(at)
        if lane is not Lane.LIVE and rows is not None:
            most = min(most, rows.rate_per_s * seconds)
        return most

    def _credit_rows(self, at: float) -> TokenBucket | None:
        """The bucket of the credit, None once it has run out."""
        if self._rows is not None and at >= self._credit_until:
            self._rows = None
        return self._rows
