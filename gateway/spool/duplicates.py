"""Each reading is stored once: same series, same time.

The fast path is the newest stored time of each series: what is newer is new. Anything else is looked up
exactly, in the segments whose time range it falls into. A reading found with the same value is a duplicate
and is dropped; with another value it is a conflict, and the first stays (promise 4). Exact for as long as
the spool keeps the segments; older ones are known to the region's ledger and unique index.

`DeviceActivity` tells when each device (sensor_id) was last received, by the gateway's clock; for a device
not received since start the newest stored time of its readings stands in.

Memory: about thirty bytes a series, a bounded window of recent keys, some bytes for each fresh segment.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.model.records import RecordClass
from gateway.spool import segment_reader
from gateway.spool.database import SQL
from gateway.spool.segment_reader import DamagedSegment, decode_segment_columns
from gateway.spool.segments import read_fresh_segments

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from cloud_sync.model.records import Readings
    from gateway.spool.database import Database
    from gateway.spool.series_catalog import SeriesCatalog

_NO_TIME = np.iinfo(np.int64).min
_CACHED_ROWS = 400_000
_KEY_COLUMNS = ("series", "time_us", "value")


class SegmentKeys(NamedTuple):
    """The identity, time and value of each reading of a segment; arrays of shape (rows,)."""

    identity: NDArray[np.int32]
    time_us: NDArray[np.int64]
    value: NDArray[np.float64]


class ScreenedReadings(NamedTuple):
    """Readings in canonical order with what is known of them without the file; arrays of shape (rows,).

    `keep` is false for repeats, `conflicting` true where the value differs from the first, `late` true for
    those that have to be looked up. `arrival` is the row each had before.
    """

    readings: Readings
    arrival: NDArray[np.intp]
    identity: NDArray[np.int32]
    keep: NDArray[np.bool_]
    conflicting: NDArray[np.bool_]
    late: NDArray[np.bool_]

    @property
    def new(self) -> Readings:
        """The readings to store."""
        return self.readings if self.keep.all() else self.readings.select(self.keep)

    @property
    def conflicts(self) -> Readings:
        """Readings whose series and time are stored with another value."""
        return self.readings.select(self.conflicting)

    @property
    def duplicates(self) -> int:
        """How many are stored already, or came twice, with the same value."""
        return int((~self.keep).sum()) - int(self.conflicting.sum())


class DuplicateFilter:
    """Knows what the spool holds. `screen` and `resolve` before an append, `stored` after it."""

    def __init__(self, database: Database, catalog: SeriesCatalog) -> None:
        self._database = database
        self._catalog = catalog
        self.newest_us = np.full(1024, _NO_TIME, np.int64)
        """The newest time by identity; the smallest int64 where there is none."""
        self._fresh: dict[int, tuple[int, int]] = {}
        """Smallest and largest time of fresh segments, by position."""
        self._cache: OrderedDict[int, SegmentKeys] = OrderedDict()
        self._cached_rows = 0
        self._moves = 0

    @classmethod
    async def open(cls, database: Database, catalog: SeriesCatalog) -> DuplicateFilter:
        """Marks of indexed segments come from their table; fresh segments are read one by one."""
        known = cls(database, catalog)
        marks, fresh = await database.read(
            lambda c: (c.execute(SQL["marks"]).fetchall(), read_fresh_segments(c))
        )
        if marks:
            identity, newest_us = np.array(marks, np.int64).T
            known._raise_marks(identity.astype(np.int32), newest_us)
        for segment in fresh:
            keys = await known._keys_at(segment.position)
            if keys is not None:
                known._fresh[segment.position] = segment.min_time_us, segment.max_time_us
                known._raise_marks(keys.identity, keys.time_us)
        return known

    def screen(self, readings: Readings) -> ScreenedReadings:
        """Sort readings and find those that are plainly new. Reads no file; may run in an executor thread."""
        arrival = np.lexsort((readings.time_us, readings.series))
        ordered = readings.select(arrival)
        identity = self._catalog.identities(ordered.series)
        self.newest_us = _grow_array(self.newest_us, int(identity.max()), _NO_TIME)
        keep = np.ones(ordered.rows, np.bool_)
        conflicting = np.zeros(ordered.rows, np.bool_)
        _mark_repeats(identity, ordered, arrival, keep, conflicting)
        late = ordered.time_us <= self.newest_us[identity]
        return ScreenedReadings(ordered, arrival, identity, keep, conflicting, late)

    async def resolve(self, screened: ScreenedReadings) -> None:
        """Look up every late reading exactly; completes `keep` and `conflicting`."""
        late = np.flatnonzero(screened.late)
        times, series = screened.readings.time_us[late], screened.identity[late]
        while True:
            moves = self._moves
            stored = await self._stored_at(np.unique(times), np.unique(series))
            if moves == self._moves:
                break  # else compaction has moved segments while they were looked through
        for at, key in zip(late, zip(series.tolist(), times.tolist(), strict=True), strict=True):
            value = stored.get(key)
            if value is not None:
                screened.keep[at] = False
                screened.conflicting[at] = value != screened.readings.value[at]

    def stored(self, position: int, readings: Readings) -> None:
        """Add a segment that has just become durable."""
        keys = SegmentKeys(self._catalog.identities(readings.series), readings.time_us, readings.value)
        self._cache_keys(position, keys)
        self._fresh[position] = int(keys.time_us.min()), int(keys.time_us.max())
        self._raise_marks(keys.identity, keys.time_us)

    def indexed(self, positions: Iterable[int]) -> None:
        """Move these segments from the fresh ones to the file's own index, after a merge."""
        self._moves += 1
        for position in positions:
            self._fresh.pop(position, None)
            self._forget(position)

    async def _stored_at(
        self, times: NDArray[np.int64], series: NDArray[np.int32]
    ) -> dict[tuple[int, int], float]:
        """Value by (series, time) of everything stored at these times and series; the first one counts."""
        first, last = int(times[0]), int(times[-1])
        indexed = await self._database.read(
            lambda c: segment_reader.find_indexed(c, RecordClass.READING, first, last)
        )
        positions = [position for position, _, _ in indexed]
        positions += [at for at, (low, high) in self._fresh.items() if low <= last and high >= first]
        stored: dict[tuple[int, int], float] = {}
        for position in sorted(positions):
            keys = await self._keys_at(position)
            if keys is None:
                continue
            found = np.flatnonzero(np.isin(keys.time_us, times) & np.isin(keys.identity, series))
            for at in found:
                stored.setdefault((int(keys.identity[at]), int(keys.time_us[at])), float(keys.value[at]))
        return stored

    async def _keys_at(self, position: int) -> SegmentKeys | None:
        """The keys of a segment; None when it cannot be decoded (delivery sets it aside)."""
        if position in self._cache:
            self._cache.move_to_end(position)
            return self._cache[position]
        block = await self._database.read(lambda c: segment_reader.read_block(c, position))
        if block is None:  # merged or set aside since it was listed
            self._fresh.pop(position, None)
            self._moves += 1
            return None
        found = await asyncio.get_running_loop().run_in_executor(
            None, decode_segment_columns, block, _KEY_COLUMNS
        )
        if isinstance(found, DamagedSegment):
            return None
        series, time_us, value = found
        keys = SegmentKeys(self._catalog.identities(series), time_us, value)
        self._cache_keys(position, keys)
        return keys

    def _raise_marks(self, identity: NDArray[np.int32], time_us: NDArray[np.int64]) -> None:
        self.newest_us = _grow_array(self.newest_us, int(identity.max()), _NO_TIME)
        np.maximum.at(self.newest_us, identity, time_us)

    def _cache_keys(self, position: int, keys: SegmentKeys) -> None:
        self._forget(position)
        self._cache[position] = keys
        self._cached_rows += len(keys.time_us)
        while self._cached_rows > _CACHED_ROWS and len(self._cache) > 1:
            self._forget(next(iter(self._cache)))

    def _forget(self, position: int) -> None:
        keys = self._cache.pop(position, None)
        if keys is not None:
            self._cached_rows -= len(keys.time_us)


