"""The lanes of a destination: which batches each sends, when, how fast, and how large. Pure.

Live sends the newest commits; backfill sends what live left behind, the oldest gap first, with the
budget that is left. A destination served in order has one lane, named by None. A schedule window is
`[DAYS ]HH:MM-HH:MM` in local time, e.g. "Mon-Fri 22:00-06:00". A budget may be overspent by a batch; the
next send waits until the debt is paid.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple
from zoneinfo import ZoneInfo

from cloud_sync.runtime.rates import TokenBucket

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from datetime import tzinfo

    from cloud_sync.model.records import BatchRange, Credit


class Lane(Enum):
    """Which end of the backlog a batch is taken from."""

    LIVE = "live"
    BACKFILL = "backfill"


class ClaimRequest(NamedTuple):
    """What a sender asks the spool for; without a lane it is the oldest gap first.

    `busy` are batches of other senders; `urgent_only`: alerts and declarations, which wait for no schedule.
    """

    now_us: int
    max_rows: int = 50_000
    lane: Lane | None = None
    busy: Collection[BatchRange] = ()
    urgent_only: bool = False


_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW_PATTERN = re.compile(
    r"(?:(?P<days>[A-Za-z,\- ]+?)\s+)?(?P<begin>\d{1,2}:\d{2})\s*-\s*(?P<end>\d{1,2}:\d{2})"
)
_MINUTES_A_DAY = 24 * 60


class WeeklyWindow(NamedTuple):
    """Days it begins on (Monday is 0) and minutes after midnight; `end` may lie beyond 24 hours."""

    days: frozenset[int]
    begin: int
    end: int

    def is_open(self, day: int, minute: int) -> bool:
        """Whether a minute of a day of the week lies in it."""
        today = day in self.days and self.begin <= minute < self.end
        yesterday = (day - 1) % 7 in self.days and self.begin <= minute + _MINUTES_A_DAY < self.end
        return today or yesterday


@dataclass(frozen=True, slots=True)
class Schedule:
    """Open while one of the windows is; always when there are none."""

    windows: tuple[WeeklyWindow, ...] = ()
    zone: tzinfo = UTC

    @classmethod
    def parse(cls, windows: Iterable[str], time_zone: str = "UTC") -> Schedule:
        """From texts; ValueError names the one that cannot be read, with an example."""
        return cls(tuple(map(parse_window, windows)), find_time_zone(time_zone))

    def is_open(self, now_us: int) -> bool:
        """Whether it is open at a time, microseconds since 1970."""
        if not self.windows:
            return True
        local = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_us)).astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        return any(window.is_open(local.weekday(), minute) for window in self.windows)


def parse_window(text: str) -> WeeklyWindow:
    """One window from its text; ValueError when it is none."""
    found = _WINDOW_PATTERN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no window; write for instance 'Mon-Fri 22:00-06:00' or '12:00-13:30'")
    begin, end = (_parse_minutes(text, found[name]) for name in ("begin", "end"))
    if begin == _MINUTES_A_DAY:
        raise ValueError(f"{text!r}: a window cannot begin at 24:00")
    days = frozenset(range(7)) if found["days"] is None else _parse_days(text, found["days"])
    return WeeklyWindow(days, begin, end if end > begin else end + _MINUTES_A_DAY)


def find_time_zone(name: str) -> tzinfo:
    """A time zone by its IANA name; ValueError when this system knows none of that name."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as fault:
        raise ValueError(
            f"{name!r} is no time zone known here; write UTC, or for instance Europe/Vienna"
        ) from fault


def _parse_minutes(text: str, clock: str) -> int:
    hours, minutes = map(int, clock.split(":"))
    if minutes > 59 or hours * 60 + minutes > _MINUTES_A_DAY:  # noqa: PLR2004 - a clock's own
        raise ValueError(f"{text!r}: {clock} is no time of day")
    return hours * 60 + minutes


def _parse_days(text: str, names: str) -> frozenset[int]:
    days: set[int] = set()
    for piece in names.split(","):
        first, _, last = (part.strip().lower()[:3] for part in piece.partition("-"))
        if first not in _DAYS or (last and last not in _DAYS):
            raise ValueError(
                f"{text!r}: {piece.strip()!r} is no day; write Mon, Tue, Wed, Thu, Fri, Sat, Sun"
            )
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        days.update((begin + n) % 7 for n in range((end - begin) % 7 + 1))
    return frozenset(days)


LIVE_MAX_DEBT_S = 10.0
"""Seconds of budget that the live lane may spend in advance."""
MAX_CREDIT_S = 3600.0
"""Longest that a destination's credit is valid."""


