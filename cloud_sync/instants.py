"""What a device says about time, as microseconds since 1970 UTC. Pure.

Numbers carry no unit; it follows from their size, so that every instant from 1973 to 5138 is read rightly
whichever unit a device counts in:

    below 1e11  seconds        below 1e14  milliseconds
    below 1e17  microseconds   above       nanoseconds (cut to microseconds)

Older instants are written as RFC 3339 text, which says its unit.
"""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import tzinfo

EARLIEST_US = -9_223_372_036_854_775
"""1677-09-21: the earliest instant that fits nanoseconds in 64 bits, as every tier can store."""
LATEST_US = 9_223_372_036_854_775
"""2262-04-11: the latest such instant."""

MICROSECONDS_FROM, MICROSECONDS_TO = 10**14, 10**17
"""A number in this range (the end excluded) counts microseconds."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SECONDS_BELOW = 10**11
_UNITS: Mapping[str, tuple[int, int]] = {
    "s": (1_000_000, 1),
    "ms": (1_000, 1),
    "us": (1, 1),
    "ns": (1, 1_000),
}
_DECIMAL = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?")

TIME_UNITS = ("auto", *_UNITS)
"""How a device counts: "auto" is by the number's size, or RFC 3339 text."""


class BadInstant(ValueError):  # noqa: N818 - said of the input, not of the program
    """A time that names no instant; the message says why."""


class InstantOutOfRange(BadInstant):
    """An instant that the tiers cannot store."""


def instant_us(ts: float | str) -> int:
    """Microseconds since 1970 UTC of a number (unit by size) or an RFC 3339 text with its offset."""
    return _checked(_from_text(ts) if isinstance(ts, str) else _from_number(ts), ts)


def instant_in(ts: object, unit: str, zone: tzinfo | None = None) -> int:
    """Microseconds since 1970 UTC of what a payload says, in one of `TIME_UNITS`; numbers may be text.

    Args:
        ts: a number, a text, or something that is no time.
        unit: of numbers; text that is no number is RFC 3339 whatever the unit.
        zone: where clocks show what text without an offset says; without it such text is a fault.

    Raises:
        BadInstant: it names no instant that can be stored.
    """
    if isinstance(ts, bool) or not isinstance(ts, (int, float, str)):
        raise BadInstant(f"expected a time, found {type(ts).__name__}")
    if isinstance(ts, str):
        if _DECIMAL.fullmatch(ts) is None:
            return _checked(_from_text(ts, zone), ts)
        ts = float(ts) if "." in ts else int(ts)
    if unit == "auto":
        return instant_us(ts)
    times, divided = _UNITS[unit]
    if isinstance(ts, int):
        return _checked(ts * times // divided, ts)
    if not math.isfinite(ts):
        raise BadInstant(f"{ts!r} is no instant")
    return _checked(round(ts * times / divided), ts)


def _checked(at: int, ts: float | str) -> int:
    if not EARLIEST_US <= at <= LATEST_US:
        raise InstantOutOfRange(f"{ts!r:.64} lies outside 1677..2262")
    return at


def _from_number(ts: float) -> int:
    if isinstance(ts, float):
        if not math.isfinite(ts):
            raise BadInstant(f"{ts!r} is no instant")
        if not ts.is_integer():
            return _from_fraction(ts)
        ts = int(ts)
    size = abs(ts)
    if size < _SECONDS_BELOW:
        return ts * 1_000_000
    if size < MICROSECONDS_FROM:
        return ts * 1_000
    return ts if size < MICROSECONDS_TO else ts // 1_000


def _from_fraction(ts: float) -> int:
    size = abs(ts)
    if size < _SECONDS_BELOW:
        return round(ts * 1e6)
    return round(ts * 1e3) if size < MICROSECONDS_FROM else round(ts)


def _from_text(ts: str, zone: tzinfo | None = None) -> int:
    try:
        at = datetime.fromisoformat(ts)
    except ValueError:
        raise BadInstant(f"{ts[:64]!r} is not RFC 3339 (such as 2026-05-01T12:00:00Z)") from None
    if at.tzinfo is None and zone is not None:
        at = at.replace(tzinfo=zone)
    if at.tzinfo is None:
        raise BadInstant(f"{ts[:64]!r} has no offset from UTC (end it with Z or +hh:mm)")
    return (at - _EPOCH) // _MICROSECOND
