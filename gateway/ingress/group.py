"""The group that gathers while a commit is in flight: readings as columns, and bad input.

Filled on the event loop, once per reading: one call packs a whole reading into a row of bytes, so that its
objects live no longer than it takes, and numpy takes the rows whole.
"""

from __future__ import annotations

import math
from struct import Struct
from struct import error as StructError  # noqa: N812 - `error` says too little
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cloud_sync.instants import (
    EARLIEST_US,
    LATEST_US,
    MICROSECONDS_FROM,
    MICROSECONDS_TO,
    BadInstant,
    instant_us,
)
from cloud_sync.records import DTYPES, SEQ_ABSENT, Flag, Readings
from gateway.spool.lots import Lot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ingress.formats.json_reading import JsonReading
    from gateway.ingress.formats.measurement import Measurement
    from gateway.spool.lots import Note
    from gateway.spool.quarantine import QuarantineItem

_NAN = math.nan
_TIME_ASSIGNED = int(Flag.TIME_ASSIGNED)
_COLUMNS = ("time_us", "value", "seq", "series", "quality", "battery_level", "signal_strength", "flags")
_TABLE = np.dtype([(name, DTYPES[name]) for name in _COLUMNS])
_pack = Struct("=qdqifffi").pack


class BadReading(ValueError):  # noqa: N818 - said of the input, not of the program
    """A reading that cannot be kept. `reason` is machine-readable, the message is for a person."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class _GroupedLot(NamedTuple):
    readings: Readings
    note: Note | None
    checked: bool


class Group:
    """Readings of one group commit to be, each packed into a row of `_TABLE`: nothing else is kept of it.

    Lots come in columns and stay so. They come first, and among them those that have been checked elsewhere.
    """

    def __init__(self) -> None:
        self.items: list[QuarantineItem] = []
        self._lots: list[_GroupedLot] = []
        self._lot_rows = 0
        self._packed = bytearray()

    @property
    def rows(self) -> int:
        """Readings gathered."""
        return self._lot_rows + self.single_rows

    @property
    def single_rows(self) -> int:
        """Readings of no lot: the last ones of `unchecked`."""
        return len(self._packed) // _TABLE.itemsize

    def add_lot(self, readings: Readings, note: Note | None, *, checked: bool) -> None:
        """Take readings in columns, in any number, as a lot of their own."""
        self._lots.append(_GroupedLot(readings, note, checked))
        self._lot_rows += readings.rows

    def lots(self) -> list[Lot]:
        """The lots in the order they were added, each with its rows among all readings."""
        at = {True: 0, False: sum(lot.readings.rows for lot in self._lots if lot.checked)}
        found = []
        for lot in self._lots:
            start = at[lot.checked]
            at[lot.checked] += lot.readings.rows
            found.append(Lot(slice(start, at[lot.checked]), lot.note))
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
            time_us, flags = assigned_us, _TIME_ASSIGNED
        else:
            try:
                time_us = instant_us(ts)
            except BadInstant as fault:
                raise BadReading("bad_time", f"ts: {fault}") from None
        self._packed += _pack(
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
            time_us, flags = assigned_us, flags | _TIME_ASSIGNED
        elif not EARLIEST_US <= time_us <= LATEST_US:
            raise BadReading("bad_time", "the time lies outside 1677..2262")
        if not math.isfinite(m.value):
            raise BadReading("bad_value", f"{m.value!r} is no value")
        try:
            self._packed += _pack(
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
            raise BadReading("bad_value", f"a companion is beyond what can be stored: {fault}") from None

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
                packed += _pack(
                    ts, r.value, r.seq, series_no, r.quality, r.battery_level, r.signal_strength, 0
                )
        except (TypeError, StructError):  # an absent member, a time that is text or has a fraction
            return False
        self._packed += packed
        return True

    def checked(self) -> Readings:
        """The readings that have been checked elsewhere: the first ones of the group."""
        return Readings.concat([lot.readings for lot in self._lots if lot.checked] or [Readings.none()])

    def unchecked(self) -> Readings:
        """All others as columns: lots, then single ones, each in order of arrival."""
        table = np.frombuffer(self._packed, _TABLE)
        packed = Readings(*(table[name].astype(dtype) for name, dtype in DTYPES.items()))
        lots = [lot.readings for lot in self._lots if not lot.checked]
        return Readings.concat([*lots, packed]) if lots else packed