def _mark_repeats(
    identity: NDArray[np.int32],
    ordered: Readings,
    arrival: NDArray[np.intp],
    keep: NDArray[np.bool_],
    conflicting: NDArray[np.bool_],
) -> None:
    """Mark readings that came twice among themselves; the first one stays."""
    if np.array_equal(identity, ordered.series):
        order = np.arange(ordered.rows)
    else:
        order = np.lexsort((arrival, ordered.time_us, identity))
    series, times = identity[order], ordered.time_us[order]
    same = (series[1:] == series[:-1]) & (times[1:] == times[:-1])
    if not same.any():
        return
    starts = np.flatnonzero(np.concatenate(([True], ~same)))
    first = np.repeat(order[starts], np.diff(starts, append=len(order)))
    repeated = order != first
    keep[order[repeated]] = False
    differs = ordered.value[order] != ordered.value[first]
    conflicting[order[repeated & differs]] = True


class LastReceived(NamedTuple):
    """Devices in order of arrival; parallel arrays. `received_us` is the smallest int64 if not known."""

    sensor_ids: list[str]
    received_us: NDArray[np.int64]
    series: NDArray[np.int32]


class DeviceActivity:
    """When each device was last received; `record` at every append."""

    def __init__(self, catalog: SeriesCatalog) -> None:
        self._catalog = catalog
        self._received_us = np.full(1024, _NO_TIME, np.int64)
        self._devices: dict[str, int] = {}
        self._device_of = np.full(1024, -1, np.int32)
        self._through = 0

    def record(self, identity: NDArray[np.int32], now_us: int) -> None:
        """Record that readings of these identities have just been received."""
        if len(identity):
            highest = int(identity.max())
            self._received_us = _grow_array(self._received_us, highest, _NO_TIME)
            self._received_us[identity] = now_us

    def last_received(self, duplicates: DuplicateFilter, now_us: int) -> LastReceived:
        """When every device was last received; a time in the future counts as now."""
        self._assign_new_series()
        size = len(self._device_of)
        received = _grow_array(self._received_us, size - 1, _NO_TIME)[:size]
        stored = np.minimum(_grow_array(duplicates.newest_us, size - 1, _NO_TIME)[:size], now_us)
        received_us = np.full(len(self._devices), _NO_TIME, np.int64)
        known = self._device_of >= 0
        at = np.where(received > _NO_TIME, received, stored)[known]
        np.maximum.at(received_us, self._device_of[known], at)
        series = np.bincount(self._device_of[known], minlength=len(self._devices)).astype(np.int32)
        return LastReceived(list(self._devices), received_us, series)

    def _assign_new_series(self) -> None:
        """Assign new series to their devices; further attribute states do not count."""
        for number, series in self._catalog.list_after(self._through):
            self._through = number
            self._device_of = _grow_array(self._device_of, number, -1)
            known = self._catalog.find(series.sensor_id, series.sensor_type)
            if known is not None and known.numbers[0] == number:
                self._device_of[number] = self._devices.setdefault(series.sensor_id, len(self._devices))


def _grow_array(array: NDArray, highest: int, filling: int) -> NDArray:  # type: ignore[type-arg]  # of either integer type
    if highest < len(array):
        return array
    return np.concatenate([array, np.full(max(highest + 1 - len(array), len(array)), filling, array.dtype)])
