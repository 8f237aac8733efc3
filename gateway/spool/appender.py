"""One append: capacity check, duplicates, encoding, transaction. Committer and tools write through it.

A `Submission` is what one request brought: its sender is told how many of its readings were new, and its
commit hook (a ledger entry, a stored answer) runs in the transaction that stores it. `Capacity` is the limit
on the spool's own size and the minimum of free space on its disk.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import msgspec
import numpy as np

from gateway.spool.database import crash_point
from gateway.spool.duplicates import DeviceActivity
from gateway.spool.errors import SpoolFullError
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spool.segments import EncodedSegment, encode_segments

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Sequence

    from cloud_sync.model.records import Readings, Records
    from gateway.spool.database import Database
    from gateway.spool.duplicates import DuplicateFilter, ScreenedReadings
    from gateway.spool.segments import SegmentWriter
    from gateway.spool.series_catalog import SeriesCatalog

    CommitNote = Callable[[sqlite3.Connection, "AppendResult"], None]


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What became of one group: `stored + duplicates + conflicts` is what was handed over.

    `lots` says the same of each lot of it.
    """

    stored: int
    duplicates: int
    conflicts: int
    submissions: tuple[AppendResult, ...] = ()


@dataclass(frozen=True, slots=True)
class Submission:
    """Rows of a group whose sender is told what became of them.

    Attributes:
        rows: which of the group's readings, as they were handed over; may be none.
        note: writes what is to be remembered of the lot, inside the transaction that stores it.
    """

    rows: slice
    note: CommitNote | None = None


def count_by_submission(
    screened: ScreenedReadings, submissions: Sequence[Submission]
) -> tuple[AppendResult, ...]:
    """What became of each lot's rows."""
    if not submissions:
        return ()
    stored, conflicting = np.empty_like(screened.keep), np.empty_like(screened.conflicting)
    stored[screened.arrival], conflicting[screened.arrival] = screened.keep, screened.conflicting
    counts = (
        (
            len(stored[submission.rows]),
            int(stored[submission.rows].sum()),
            int(conflicting[submission.rows].sum()),
        )
        for submission in submissions
    )
    return tuple(AppendResult(kept, rows - kept - differing, differing) for rows, kept, differing in counts)


def bind_commit_hooks(
    submissions: Sequence[Submission], by_submission: Sequence[AppendResult]
) -> list[Callable[[sqlite3.Connection], None]]:
    """What the lots want to be remembered of them."""
    return [
        partial(_run_commit_hook, submission.note, appended)
        for submission, appended in zip(submissions, by_submission, strict=True)
        if submission.note is not None
    ]


def _run_commit_hook(note: CommitNote, appended: AppendResult, connection: sqlite3.Connection) -> None:
    note(connection, appended)


_OTHERS_FILL_DISK = (
    ". Something else fills the disk: the spool has given up half of what it held, "
    "and gives up no more for that"
)


class Shortage(NamedTuple):
    """Bytes beyond nine tenths of the cap, bytes missing to eleven tenths of the floor, bytes in use.

    The log is not among those in use. `ample` says that twice the floor is free.
    """

    over_cap: int
    under_floor: int
    used: int
    far_above_floor: bool