@dataclass(slots=True)
class SendBudget:
    """The budget of one destination: a configured rate of bytes, and the credit it gave last."""

    bytes_per_s: float | None = None
    _bytes: TokenBucket | None = field(init=False, default=None)
    _rows: TokenBucket | None = field(init=False, default=None)
    _credit_until: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.bytes_per_s is not None:
            self._bytes = TokenBucket(self.bytes_per_s, self.bytes_per_s)

    def wait_s(self, lane: Lane | None, at: float) -> float:
        """Seconds until a batch of this lane may leave; 0 for now."""
        borrows_s = LIVE_MAX_DEBT_S if lane is Lane.LIVE else 0.0
        wait_s = 0.0 if self._bytes is None else self._bytes.wait_s(at, debt_s=borrows_s)
        rows = self._credit_rows(at)
        if lane is not Lane.LIVE and rows is not None:
            wait_s = max(wait_s, min(rows.wait_s(at), self._credit_until - at))
        return wait_s

    def spend(self, lane: Lane | None, *, wire_bytes: int, rows: int, at: float) -> None:
        """Count a batch that was sent, whether it was accepted or not."""
        if self._bytes is not None:
            self._bytes.spend(wire_bytes, at)
        credit = self._credit_rows(at)
        if lane is not Lane.LIVE and credit is not None:
            credit.spend(rows, at)

    def grant(self, credit: Credit | None, at: float) -> None:
        """The credit of the newest receipt; None lifts the limit."""
        if credit is None or credit.valid_s <= 0:
            self._rows = None
            return
        rate = max(0.0, credit.rows_per_s)
        if self._credit_rows(at) is None:
            self._rows = TokenBucket(rate, rate)
        elif self._rows is not None:
            self._rows.change_rate(rate, at)
        self._credit_until = at + min(credit.valid_s, MAX_CREDIT_S)

    def max_rows_in(self, seconds: float, lane: Lane | None, bytes_per_row: float, at: float) -> float:
        """Rows that the budget lets through in so many seconds; infinity without a limit."""
        most = float("inf")
        if self.bytes_per_s is not None and bytes_per_row > 0:
            most = self.bytes_per_s * seconds / bytes_per_row
        rows = self._credit_rows(at)
        if lane is not Lane.LIVE and rows is not None:
            most = min(most, rows.per_s * seconds)
        return most

    def _credit_rows(self, at: float) -> TokenBucket | None:
        """The bucket of the credit, None once it has run out."""
        if self._rows is not None and at >= self._credit_until:
            self._rows = None
        return self._rows


MIN_ROWS = 500
"""Slow requests make batches no smaller than this."""
_FIRST_ROWS = 10_000
_RAISE_CEILING_AFTER = 200
_CEILING_GROWTH = 1.25
_BYTES_WEIGHT = 0.2


@dataclass(slots=True)
class BatchSizer:
    """Adapts the size of batches to every answer, towards requests of `target_s`.

    `bytes_per_row` is what a row has taken on the wire, a moving mean; 0 before the first.
    """

    max_rows: int
    max_bytes: int = 4 << 20
    target_s: float = 0.5
    bytes_per_row: float = 0.0
    _rows: float = field(init=False)
    _ceiling: float = field(init=False)
    _sent: int = 0

    def __post_init__(self) -> None:
        self._ceiling = float(self.max_rows)
        self._rows = float(min(self.max_rows, _FIRST_ROWS))

    @property
    def rows(self) -> int:
        """Rows to ask for."""
        most = min(self._rows, self._ceiling)
        if self.bytes_per_row > 0:
            most = min(most, self.max_bytes / self.bytes_per_row)
        return max(1, int(most))

    def record_sent(self, rows: int, wire_bytes: int, seconds: float) -> None:
        """A batch was answered with a receipt after so many seconds."""
        if rows <= 0:
            return
        each = wire_bytes / rows
        old = self.bytes_per_row or each
        self.bytes_per_row = old + _BYTES_WEIGHT * (each - old)
        if seconds > self.target_s:
            shrunk = rows * max(0.5, self.target_s / seconds)
            self._rows = max(min(self._rows, shrunk), min(self._rows, MIN_ROWS))
        elif seconds < self.target_s / 2 and rows >= self._rows / 2:
            self._rows = min(float(self.max_rows), self._rows * 2)
        self._sent += 1
        if self._sent >= _RAISE_CEILING_AFTER and self._ceiling < self.max_rows:
            self._sent = 0
            self._ceiling = min(float(self.max_rows), self._ceiling * _CEILING_GROWTH + 1)

    def record_too_large(self, rows: int) -> None:
        """The destination did not accept so many rows; larger batches are tried again after many others."""
        self._sent = 0
        self._ceiling = max(1.0, min(self._ceiling, rows // 2))
