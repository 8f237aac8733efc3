"""The group that fills while a commit is in flight: readings packed into rows, and quarantine items.

Filled on the event loop, one call per reading: it is packed into a row of bytes at once, so that no object
outlives the call, and numpy takes all rows as columns.
"""

from __future__ import annotations

import math
from struct import Struct
from struct import error as StructError  # noqa: N812 - `error` says too little
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cloud_sync.model.reading_builder import (
    MAX_TIME_US,
    MICROSECONDS_FROM,
    MICROSECONDS_TO,
    MIN_TIME_US,
    TimestampError,
    parse_timestamp,
)
from cloud_sync.model.records import SEQ_ABSENT, Flag, Readings
from gateway.spool.appender import Submission

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.payloads.formats.json_reading import JsonReading
    from gateway.payloads.measurement import Measurement
    from gateway.spool.quarantine_items import QuarantineItem
    from gateway.spool.segments import CommitNote

_NAN = math.nan
_TIME_ASSIGNED_FLAG = int(Flag.TIME_ASSIGNED)
_ROW_COLUMNS = ("time_us", "value", "seq", "series", "quality", "battery_level", "signal_strength", "flags")
_ROW_DTYPE = np.dtype([(name, Readings.columns[name]) for name in _ROW_COLUMNS])
_pack_row = Struct("=qdqifffi").pack


class InvalidReadingError(ValueError):
    """A reading that cannot be kept. `reason` is machine-readable, the message is for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _GroupedLot(NamedTuple):
    readings: Readings
    note: CommitNote | None
    checked: bool


class CommitGroup:
    """Readings of one group commit to be, each packed into a row of `_TABLE`: nothing else is kept of it.

    Lots come in columns and stay so. They come first, and among them those that have been checked elsewhere.
    """

    def __init__(self) -> None:
        self.items: list[QuarantineItem] = []
        self._submissions: list[_GroupedLot] = []
        self._lot_rows = 0
        self._packed = bytearray()

    @property
    def rows(self) -> int:
        """Readings gathered."""
        return self._lot_rows + self.single_rows

    @property
    def single_rows(self) -> int:
        """Readings of no lot: the last ones of `unchecked`."""
        return len(self._packed) // _ROW_DTYPE.itemsize

    def add_submission(self, readings: Readings, note: CommitNote | None, *, checked: bool) -> None:
        """Take readings in columns, in any number, as a lot of their own."""
        self._submissions.append(_GroupedLot(readings, note, checked))
        self._lot_rows += readings.rows

    def submissions(self) -> list[Submission]:
        """The lots in the order they were added, each with its rows among all readings."""
        at = {
            True: 0,
            False: sum(submission.readings.rows for submission in self._submissions if submission.checked),
        }
        found = []
        for submission in self._submissions:
            start = at[submission.checked]
            at[submission.checked] += submission.readings.rows
            found.append(Submission(slice(start, at[submission.checked]), submission.note))
        return found

    def add(self, series_no: int, reading: JsonReading, *, assigned_us: int) -> None:
        """Take one reading of a series; `assigned_us` stands in when the device sent no time.

        Raises:
            BadReading: nothing was taken.
        """
        ts, flags = reading.ts, 0
        if type(ts) is int and MICROSECONDS_FROM <= ts < MICROSECONDS_TO:
            time_us = ts
        elif ts is None:
            time_us, flags = assigned_us, _TIME_ASSIGNED_FLAG
        else:
            try:
                time_us = parse_timestamp(ts)
            except TimestampError as fault:
                raise InvalidReadingError("bad_time", f"ts: {fault}") from None
        self._packed += _pack_row(
            time_us,
            reading.value,
            SEQ_ABSENT if reading.seq is None else reading.seq,
            series_no,
            _NAN if reading.quality is None else reading.quality,
            _NAN if reading.battery_level is None else reading.battery_level,
            _NAN if reading.signal_strength is None else reading.signal_strength,
            flags,
        )

    def take(self, series_no: int, measurement: Measurement, *, assigned_us: int) -> None:
        """Take one reading whose time is known to be in microseconds, or absent.

        Raises:
            BadReading: it is beyond what can be stored; nothing was taken.
        """
        m, flags = measurement, measurement.flags
        time_us = m.time_us
        if time_us is None:
            time_us, flags = assigned_us, flags | _TIME_ASSIGNED_FLAG
        elif not MIN_TIME_US <= time_us <= MAX_TIME_US:
            raise InvalidReadingError("bad_time", "the time lies outside 1677..2262")
        if not math.isfinite(m.value):
            raise InvalidReadingError("bad_value", f"{m.value!r} is no value")
        try:
            self._packed += _pack_row(
                time_us,
                m.value,
                SEQ_ABSENT if m.seq is None else m.seq,
                series_no,
                _NAN if m.quality is None else m.quality,
                _NAN if m.battery_level is None else m.battery_level,
                _NAN if m.signal_strength is None else m.signal_strength,
                flags,
            )
        except (StructError, OverflowError) as fault:
            raise InvalidReadingError(
                "bad_value", f"a companion is beyond what can be stored: {fault}"
            ) from None

    def extend(self, series_nos: Sequence[int], readings: Sequence[JsonReading]) -> bool:
        """Take many readings at once, when each has all its members and a time in microseconds.

        False, and nothing is taken, when one has not: `add` takes them one by one.
        """
        packed = bytearray()
        try:
            for series_no, r in zip(series_nos, readings, strict=True):
                ts: Any = r.ts
                if not MICROSECONDS_FROM <= ts < MICROSECONDS_TO:
                    return False
                packed += _pack_row(
                    ts, r.value, r.seq, series_no, r.quality, r.battery_level, r.signal_strength, 0
                )
        except (TypeError, StructError):  # an absent member, a time that is text or has a fraction
            return False
        self._packed += packed
        return True

    def checked(self) -> Readings:
        """The readings that have been checked elsewhere: the first ones of the group."""
        return Readings.concat(
            [submission.readings for submission in self._submissions if submission.checked]
            or [Readings.empty()]
        )

    def unchecked(self) -> Readings:
        """All others as columns: lots, then single ones, each in order of arrival."""
        table = np.frombuffer(self._packed, _ROW_DTYPE)
        packed = Readings(*(table[name].astype(dtype) for name, dtype in Readings.columns.items()))
        submissions = [submission.readings for submission in self._submissions if not submission.checked]
        return Readings.concat([*submissions, packed]) if submissions else packed
