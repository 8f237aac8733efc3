"""Each reading is stored once: same series, same time.

The fast path is a mark for each series, the newest time it has in the spool: what is newer is new. What is
not newer is looked for exactly, in the segments whose time range it falls into. A reading found with the
same value is a duplicate and is dropped; with another value it is a conflict, and the first stays
(promise 4). Exact for as long as the spool keeps the segments; what was pruned, the region's own ledger and
unique index still know.

Memory: eight bytes a series for the marks, a bounded window of recent keys, and some bytes for each segment
that compaction has not merged yet.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import RecordClass
from gateway.spool.database import SQL
from gateway.spool.segments import fresh_segments, span_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from cloud_sync.records import Readings
    from gateway.spool.database import Database
    from gateway.spool.series import SeriesBook

_NEVER = np.iinfo(np.int64).min
_CACHED_ROWS = 400_000
_KEY_COLUMNS = ("series", "time_us", "value")
_READINGS = span_of(RecordClass.READING)


class Keys(NamedTuple):
    """What identifies the readings of a segment, and their values; arrays of shape (rows,)."""

    identity: NDArray[np.int32]
    time_us: NDArray[np.int64]
    value: NDArray[np.float64]


class Span(NamedTuple):
    """Where the times of one fresh segment lie."""

    position: int
    min_time_us: int
    max_time_us: int


class Screened(NamedTuple):
    """Readings in canonical order, with what can be said of them without the file; arrays of shape (rows,).

    `keep` is false for those that came twice, `conflicting` is true where the value differed from the first,
    `late` is true for those that the file has to be asked about. `arrival` is where each was before.
    """

    readings: Readings
    arrival: NDArray[np.intp]
    identity: NDArray[np.int32]
    keep: NDArray[np.bool_]
    conflicting: NDArray[np.bool_]
    late: NDArray[np.bool_]

    @property
    def new(self) -> Readings:
        """What is to be stored."""
        return self.readings if self.keep.all() else self.readings.take(self.keep)

    @property
    def conflicts(self) -> Readings:
        """Those of a series and time that is stored with another value."""
        return self.readings.take(self.conflicting)

    @property
    def duplicates(self) -> int:
        """How many came twice, or were stored already, with the same value."""
        return int((~self.keep).sum()) - int(self.conflicting.sum())


class Duplicates:
    """Knows what the spool holds. `screen` and `resolve` before an append, `stored` after it."""

    def __init__(self, database: Database, book: SeriesBook) -> None:
        self._database = database
        self._book = book
        self._marks = np.full(1024, _NEVER, np.int64)
        self._fresh: dict[int, Span] = {}
        self._cache: OrderedDict[int, Keys] = OrderedDict()
        self._cached_rows = 0
        self._moves = 0

    @classmethod
    async def load(cls, database: Database, book: SeriesBook) -> Duplicates:
        """Marks of what is indexed come from their table; what is fresh is read, segment by segment."""
        known = cls(database, book)
        marks, fresh = await database.read(_marks_and_fresh)
        for series_no, newest_us in marks:
            known._raise_marks(np.array([series_no], np.int32), np.array([newest_us], np.int64))
        for span in fresh:
            keys = await known._keys_at(span.position)
            if keys is not None:
                known._note(span, keys)
        return known

    def screen(self, readings: Readings) -> Screened:
        """Sort readings and tell the plainly new ones. Uses no file; may run in an executor thread."""
        arrival = np.lexsort((readings.time_us, readings.series))
        ordered = readings.take(arrival)
        identity = self._book.identities(ordered.series)
        self._grow(int(identity.max()))
        keep = np.ones(ordered.rows, np.bool_)
        conflicting = np.zeros(ordered.rows, np.bool_)
        _strike_repeats(identity, ordered, arrival, keep, conflicting)
        late = ordered.time_us <= self._marks[identity]
        return Screened(ordered, arrival, identity, keep, conflicting, late)

    async def resolve(self, screened: Screened) -> None:
        """Look every late reading up exactly; `keep` and `conflicting` say the rest afterwards."""
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
        """Note a segment that has just become durable."""
        keys = Keys(self._book.identities(readings.series), readings.time_us, readings.value)
        span = Span(position, int(keys.time_us.min()), int(keys.time_us.max()))
        self._remember(position, keys)
        self._note(span, keys)

    def indexed(self, positions: Iterable[int]) -> None:
        """Note that these fresh segments are merged or indexed; the file's own index knows them now."""
        self._moves += 1
        for position in positions:
            self._fresh.pop(position, None)
            self._forget(position)

    def newest_us(self) -> NDArray[np.int64]:
        """The newest time by series (number of its first attribute state); the smallest int64 without any."""
        return self._marks

    async def _stored_at(
        self, times: NDArray[np.int64], series: NDArray[np.int32]
    ) -> dict[tuple[int, int], float]:
        """Value by (series, time) of everything stored at these times and series; the first one counts."""
        first, last = int(times[0]), int(times[-1])
        positions = await self._database.read(
            lambda c: [row[0] for row in c.execute(SQL["indexed_holding_times"], (last, first, *_READINGS))]
        )
        positions += [
            s.position for s in self._fresh.values() if s.min_time_us <= last and s.max_time_us >= first
        ]
        stored: dict[tuple[int, int], float] = {}
        for position in sorted(positions):
            keys = await self._keys_at(position)
            if keys is None:
                continue
            found = np.flatnonzero(np.isin(keys.time_us, times) & np.isin(keys.identity, series))
            for at in found:
                stored.setdefault((int(keys.identity[at]), int(keys.time_us[at])), float(keys.value[at]))
        return stored

    async def _keys_at(self, position: int) -> Keys | None:
        """The keys of a segment; None when its bytes cannot be read (delivery sets it aside)."""
        if position in self._cache:
            self._cache.move_to_end(position)
            return self._cache[position]
        block = await self._database.read(lambda c: c.execute(SQL["block_at"], (position,)).fetchone())
        if block is None:  # merged or set aside since it was listed
            self._fresh.pop(position, None)
            self._moves += 1
            return None
        try:
            series, time_us, value = await asyncio.get_running_loop().run_in_executor(
                None, columns.decode_columns, block[0], _KEY_COLUMNS
            )
        except FormatError:
            return None
        keys = Keys(self._book.identities(series), time_us, value)
        self._remember(position, keys)
        return keys

    def _note(self, span: Span, keys: Keys) -> None:
        self._fresh[span.position] = span
        self._grow(int(keys.identity.max()))
        self._raise_marks(keys.identity, keys.time_us)

    def _raise_marks(self, identity: NDArray[np.int32], time_us: NDArray[np.int64]) -> None:
        self._grow(int(identity.max()))
        np.maximum.at(self._marks, identity, time_us)

    def _grow(self, identity: int) -> None:
        if identity >= len(self._marks):
            self._marks = np.concatenate([self._marks, np.full(identity + 1, _NEVER, np.int64)])

    def _remember(self, position: int, keys: Keys) -> None:
        self._forget(position)
        self._cache[position] = keys
        self._cached_rows += len(keys.time_us)
        while self._cached_rows > _CACHED_ROWS and len(self._cache) > 1:
            self._forget(next(iter(self._cache)))

    def _forget(self, position: int) -> None:
        keys = self._cache.pop(position, None)
        if keys is not None:
            self._cached_rows -= len(keys.time_us)


def _strike_repeats(
    identity: NDArray[np.int32],
    ordered: Readings,
    arrival: NDArray[np.intp],
    keep: NDArray[np.bool_],
    conflicting: NDArray[np.bool_],
) -> None:
    """Strike out readings that came twice among themselves; the first to come stays."""
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


def _marks_and_fresh(connection: sqlite3.Connection) -> tuple[list[tuple[int, int]], list[Span]]:
    marks = connection.execute(SQL["marks"]).fetchall()
    return marks, [Span(s.position, s.min_time_us, s.max_time_us) for s in fresh_segments(connection)]
