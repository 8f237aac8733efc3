"""A large spool, built quickly: full segments written into a real spool file, each with commits of its own.

The blocks are a few dozen, encoded as compaction encodes them, written again and again under new ranges of
commits; everything else (series, marks, row counts, the index of times) is as the agent would have left it.
"""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import closing
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import traffic
from cloud_sync.codec import columns
from cloud_sync.model.records import Readings, RecordClass, Series
from gateway.spool.database import SQL, Database
from gateway.spool.segments import MAX_SEGMENT_ROWS, segment_position
from gateway.spool.series_catalog import write_series

if TYPE_CHECKING:
    from pathlib import Path

SERIES = 1_000
COMMITS_A_SEGMENT = 500
_BLOCKS = 24
_AT_ONCE = 256


def readings(first: int, count: int, *, origin_us: int, tick_us: int = 1_000) -> Readings:
    """Readings `first` .. of series numbers 1 .. `SERIES`, second by second, shape (SERIES * count,)."""
    drawn = traffic.draw(np.arange(SERIES), first, count, origin_us=origin_us, tick_us=tick_us)
    value, time_us, quality, battery, signal, seq = (part.T.reshape(-1) for part in drawn)
    return Readings(
        np.tile(np.arange(1, SERIES + 1, dtype=np.int32), count),
        time_us,
        value / 100,
        quality.astype(np.float32),
        battery.astype(np.float32),
        -signal.astype(np.float32),
        seq,
        np.zeros(SERIES * count, np.int32),
    )


def numbered_series() -> list[tuple[int, Series]]:
    """The series with their numbers, as the benches' devices are called."""
    attributes = (("location", "hall-07"), ("unit", "degC"))
    found = []
    for number in range(SERIES):
        _, sensor_id, sensor_type = traffic.series_topic(number).decode().split("/")
        found.append((number + 1, Series(sensor_id, sensor_type, attributes)))
    return found


async def fill(path: Path, min_bytes: int) -> int:
    """Make a spool of at least `wanted_bytes` at `path`; returns its readings."""
    await (await Database.open(path)).close()
    per_series = MAX_SEGMENT_ROWS // SERIES
    origin_us = time.time_ns() // 1000 - 300 * 86_400_000_000
    blocks = [
        columns.encode(
            readings(number * per_series, per_series, origin_us=origin_us).in_order(),
            level=columns.FINAL_LEVEL,
        )
        for number in range(_BLOCKS)
    ]
    rows = per_series * SERIES
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        write_series(connection, numbered_series())
        newest_us = max(columns.time_range_us(block)[1] for block in blocks)
        connection.executemany(SQL["raise_mark"], [(n, newest_us) for n in range(1, SERIES + 1)])
        segments = written = 0
        for block in cycle(blocks):
            first = segments * COMMITS_A_SEGMENT + 1
            row = (
                segment_position(RecordClass.READING, first),
                first + COMMITS_A_SEGMENT - 1,
                rows,
                segments * rows,
                *columns.time_range_us(block),
                origin_us + first,
                1,
                block,
            )
            connection.execute(SQL["append_segment"], row)
            segments += 1
            written += len(block)
            if segments % _AT_ONCE == 0 or written >= min_bytes:
                connection.execute("COMMIT")
                if written >= min_bytes:
                    break
                connection.execute("BEGIN")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    return segments * rows


def forget_cached(path: Path) -> None:
    """Ask the kernel to drop a file from its cache, so that what follows reads the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
