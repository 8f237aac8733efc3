"""The commit log of readings, read in order and in bounded chunks. For one thread at a time."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple, Self

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import Flag, Readings, RecordClass
from gateway.spool.database import SQL, open_read_only
from gateway.spool.errors import SpoolFailed
from gateway.spool.segments import commit_of, span_of

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.spool.series import SeriesBook

_log = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """Some commits in a row.

    Attributes:
        readings: of whole segments, in commit order; `series` being identities.
        last_commit: the newest commit that was looked at, 0 when there was none.
        damaged_rows: readings of segments that could not be decoded, and were passed over.
        written_at_us: when the newest of the commits was written, None when there was none.
    """

    readings: Readings
    last_commit: int
    damaged_rows: int
    written_at_us: int | None


class CommitLog:
    """Reads the readings of one spool in commit order, through a connection of its own."""

    def __init__(self, connection: sqlite3.Connection, book: SeriesBook) -> None:
        self.connection = connection
        self._book = book

    @classmethod
    def open(cls, path: Path, book: SeriesBook) -> Self:
        """The log of the spool at `path`, which somebody else holds open to write."""
        return cls(open_read_only(path), book)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def read(self, after: int, max_rows: int) -> Chunk:
        """The segments that begin after a commit, until there are `max_rows` readings; at least one of them.

        Raises:
            SpoolFailed: the file cannot be read.
        """
        parts: list[Readings] = []
        rows = damaged_rows = last_commit = 0
        written_at_us = None
        span = span_of(RecordClass.READING, after + 1)
        try:
            with closing(self.connection.execute(SQL["segments_with_blocks"], span)) as segments:
                for position, last, segment_rows, written, block in segments:
                    try:
                        parts.append(self._identified(columns.decode(block)))
                    except FormatError as fault:
                        _log.warning("commit %d is damaged and not processed: %s", commit_of(position), fault)
                        damaged_rows += segment_rows
                    rows += segment_rows
                    last_commit, written_at_us = last, written
                    if rows >= max_rows:
                        break
        except sqlite3.Error as fault:
            raise SpoolFailed(f"the commits after {after} cannot be read: {fault}") from fault
        readings = Readings.concat(parts) if parts else Readings.none()
        return Chunk(readings, last_commit, damaged_rows, written_at_us)

    def _identified(self, readings: Readings) -> Readings:
        """The readings by the identity of each series, without those that were processed elsewhere."""
        elsewhere = (readings.flags & Flag.PROCESSED) != 0
        if elsewhere.any():
            readings = readings.take(~elsewhere)
        identities = self._book.identities(readings.series)
        if identities.all():
            return readings.with_series(identities)
        raise FormatError("unknown_series", "it names a series that the spool does not know")
