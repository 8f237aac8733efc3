"""Progress of every destination: ranges delivered, batches open, and what is claimed next.

Invariants:
- The range of a batch is fsynced in `batch` before `claim` returns it (promise 3). After a restart the
  open batches are handed out again, unchanged, before anything new.
- `settle` moves a range from `batch` to `delivered` in one transaction. A crash before it means the batch
  is sent again and the destination's ledger answers with the same receipt (promise 4).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import Batch, BatchRange, Readings, RecordClass
from gateway.spool import ranges
from gateway.spool.crashpoints import point
from gateway.spool.database import SQL, Database
from gateway.spool.ranges import Range
from gateway.spool.segments import Segments, commit_of, keep_high_mark, read_range, span_of

if TYPE_CHECKING:
    import sqlite3

    from gateway.spool.series import SeriesBook

_log = logging.getLogger(__name__)
_LOOK_AHEAD = 4096
DEFAULT_MAX_ROWS = 50_000


@dataclass(frozen=True, slots=True)
class Backlog:
    """What one destination has not yet given a receipt for.

    Attributes:
        readings: how many.
        oldest_written_at_us: when the oldest of them was committed, None when there is none.
    """

    readings: int
    oldest_written_at_us: int | None


class Deliveries:
    """Claims, loads and settles the batches of all destinations of one spool."""

    def __init__(self, database: Database, segments: Segments, book: SeriesBook, gateway_id: str) -> None:
        self._database = database
        self._segments = segments
        self._book = book
        self._gateway_id = gateway_id

    async def register(self, destination: str, kind: str, *, now_us: int) -> None:
        """Make a destination known; one that was known keeps its progress."""
        await self._database.write(lambda c: c.execute(SQL["add_destination"], (destination, kind, now_us)))

    async def claim(
        self, destination: str, *, now_us: int, max_rows: int = DEFAULT_MAX_ROWS
    ) -> BatchRange | None:
        """The range to send next: an open batch from before, else the oldest gap; None when all is delivered.

        Whole segments only; the first is taken even when it alone exceeds `max_rows`.
        """
        record_class = RecordClass.READING
        newest = self._segments.newest_commit(record_class)

        def look(connection: sqlite3.Connection) -> tuple[Range | None, bool]:
            for first, last in connection.execute(SQL["open_batches"], (destination, record_class)):
                return Range(first, last), True
            return _next_gap(connection, destination, record_class, newest, max_rows), False

        found, is_open = await self._database.read(look)
        if found is None:
            return None
        if not is_open:
            row = (destination, record_class, found.first, found.last, now_us)
            await self._database.write(lambda c: c.execute(SQL["add_batch"], row))
            point("after_claim")
        return BatchRange(self._gateway_id, self._database.epoch, record_class, found.first, found.last)

    async def load(self, claimed: BatchRange) -> Batch | None:
        """The batch of a claimed range: its segments merged, self-contained, in canonical order.

        A segment whose bytes cannot be read is set aside and counted; None when none is left.
        """
        blocks = await self._database.read(
            lambda c: read_range(c, claimed.record_class, claimed.first_commit, claimed.last_commit)
        )
        readable = []
        for position, block in blocks:
            try:
                decoded = columns.decode(block)
            except FormatError as fault:
                await self._set_aside(position, f"{fault.reason}: {fault}")
                continue
            if self._book.knows(decoded.series):
                readable.append(decoded)
            else:
                await self._set_aside(position, "unknown_series: it names a series that the spool does not")
        return self._assemble(claimed, readable) if readable else None

    async def _set_aside(self, position: int, reason: str) -> None:
        _log.error("commit %d is damaged and set aside: %s", commit_of(position), reason)
        now_us = time.time_ns() // 1000

        def work(connection: sqlite3.Connection) -> None:
            keep_high_mark(connection, position)
            connection.execute(SQL["set_aside"], (now_us, reason, position))
            connection.execute(SQL["keep_damaged_block"], (position,))
            connection.execute(SQL["delete_segment"], (position,))

        await self._database.write(work)

    async def settle(self, destination: str, claimed: BatchRange) -> None:
        """Note a receipt: the range is delivered and no longer open."""
        record_class, first, last = claimed.record_class, claimed.first_commit, claimed.last_commit

        point("before_settle")

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(SQL["delete_batch"], (destination, record_class, first, last))
            _add_delivered(connection, destination, record_class, Range(first, last))

        await self._database.write(work)

    async def renew_epoch(self) -> None:
        """Take a new epoch: a destination has ranges of this one that this spool does not know."""
        await self._database.renew_epoch()

    async def split(self, destination: str, claimed: BatchRange) -> bool:
        """Halve an open batch that the destination found too large; False when it is a single segment."""
        record_class, first, last = claimed.record_class, claimed.first_commit, claimed.last_commit

        def work(connection: sqlite3.Connection) -> bool:
            sizes = connection.execute(
                SQL["segment_sizes_from"], (*span_of(record_class, first, last), last - first + 1)
            ).fetchall()
            if len(sizes) < 2:  # noqa: PLR2004 - one segment cannot be halved
                return False
            middle = commit_of(sizes[len(sizes) // 2][0])
            connection.execute(SQL["delete_batch"], (destination, record_class, first, last))
            for half in (Range(first, middle - 1), Range(middle, last)):
                connection.execute(SQL["add_batch"], (destination, record_class, *half, 0))
            return True

        return await self._database.write(work)

    async def backlog(self, destination: str) -> Backlog:
        """What `destination` lacks, in time that grows with its gaps, not with their size."""
        record_class = RecordClass.READING
        newest = self._segments.newest_commit(record_class)
        total = self._segments.rows_ever(record_class)
        return await self._database.read(lambda c: backlog_of(c, destination, record_class, newest, total))

    def _assemble(self, claimed: BatchRange, parts: list[Readings]) -> Batch:
        merged = Readings.concat(parts)
        numbers, index = np.unique(merged.series, return_inverse=True)
        series = [self._book[int(number)] for number in numbers]
        order = sorted(range(len(series)), key=series.__getitem__)
        rank = np.empty(len(order), np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        readings = merged.with_series(rank[index]).in_order()
        return Batch(claimed, tuple(series[i] for i in order), readings)


def backlog_of(
    connection: sqlite3.Connection, destination: str, record_class: RecordClass, newest: int, total_rows: int
) -> Backlog:
    """The backlog from cumulative row counts: each gap costs two look-ups."""
    readings, oldest = 0, None
    for gap in ranges.gaps(_delivered(connection, destination, record_class), 1, newest):
        first = connection.execute(
            SQL["first_segment_from"], span_of(record_class, gap.first, gap.last)
        ).fetchone()
        if first is None:
            continue
        after = connection.execute(SQL["first_segment_from"], span_of(record_class, gap.last + 1)).fetchone()
        readings += (total_rows if after is None else after[1]) - first[1]
        oldest = first[2] if oldest is None else min(oldest, first[2])
    return Backlog(readings, oldest)


def _delivered(connection: sqlite3.Connection, destination: str, record_class: RecordClass) -> list[Range]:
    return [Range(*row) for row in connection.execute(SQL["delivered"], (destination, record_class))]


def _next_gap(
    connection: sqlite3.Connection, destination: str, record_class: RecordClass, newest: int, max_rows: int
) -> Range | None:
    for gap in ranges.gaps(_delivered(connection, destination, record_class), 1, newest):
        sizes = connection.execute(
            SQL["segment_sizes_from"], (*span_of(record_class, gap.first, gap.last), _LOOK_AHEAD)
        ).fetchall()
        if not sizes:
            continue
        total = np.cumsum([rows for _, _, rows in sizes])
        fitting = max(1, sum(1 for _ in takewhile(lambda rows: rows <= max_rows, total)))
        return Range(commit_of(sizes[0][0]), sizes[fitting - 1][1])
    return None


def _add_delivered(
    connection: sqlite3.Connection, destination: str, record_class: RecordClass, new: Range
) -> None:
    """Add a range and merge it with its neighbours."""
    touching = [
        Range(*row)
        for row in connection.execute(
            SQL["delivered_touching"], (destination, record_class, new.last + 1, new.first - 1)
        )
    ]
    for old in touching:
        connection.execute(SQL["delete_delivered"], (destination, record_class, old.first))
    for whole in ranges.merged([*touching, new]):
        connection.execute(SQL["add_delivered"], (destination, record_class, *whole))
