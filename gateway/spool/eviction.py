"""Eviction of undelivered records when the spool exceeds its limits, and the ledger of losses (promise 5).

Delivered readings go first, by `gateway.spool.retention`. Then, and for readings older than `max_age`:

1. the oldest undelivered readings, once processing has read them: their rollups are kept;
2. the oldest rollups of the shortest windows, then of the next longer ones, never of the longest.

Open batches, alerts and declarations are never evicted. While the link is down the oldest readings are an
open batch, which is sent again and again: what comes after it goes then.

The records, their declaration, their entry in the loss ledger and the destinations' progress change in one
transaction. Segments damaged before a destination had them are declared the same way.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.model.records import Declarations, RecordClass
from gateway.spool import delivery_ranges
from gateway.spool.database import SQL, crash_point, read_meta, write_meta
from gateway.spool.delivery_ranges import CommitRange, DeliveryQueue
from gateway.spool.processing_state import NO_LIMIT, read_processed_through
from gateway.spool.segment_reader import read_window_length, record_evicted_rollups
from gateway.spool.segments import (
    StoredSegment,
    encode_segments,
    position_span,
    read_segments,
    record_class_at,
    save_pruned_mark,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Mapping, Sequence

    from gateway.spool.appender import Capacity
    from gateway.spool.database import Database
    from gateway.spool.segments import AppendResult, CommitNote, SegmentWriter


class Loss(NamedTuple):
    """Commits that a destination ("" for a gateway without any) will not get."""

    destination: str
    record_class: RecordClass
    commits: CommitRange
    rows: int
    from_us: int
    to_us: int


class LossTotal(NamedTuple):
    """Everything one destination lost of one class for one reason, and the coarser form that survives."""

    destination: str
    record_class: RecordClass
    reason: str
    survives: str
    rows: int
    from_us: int
    to_us: int
    declared_at_us: int


def find_losses(
    connection: sqlite3.Connection,
    destinations: Sequence[str],
    record_class: RecordClass,
    run: Sequence[StoredSegment],
) -> list[Loss]:
    """What each destination would lose if a run of contiguous segments were deleted now."""
    found = []
    first, last = run[0].first_commit, run[-1].last_commit
    for destination in destinations or ("",):
        delivered = delivery_ranges.read_delivered(connection, DeliveryQueue(destination, record_class))
        for gap in delivery_ranges.find_gaps(delivered, first, last):
            inside = [s for s in run if gap.first <= s.first_commit and s.last_commit <= gap.last]
            if inside:
                found.append(
                    Loss(
                        destination,
                        record_class,
                        CommitRange(inside[0].first_commit, inside[-1].last_commit),
                        sum(s.rows for s in inside),
                        min(s.min_time_us for s in inside),
                        max(s.max_time_us for s in inside),
                    )
                )
    return found


def record_losses(
    connection: sqlite3.Connection, losses: Sequence[Loss], reason: str, survives: str, now_us: int
) -> None:
    """Enter losses, and count their commits as delivered; inside a transaction."""
    for loss in losses:
        first, last = loss.commits
        key = (loss.destination, loss.record_class)
        grown = connection.execute(
            SQL["grow_loss"],
            (last, loss.rows, loss.from_us, loss.to_us, now_us, *key, first - 1, reason, survives),
        )
        if not grown.rowcount:
            connection.execute(
                SQL["add_loss"],
                (*key, first, last, loss.rows, loss.from_us, loss.to_us, reason, survives, now_us),
            )
        if loss.destination:
            delivery_ranges.add_delivered(connection, DeliveryQueue(*key), loss.commits)


def build_declarations(losses: Sequence[Loss], reason: str, survives: str, now_us: int) -> Declarations:
    """Declarations of losses, in canonical order."""
    count = len(losses)
    return Declarations(
        time_us=np.full(count, now_us, np.int64),
        of_class=np.array([loss.record_class for loss in losses], np.int32),
        first_commit=np.array([loss.commits.first for loss in losses], np.int64),
        last_commit=np.array([loss.commits.last for loss in losses], np.int64),
        lost=np.array([loss.rows for loss in losses], np.int64),
        from_us=np.array([loss.from_us for loss in losses], np.int64),
        to_us=np.array([loss.to_us for loss in losses], np.int64),
        destination=np.array([loss.destination for loss in losses], np.object_),
        reason=np.full(count, reason, np.object_),
        survives=np.full(count, survives, np.object_),
    ).in_order()


def read_loss_totals(connection: sqlite3.Connection) -> list[LossTotal]:
    """All losses, by destination, class and reason."""
    return [
        LossTotal(destination, RecordClass(number), *rest)
        for destination, number, *rest in connection.execute(SQL["loss_totals"])
    ]


_log = logging.getLogger(__name__)
_MAX_SEGMENTS = 256
_MAX_ROLLUP_SEGMENTS = 2000
_FREE_PAGES = 2048
_IN_USE_WHEN_SHORT_KEY = "held_when_short"
"""In `meta`: the most bytes in use since the disk's free space fell below its floor; 0 once it is ample."""


