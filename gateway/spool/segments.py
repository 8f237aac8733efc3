"""Segments: appended by group commits, read back by ranges of commits, never changed.

Each record class counts its own commits 1, 2, 3, ... without gaps; a number is never used again in an
epoch, not even after its segment was pruned (`meta` keeps the highest pruned number, as "commit rows").
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.records import RecordClass, Records
from gateway.spool.database import SQL, fetch_scalar, read_meta, write_meta
from gateway.spool.quarantine_items import QuarantineItem, write_quarantine_items
from gateway.spool.series_catalog import write_series

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from gateway.spool.database import Database
    from gateway.spool.series_catalog import SeriesCatalog

CLASS_SHIFT = 56
_COMMIT_MASK = (1 << CLASS_SHIFT) - 1
MAX_SEGMENT_ROWS = 65_536


def segment_position(record_class: RecordClass, commit: int) -> int:
    """The key of the segment that starts at `commit`."""
    return record_class << CLASS_SHIFT | commit


def record_class_at(position: int) -> RecordClass:
    """The class of the segment at `position`."""
    return RecordClass(position >> CLASS_SHIFT)


def first_commit_at(position: int) -> int:
    """The first commit of the segment at `position`."""
    return position & _COMMIT_MASK


def position_span(record_class: RecordClass, first: int = 0, last: int = _COMMIT_MASK) -> tuple[int, int]:
    """Smallest and largest key of a class's segments that start in first..last."""
    return segment_position(record_class, first), segment_position(record_class, last)


@dataclass(frozen=True, slots=True)
class EncodedSegment:
    """An encoded run of records, ready to be appended."""

    record_class: RecordClass
    records: Records
    rows: int
    min_time_us: int
    max_time_us: int
    block: bytes


def encode_segments(records: Records, *, level: int = columns.FAST_LEVEL) -> list[EncodedSegment]:
    """Encode records in canonical order, in runs of at most `MAX_SEGMENT_ROWS`. Pure; takes milliseconds."""
    segments = []
    for start in range(0, records.rows, MAX_SEGMENT_ROWS):
        rows = np.arange(start, min(start + MAX_SEGMENT_ROWS, records.rows))
        run = records if len(rows) == records.rows else records.select(rows)
        block = columns.encode(run, level=level)
        segments.append(EncodedSegment(run.record_class, run, run.rows, *columns.time_range_us(block), block))
    return segments


@dataclass(frozen=True, slots=True)
class AppendResult:
    """The result of one group: `stored + duplicates + conflicts` rows were handed over."""

    stored: int
    duplicates: int
    conflicts: int
    submissions: tuple[AppendResult, ...] = ()


CommitNote = Callable[["sqlite3.Connection", AppendResult], None]
"""What a commit remembers besides its records: it is written by the same transaction, given the result."""


class CommitCounter(NamedTuple):
    """The newest commit of a class, and the rows ever committed."""

    commit: int
    rows: int


class SegmentWriter:
    """The writing side: it knows the next commit number of every class."""

    def __init__(
        self, database: Database, catalog: SeriesCatalog, counters: dict[RecordClass, CommitCounter]
    ) -> None:
        self._database = database
        self._catalog = catalog
        self._counters = counters
        self._turn = asyncio.Lock()
        self.appended_bytes = 0

    @classmethod
    async def open(cls, database: Database, catalog: SeriesCatalog) -> SegmentWriter:
        """The writer of an open spool, in time that does not grow with the number of segments."""
        counters = await database.read(lambda c: {k: read_commit_counter(c, k) for k in RecordClass})
        return cls(database, catalog, counters)

    def newest_commit(self, record_class: RecordClass) -> int:
        """The newest durable commit of a class, 0 before the first."""
        return self._counters[record_class].commit

    def rows_ever(self, record_class: RecordClass) -> int:
        """Rows of a class ever committed."""
        return self._counters[record_class].rows

    async def append(
        self,
        sealed: Sequence[EncodedSegment],
        items: Sequence[QuarantineItem] = (),
        *,
        now_us: int,
        notes: Sequence[CommitNote] = (),
    ) -> list[int]:
        """Commit a group: segments (mostly one), quarantine items and notes, fsynced together (promise 1).

        Returns the position of each new segment. After a SpoolError nothing was written: call it again.
        """
        result = AppendResult(sum(run.rows for run in sealed), 0, 0)
        async with self._turn:
            new_series = self._catalog.list_unsaved()

            def work(connection: sqlite3.Connection) -> tuple[dict[RecordClass, CommitCounter], list[int]]:
                if new_series:
                    write_series(connection, new_series)
                if items:
                    write_quarantine_items(connection, items)
                for note in notes:
                    note(connection, result)
                return self._insert(connection, sealed, now_us)

            self._counters, positions = await self._database.write(work)
            self._catalog.mark_saved(new_series)
            self.appended_bytes += sum(len(run.block) for run in sealed)
            return positions

    def _insert(
        self, connection: sqlite3.Connection, sealed: Sequence[EncodedSegment], now_us: int
    ) -> tuple[dict[RecordClass, CommitCounter], list[int]]:
        """Insert segments; returns the counters once this is durable, and the positions."""
        counters, positions = dict(self._counters), []
        for run in sealed:
            commit, rows_before = counters[run.record_class]
            commit += 1
            positions.append(segment_position(run.record_class, commit))
            connection.execute(
                SQL["append_segment"],
                (
                    positions[-1],
                    commit,
                    run.rows,
                    rows_before,
                    run.min_time_us,
                    run.max_time_us,
                    now_us,
                    int(run.record_class is not RecordClass.READING),
                    run.block,
                ),
            )
            counters[run.record_class] = CommitCounter(commit, rows_before + run.rows)
        return counters, positions


