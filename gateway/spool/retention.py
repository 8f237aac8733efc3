"""What leaves the spool: readings that every destination has given a receipt for, after a while.

Nothing undelivered is ever pruned here, nor what processing has not been over yet. Pages that become free are
given back to the file system.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.watchdog import StageProgress
from gateway.spool import delivery_ranges
from gateway.spool.appender import Capacity
from gateway.spool.database import SQL, crash_point
from gateway.spool.errors import SpoolError
from gateway.spool.processing_state import read_processed_through
from gateway.spool.segments import (
    first_commit_at,
    position_span,
    read_commit_counter,
    save_pruned_mark,
    segment_position,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Sequence

    from gateway.spool.database import Database
    from gateway.spool.eviction import Evictor

_log = logging.getLogger(__name__)
_PAUSE_S = 5.0
_STEP_WITHIN_S = 600.0
_MAX_SEGMENTS = 500
_KEEP_WHEN_FULL_S = 86_400.0  # of rollups: late readings of a day still give revisions
_FREE_PAGES = 256  # as many as are given back in about two milliseconds


class Retention:
    """Prunes delivered segments of a class older than `keep_s` seconds; when full readings of any age, others
    older than a day. `before` are pruned when full before `giving_up` is asked. Readings wait for every
    destination of the spool that is not `configured` any more, too, until a person drops it; None: for none.
    """

    def __init__(
        self,
        database: Database,
        destinations: Sequence[str],
        *,
        keep_s: float,
        capacity: Capacity | None = None,
        evictor: Evictor | None = None,
        record_class: RecordClass = RecordClass.READING,
        before: Sequence[Retention] = (),
        configured: Collection[str] | None = None,
    ) -> None:
        self._database = database
        self._capacity = capacity or Capacity()
        self.destinations = tuple(destinations)
        self.keep_s = keep_s
        self.evictor = evictor
        self.record_class = record_class
        self._before = tuple(before)
        self.configured = configured
        of_readings = record_class is RecordClass.READING
        self.stage = StageProgress(
            "retention" if of_readings else f"retention of {record_class.name.lower()}s"
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Prune until `stop` is set."""
        while not stop.is_set():
            self.stage.begin_step(within_s=_STEP_WITHIN_S)
            try:
                more = await self.make_room_once(time.time_ns() // 1000)
            except SpoolError as fault:
                _log.warning("nothing was pruned: %s", fault)
                more = False
            try:
                async with asyncio.timeout(0.1 if more else _PAUSE_S):
                    await stop.wait()
            except TimeoutError:
                continue
        self.stage.set_idle()

    async def make_room_once(self, now_us: int) -> bool:
        """Prune, and where that was not enough give something up; whether there is more to do at once."""
        pruned = await self.prune_once(now_us)
        if pruned == _MAX_SEGMENTS or self.evictor is None:
            return pruned == _MAX_SEGMENTS
        if await self._is_full():  # what everybody has goes before what somebody lacks, whatever it is
            for other in self._before:
                if await other.prune_once(now_us):
                    return True
        return await self.evictor.evict_once(now_us) > 0

    async def prune_once(self, now_us: int) -> int:
        """Delete at most some hundred segments; returns how many.

        Without destinations no reading is delivered; rollups that nobody gets go by their age alone.
        """
        of_readings = self.record_class is RecordClass.READING
        if of_readings and not self.destinations:
            return 0
        when_full_s = 0.0 if of_readings else _KEEP_WHEN_FULL_S
        keep_s = min(self.keep_s, when_full_s) if await self._is_full() else self.keep_s
        before_us = now_us - round(keep_s * 1e6)
        if not await self._database.read(lambda c: self._prunable(c, before_us)):
            return 0

        def work(connection: sqlite3.Connection) -> int:
            doomed = self._prunable(connection, before_us)  # again: compaction may have merged some since
            if doomed:
                save_pruned_mark(connection, doomed[-1][0])
                connection.execute(SQL["delete_segments"], (doomed[0][0], doomed[-1][0]))
                crash_point("in_prune")
            return len(doomed)

        gone = await self._database.write(work)
        await self._database.reclaim(_FREE_PAGES)
        return gone

    async def _is_full(self) -> bool:
        return await self._capacity.excess_bytes(self._database) > 0

    def _prunable(self, connection: sqlite3.Connection, before_us: int) -> list[tuple[int, int]]:
        """Position and last commit of the oldest segments, up to the first that must stay."""
        waited_for = list(self.destinations)
        if self.record_class is RecordClass.READING and self.configured is not None:
            waited_for += delivery_ranges.unconfigured_destinations(connection, self.configured)
        through = min(
            (
                read_delivered_through(connection, destination, self.record_class)
                for destination in waited_for
            ),
            default=read_commit_counter(connection, self.record_class).commit,
        )
        if self.record_class is RecordClass.READING:
            through = min(through, read_processed_through(connection))
        span = (segment_position(self.record_class, 0), segment_position(self.record_class, through))
        doomed = []
        for position, last_commit, written_at_us in connection.execute(
            SQL["prune_candidates"], (*span, _MAX_SEGMENTS)
        ):
            if last_commit > through or written_at_us >= before_us:
                break
            doomed.append((position, last_commit))
        return doomed


def read_delivered_through(
    connection: sqlite3.Connection, destination: str, record_class: RecordClass
) -> int:
    """The commit up to which a destination has everything that is still in the spool."""
    oldest = connection.execute(SQL["first_segment_from"], position_span(record_class)).fetchone()
    if oldest is None:
        return 0
    for first, last in connection.execute(SQL["delivered"], (destination, record_class)):
        if first <= first_commit_at(oldest[0]) <= last:
            return int(last)
    return 0
