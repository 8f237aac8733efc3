"""One reading as it arrives: its timestamp, its validation, and single readings built into columns. Pure.

The unit of a numeric timestamp follows from its size, so that every time from 1973 to 5138 is read
correctly:

    below 1e11  seconds        below 1e14  milliseconds
    below 1e17  microseconds   above       nanoseconds (cut to microseconds)

Earlier times are written as RFC 3339 text.
"""

from __future__ import annotations

import itertools
import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cloud_sync.model.records import ATTRIBUTE_NAMES, SEQ_ABSENT, Readings, Series, is_storable_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import tzinfo

MIN_TIME_US = -9_223_372_036_854_775
"""1677-09-21: the earliest instant that fits nanoseconds in 64 bits, as every tier can store."""
MAX_TIME_US = 9_223_372_036_854_775
"""2262-04-11: the latest such instant."""

MICROSECONDS_FROM, MICROSECONDS_TO = 10**14, 10**17
"""A number in this range (the end excluded) counts microseconds."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS_BELOW = 10**11
UNIT_SCALES = {"ns": (1, 1_000), "us": (1, 1), "ms": (1_000, 1), "s": (1_000_000, 1)}
"""Units of timestamps, as (times, divided by) to microseconds."""
_DECIMAL_TEXT = re.compile(r"[+-]?\d{1,30}(\.\d{0,30})?")

TIME_UNITS = ("auto", *UNIT_SCALES)
"""How a device counts: "auto" is by the number's size, or RFC 3339 text."""


class TimestampError(ValueError):
    """A text or number that is no time; the message says why."""


class TimestampRangeError(TimestampError):
    """A time that the tiers cannot store."""


def parse_timestamp(ts: float | str) -> int:
    """Microseconds since 1970 UTC of a number (unit by size) or an RFC 3339 text with its offset."""
    return _check_range(_text_to_us(ts) if isinstance(ts, str) else _number_to_us(ts), ts)


