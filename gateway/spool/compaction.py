"""Compaction: merges small segments into large ones, in the background, paced, or to the end for a tool.

Two passes. The first goes over the fresh segments in commit order, once: those between two boundaries
become one, and all become known to the index of times. The second merges what the first left small, and
rollups, which are in the index from the beginning.

A boundary is where some destination's progress or an open batch begins or ends; no merged segment crosses
one, and segments of an open batch are left as they are (promise 3). Commit numbers and rows stay what they
were: a merged segment covers the contiguous commits of its parts (promise 2).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.watchdog import StageProgress
from gateway.spool.database import SQL, crash_point, fetch_scalar
from gateway.spool.delivery_ranges import CommitRange, is_covered, read_open_everywhere
from gateway.spool.processing_state import NO_LIMIT, read_processed_through
from gateway.spool.retention import STEP_WITHIN_S, read_delivered_to_all, run_maintenance
from gateway.spool.segment_reader import DamagedSegment, decode_segment, read_block, read_window_length
from gateway.spool.segments import (
    MAX_SEGMENT_ROWS,
    StoredSegment,
    position_span,
    read_fresh_segments,
    read_segments,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cloud_sync.model.records import Records
    from gateway.spool.database import Database
    from gateway.spool.duplicates import DuplicateFilter
    from gateway.spool.series_catalog import SeriesCatalog

_log = logging.getLogger(__name__)
_FRESH_SEGMENTS = 512
_FRESH_ROWS = 2 * MAX_SEGMENT_ROWS
_SMALL_ROWS = MAX_SEGMENT_ROWS // 2
_LOOK_BACK = 256
_FREE_PAGES = 256  # as many as are given back in about two milliseconds


@dataclass(frozen=True, slots=True)
class MergeBounds:
    """What no merged segment may cross (`cuts`, `through`) or touch (`open`).

    A cut is a commit where a destination's progress or an open batch begins or ends; processing has read the
    commits up to `through`.
    """

    cuts: frozenset[int]
    open: tuple[CommitRange, ...]
    through: int = NO_LIMIT

    @classmethod
    def read(
        cls, connection: sqlite3.Connection, record_class: RecordClass = RecordClass.READING
    ) -> MergeBounds:
        """The present bounds of a class."""
        open_ = tuple(read_open_everywhere(connection, record_class))
        delivered = [
            CommitRange(*r) for r in connection.execute(SQL["delivered_everywhere"], (record_class,))
        ]
        edges = {edge for r in (*open_, *delivered) for edge in (r.first, r.last + 1)}
        through = read_processed_through(connection) if record_class is RecordClass.READING else NO_LIMIT
        return cls(frozenset(edges), open_, through)

    def allow(self, run: Sequence[StoredSegment]) -> bool:
        """Whether these contiguous segments may become one."""
        first, last = run[0].first_commit, run[-1].last_commit
        if last > self.through:
            return False
        return not any(first < cut <= last for cut in self.cuts) and not any(
            is_covered(segment, self.open) for segment in run
        )


def group_mergeable_runs(segments: Sequence[StoredSegment], bounds: MergeBounds) -> list[list[StoredSegment]]:
    """Contiguous segments grouped into runs that may each become one segment. Pure."""
    runs: list[list[StoredSegment]] = []
    rows = 0
    for segment in segments:
        joins = (
            bool(runs)
            and rows + segment.rows <= MAX_SEGMENT_ROWS
            and runs[-1][-1].last_commit + 1 == segment.first_commit
            and bounds.allow([*runs[-1][:1], *runs[-1][-1:], segment])
        )
        if joins:
            runs[-1].append(segment)
            rows += segment.rows
        else:
            runs.append([segment])
            rows = segment.rows
    return runs


class Compaction:
    """Merges the segments of one spool. `compact_once` is the step, `run` the loop."""

    def __init__(self, database: Database, catalog: SeriesCatalog, duplicates: DuplicateFilter) -> None:
        self.rollup_receivers: Sequence[str] = ()
        self._rollups_from = 0
        self._database = database
        self._catalog = catalog
        self._duplicates = duplicates
        self._turn = asyncio.Lock()
        self.stage = StageProgress("compaction")

    async def run(self, stop: asyncio.Event) -> None:
        """Compact until `stop` is set."""
        await run_maintenance(self.stage, self.compact_once, stop, busy_pause_s=0.05, idle_pause_s=1.0)

    async def compact_once(self, *, everything: bool = False) -> int:
        """One pass, once enough has gathered or with `everything`; returns how many segments went."""
        async with self._turn:
            gone = await self._index_fresh(everything=everything)
            gone += await self._merge_small(everything=everything)
            gone += await self._merge_rollups(everything=everything)
            await self._reclaim_pages(everything=everything)
        return gone

    async def _reclaim_pages(self, *, everything: bool) -> None:
        spare = -1
        while True:
            before, (_, spare) = spare, await self._database.used_and_spare_bytes()
            if spare in (0, before):
                return
            self.stage.begin_step(within_s=STEP_WITHIN_S)
            await self._database.reclaim(_FREE_PAGES)
            if not everything:
                return

    async def _index_fresh(self, *, everything: bool) -> int:
        segments, bounds = await self._database.read(
            lambda c: (read_fresh_segments(c, 4 * _FRESH_SEGMENTS), MergeBounds.read(c))
        )
        segments = [s for s in segments if s.last_commit <= bounds.through]
        enough = len(segments) >= _FRESH_SEGMENTS or sum(s.rows for s in segments) >= _FRESH_ROWS
        if not segments or not (enough or everything):
            return 0
        gone = 0
        for run in group_mergeable_runs(segments, bounds):
            if not await self._replace(run):
                break
            gone += len(run) - 1
        return gone

    async def _merge_small(self, *, everything: bool) -> int:
        def look(connection: sqlite3.Connection) -> tuple[list[StoredSegment], MergeBounds]:
            low, high = position_span(RecordClass.READING)
            newest = fetch_scalar(connection, "newest_indexed", (low, high))
            if newest is None:
                return [], MergeBounds.read(connection)
            back = read_segments(connection, (low, newest), _LOOK_BACK, newest_first=True)
            small = list(takewhile(lambda segment: segment.rows <= _SMALL_ROWS, back))
            return small[::-1], MergeBounds.read(connection)

        small, bounds = await self._database.read(look)
        if sum(s.rows for s in small) < MAX_SEGMENT_ROWS and len(small) < _LOOK_BACK and not everything:
            return 0
        return await self._replace_all(group_mergeable_runs(small, bounds))

    async def _merge_rollups(self, *, everything: bool) -> int:
        """Merge new rollups: undelivered ones by window length, which eviction goes by."""
        start = 0 if everything else self._rollups_from

        def look(connection: sqlite3.Connection) -> list[list[StoredSegment]]:
            span = position_span(RecordClass.ROLLUP, start)
            limit = -1 if everything else 2 * _LOOK_BACK
            segments = read_segments(connection, span, limit)
            if len(segments) < _LOOK_BACK and not everything:
                return []
            through = read_delivered_to_all(connection, self.rollup_receivers, RecordClass.ROLLUP) or 0
            runs = group_mergeable_runs(segments, MergeBounds.read(connection, RecordClass.ROLLUP))
            return [
                list(alike)
                for run in runs
                for _, alike in groupby(run, key=lambda s: _merge_kind(connection, s, through))
            ]

        runs = await self._database.read(look)
        if not runs:
            return 0
        gone = await self._replace_all(runs)
        last = runs[-1]
        is_small = sum(segment.rows for segment in last) < _SMALL_ROWS
        self._rollups_from = last[0].first_commit if is_small else last[-1].last_commit + 1
        return gone

    async def _replace_all(self, runs: list[list[StoredSegment]]) -> int:
        gone = 0
        for run in runs:
            if len(run) > 1 and await self._replace(run):
                gone += len(run) - 1
        return gone

    async def _replace(self, run: list[StoredSegment]) -> bool:
        """Replace a run by one segment; False when the bounds have moved and nothing was done."""
        self.stage.begin_step(within_s=STEP_WITHIN_S)
        blocks = await self._database.read(
            lambda c: [block for s in run if (block := read_block(c, s.position)) is not None]
        )
        if len(blocks) < len(run):
            return False  # some were pruned meanwhile
        record_class = run[0].record_class
        merged = await asyncio.get_running_loop().run_in_executor(
            None, _merge_blocks, blocks, record_class, self._catalog
        )
        if isinstance(merged, DamagedSegment):
            _log.warning(
                "commits %d..%d are not merged: %s", run[0].first_commit, run[-1].last_commit, merged.detail
            )
            await self._database.write(lambda c: c.executemany(SQL["mark_indexed"], _position_rows(run)))
            self._duplicates.indexed(s.position for s in run)
            return True
        block, records = merged
        marks = []
        if record_class is RecordClass.READING:
            marks = _newest_by_series(self._catalog.identities(records.series), records.time_us)

        def work(connection: sqlite3.Connection) -> bool:
            if read_segments(connection, (run[0].position, run[-1].position), len(run) + 1) != run:
                return False
            if len(run) > 1 and not MergeBounds.read(connection, record_class).allow(run):
                return False
            connection.executemany(SQL["raise_mark"], marks)
            if len(run) == 1:
                connection.executemany(SQL["mark_indexed"], _position_rows(run))
                return True
            connection.executemany(SQL["delete_segment"], _position_rows(run))
            crash_point("in_compaction")
            connection.execute(SQL["append_segment"], (*_merged_segment(run), 1, block))
            return True

        if not await self._database.write(work):
            return False
        self._duplicates.indexed(s.position for s in run)
        return True


def _merge_kind(connection: sqlite3.Connection, segment: StoredSegment, delivered: int) -> int:
    """Which rollups may be merged with each other: 0 for delivered ones, else their length."""
    if segment.last_commit <= delivered:
        return 0
    length_s, _ = read_window_length(connection, segment)
    return -segment.first_commit if length_s is None else length_s


def _merge_blocks(
    blocks: list[bytes], record_class: RecordClass, catalog: SeriesCatalog
) -> tuple[bytes, Records] | DamagedSegment:
    parts = []
    for block in blocks:
        part = decode_segment(block, columns.RECORD_TYPES[record_class], knows=catalog.knows)
        if isinstance(part, DamagedSegment):
            return part
        parts.append(part)
    records = parts[0].concat(parts).in_order()
    if len(blocks) == 1:
        return blocks[0], records
    return columns.encode(records, level=columns.FINAL_LEVEL), records


def _position_rows(run: list[StoredSegment]) -> list[tuple[int]]:
    return [(segment.position,) for segment in run]


def _merged_segment(run: list[StoredSegment]) -> StoredSegment:
    return run[0]._replace(
        last_commit=run[-1].last_commit,
        rows=sum(s.rows for s in run),
        min_time_us=min(s.min_time_us for s in run),
        max_time_us=max(s.max_time_us for s in run),
    )


def _newest_by_series(identity: NDArray[np.int32], time_us: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(series_no, newest time in us) of each series."""
    series, index = np.unique(identity, return_inverse=True)
    newest = np.full(len(series), np.iinfo(np.int64).min)
    np.maximum.at(newest, index, time_us)
    return list(zip(series.tolist(), newest.tolist(), strict=True))