class _SegmentsChangedError(Exception):
    """The segments or the progress have changed since they were read."""


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """What is kept: by class the destinations that get it, and how long it stays after delivery.

    With `configured`, all configured destinations, readings also wait for others that the spool still knows.
    `evicts` allows eviction of undelivered records. `windows_s` are lengths of rollups, shortest first.
    Readings older than `max_age_s` are evicted, delivered or not.
    """

    receivers: Mapping[RecordClass, Sequence[str]]
    keep_s: Mapping[RecordClass, float] = field(default_factory=dict)
    configured: Collection[str] | None = None
    evicts: bool = False
    windows_s: Sequence[int] = ()
    max_age_s: float | None = None

    def list_receivers(self, connection: sqlite3.Connection, record_class: RecordClass) -> list[str]:
        """The destinations that get a class, unconfigured ones included where they count."""
        names = list(self.receivers.get(record_class, ()))
        if record_class is RecordClass.READING and self.configured is not None:
            stored = (name for name, *_ in connection.execute(SQL["destinations"]))
            names += [name for name in stored if name not in self.configured]
        return names


class Evictor:
    """Evicts what one spool has no room for. `evict_once` is the step; retention's loop calls it."""

    def __init__(
        self, database: Database, segments: SegmentWriter, capacity: Capacity, policy: RetentionPolicy
    ) -> None:
        self._database = database
        self._segments = segments
        self._capacity = capacity
        self._policy = policy
        self._rollups_searched_to = dict.fromkeys(policy.windows_s, 0)

    async def evict_once(self, now_us: int) -> int:
        """Make a step towards the limits; returns how many records were deleted."""
        await self._declare_damage(now_us)
        excess = await self._excess()
        max_age_s = self._policy.max_age_s
        oldest_us = None if max_age_s is None else now_us - round(max_age_s * 1e6)
        evicted = await self._evict_readings(excess, oldest_us, now_us)
        if not evicted and excess > 0:
            evicted = await self._evict_rollups(excess, now_us)
        if evicted:
            await self._database.reclaim(_FREE_PAGES)
        return evicted

    async def _excess(self) -> int:
        """Bytes to evict: for the floor of free space at most half of what was in use when space ran short.

        That something else fills the disk is no reason to empty the spool.
        """
        if not self._policy.evicts:
            self._capacity.floor_out_of_reach = False
            return 0
        space = await self._capacity.measure(self._database)
        in_use = space.used - space.wal
        most_in_use = int(await self._database.read(lambda c: read_meta(c, _IN_USE_WHEN_SHORT_KEY)))
        if not space.under_floor:
            self._capacity.floor_out_of_reach = False
            if most_in_use and space.available >= 2 * space.min_free_bytes:
                await self._database.write(lambda c: write_meta(c, _IN_USE_WHEN_SHORT_KEY, 0))
            return space.over_cap
        if in_use > most_in_use:
            most_in_use = in_use
            await self._database.write(lambda c: write_meta(c, _IN_USE_WHEN_SHORT_KEY, most_in_use))
        allowed = max(0, in_use - most_in_use // 2)
        if allowed == 0 and not self._capacity.floor_out_of_reach:
            _log.error("something else fills the disk; nothing more is evicted for spool.min_free_bytes")
        self._capacity.floor_out_of_reach = allowed == 0
        return max(space.over_cap, min(space.under_floor, allowed))

    async def _evict_readings(self, excess: int, oldest_us: int | None, now_us: int) -> int:
        def look(connection: sqlite3.Connection) -> list[StoredSegment]:
            through = read_processed_through(connection)
            open_ = delivery_ranges.read_open_everywhere(connection, RecordClass.READING)
            chosen: list[StoredSegment] = []
            left = excess
            span = (*position_span(RecordClass.READING), -1)
            for *row, block_bytes in connection.execute(SQL["segments_with_sizes"], span):
                segment = StoredSegment(*row)
                too_old = oldest_us is not None and segment.written_at_us < oldest_us
                if (
                    segment.last_commit > through
                    or (left <= 0 and not too_old)
                    or len(chosen) == _MAX_SEGMENTS
                ):
                    break
                if chosen and segment.first_commit != chosen[-1].last_commit + 1:
                    break
                if not delivery_ranges.is_covered(segment, open_):
                    chosen.append(segment)
                    left -= block_bytes
                elif chosen:
                    break
            return chosen

        run = await self._database.read(look)
        if not run:
            return 0
        reason = "no_room" if excess > 0 else "max_age"
        rolled = await self._database.read(read_processed_through) < NO_LIMIT
        survives = f"rollup {self._policy.windows_s[0]} s" if self._policy.windows_s and rolled else ""
        return await self._evict(run, RecordClass.READING, reason, survives, now_us)

    async def _evict_rollups(self, excess: int, now_us: int) -> int:
        """Evict rollups of the shortest window that is left."""
        for window_s, longer_s in zip(self._policy.windows_s, self._policy.windows_s[1:], strict=False):
            run = await self._find_oldest_rollups(window_s, excess)
            if run:
                survives = f"rollup {longer_s} s"
                return await self._evict(run, RecordClass.ROLLUP, "no_room", survives, now_us)
        return 0

    async def _find_oldest_rollups(self, window_s: int, excess: int) -> list[StoredSegment]:
        """The oldest contiguous segments that hold windows of this length only."""
        run: list[StoredSegment] = []
        left = excess
        while left > 0:
            span = position_span(RecordClass.ROLLUP, self._rollups_searched_to[window_s])
            segments = await self._database.read(
                partial(read_segments, span=span, limit=_MAX_ROLLUP_SEGMENTS)
            )
            open_ = await self._database.read(
                lambda c: delivery_ranges.read_open_everywhere(c, RecordClass.ROLLUP)
            )
            for segment in segments:
                length_s, size = await self._database.read(partial(read_window_length, segment=segment))
                fits = length_s == window_s and not delivery_ranges.is_covered(segment, open_)
                if run and (not fits or segment.first_commit != run[-1].last_commit + 1 or left <= 0):
                    return run
                if fits:
                    run.append(segment)
                    left -= size
                self._rollups_searched_to[window_s] = segment.last_commit + 1
            if len(segments) < _MAX_ROLLUP_SEGMENTS:
                break
        if not run:
            self._rollups_searched_to[window_s] = 0  # from the beginning, the next time
        return run

    async def _evict(
        self, run: Sequence[StoredSegment], record_class: RecordClass, reason: str, survives: str, now_us: int
    ) -> int:
        """Delete a run of contiguous segments and declare the losses; 0 when the run has changed."""
        destinations = await self._database.read(lambda c: self._policy.list_receivers(c, record_class))
        lost = await self._database.read(lambda c: find_losses(c, destinations, record_class, run))

        def note(connection: sqlite3.Connection, _: AppendResult) -> None:
            span = (run[0].position, run[-1].position)
            open_ = delivery_ranges.read_open_everywhere(connection, record_class)
            stored = read_segments(connection, span, len(run) + 1)
            if stored != list(run) or any(delivery_ranges.is_covered(segment, open_) for segment in run):
                raise _SegmentsChangedError
            if find_losses(connection, destinations, record_class, run) != lost:
                raise _SegmentsChangedError
            record_losses(connection, lost, reason, survives, now_us)
            save_pruned_mark(connection, run[-1].position)
            connection.execute(SQL["delete_segments"], span)
            if record_class is RecordClass.ROLLUP:
                record_evicted_rollups(connection, max(s.max_time_us for s in run))
            crash_point("in_eviction")

        if not await self._declare(lost, reason, survives, now_us, note):
            return 0
        rows = sum(segment.rows for segment in run)
        if lost:
            _log.warning(
                "evicted %d %ss of commits %d..%d (%s); %s",
                rows,
                record_class.name.lower(),
                run[0].first_commit,
                run[-1].last_commit,
                reason,
                f"what is left of them: {survives}" if survives else "nothing is left of them",
            )
        return rows

    async def _declare_damage(self, now_us: int) -> None:
        """Declare segments that were set aside before some destination had them."""

        def look(connection: sqlite3.Connection) -> list[tuple[int, list[Loss]]]:
            found = []
            for position, last, rows, from_us, to_us, lacking in connection.execute(SQL["damage_to_declare"]):
                record_class = record_class_at(position)
                segment = StoredSegment(position, last, rows, 0, from_us, to_us, 0)
                commits = CommitRange(segment.first_commit, last)
                receivers = self._policy.receivers.get(record_class, ())
                lost = [
                    Loss(name, record_class, commits, rows, from_us, to_us)
                    for name in json.loads(lacking)
                    if name in receivers
                ]
                found.append((position, lost))
            return found

        def note(
            position: int, lost: Sequence[Loss], connection: sqlite3.Connection, _: AppendResult
        ) -> None:
            record_losses(connection, lost, "damaged", "", now_us)
            connection.execute(SQL["damage_declared"], (position,))

        for position, lost in await self._database.read(look):
            await self._declare(lost, "damaged", "", now_us, partial(note, position, lost))

    async def _declare(
        self, lost: Sequence[Loss], reason: str, survives: str, now_us: int, note: CommitNote
    ) -> bool:
        """Append the declarations with what `note` writes; False when the segments have changed."""
        named = [loss for loss in lost if loss.destination]
        declarations = build_declarations(named, reason, survives, now_us)
        try:
            await self._segments.append(encode_segments(declarations), now_us=now_us, notes=[note])
        except _SegmentsChangedError:
            return False
        return True
