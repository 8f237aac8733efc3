"""Segments read back: found by time, decoded, walked by tools, followed by processing; stored rollups.

Every reader of blocks decodes them here. Bytes that cannot be decoded are a `DamagedSegment`, a value: what
follows from it differs. Delivery sets the segment aside, everybody else passes it over.

A reader that keeps one view of a live spool keeps its write-ahead log from being checkpointed. So the walk
starts a new view each time the log has grown by `_LOG_GROWTH_BYTES`, and continues where it was. Between two
views compaction may have merged segments that were seen with ones that were not: such a segment `overlaps`.

Rollup segments are in the index of times from their commit on; some are kept decoded, bounded in rows.
"""

from __future__ import annotations

import logging
import sqlite3
from collections import OrderedDict
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import Flag, Readings, RecordClass, Records, Rollups
from gateway.spool.database import SQL, fetch_scalar, read_meta, read_view, wal_size_bytes, write_meta
from gateway.spool.errors import SpoolAccessError
from gateway.spool.segments import (
    StoredSegment,
    first_commit_at,
    position_span,
    read_commit_counter,
    read_fresh_segments,
    read_segments,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from gateway.spool.series_catalog import SeriesCatalog

_log = logging.getLogger(__name__)
_AT_ONCE = 256
_LOG_GROWTH_BYTES = 16 << 20
_CACHED_ROWS = 100_000
_CLUSTER_GAP_US = 3_600_000_000
_AHEAD_US = 300_000_000
_EVICTED_ROLLUPS_KEY = "rollups_given_up_us"
_ROLLUP_SPAN = position_span(RecordClass.ROLLUP)
ANY_TIME_US = 1 << 62
"""Windows of any time may be gone."""

R = TypeVar("R", bound=Records)


class DamagedSegment(NamedTuple):
    """Why a segment cannot be used: a machine-readable reason and a sentence."""

    reason: str
    detail: str


def read_block(connection: sqlite3.Connection, position: int) -> bytes | None:
    """The encoded records of the segment at `position`; None when there is none."""
    row = connection.execute(SQL["block_at"], (position,)).fetchone()
    return None if row is None else bytes(row[0])


def decode_segment(
    block: bytes,
    kind: type[R],
    *,
    knows: Callable[[NDArray[np.int32]], bool] | None = None,
    max_rows: int = columns.MAX_ROWS,
) -> R | DamagedSegment:
    """All columns of a segment; damaged, too, when it does not pass `knows` of the catalog of series."""
    try:
        records = columns.decode_records(block, kind.record_class, max_rows=max_rows)
    except FormatError as fault:
        return DamagedSegment(fault.reason, str(fault))
    assert isinstance(records, kind)
    if knows is not None and records.has_series and not knows(records.series):
        return DamagedSegment("unknown_series", "it names a series that the spool does not know")
    return records


def decode_segment_columns(
    block: bytes, names: Sequence[str], record_class: RecordClass = RecordClass.READING
) -> list[NDArray[Any]] | DamagedSegment:
    """Some columns of a segment, for which the others are not decoded."""
    try:
        return columns.decode_columns(block, names, record_class)
    except FormatError as fault:
        return DamagedSegment(fault.reason, str(fault))


def read_window_length(connection: sqlite3.Connection, segment: StoredSegment) -> tuple[int | None, int]:
    """The window length of a segment of rollups (None when mixed or damaged), and the bytes of its block."""
    block = read_block(connection, segment.position) or b""
    found = decode_segment_columns(block, ("window_s",), RecordClass.ROLLUP)
    if isinstance(found, DamagedSegment) or not (found[0] == found[0][0]).all():
        return None, len(block)
    return int(found[0][0]), len(block)


def find_positions(connection: sqlite3.Connection, since_us: int, until_us: int) -> list[int]:
    """The segments of readings, indexed or fresh, that may hold a time in since_us <= time < until_us."""
    indexed = find_indexed(connection, RecordClass.READING, since_us, until_us - 1)
    positions = {position for position, _, _ in indexed} | {
        segment.position
        for segment in read_fresh_segments(connection)
        if segment.min_time_us < until_us and segment.max_time_us >= since_us
    }
    return sorted(positions)


def find_indexed(
    connection: sqlite3.Connection, record_class: RecordClass, first_us: int, last_us: int
) -> list[tuple[int, int, int]]:
    """Position, last commit and newest time of indexed segments that may hold a time in first_us..last_us."""
    span = (last_us, first_us, *position_span(record_class))
    return connection.execute(SQL["indexed_between_times"], span).fetchall()


def count_kept_rows(connection: sqlite3.Connection, record_class: RecordClass = RecordClass.READING) -> int:
    """Records of a class between its oldest segment and its newest, without counting them."""
    oldest = connection.execute(SQL["first_segment_from"], position_span(record_class)).fetchone()
    return 0 if oldest is None else read_commit_counter(connection, record_class).rows - int(oldest[1])


class SegmentWalk:
    """Iterate it once for segments; `block` and `overlaps` are about the newest one."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        record_class: RecordClass = RecordClass.READING,
        *,
        newest_first: bool = False,
    ) -> None:
        self._connection = connection
        self._path = path
        self._span = position_span(record_class)
        self._newest_first = newest_first
        self._class = record_class
        self._seen_first = self._seen_last = 0
        self._before: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[StoredSegment]:
        at_end = False
        while not at_end:
            wal_bytes = wal_size_bytes(self._path)
            self._before = (self._seen_first, self._seen_last) if self._seen_last else None
            self._connection.execute("BEGIN")
            try:
                at_end = yield from self._one_view(wal_bytes)
            finally:
                with suppress(sqlite3.ProgrammingError):  # closed before a walk that was broken off
                    self._connection.execute("COMMIT")

    def block(self, head: StoredSegment) -> bytes:
        """The block of the newest segment, of the same view."""
        block = read_block(self._connection, head.position)
        assert block is not None
        return block

    def overlaps(self, head: StoredSegment) -> bool:
        """Whether the newest segment covers commits of segments of an earlier view."""
        return self._before is not None and head.overlaps(*self._before)

    def _one_view(self, wal_bytes: int) -> Generator[StoredSegment, None, bool]:
        """Segments until there are none (True), or the log has grown too much (False)."""
        while heads := self._heads():
            for head in heads:
                yield head
                last_commit = max(head.first_commit, head.last_commit)
                self._seen_first = min(self._seen_first or head.first_commit, head.first_commit)
                self._seen_last = max(self._seen_last, last_commit)
                if wal_size_bytes(self._path) - wal_bytes > _LOG_GROWTH_BYTES:
                    return False
        return True

    def _heads(self) -> list[StoredSegment]:
        """The next segments: those that reach beyond what was seen."""
        lowest, highest = self._span
        if self._newest_first:
            if self._seen_last:
                highest = position_span(self._class, 0, self._seen_first - 1)[1]
            return self._read(lowest, highest, newest_first=True)
        if self._seen_last:
            lowest = position_span(self._class, self._seen_last + 1)[0]
            straddling = self._read(self._span[0], lowest - 1, 1, newest_first=True)
            if straddling and straddling[0].last_commit > self._seen_last:
                return straddling
        return self._read(lowest, highest)

    def _read(
        self, lowest: int, highest: int, limit: int = _AT_ONCE, *, newest_first: bool = False
    ) -> list[StoredSegment]:
        heads = read_segments(self._connection, (lowest, highest), limit, newest_first=newest_first)
        for head in heads:
            if not all(isinstance(member, int) for member in head):
                raise SpoolAccessError(f"{self._path}: the row of the segment at {head.position} is damaged")
        return heads


class CommitChunk(NamedTuple):
    """Consecutive commits: the readings of whole segments, by identity.

    `last_commit` is 0 and `written_at_us` None when there was no commit. `damaged_rows` were passed over.
    """

    readings: Readings
    last_commit: int
    damaged_rows: int
    written_at_us: int | None


class CommitLogReader:
    """Reads the readings of one spool in commit order, through a connection of its own."""

    def __init__(self, connection: sqlite3.Connection, catalog: SeriesCatalog) -> None:
        self.connection = connection
        self._catalog = catalog

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def read(self, after: int, max_rows: int) -> CommitChunk:
        """The segments after a commit, at least one, until there are `max_rows` readings."""
        parts: list[Readings] = []
        rows = damaged_rows = last_commit = 0
        written_at_us = None
        span = position_span(RecordClass.READING, after + 1)
        try:
            with closing(self.connection.execute(SQL["segments_with_blocks"], span)) as segments:
                for position, last, segment_rows, written, block in segments:
                    readings = decode_segment(block, Readings, knows=self._catalog.knows)
                    if isinstance(readings, DamagedSegment):
                        _log.warning(
                            "commit %d is damaged and not processed: %s",
                            first_commit_at(position),
                            readings.detail,
                        )
                        damaged_rows += segment_rows
                    else:
                        processed = (readings.flags & Flag.PROCESSED) != 0
                        own = readings.select(~processed) if processed.any() else readings
                        parts.append(own.with_series(self._catalog.identities(own.series)))
                    rows += segment_rows
                    last_commit, written_at_us = last, written
                    if rows >= max_rows:
                        break
        except sqlite3.Error as fault:
            raise SpoolAccessError(f"the commits after {after} cannot be read: {fault}") from fault
        everything = Readings.concat(parts) if parts else Readings.empty()
        return CommitChunk(everything, last_commit, damaged_rows, written_at_us)


def record_evicted_rollups(connection: sqlite3.Connection, newest_us: int) -> None:
    """Record that rollups of windows that begin up to then were evicted; inside a transaction."""
    known_us = int(read_meta(connection, _EVICTED_ROLLUPS_KEY, newest_us))
    write_meta(connection, _EVICTED_ROLLUPS_KEY, str(max(known_us, newest_us)))


class StoredRevisions(NamedTuple):
    """The newest stored revisions, in any order; windows before `evicted_before_us` may have been evicted."""

    found: Rollups
    evicted_before_us: int


class StoredRollups:
    """Reads the rollups of one spool through a connection of its own; for one thread at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._cache: OrderedDict[tuple[int, int], Rollups] = OrderedDict()

    def has_rollups(self) -> bool:
        """Whether a rollup was ever committed."""
        return read_commit_counter(self._connection, RecordClass.ROLLUP).commit > 0

    def newest_revisions(self, windows: Rollups) -> StoredRevisions:
        """The newest stored revision of the windows in `windows`, which are all of one length."""
        found = []
        with read_view(self._connection):
            evicted_before_us = self._evicted_before_us()
            times = np.unique(windows.time_us)
            for near in np.split(times, np.flatnonzero(np.diff(times) > _CLUSTER_GAP_US) + 1):
                span_us = int(near[0]), int(near[-1])
                for position, last_commit, _ in find_indexed(self._connection, RecordClass.ROLLUP, *span_us):
                    stored = self._decode(position, last_commit)
                    if stored is None:
                        evicted_before_us = ANY_TIME_US
                        continue
                    hits = _rows_of_windows(stored, windows)
                    if hits.any():
                        found.append(stored.select(hits))
        newest = keep_newest_revisions(Rollups.concat(found)) if found else Rollups.empty()
        return StoredRevisions(newest, evicted_before_us)

    def _evicted_before_us(self) -> int:
        """Windows that begin before this may have been pruned, or set aside as damaged."""
        aside_us = fetch_scalar(self._connection, "last_set_aside", _ROLLUP_SPAN)
        oldest = self._connection.execute(SQL["first_segment_from"], _ROLLUP_SPAN).fetchone()
        if oldest is None:
            return ANY_TIME_US if self.has_rollups() else -ANY_TIME_US
        gone_us = -ANY_TIME_US if aside_us is None else int(aside_us)
        position, _, written_at_us, _ = oldest
        if first_commit_at(position) > 1:
            gone_us = max(gone_us, written_at_us)
        evicted_us = int(read_meta(self._connection, _EVICTED_ROLLUPS_KEY, -ANY_TIME_US))
        return max(gone_us, evicted_us + 1) + _AHEAD_US

    def _decode(self, position: int, last_commit: int) -> Rollups | None:
        """A segment of rollups, perhaps cached; None when it is damaged."""
        key = (position, last_commit)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        rollups = decode_segment(read_block(self._connection, position) or b"", Rollups)
        if isinstance(rollups, DamagedSegment):
            return None
        self._cache[key] = rollups
        while sum(kept.rows for kept in self._cache.values()) > _CACHED_ROWS and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return rollups


def keep_newest_revisions(rollups: Rollups) -> Rollups:
    """The newest revision of each series, window length and start, in canonical order."""
    ordered = rollups.in_order()
    follows = np.ones(max(0, ordered.rows - 1), np.bool_)
    for name in ("series", "window_s", "time_us"):
        column = getattr(ordered, name)
        follows &= column[1:] == column[:-1]
    return ordered.select(np.append(~follows, [True])) if ordered.rows else ordered


def _rows_of_windows(stored: Rollups, windows: Rollups) -> NDArray[np.bool_]:
    """Which stored rows are of a window in `windows`."""
    hits: NDArray[np.bool_] = stored.window_s == windows.window_s[0]
    hits &= np.isin(stored.time_us, windows.time_us) & np.isin(stored.series, windows.series)
    named = set(zip(windows.series.tolist(), windows.time_us.tolist(), strict=True))
    keys = zip(stored.series[hits].tolist(), stored.time_us[hits].tolist(), strict=True)
    hits[hits] = [key in named for key in keys]
    return hits