def parse_timestamp_in_unit(ts: object, unit: str, zone: tzinfo | None = None) -> int:
    """Microseconds since 1970 UTC of a payload's time, in one of `TIME_UNITS`; numbers may be text.

    Text that is no number is RFC 3339 whatever the unit; without an offset it is local time of `zone`.
    """
    if isinstance(ts, bool) or not isinstance(ts, (int, float, str)):
        raise TimestampError(f"expected a time, found {type(ts).__name__}")
    if isinstance(ts, str):
        if _DECIMAL_TEXT.fullmatch(ts) is None:
            return _check_range(_text_to_us(ts, zone), ts)
        ts = float(ts) if "." in ts else int(ts)
    if unit == "auto":
        return parse_timestamp(ts)
    times, divided = UNIT_SCALES[unit]
    if isinstance(ts, int):
        return _check_range(ts * times // divided, ts)
    if not math.isfinite(ts):
        raise TimestampError(f"{ts!r} is no time")
    return _check_range(round(ts * times / divided), ts)


def _check_range(at: int, ts: float | str) -> int:
    if not MIN_TIME_US <= at <= MAX_TIME_US:
        raise TimestampRangeError(f"{ts!r:.64} lies outside 1677..2262")
    return at


def _number_to_us(ts: float) -> int:
    size = abs(ts)
    if isinstance(ts, float):
        if not math.isfinite(ts):
            raise TimestampError(f"{ts!r} is no time")
        if not ts.is_integer():
            return round(ts * (1e6 if size < _SECONDS_BELOW else 1e3 if size < MICROSECONDS_FROM else 1))
        ts = int(ts)
    if size < _SECONDS_BELOW:
        return ts * 1_000_000
    if size < MICROSECONDS_FROM:
        return ts * 1_000
    return ts if size < MICROSECONDS_TO else ts // 1_000


def _text_to_us(ts: str, zone: tzinfo | None = None) -> int:
    try:
        at = datetime.fromisoformat(ts)
    except ValueError:
        raise TimestampError(f"{ts[:64]!r} is not RFC 3339 (such as 2026-05-01T12:00:00Z)") from None
    if at.tzinfo is None and zone is not None:
        at = at.replace(tzinfo=zone)
    if at.tzinfo is None:
        raise TimestampError(f"{ts[:64]!r} has no offset from UTC (end it with Z or +hh:mm)")
    return (at - _EPOCH) // timedelta(microseconds=1)


_COMPANIONS = ("quality", "battery_level", "signal_strength")
_FLOAT32_END = 2.0**128 - 2.0**103  # what is smaller rounds to a finite float32
_INT32_MAX = (1 << 31) - 1
_INT64_MAX = (1 << 63) - 1


class InvalidReadingError(ValueError):
    """Not a reading; the message is a machine-readable reason."""


class Reading(NamedTuple):
    """One reading; absent are None for the time and the seq, NaN for the others."""

    series: Series
    time_us: int | None
    value: float
    quality: float = math.nan
    battery_level: float = math.nan
    signal_strength: float = math.nan
    seq: int | None = None
    flags: int = 0


def build_reading(name: Sequence[str], time_us: int | None, value: float, members: object) -> Reading:
    """A reading of a series with attributes, companions and seq out of a decoded object; None is absent."""
    quality, battery_level, signal_strength = (
        math.nan if (number := getattr(members, key)) is None else number for key in _COMPANIONS
    )
    attributes = tuple((key, text) for key in sorted(ATTRIBUTE_NAMES) if (text := getattr(members, key)))
    seq: int | None = getattr(members, "seq", None)
    series = Series(name[0], name[1], attributes)
    return Reading(series, time_us, value, quality, battery_level, signal_strength, seq)


class ColumnBuilder:
    """Collects readings and builds columns of them."""

    def __init__(self) -> None:
        self._numbers: dict[Series, int] = {}
        self._rows: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, reading: Reading) -> None:
        """Add one reading; an InvalidReadingError, when it cannot be stored, adds nothing."""
        number = self._numbers.get(reading.series)
        if number is None:
            validate_series(reading.series)
            number = len(self._numbers)
        if reading.time_us is None:
            raise InvalidReadingError("no_time")
        if not math.isfinite(reading.value):
            raise InvalidReadingError("bad_value")
        if not MIN_TIME_US <= reading.time_us <= MAX_TIME_US:
            raise InvalidReadingError("time_out_of_range")
        for part in reading[3:6]:
            if abs(part) >= _FLOAT32_END:
                raise InvalidReadingError("number_out_of_range")
        seq = SEQ_ABSENT if reading.seq is None else reading.seq
        if not (0 <= reading.flags <= _INT32_MAX and SEQ_ABSENT <= seq <= _INT64_MAX):
            raise InvalidReadingError("number_out_of_range")
        self._numbers.setdefault(reading.series, number)
        self._rows.append((number, *reading[1:6], seq, reading.flags))

    def build(self) -> tuple[Sequence[Series], Readings]:
        """All that was added, in canonical order; the builder is empty afterwards."""
        rows, series = self._rows, tuple(self._numbers)
        self._rows, self._numbers = [], {}
        if not rows:
            return (), Readings.empty()
        columns = zip(zip(*rows, strict=True), Readings.columns.values(), strict=True)
        return series, Readings(*(np.array(column, dtype) for column, dtype in columns)).in_order()


def validate_series(series: Series) -> None:
    """InvalidReadingError when a name is missing, too long, or cannot be stored as text."""
    if not series.sensor_id:
        raise InvalidReadingError("no_sensor_id")
    if not series.sensor_type:
        raise InvalidReadingError("no_sensor_type")
    texts = (series.sensor_id, series.sensor_type, *itertools.chain(*series.attributes))
    if not all(map(is_storable_text, texts)):
        raise InvalidReadingError("bad_name")
