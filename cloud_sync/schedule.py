"""When a destination may be sent to: windows of the week, in local time. Pure.

A window is `[DAYS ]HH:MM-HH:MM`; DAYS are names or ranges of names with commas, e.g. "Mon-Fri 22:00-06:00",
"Sat,Sun 00:00-24:00", "12:30-13:00" (every day). One that ends no later than it begins ends on the next day;
its days are those it begins on. Local times are read off the clock on the wall: the hour that a change to
summer time leaves out is open for no time, the one that comes twice is open twice.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple
from zoneinfo import ZoneInfo

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import tzinfo

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FORM = re.compile(r"(?:(?P<days>[A-Za-z,\- ]+?)\s+)?(?P<begin>\d{1,2}:\d{2})\s*-\s*(?P<end>\d{1,2}:\d{2})")
_MINUTES_A_DAY = 24 * 60


class Window(NamedTuple):
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

    windows: tuple[Window, ...] = ()
    zone: tzinfo = UTC

    @classmethod
    def of(cls, windows: Iterable[str], time_zone: str = "UTC") -> Schedule:
        """From the texts of the configuration; ValueError says which one cannot be read, and what can."""
        return cls(tuple(map(window_of, windows)), zone_of(time_zone))

    def is_open(self, now_us: int) -> bool:
        """Whether it is open at a time, microseconds since 1970."""
        if not self.windows:
            return True
        local = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=now_us)).astimezone(self.zone)
        minute = local.hour * 60 + local.minute
        return any(window.is_open(local.weekday(), minute) for window in self.windows)


def window_of(text: str) -> Window:
    """One window from its text; ValueError when it is none."""
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no window; write for instance 'Mon-Fri 22:00-06:00' or '12:00-13:30'")
    begin, end = (_minutes(text, found[name]) for name in ("begin", "end"))
    if begin == _MINUTES_A_DAY:
        raise ValueError(f"{text!r}: a window cannot begin at 24:00")
    days = frozenset(range(7)) if found["days"] is None else _days(text, found["days"])
    return Window(days, begin, end if end > begin else end + _MINUTES_A_DAY)


def zone_of(name: str) -> tzinfo:
    """A time zone by its IANA name; ValueError when this system knows none of that name."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError) as fault:
        raise ValueError(
            f"{name!r} is no time zone known here; write UTC, or for instance Europe/Vienna"
        ) from fault


def _minutes(text: str, clock: str) -> int:
    hours, minutes = map(int, clock.split(":"))
    if minutes > 59 or hours * 60 + minutes > _MINUTES_A_DAY:  # noqa: PLR2004 - a clock's own
        raise ValueError(f"{text!r}: {clock} is no time of day")
    return hours * 60 + minutes


def _days(text: str, names: str) -> frozenset[int]:
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
