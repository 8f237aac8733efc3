"""Compaction run to its end, on a stopped spool or inside its gateway, and free space given back."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.records import RecordClass
from gateway.operate.spool_file import opened
from gateway.operate.spool_walk import SQL
from gateway.operate.watcher import Nobody, Watcher
from gateway.spool.compaction import Compaction
from gateway.spool.database import SQL as SPOOL_SQL
from gateway.spool.database import Database, value_of
from gateway.spool.duplicates import Duplicates
from gateway.spool.segments import newest_of, span_of
from gateway.spool.series import DEFAULT_MAX_SERIES, SeriesBook

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

_RECLAIM_PAGES = 256
_ROUNDS = 100_000  # each gets something done, or is the last; a gateway that appends may never be done


class Compacted(NamedTuple):
    """What compaction did. Bytes are of the file, once it was closed."""

    segments_before: int
    segments_after: int
    rows: int
    bytes_before: int
    bytes_after: int


class _Standing(NamedTuple):
    """How far compaction has been: commits it has not been over, and segments."""

    fresh_commits: int
    segments: int
    rows: int


async def compact(
    path: Path,
    watcher: Watcher = Nobody(),  # noqa: B008 - it has no state
) -> Compacted:
    """Merge every segment that may be merged; `watcher` is told of the commits gone over.

    Raises:
        SpoolInUse: a gateway is running on this spool; it compacts by itself.
        SpoolFailed, SpoolFull: the spool cannot be used or written.
    """
    with opened(path):
        pass  # refuses what is no spool, before a writer would make one of it
    bytes_before = path.stat().st_size  # noqa: ASYNC240 - nothing else runs here
    database = await Database.open(path)
    try:
        book = await SeriesBook.load(database, DEFAULT_MAX_SERIES)
        compaction = Compaction(database, book, await Duplicates.load(database, book))
        done = await compact_within(database, compaction, watcher)
    finally:
        await database.close()
    bytes_after = path.stat().st_size  # noqa: ASYNC240 - nothing else runs here
    return done._replace(bytes_before=bytes_before, bytes_after=bytes_after)


async def compact_within(
    database: Database,
    compaction: Compaction,
    watcher: Watcher = Nobody(),  # noqa: B008 - it has no state
) -> Compacted:
    """The same on the open spool of a running gateway, which goes on appending meanwhile.

    Raises:
        SpoolFailed, SpoolFull: the spool cannot be written.
    """
    bytes_before = database.size_bytes
    before = now = await database.read(_standing)
    watcher.total(before.fresh_commits)
    for _ in range(_ROUNDS):
        merged = await compaction.compact_once(everything=True)
        was, now = now, await database.read(_standing)
        watcher.advance(max(0, was.fresh_commits - now.fresh_commits))
        if merged == 0 and now.fresh_commits in (0, was.fresh_commits):
            break
    await _reclaim(database)
    return Compacted(before.segments, now.segments, now.rows, bytes_before, database.size_bytes)


async def _reclaim(database: Database) -> None:
    free = await database.read(_free_pages)
    while free:
        await database.reclaim(_RECLAIM_PAGES)
        was, free = free, await database.read(_free_pages)
        if free >= was:
            return


def _free_pages(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA freelist_count").fetchone()[0])


def _standing(connection: sqlite3.Connection) -> _Standing:
    span = span_of(RecordClass.READING)
    newest = newest_of(connection, RecordClass.READING).commit
    indexed = value_of(connection.execute(SPOOL_SQL["newest_indexed"], span).fetchone(), 0)
    last = connection.execute(SPOOL_SQL["segments_back_from"], (span[0], indexed, 1)).fetchone()
    segments, rows, *_ = connection.execute(SQL["scan"], span).fetchone()
    return _Standing(newest - (0 if last is None else last[1]), segments, rows)
