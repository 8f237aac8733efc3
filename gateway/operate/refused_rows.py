"""Readings that a destination refused, sent to it once more: they get a commit that only it lacks.

The spool's own copy of such a reading lies in a range that is delivered. What is sent again is therefore
committed again, marked as processed, and counted as delivered to every other destination, in the transaction
that drops the quarantine items.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cloud_sync.gathered import BadReading, Gathering, Reading
from cloud_sync.records import ATTRIBUTE_NAMES, Flag, Readings, RecordClass, Series
from gateway.operate.spool_walk import SQL
from gateway.spool import claims
from gateway.spool.claims import Queue
from gateway.spool.database import SQL as SPOOL_SQL
from gateway.spool.ranges import Range
from gateway.spool.segments import newest_of, seal

if TYPE_CHECKING:
    import sqlite3

    from gateway.operate.quarantine_items import Item
    from gateway.spool.database import Database
    from gateway.spool.segments import Segments
    from gateway.spool.series import SeriesBook

_CLASS = RecordClass.READING


class _Refused(msgspec.Struct):
    """The payload of an item, as `Deliveries.refuse` writes it; `ts` counts microseconds."""

    value: float
    ts: int
    sensor_id: str
    sensor_type: str
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    flags: int = 0
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


_decoder = msgspec.json.Decoder(_Refused)


class RefusedRows:
    """Takes items, then sends all of them again together."""

    def __init__(self, database: Database, segments: Segments, book: SeriesBook) -> None:
        self._database = database
        self._segments = segments
        self._book = book
        self._gathered: dict[str, Gathering] = defaultdict(Gathering)
        self._numbers: dict[str, list[int]] = defaultdict(list)

    async def take(self, item: Item) -> str | None:
        """Keep an item for `send`; or why it cannot be sent again."""
        known = await self._database.read(
            lambda c: c.execute(SPOOL_SQL["destination_known"], (item.source,)).fetchone()
        )
        if known is None:
            return f"it was put aside by {item.source}, and is no publish"
        try:
            told = _decoder.decode(item.payload)
            self._gathered[item.source].add(_reading(told))
        except (msgspec.DecodeError, UnicodeDecodeError, BadReading):
            return "it is no single reading that could be sent again"
        self._numbers[item.source].append(item.quarantine_no)
        return None

    async def send(self, now_us: int) -> int:
        """Commit what was taken for its destinations, and drop the items; returns how many readings.

        Raises:
            SpoolFailed, SpoolFull: nothing of the rest has happened.
        """
        sent = 0
        for destination in list(self._gathered):
            series, readings = self._gathered.pop(destination).take()
            gone = [(number,) for number in self._numbers.pop(destination)]
            numbers = np.array([self._book.number_of(one) for one in series], np.int32)
            own = readings.with_series(numbers[readings.series]).in_order()
            await self._commit(destination, own, gone, now_us)
            sent += own.rows
        return sent

    async def _commit(
        self, destination: str, readings: Readings, gone: list[tuple[int]], now_us: int
    ) -> None:
        sealed = seal(readings)

        def note(connection: sqlite3.Connection) -> None:
            newest = newest_of(connection, _CLASS).commit
            new = Range(newest + 1, newest + len(sealed))
            for name, *_ in connection.execute(SPOOL_SQL["destinations"]).fetchall():
                if name != destination:
                    claims.add_delivered(connection, Queue(name, _CLASS), new)
            connection.executemany(SQL["drop_quarantine"], gone)

        await self._segments.append(sealed, now_us=now_us, notes=[note])


def _reading(told: _Refused) -> Reading:
    attributes = tuple((name, text) for name in sorted(ATTRIBUTE_NAMES) if (text := getattr(told, name)))
    quality, battery_level, signal_strength = (
        math.nan if number is None else number
        for number in (told.quality, told.battery_level, told.signal_strength)
    )
    return Reading(
        Series(told.sensor_id, told.sensor_type, attributes),
        told.ts,
        told.value,
        quality,
        battery_level,
        signal_strength,
        told.seq,
        told.flags | Flag.PROCESSED,
    )
