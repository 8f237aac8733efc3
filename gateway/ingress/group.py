"""The group that gathers while a commit is in flight: readings as columns, and bad input.

Filled on the event loop, once per reading, so it appends to plain lists and lets numpy take them whole.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_sync.records import SEQ_ABSENT, Flag, Readings
from gateway.ingress.instants import MICROSECONDS_FROM, MICROSECONDS_TO, BadInstant, instant_us

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ingress.formats.json_reading import JsonReading
    from gateway.spool.quarantine import QuarantineItem

_NAN = math.nan
_TIME_ASSIGNED = int(Flag.TIME_ASSIGNED)


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
        ts = reading.ts
        if type(ts) is int and MICROSECONDS_FROM <= ts < MICROSECONDS_TO:
            self._time_us.append(ts)
            self._flags.append(0)
        elif ts is None:
            self._time_us.append(assigned_us)
            self._flags.append(_TIME_ASSIGNED)
        else:
            try:
                self._time_us.append(instant_us(ts))
            except BadInstant as fault:
                raise BadReading("bad_time", f"ts: {fault}") from None
            self._flags.append(0)
        self._series.append(series_no)
        self._value.append(reading.value)
        self._quality.append(_NAN if reading.quality is None else reading.quality)
        self._battery_level.append(_NAN if reading.battery_level is None else reading.battery_level)
        self._signal_strength.append(_NAN if reading.signal_strength is None else reading.signal_strength)
        self._seq.append(SEQ_ABSENT if reading.seq is None else reading.seq)

    def extend(self, series_nos: Sequence[int], readings: Sequence[JsonReading]) -> bool:
        """Take many readings at once, column by column.

        False, and nothing is taken, when their times are not all microseconds: `add` takes them one by one.
        """
        times: Any = [r.ts for r in readings]
        try:
            if type(sum(times)) is not int or min(times) < MICROSECONDS_FROM or max(times) >= MICROSECONDS_TO:
                return False
        except TypeError:
            return False
        self._time_us += times
        self._flags += [0] * len(times)
        self._series += series_nos
        self._value += [r.value for r in readings]
        self._quality += [_NAN if (n := r.quality) is None else n for r in readings]
        self._battery_level += [_NAN if (n := r.battery_level) is None else n for r in readings]
        self._signal_strength += [_NAN if (n := r.signal_strength) is None else n for r in readings]
        self._seq += [SEQ_ABSENT if (n := r.seq) is None else n for r in readings]
        return True

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