@dataclass(slots=True)
class Capacity:
    """Limits in bytes; `max_bytes` None means as much as the floor allows.

    Room that was freed inside the file counts as room: SQLite uses it before the file grows.
    `floor_out_of_reach` is set while something else keeps the disk full, and giving up has done what it may.
    """

    max_bytes: int | None = None
    min_free_bytes: int = 0
    floor_out_of_reach: bool = False

    async def room_bytes(self, database: Database) -> int:
        """Bytes that may still be used, never below zero."""
        used, spare = await database.room()
        room = shutil.disk_usage(database.path.parent).free + spare - self.min_free_bytes
        if self.max_bytes is not None:
            room = min(room, self.max_bytes - used)
        return max(0, room)

    async def excess_bytes(self, database: Database) -> int:
        """How far a spool is beyond nine tenths of its cap, or below eleven tenths of the floor; 0 or more.

        Readings are taken until the limits themselves; what is between is room for rollups, alerts and
        declarations, and time to give something up.
        """
        shortage = await self.shortage(database)
        return max(shortage.over_cap, shortage.under_floor)

    async def shortage(self, database: Database) -> Shortage:
        """The same by limit, with what the spool uses."""
        used, spare = await database.room()
        over = 0 if self.max_bytes is None else used - self.max_bytes * 9 // 10
        free = shutil.disk_usage(database.path.parent).free + spare
        return Shortage(
            max(0, over),
            max(0, self.min_free_bytes * 11 // 10 - free),
            used - database.wal_bytes,
            far_above_floor=free >= 2 * self.min_free_bytes,
        )

    def reconfigure(self, max_bytes: int | None, min_free_bytes: int) -> None:
        """Go on with other limits, for everyone who shares these."""
        self.max_bytes, self.min_free_bytes = max_bytes, min_free_bytes

    async def require(self, database: Database) -> None:
        """Do nothing while there is room.

        Raises:
            SpoolFullError: with the limit that was reached, in words.
        """
        used, spare = await database.room()
        if self.max_bytes is not None and used > self.max_bytes:
            raise SpoolFullError(
                f"{database.path}: {used} bytes are used; spool.max_bytes is {self.max_bytes}"
            )
        free = shutil.disk_usage(database.path.parent).free
        if free + spare < self.min_free_bytes:
            raise SpoolFullError(
                f"{database.path}: {free} bytes are free on its disk; "
                f"spool.min_free_bytes is {self.min_free_bytes}"
                + (_OTHERS_FILL_DISK if self.floor_out_of_reach else "")
            )


_INLINE_ROWS = 4096
_CAPACITY_CHECK_VALID_S = 0.25  # room that was there is taken for granted so long

T = TypeVar("T")


class Appender:
    """Appends groups of readings and quarantine rows to one spool, one group at a time, whoever asks."""

    def __init__(
        self,
        database: Database,
        segments: SegmentWriter,
        duplicates: DuplicateFilter,
        catalog: SeriesCatalog,
        capacity: Capacity | None = None,
    ) -> None:
        self._database = database
        self._segments = segments
        self._duplicates = duplicates
        self._catalog = catalog
        self._capacity = capacity or Capacity()
        self.device_activity = DeviceActivity(catalog)
        self._capacity_checked_until = 0.0
        self._turn = asyncio.Lock()

    async def append(
        self,
        readings: Readings | None,
        items: Sequence[QuarantineItem],
        *,
        now_us: int,
        submissions: Sequence[Submission] = (),
    ) -> AppendResult:
        """Make a group durable. On return it is fsynced (promise 1).

        Raises:
            SpoolFullError, SpoolAccessError: nothing was written; the same call may be made again.
        """
        async with self._turn:
            return await self._append(readings, items, now_us, submissions)

    async def append_records(
        self, records: Records, note: Callable[[sqlite3.Connection], None], *, now_us: int
    ) -> None:
        """Make records of another class durable as they are, with what `note` writes: fsynced on return.

        Raises:
            SpoolFullError, SpoolAccessError: nothing was written; the same call may be made again.
        """
        await self._require_room()
        sealed = await _run_inline_or_in_thread(records.rows, lambda: encode_segments(records))
        await self._segments.append(sealed, now_us=now_us, notes=[note])

    async def match_stored(self, readings: Readings) -> AppendResult | None:
        """What readings are that are all in the spool already; None when one of them is not."""
        if readings.rows == 0:
            return AppendResult(0, 0, 0)
        async with self._turn:
            screened = await _run_inline_or_in_thread(
                readings.rows, lambda: self._duplicates.screen(readings)
            )
            if screened.late.any():
                await self._duplicates.resolve(screened)
        if screened.keep.any():
            return None
        return AppendResult(0, screened.duplicates, int(screened.conflicting.sum()))

    async def _append(
        self,
        readings: Readings | None,
        items: Sequence[QuarantineItem],
        now_us: int,
        submissions: Sequence[Submission],
    ) -> AppendResult:
        await self._require_room()
        if readings is None or readings.rows == 0:
            nothing = AppendResult(0, 0, 0)
            by_submission = (nothing,) * len(submissions)
            if items or submissions:
                await self._segments.append(
                    (), items, now_us=now_us, notes=bind_commit_hooks(submissions, by_submission)
                )
            return AppendResult(0, 0, 0, by_submission)
        screened, sealed = await _run_inline_or_in_thread(
            readings.rows, lambda: self._screen_and_seal(readings)
        )
        if sealed is None:
            await self._duplicates.resolve(screened)
            sealed = await _run_inline_or_in_thread(readings.rows, lambda: encode_segments(screened.new))
        conflicts = screened.conflicts
        by_submission = count_by_submission(screened, submissions)
        crash_point("before_append")
        positions = await self._segments.append(
            sealed,
            [*items, *self._conflict_items(conflicts, now_us)],
            now_us=now_us,
            notes=bind_commit_hooks(submissions, by_submission),
        )
        for position, run in zip(positions, sealed, strict=True):
            self._duplicates.stored(position, cast("Readings", run.records))
        crash_point("after_append")
        self.device_activity.note(screened.identity, now_us)
        return AppendResult(
            sum(run.rows for run in sealed), screened.duplicates, conflicts.rows, by_submission
        )

    async def _require_room(self) -> None:
        if time.monotonic() < self._capacity_checked_until:
            return
        await self._capacity.require(self._database)
        self._capacity_checked_until = time.monotonic() + _CAPACITY_CHECK_VALID_S

    def _screen_and_seal(self, readings: Readings) -> tuple[ScreenedReadings, list[EncodedSegment] | None]:
        """Screen a group, and encode it at once when nothing has to be looked up."""
        screened = self._duplicates.screen(readings)
        return screened, None if screened.late.any() else encode_segments(screened.new)

    def _conflict_items(self, conflicts: Readings, now_us: int) -> Iterator[QuarantineItem]:
        for row in range(conflicts.rows):
            one = conflicts.select(np.array([row]))
            series = self._catalog[int(one.series[0])]
            yield QuarantineItem.from_payload(
                received_at_us=now_us,
                source="spool",
                topic=f"{series.sensor_id}/{series.sensor_type}",
                reason="conflict",
                detail="another value is stored for this series and time; the first one stays",
                payload=msgspec.json.encode({"value": float(one.value[0]), "ts": int(one.time_us[0])}),
            )


async def _run_inline_or_in_thread(rows: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small, else in an executor thread, where numpy and pcodec let others run."""
    if rows <= _INLINE_ROWS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
