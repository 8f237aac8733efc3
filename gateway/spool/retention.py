"""What leaves the spool: what every destination has given a receipt for, after a while; then eviction.

Nothing undelivered is ever pruned here, nor what processing has not read yet. When the spool is full,
delivered readings of any age go, and delivered records of other classes older than a day; only then is
anything evicted that a destination lacks. Pages that become free are given back to the file system.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watchdog import StageProgress
from gateway.spool.database import SQL, crash_point
from gateway.spool.errors import SpoolError
from gateway.spool.eviction import Evictor
from gateway.spool.processing_state import read_processed_through
from gateway.spool.segments import first_commit_at, position_span, read_commit_counter, save_pruned_mark

if TYPE_CHECKING:
    import asyncio
    import sqlite3
    from collections.abc import Awaitable, Callable, Sequence

    from gateway.spool.appender import Capacity
    from gateway.spool.database import Database
    from gateway.spool.eviction import RetentionPolicy
    from gateway.spool.segments import SegmentWriter

_log = logging.getLogger(__name__)
STEP_WITHIN_S = 600.0
_MAX_SEGMENTS = 500
_KEEP_WHEN_FULL_S = 86_400.0  # of rollups: late readings of a day still give revisions
_FREE_PAGES = 256  # as many as are given back in about two milliseconds


async def run_maintenance(
    stage: StageProgress,
    step: Callable[[], Awaitable[int]],
    stop: asyncio.Event,
    *,
    busy_pause_s: float,
    idle_pause_s: float,
) -> None:
    """Repeat `step` until `stop` is set; the short pause follows a step that did something."""
    while not stop.is_set():
        stage.begin_step(within_s=STEP_WITHIN_S)
        try:
            done = await step()
        except SpoolError as fault:
            _log.warning("%s: %s", stage.name, fault)
            done = 0
        await sleep_or_stop(stop, busy_pause_s if done else idle_pause_s)
    stage.set_idle()


class Retention:
    """Prunes and evicts segments of one spool. `make_room_once` is the step, `run` the loop."""

    def __init__(
        self, database: Database, segments: SegmentWriter, capacity: Capacity, policy: RetentionPolicy
    ) -> None:
        self._database = database
        self._segments = segments
        self._capacity = capacity
        self.stage = StageProgress("retention")
        self.reconfigure(policy)

    def reconfigure(self, policy: RetentionPolicy) -> None:
        """Replace the policy."""
        self.policy = policy
        self._evictor = Evictor(self._database, self._segments, self._capacity, policy)

    async def run(self, stop: asyncio.Event) -> None:
        """Make room until `stop` is set."""
        await run_maintenance(
            self.stage,
            lambda: self.make_room_once(time.time_ns() // 1000),
            stop,
            busy_pause_s=0.1,
            idle_pause_s=5.0,
        )

    async def make_room_once(self, now_us: int) -> bool:
        """Prune, then evict if that was not enough; whether there is more to do at once."""
        pruned = [await self.prune_once(now_us, record_class) for record_class in self.policy.keep_s]
        if max(pruned, default=0) == _MAX_SEGMENTS or (any(pruned) and await self._is_full()):
            return True  # what everybody has goes before what somebody lacks, whatever it is
        return await self._evictor.evict_once(now_us) > 0

    async def prune_once(self, now_us: int, record_class: RecordClass = RecordClass.READING) -> int:
        """Delete at most some hundred delivered segments of a class; returns how many.

        Without destinations no reading counts as delivered; rollups that no destination gets go by age alone.
        """
        of_readings = record_class is RecordClass.READING
        if of_readings and not self.policy.receivers.get(record_class):
            return 0
        keep_s = self.policy.keep_s[record_class]
        if await self._is_full():
            keep_s = min(keep_s, 0.0 if of_readings else _KEEP_WHEN_FULL_S)
        before_us = now_us - round(keep_s * 1e6)
        if not await self._database.read(lambda c: self._find_prunable(c, record_class, before_us)):
            return 0

        def work(connection: sqlite3.Connection) -> int:
            prunable = self._find_prunable(connection, record_class, before_us)  # some may be merged by now
            if prunable:
                save_pruned_mark(connection, prunable[-1])
                connection.execute(SQL["delete_segments"], (prunable[0], prunable[-1]))
                crash_point("in_prune")
            return len(prunable)

        pruned = await self._database.write(work)
        await self._database.reclaim(_FREE_PAGES)
        return pruned

    async def _is_full(self) -> bool:
        return (await self._capacity.measure(self._database)).excess > 0

    def _find_prunable(
        self, connection: sqlite3.Connection, record_class: RecordClass, before_us: int
    ) -> list[int]:
        """Positions of the oldest segments, up to the first that must stay."""
        receivers = self.policy.list_receivers(connection, record_class)
        through = read_delivered_to_all(connection, receivers, record_class)
        if through is None:
            through = read_commit_counter(connection, record_class).commit
        if record_class is RecordClass.READING:
            through = min(through, read_processed_through(connection))
        prunable = []
        span = (*position_span(record_class, 0, through), _MAX_SEGMENTS)
        for position, last_commit, written_at_us in connection.execute(SQL["prune_candidates"], span):
            if last_commit > through or written_at_us >= before_us:
                break
            prunable.append(position)
        return prunable


def read_delivered_to_all(
    connection: sqlite3.Connection, destinations: Sequence[str], record_class: RecordClass
) -> int | None:
    """The commit up to which every destination has what is still in the spool; None without destinations."""
    oldest = connection.execute(SQL["first_segment_from"], position_span(record_class)).fetchone()
    first_stored = 0 if oldest is None else first_commit_at(oldest[0])
    through = []
    for destination in destinations:
        ranges = connection.execute(SQL["delivered"], (destination, record_class))
        through.append(next((last for first, last in ranges if first <= first_stored <= last), 0))
    return min(through, default=None)
