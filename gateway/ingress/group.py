"""The group that gathers while a commit is in flight: readings as columns, and bad input.

Filled on the event loop, once per reading, so it appends to plain lists and lets numpy take them whole.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.records import SEQ_ABSENT, Flag, Readings
from gateway.ingress.instants import BadInstant, instant_us

if TYPE_CHECKING:
    from gateway.ingress.formats.json_reading import JsonReading
    from gateway.spool.quarantine import QuarantineItem

_NAN = math.nan
_INT64_MAX = (1 << 63) - 1
_FLOAT32_MAX = 3.4e38


class BadReading(ValueError):  # noqa: N818 - said of the input, not of the program
    """A reading that cannot be kept. `reason` is machine-readable, the message is for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Group:
    """Readings of one group commit to be."""

    def __init__(self) -> None:
        self.items: list[QuarantineItem] = []
        self.payload_bytes = 0
        self._series: list[int] = []
        self._time_us: list[int] = []
        self._value: list[float] = []
        self._quality: list[float] = []
        self._battery_level: list[float] = []
        self._signal_strength: list[float] = []
        self._seq: list[int] = []
        self._flags: list[int] = []

    @property
    def rows(self) -> int:
        """Readings gathered."""
        return len(self._series)

    def add(self, series_no: int, reading: JsonReading, *, assigned_us: int) -> None:
        """Take one reading of a series; `assigned_us` stands in when the device sent no time.

        Raises:
            BadReading: nothing was taken.
        """
        value = float(reading.value)
        if not math.isfinite(value):
            raise BadReading("bad_value", f"value is {value}; a finite number is expected")
        flags = 0
        if reading.ts is None:
            time_us, flags = assigned_us, int(Flag.TIME_ASSIGNED)
        else:
            try:
                time_us = instant_us(reading.ts)
            except BadInstant as fault:
                raise BadReading("bad_time", f"ts: {fault}") from None
        seq = reading.seq
        if seq is None:
            seq = SEQ_ABSENT
        elif not 0 <= seq <= _INT64_MAX:
            raise BadReading("bad_seq", f"seq is {seq}; 0..2^63-1 is expected")
        quality = _single("quality", reading.quality)
        battery_level = _single("battery_level", reading.battery_level)
        self._signal_strength.append(_single("signal_strength", reading.signal_strength))
        self._quality.append(quality)
        self._battery_level.append(battery_level)
        self._series.append(series_no)
        self._time_us.append(time_us)
        self._value.append(value)
        self._seq.append(seq)
        self._flags.append(flags)

    def readings(self) -> Readings:
        """What was gathered, as columns, in order of arrival."""
        return Readings(
            np.array(self._series, np.int32),
            np.array(self._time_us, np.int64),
            np.array(self._value, np.float64),
            np.array(self._quality, np.float32),
            np.array(self._battery_level, np.float32),
            np.array(self._signal_strength, np.float32),
            np.array(self._seq, np.int64),
            np.array(self._flags, np.int32),
        )


def _single(member: str, number: float | None) -> float:
    """The number, NaN for an absent one; it must fit single precision."""
    if number is None:
        return _NAN
    if -_FLOAT32_MAX < number < _FLOAT32_MAX:
        return number
    raise BadReading(f"bad_{member}", f"{member} is {number}; a finite number is expected")