class StoredSegment(NamedTuple):
    """A segment in the file, without its block. `position` encodes its class and first commit."""

    position: int
    last_commit: int
    rows: int
    rows_before: int
    min_time_us: int
    max_time_us: int
    written_at_us: int

    @property
    def record_class(self) -> RecordClass:
        """The class of its records."""
        return record_class_at(self.position)

    @property
    def first_commit(self) -> int:
        """The first commit it covers."""
        return first_commit_at(self.position)

    def overlaps(self, first: int, last: int) -> bool:
        """Whether it covers one of the commits first..last."""
        return self.first_commit <= last and first <= self.last_commit

    def __str__(self) -> str:
        name = f"{self.record_class.name.lower()} segment {self.first_commit}"
        return name if self.first_commit == self.last_commit else f"{name}..{self.last_commit}"


def read_segments(
    connection: sqlite3.Connection, span: tuple[int, int], limit: int = -1, *, newest_first: bool = False
) -> list[StoredSegment]:
    """The segments whose positions lie in a span, both ends included, in commit order or against it."""
    statement = SQL["segments_back_from" if newest_first else "segments_between"]
    return [StoredSegment(*row) for row in connection.execute(statement, (*span, limit))]


def read_fresh_segments(connection: sqlite3.Connection, limit: int = -1) -> list[StoredSegment]:
    """The segments of readings that compaction has not indexed yet, oldest first."""
    low, high = position_span(RecordClass.READING)
    newest_indexed = fetch_scalar(connection, "newest_indexed", (low, high))
    start = low if newest_indexed is None else newest_indexed + 1
    return read_segments(connection, (start, high), limit)


def save_pruned_mark(connection: sqlite3.Connection, position: int) -> None:
    """Record the commit of a segment that is about to be deleted; inside the same transaction."""
    record_class = record_class_at(position)
    row = connection.execute(SQL["segment_end"], (position,)).fetchone()
    if row is None:
        return  # it was pruned meanwhile
    commit, rows = row
    if commit > read_pruned_mark(connection, record_class).commit:
        write_meta(connection, f"pruned_{record_class.name.lower()}", f"{commit} {rows}")


def read_commit_counter(connection: sqlite3.Connection, record_class: RecordClass) -> CommitCounter:
    """The newest commit of a class and the rows ever committed, from the file."""
    mark = read_pruned_mark(connection, record_class)
    row = connection.execute(SQL["newest_segment"], position_span(record_class)).fetchone()
    if row is None:
        return mark
    position, last_commit, rows, rows_before = row
    return max(mark, CommitCounter(max(last_commit, first_commit_at(position)), rows_before + rows))


def read_pruned_mark(connection: sqlite3.Connection, record_class: RecordClass) -> CommitCounter:
    """The newest commit of a class that was pruned, and the rows up to it."""
    mark = read_meta(connection, f"pruned_{record_class.name.lower()}", "0 0")
    return CommitCounter(*map(int, str(mark).split()))
