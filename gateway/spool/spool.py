"""An open spool: its file and everything that reads and writes it, made together, closed together.

`compact_spool` and `compact_open_spool` are the compaction that an operator asks for: to the end, not paced.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.model.records import RecordClass
from gateway.spool.appender import Appender, Capacity
from gateway.spool.compaction import Compaction
from gateway.spool.database import (
    NO_PROGRESS,
    SQL,
    Database,
    ProgressListener,
    fetch_scalar,
    file_size_bytes,
    open_spool_read_only,
)
from gateway.spool.deliveries import Deliveries
from gateway.spool.duplicates import DuplicateFilter
from gateway.spool.segments import SegmentWriter, position_span, read_commit_counter
from gateway.spool.series_catalog import DEFAULT_MAX_SERIES, SeriesCatalog

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import AsyncIterator
    from pathlib import Path

_MAX_ROUNDS = 100_000  # each gets something done, or is the last; a gateway that appends may never be done


@dataclass(frozen=True, slots=True)
class Spool:
    """The parts of one open spool, which share its file, its commit counters and its series."""

    database: Database
    catalog: SeriesCatalog
    segments: SegmentWriter
    duplicates: DuplicateFilter
    capacity: Capacity
    appender: Appender
    deliveries: Deliveries
    compaction: Compaction


async def build_spool(
    database: Database,
    gateway_id: str = "",
    *,
    max_series: int = DEFAULT_MAX_SERIES,
    capacity: Capacity | None = None,
) -> Spool:
    """Read what the parts keep in memory out of an open file."""
    capacity = capacity or Capacity()
    catalog = await SeriesCatalog.read(database, max_series)
    segments = await SegmentWriter.open(database, catalog)
    duplicates = await DuplicateFilter.open(database, catalog)
    return Spool(
        database,
        catalog,
        segments,
        duplicates,
        capacity,
        Appender(database, segments, duplicates, catalog, capacity),
        Deliveries(database, segments, catalog, gateway_id),
        Compaction(database, catalog, duplicates),
    )


@asynccontextmanager
async def open_spool(
    path: Path,
    gateway_id: str = "",
    *,
    max_series: int = DEFAULT_MAX_SERIES,
    capacity: Capacity | None = None,
    create: bool = True,
) -> AsyncIterator[Spool]:
    """The spool at `path`, open for a block. Without `create` it must exist. Raises SpoolError."""
    if not create:
        with open_spool_read_only(path):
            pass
    database = await Database.open(path)
    try:
        yield await build_spool(database, gateway_id, max_series=max_series, capacity=capacity)
    finally:
        await database.close()


class CompactionResult(NamedTuple):
    """The result of a compaction. Bytes are of the file."""

    segments_before: int
    segments_after: int
    rows: int
    bytes_before: int
    bytes_after: int


async def compact_spool(path: Path, progress: ProgressListener = NO_PROGRESS) -> CompactionResult:
    """Merge every segment that may be merged; `progress` counts commits. Raises SpoolError."""
    async with open_spool(path, create=False) as spool:
        bytes_before = file_size_bytes(path)
        result = await compact_open_spool(spool, progress)
    return result._replace(bytes_before=bytes_before, bytes_after=file_size_bytes(path))


async def compact_open_spool(spool: Spool, progress: ProgressListener = NO_PROGRESS) -> CompactionResult:
    """The same on the open spool of a running gateway, which goes on appending meanwhile."""
    database = spool.database
    bytes_before = file_size_bytes(database.path)
    fresh, segments_before, rows = await database.read(_read_compaction_progress)
    segments = segments_before
    progress.total(fresh)
    for _ in range(_MAX_ROUNDS):
        merged = await spool.compaction.compact_once(everything=True)
        previous, (fresh, segments, rows) = fresh, await database.read(_read_compaction_progress)
        progress.advance(max(0, previous - fresh))
        if merged == 0 and fresh in (0, previous):
            break
    return CompactionResult(segments_before, segments, rows, bytes_before, file_size_bytes(database.path))


def _read_compaction_progress(connection: sqlite3.Connection) -> tuple[int, int, int]:
    """Commits that compaction has not indexed yet, all segments, and their rows."""
    span = position_span(RecordClass.READING)
    newest = read_commit_counter(connection, RecordClass.READING).commit
    indexed = fetch_scalar(connection, "newest_indexed", span) or 0
    last = connection.execute(SQL["segments_back_from"], (span[0], indexed, 1)).fetchone()
    segments, rows, *_ = connection.execute(SQL["scan"], span).fetchone()
    return newest - (0 if last is None else last[1]), segments, rows
