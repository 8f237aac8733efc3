"""What a spool holds, in time that does not grow with its size.

Exact always: readings, commits, backlogs, quarantine, bytes of the file. Segments, their bytes and the
range of times need every segment's row; they are counted exactly while that takes no longer than
`SCAN_WITHIN_S`, else estimated from segments picked evenly over the commits, and said to be.
"""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cloud_sync.model.records import RecordClass
from gateway.spool import delivery_ranges
from gateway.spool.database import SQL, is_spool_live, open_spool_read_only, read_meta, wal_size_bytes
from gateway.spool.deliveries import read_backlog
from gateway.spool.segments import first_commit_at, position_span, read_commit_counter

if TYPE_CHECKING:
    from pathlib import Path

SCAN_WITHIN_S = 1.0
_SAMPLES = 2000
_PROGRESS_STEPS = 1000


class ClassInfo(msgspec.Struct):
    """Records of one class; with `estimated` its segments, bytes and times are estimates."""

    rows: int
    rows_ever: int
    oldest_commit: int
    newest_commit: int
    segments: int
    block_bytes: int
    min_time_us: int | None
    max_time_us: int | None
    oldest_written_at_us: int | None
    estimated: bool


class BacklogInfo(msgspec.Struct):
    """What one destination lacks, per class, and its batches on their way."""

    name: str
    kind: str
    backlog: dict[str, int]
    oldest_written_at_us: int | None
    delivered_ranges: int
    open_batches: int


class SpoolInfo(msgspec.Struct):
    """The whole document. Sizes in bytes, times in microseconds since 1970; None means not known."""

    path: str
    live: bool | None
    format_version: int
    epoch: str
    gateway_id: str | None
    file_bytes: int
    wal_bytes: int
    page_bytes: int
    free_pages: int
    used_bytes: int
    bytes_per_reading: float | None
    series: int
    quarantined: int
    damaged_segments: int
    damaged_rows: int
    classes: dict[str, ClassInfo]
    destinations: list[BacklogInfo]


def read_spool_info(
    path: Path, gateway_id: str | None = None, *, scan_within_s: float = SCAN_WITHIN_S
) -> SpoolInfo:
    """What the spool at `path` holds, live or stopped. Raises SpoolError."""
    live = is_spool_live(path)
    with open_spool_read_only(path) as connection:
        connection.execute("BEGIN")  # one view for all that follows
        page_bytes, pages, free = (
            connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        classes = {
            record_class.name.lower(): info
            for record_class in RecordClass
            if (info := _class_info(connection, record_class, scan_within_s)).newest_commit
        }
        readings = classes.get("reading")
        damaged = connection.execute(SQL["damaged_totals"]).fetchone()
        used_bytes = (pages - free) * page_bytes
        return SpoolInfo(
            path=str(path),
            live=live,
            format_version=version,
            epoch=str(read_meta(connection, "epoch", "")),
            gateway_id=gateway_id,
            file_bytes=path.stat().st_size,
            wal_bytes=wal_size_bytes(path),
            page_bytes=page_bytes,
            free_pages=free,
            used_bytes=used_bytes,
            bytes_per_reading=used_bytes / readings.rows if readings and readings.rows else None,
            series=connection.execute(SQL["series_count"]).fetchone()[0],
            quarantined=connection.execute(SQL["quarantine_count"]).fetchone()[0],
            damaged_segments=damaged[0],
            damaged_rows=damaged[1],
            classes=classes,
            destinations=[
                _backlog_info(connection, name, kind)
                for name, kind, _ in connection.execute(SQL["destinations"]).fetchall()
            ],
        )


def _class_info(connection: sqlite3.Connection, record_class: RecordClass, within_s: float) -> ClassInfo:
    newest, rows_ever = read_commit_counter(connection, record_class)
    oldest = connection.execute(SQL["first_segment_from"], position_span(record_class)).fetchone()
    if oldest is None:
        return ClassInfo(0, rows_ever, 0, newest, 0, 0, None, None, None, estimated=False)
    position, rows_before, written_at_us, _ = oldest
    first = first_commit_at(position)
    scanned = _scan_segments(connection, record_class, within_s)
    estimated = scanned is None
    segments, rows, min_us, max_us, block_bytes = scanned or _sample_segments(
        connection, record_class, first, newest, rows_ever - rows_before
    )
    return ClassInfo(
        rows, rows_ever, first, newest, segments, block_bytes, min_us, max_us, written_at_us, estimated
    )


def _scan_segments(
    connection: sqlite3.Connection, record_class: RecordClass, within_s: float
) -> tuple[int, int, int, int, int] | None:
    """Segments, rows, smallest and largest time, bytes; None when it takes too long."""
    deadline = time.monotonic() + within_s
    connection.set_progress_handler(lambda: time.monotonic() > deadline, _PROGRESS_STEPS)
    try:
        row: tuple[int, int, int, int, int] = connection.execute(
            SQL["scan"], position_span(record_class)
        ).fetchone()
    except sqlite3.OperationalError as fault:
        if fault.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return None
    finally:
        connection.set_progress_handler(None, 0)
    return row


def _sample_segments(
    connection: sqlite3.Connection, record_class: RecordClass, first: int, newest: int, rows: int
) -> tuple[int, int, int, int, int]:
    """The same from segments picked evenly over the commits.

    A segment of n commits is met n times as often as one of a single commit, so each pick counts 1 / n.
    """
    commits = newest - first + 1
    segments = block_bytes = 0.0
    times: list[int] = []
    picks = 0
    for commit in np.linspace(first, newest, min(_SAMPLES, commits), dtype=np.int64).tolist():
        found = connection.execute(SQL["covering"], position_span(record_class, 0, commit)).fetchone()
        if found is None:  # pruned while we look
            continue
        position, last_commit, _, min_us, max_us, size = found
        share = 1 / max(1, last_commit - first_commit_at(position) + 1)
        picks += 1
        segments += share
        block_bytes += share * size
        times += (min_us, max_us)
    scale = commits / max(1, picks)
    low_us, high_us = min(times, default=0), max(times, default=0)
    return round(segments * scale), rows, low_us, high_us, round(block_bytes * scale)


def _backlog_info(connection: sqlite3.Connection, name: str, kind: str) -> BacklogInfo:
    backlog: dict[str, int] = {}
    oldest_us: int | None = None
    delivered = batches = 0
    for record_class in RecordClass:
        newest, _ = read_commit_counter(connection, record_class)
        if not newest:
            continue
        lacking = read_backlog(connection, name, record_class, newest)
        backlog[record_class.name.lower()] = lacking.readings
        if lacking.oldest_written_at_us is not None:
            oldest_us = min(oldest_us or lacking.oldest_written_at_us, lacking.oldest_written_at_us)
        done = connection.execute(SQL["delivered"], (name, record_class)).fetchall()
        delivered += len(delivery_ranges.merge_ranges(done))
        batches += len(connection.execute(SQL["open_batches"], (name, record_class)).fetchall())
    return BacklogInfo(name, kind, backlog, oldest_us, delivered, batches)
