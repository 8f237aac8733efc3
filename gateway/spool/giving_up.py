"""What the spool gives up when it must, and declares: the last of its means to stay within its limits.

Delivered readings go first, by `gateway.spool.retention`. Then, and for readings older than `max_age`:

1. the oldest readings that nobody has, once processing has been over them: their rollups are kept;
2. the oldest rollups of the shortest windows, then of the next longer ones, never of the longest.

An open batch is never touched, nor alerts and declarations. While the link is down the oldest readings are an
open batch, which is sent again and again: what comes after it goes then.

What goes, its declaration, its entry in the loss ledger and the destinations' progress move in one
transaction (promise 5). Segments that were damaged before a destination had them are declared the same way.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import RecordClass
from gateway.spool import claims, losses
from gateway.spool.crashpoints import point
from gateway.spool.database import SQL, value_of
from gateway.spool.losses import Loss
from gateway.spool.processed import NO_LIMIT, processed_through
from gateway.spool.ranges import Range
from gateway.spool.segments import CLASS_SHIFT, Stored, keep_high_mark, seal, span_of
from gateway.spool.stored_rollups import note_gone

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Collection, Mapping, Sequence

    from gateway.spool.capacity import Capacity
    from gateway.spool.database import Database
    from gateway.spool.segments import Segments

_log = logging.getLogger(__name__)
_AT_ONCE = 256
_THIN_AT_ONCE = 2000
_FREE_PAGES = 2048
_HELD = "held_when_short"  # in meta: bytes in use, at most, since the disk's free space fell below its floor


class _Moved(Exception):  # noqa: N818 - no fault: somebody was faster
    """What was looked at is not what is there any more."""


class GivingUp:
    """Gives up what one spool has no room for. `give_up_once` is the step; retention's loop calls it.

    Args:
        database: the open spool.
        segments: its writing side.
        capacity: its limits.
        wanted_by: names of the destinations that are to get each class.
        windows_s: lengths of the rollups' windows, seconds, the shortest first; none without rollups.
        configured: names of all destinations of the configuration. Readings are declared to those of the
            spool that are not among them, too; None: to no other.
        max_age_s: readings older than that are given up, delivered or not; None for no limit.
    """

    def __init__(
        self,
        database: Database,
        segments: Segments,
        *,
        capacity: Capacity,
        wanted_by: Mapping[RecordClass, Sequence[str]],
        configured: Collection[str] | None = None,
        windows_s: Sequence[int] = (),
        max_age_s: float | None = None,
    ) -> None:
        self._database = database
        self._segments = segments
        self._capacity = capacity
        self._wanted_by = wanted_by
        self._configured = configured
        self._windows_s = tuple(windows_s)
        self._max_age_s = max_age_s
        self._thin_from = dict.fromkeys(self._windows_s, 0)

    async def give_up_once(self, now_us: int) -> int:
        """Make a step towards the limits; returns how many records left the spool, 0 when nothing has to."""
        await self._declare_damage(now_us)
        excess = await self._excess()
        oldest_us = None if self._max_age_s is None else now_us - round(self._max_age_s * 1e6)
        gone = await self._give_up_readings(excess, oldest_us, now_us)
        if not gone and excess > 0:
            gone = await self._thin(excess, now_us)
        if gone:
            await self._database.reclaim(_FREE_PAGES)
        return gone

    async def _excess(self) -> int:
        """Bytes that are to go.

        For the floor's sake never more than half of what the spool held when room became short: that
        something else fills the disk is no reason to empty the spool.
        """
        shortage = await self._capacity.shortage(self._database)
        held: int = await self._database.read(
            lambda c: value_of(c.execute(SQL["meta"], (_HELD,)).fetchone(), 0)
        )
        if not shortage.under_floor:
            self._capacity.floor_out_of_reach = False
            if held and shortage.ample:
                await self._database.write(lambda c: c.execute(SQL["set_meta"], (_HELD, 0)))
            return shortage.over_cap
        if shortage.used > held:
            held = shortage.used
            await self._database.write(lambda c: c.execute(SQL["set_meta"], (_HELD, held)))
        allowed = max(0, shortage.used - held // 2)
        if allowed == 0 and not self._capacity.floor_out_of_reach:
            _log.error("something else fills the disk; nothing more is given up for spool.min_free_bytes")
        self._capacity.floor_out_of_reach = allowed == 0
        return max(shortage.over_cap, min(shortage.under_floor, allowed))

    async def _give_up_readings(self, excess: int, oldest_us: int | None, now_us: int) -> int:
        def look(connection: sqlite3.Connection) -> list[Stored]:
            through = processed_through(connection)
            open_ = _open(connection, RecordClass.READING)
            chosen: list[Stored] = []
            left = excess
            span = (*span_of(RecordClass.READING), -1)
            for *row, block_bytes in connection.execute(SQL["segments_with_sizes"], span):
                segment = Stored(*row)
                too_old = oldest_us is not None and segment.written_at_us < oldest_us
                if segment.last_commit > through or (left <= 0 and not too_old) or len(chosen) == _AT_ONCE:
                    break
                if chosen and segment.first_commit != chosen[-1].last_commit + 1:
                    break
                if not _touches(segment, open_):
                    chosen.append(segment)
                    left -= block_bytes
                elif chosen:
                    break
            return chosen

        run = await self._database.read(look)
        if not run:
            return 0
        reason = "no_room" if excess > 0 else "max_age"
        rolled = await self._database.read(processed_through) < NO_LIMIT
        survives = f"rollup {self._windows_s[0]} s" if self._windows_s and rolled else ""
        return await self._take_away(run, RecordClass.READING, reason, survives, now_us)

    async def _thin(self, excess: int, now_us: int) -> int:
        """Give up rollups of the shortest window that is left."""
        for window_s, longer_s in zip(self._windows_s, self._windows_s[1:], strict=False):
            run = await self._oldest_of(window_s, excess)
            if run:
                survives = f"rollup {longer_s} s"
                return await self._take_away(run, RecordClass.ROLLUP, "no_room", survives, now_us)
        return 0

    async def _oldest_of(self, window_s: int, excess: int) -> list[Stored]:
        """Contiguous segments of nothing but windows of one length, the oldest not looked at yet."""
        run: list[Stored] = []
        left = excess
        while left > 0:
            span = (*span_of(RecordClass.ROLLUP, self._thin_from[window_s]), _THIN_AT_ONCE)
            segments = await self._database.read(partial(_segments, span=span))
            open_ = await self._database.read(lambda c: _open(c, RecordClass.ROLLUP))
            for segment in segments:
                size = await self._database.read(partial(_size_if_of, segment=segment, window_s=window_s))
                fits = size > 0 and not _touches(segment, open_)
                if run and (not fits or segment.first_commit != run[-1].last_commit + 1 or left <= 0):
                    return run
                if fits:
                    run.append(segment)
                    left -= size
                self._thin_from[window_s] = segment.last_commit + 1
            if len(segments) < _THIN_AT_ONCE:
                break
        if not run:
            self._thin_from[window_s] = 0  # from the beginning, the next time
        return run

    async def _take_away(
        self, run: Sequence[Stored], record_class: RecordClass, reason: str, survives: str, now_us: int
    ) -> int:
        """Delete a run of contiguous segments and declare it; 0 when it is not there any more as it was."""
        destinations = list(self._wanted_by.get(record_class, ()))
        if record_class is RecordClass.READING and self._configured is not None:
            configured = self._configured
            destinations += await self._database.read(lambda c: claims.orphans(c, configured))
        lost = await self._database.read(lambda c: losses.losses_by(c, destinations, record_class, run))

        def work(connection: sqlite3.Connection) -> None:
            span = (run[0].position, run[-1].position, len(run) + 1)
            there = [Stored(*row) for row in connection.execute(SQL["segments_between"], span)]
            if there != list(run) or any(_touches(s, _open(connection, record_class)) for s in run):
                raise _Moved
            if losses.losses_by(connection, destinations, record_class, run) != lost:
                raise _Moved
            losses.note(connection, lost, reason, survives, now_us)
            keep_high_mark(connection, run[-1].position)
            connection.execute(SQL["delete_segments"], span[:2])
            if record_class is RecordClass.ROLLUP:
                note_gone(connection, max(s.max_time_us for s in run))
            point("in_giving_up")

        if not await self._declare(lost, reason, survives, now_us, work):
            return 0
        rows = sum(segment.rows for segment in run)
        if lost:
            _log.warning(
                "%d %ss of commits %d..%d are given up (%s); %s",
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
                record_class = RecordClass(position >> CLASS_SHIFT)
                segment = Stored(position, last, rows, 0, from_us, to_us, 0)
                commits = Range(segment.first_commit, last)
                wanted = self._wanted_by.get(record_class, ())
                lost = [
                    Loss(name, record_class, commits, rows, from_us, to_us)
                    for name in json.loads(lacking)
                    if name in wanted
                ]
                found.append((position, lost))
            return found

        for position, lost in await self._database.read(look):

            def work(
                connection: sqlite3.Connection, position: int = position, lost: list[Loss] = lost
            ) -> None:
                losses.note(connection, lost, "damaged", "", now_us)
                connection.execute(SQL["damage_declared"], (position,))

            await self._declare(lost, "damaged", "", now_us, work)

    async def _declare(
        self,
        lost: Sequence[Loss],
        reason: str,
        survives: str,
        now_us: int,
        work: Callable[[sqlite3.Connection], None],
    ) -> bool:
        told = losses.declared([loss for loss in lost if loss.destination], reason, survives, now_us)
        try:
            await self._segments.append(seal(told), now_us=now_us, notes=[work])
        except _Moved:
            return False
        return True


def _segments(connection: sqlite3.Connection, span: tuple[int, int, int]) -> list[Stored]:
    return [Stored(*row) for row in connection.execute(SQL["segments_between"], span)]


def _open(connection: sqlite3.Connection, record_class: RecordClass) -> list[Range]:
    return [Range(*row) for row in connection.execute(SQL["open_everywhere"], (record_class,))]


def _touches(segment: Stored, open_: Sequence[Range]) -> bool:
    return any(r.first <= segment.last_commit and segment.first_commit <= r.last for r in open_)


def _size_if_of(connection: sqlite3.Connection, segment: Stored, window_s: int) -> int:
    """Bytes of a segment of rollups that holds windows of that length only; 0 of another, or of none."""
    block = value_of(connection.execute(SQL["block_at"], (segment.position,)).fetchone(), b"")
    try:
        (lengths,) = columns.decode_columns(block, ("window_s",), RecordClass.ROLLUP)
    except FormatError:
        return 0
    return len(block) if (lengths == window_s).all() else 0
