"""Single readings gathered into columns, each looked at before it is taken. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cloud_sync.instants import EARLIEST_US, LATEST_US
from cloud_sync.records import SEQ_ABSENT, Readings, Series

if TYPE_CHECKING:
    from collections.abc import Sequence

_NAME_MAX_BYTES = 1024
_FLOAT32_END = 2.0**128 - 2.0**103  # what is smaller rounds to a finite float32
_INT32_MAX = (1 << 31) - 1
_INT64_MAX = (1 << 63) - 1


class BadReading(ValueError):  # noqa: N818 - said of the input, not of the program
    """Something that is no reading; the message is a machine-readable reason."""


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


class Gathering:
    """Readings as they come, to be taken as columns together."""

    def __init__(self) -> None:
        self._numbers: dict[Series, int] = {}
        self._rows: list[tuple[Any, ...]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, reading: Reading) -> None:
        """Take one reading.

        Raises:
            BadReading: it cannot be stored; nothing was taken.
        """
        number = self._numbers.get(reading.series)
        if number is None:
            check_series(reading.series)
            number = len(self._numbers)
        if reading.time_us is None:
            raise BadReading("no_time")
        if not math.isfinite(reading.value):
            raise BadReading("bad_value")
        if not EARLIEST_US <= reading.time_us <= LATEST_US:
            raise BadReading("time_out_of_range")
        for part in reading[3:6]:
            if abs(part) >= _FLOAT32_END:
                raise BadReading("number_out_of_range")
        seq = SEQ_ABSENT if reading.seq is None else reading.seq
        if not (0 <= reading.flags <= _INT32_MAX and SEQ_ABSENT <= seq <= _INT64_MAX):
            raise BadReading("number_out_of_range")
        self._numbers.setdefault(reading.series, number)
        self._rows.append((number, *reading[1:6], seq, reading.flags))

    def take(self) -> tuple[Sequence[Series], Readings]:
        """All that was added, in canonical order; nothing is left."""
        rows, series = self._rows, tuple(self._numbers)
        self._rows, self._numbers = [], {}
        if not rows:
            return (), Readings.none()
        columns = list(zip(*rows, strict=True))
        return series, Readings(
            np.array(columns[0], np.int32),
            np.array(columns[1], np.int64),
            np.array(columns[2], np.float64),
            np.array(columns[3], np.float32),
            np.array(columns[4], np.float32),
            np.array(columns[5], np.float32),
            np.array(columns[6], np.int64),
            np.array(columns[7], np.int32),
        ).in_order()


def check_series(series: Series) -> None:
    """Refuse names that no tier can hold.

    Raises:
        BadReading: one is missing, too long, or holds what text cannot.
    """
    if not series.sensor_id:
        raise BadReading("no_sensor_id")
    if not series.sensor_type:
        raise BadReading("no_sensor_type")
    for text in (
        series.sensor_id,
        series.sensor_type,
        *(part for pair in series.attributes for part in pair),
    ):
        if len(text.encode(errors="replace")) > _NAME_MAX_BYTES or "\0" in text or not _is_text(text):
            raise BadReading("bad_name")


def _is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
