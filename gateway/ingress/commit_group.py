"""The group that fills while a commit is in flight: readings packed into rows, and quarantine items.

Filled on the event loop, one call per reading: it is packed into a row of bytes at once, so that no object
outlives the call, and numpy reads all rows as columns. Submissions come in columns and stay so; in the group
they precede single readings, and among them those that were checked by the gateway they come from.
"""

from __future__ import annotations

import math
from struct import Struct
from struct import error as StructError  # noqa: N812 - `error` says too little
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cloud_sync.model.reading_builder import MICROSECONDS_FROM, MICROSECONDS_TO
from cloud_sync.model.records import SEQ_ABSENT, Readings
from gateway.payloads.measurement import PayloadDecodeError
from gateway.spool.appender import Submission

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gateway.payloads.formats.json_reading import JsonReading
    from gateway.payloads.measurement import Measurement
    from gateway.spool.quarantine_items import QuarantineItem
    from gateway.spool.segments import CommitNote

AttributeTexts = tuple[str | None, str | None, str | None, str | None]
"""location, manufacturer, firmware_version and unit."""
_NAN = math.nan
_ROW_COLUMNS = ("time_us", "value", "seq", "series", "quality", "battery_level", "signal_strength", "flags")
_ROW_DTYPE = np.dtype([(name, Readings.columns[name]) for name in _ROW_COLUMNS])
_pack_row = Struct("=qdqifffi").pack


class _SubmittedReadings(NamedTuple):
    readings: Readings
    note: CommitNote | None
    checked: bool


class CommitGroup:
    """Readings and quarantine items of one group commit to be."""

    def __init__(self) -> None:
        self.items: list[QuarantineItem] = []
        self._submitted: list[_SubmittedReadings] = []
        self._submitted_rows = 0
        self._packed = bytearray()

    @property
    def rows(self) -> int:
        """Readings in the group."""
        return self._submitted_rows + self.single_rows

    @property
    def single_rows(self) -> int:
        """Readings of no submission: the last ones of `unchecked`."""
        return len(self._packed) // _ROW_DTYPE.itemsize

    def add_submission(self, readings: Readings, note: CommitNote | None, *, checked: bool) -> None:
        """Add the readings of one request, of any number."""
        self._submitted.append(_SubmittedReadings(readings, note, checked))
        self._submitted_rows += readings.rows

    def submissions(self) -> list[Submission]:
        """The submissions in the order they were added, each with its rows among all readings."""
        next_row = {True: 0, False: sum(one.readings.rows for one in self._submitted if one.checked)}
        located = []
        for one in self._submitted:
            start = next_row[one.checked]
            next_row[one.checked] += one.readings.rows
            located.append(Submission(slice(start, next_row[one.checked]), one.note))
        return located

    def add(self, series_no: int, reading: JsonReading | Measurement, time_us: int, flags: int) -> None:
        """Add one reading of a series, whose time and value were checked."""
        r = reading
        try:
            self._packed += _pack_row(
                time_us,
                r.value,
                SEQ_ABSENT if r.seq is None else r.seq,
                series_no,
                _NAN if r.quality is None else r.quality,
                _NAN if r.battery_level is None else r.battery_level,
                _NAN if r.signal_strength is None else r.signal_strength,
                flags,
            )
        except (StructError, OverflowError) as fault:
            raise PayloadDecodeError(
                "bad_value", f"a companion is beyond what can be stored: {fault}"
            ) from None

    def extend(self, series_numbers: Mapping[AttributeTexts, int], readings: Sequence[JsonReading]) -> bool:
        """Add many readings at once if each has all its members, a time in microseconds and a known number.

        `series_numbers` are by the attributes. Otherwise nothing is added and the answer is False.
        """
        packed = bytearray()
        try:
            for r in readings:
                ts: Any = r.ts
                if not MICROSECONDS_FROM <= ts < MICROSECONDS_TO:
                    return False
                number = series_numbers[r.location, r.manufacturer, r.firmware_version, r.unit]
                packed += _pack_row(
                    ts, r.value, r.seq, number, r.quality, r.battery_level, r.signal_strength, 0
                )
        except (KeyError, TypeError, StructError):  # TypeError: an absent member, or a time that is text
            return False
        self._packed += packed
        return True

    def checked(self) -> Readings:
        """The readings that were checked elsewhere: the first ones of the group."""
        return Readings.concat([one.readings for one in self._submitted if one.checked] or [Readings.empty()])

    def unchecked(self) -> Readings:
        """All others as columns: submissions, then single readings, each in order of arrival."""
        table = np.frombuffer(self._packed, _ROW_DTYPE)
        packed = Readings(*(table[name].astype(dtype) for name, dtype in Readings.columns.items()))
        submitted = [one.readings for one in self._submitted if not one.checked]
        return Readings.concat([*submitted, packed]) if submitted else packed
