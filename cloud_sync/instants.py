"""What a device says about time, as microseconds since 1970 UTC. Pure.

Numbers carry no unit; it follows from their size, so that every instant from 1973 to 5138 is read rightly
whichever unit a device counts in:

    below 1e11  seconds        below 1e14  milliseconds
    below 1e17  microseconds   above       nanoseconds (cut to microseconds)

Older instants are written as RFC 3339 text, which says its unit.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

EARLIEST_US = -9_223_372_036_854_775
"""1677-09-21: the earliest instant that fits nanoseconds in 64 bits, as every tier can store."""
LATEST_US = 9_223_372_036_854_775
"""2262-04-11: the latest such instant."""

MICROSECONDS_FROM, MICROSECONDS_TO = 10**14, 10**17
"""A number in this range (the end excluded) counts microseconds."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_SECONDS_BELOW = 10**11


class BadInstant(ValueError):  # noqa: N818 - said of the input, not of the program
    """A time that names no instant; the message says why."""


class InstantOutOfRange(BadInstant):
    """An instant that the tiers cannot store."""


def instant_us(ts: float | str) -> int:
    """Microseconds since 1970 UTC of a number (unit by size) or an RFC 3339 text with its offset."""
    at = _from_text(ts) if isinstance(ts, str) else _from_number(ts)
    if not EARLIEST_US <= at <= LATEST_US:
        raise InstantOutOfRange(f"{ts!r} lies outside 1677..2262")
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


def _from_text(ts: str) -> int:
    try:
        at = datetime.fromisoformat(ts)
    except ValueError:
        raise BadInstant(f"{ts[:64]!r} is not RFC 3339 (such as 2026-05-01T12:00:00Z)") from None
    if at.tzinfo is None:
        raise BadInstant(f"{ts[:64]!r} has no offset from UTC (end it with Z or +hh:mm)")
    return (at - _EPOCH) // _MICROSECOND
