"""One append: capacity check, duplicates, encoding, transaction. Committer and tools write through it.

A `Submission` is what one request brought: its sender learns how many of its readings were new, and its
commit note (a ledger entry, a stored answer) is written by the transaction that stores it. `Capacity` is the
limit on the spool's own size and the minimum of free space on its disk.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import msgspec
import numpy as np

from gateway.spool.database import crash_point, wal_size_bytes
from gateway.spool.duplicates import DeviceActivity
from gateway.spool.errors import SpoolFullError
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spool.segments import AppendResult, EncodedSegment, encode_segments

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cloud_sync.model.records import Readings, Records
    from gateway.spool.database import Database
    from gateway.spool.duplicates import DuplicateFilter, ScreenedReadings
    from gateway.spool.segments import CommitNote, SegmentWriter
    from gateway.spool.series_catalog import SeriesCatalog


@dataclass(frozen=True, slots=True)
class Submission:
    """Readings (`rows` of a group, or none) whose sender learns their result; `note` gets it, too."""

    rows: slice
    note: CommitNote | None = None


def count_by_submission(
    screened: ScreenedReadings, submissions: Sequence[Submission]
) -> tuple[AppendResult, ...]:
    """What became of the rows of each submission."""
    if not submissions:
        return ()
    stored, conflicting = np.empty_like(screened.keep), np.empty_like(screened.conflicting)
    stored[screened.arrival], conflicting[screened.arrival] = screened.keep, screened.conflicting
    results = []
    for submission in submissions:
        new, conflicts = int(stored[submission.rows].sum()), int(conflicting[submission.rows].sum())
        results.append(AppendResult(new, len(stored[submission.rows]) - new - conflicts, conflicts))
    return tuple(results)


def _bind_notes(submissions: Sequence[Submission], results: Sequence[AppendResult]) -> list[CommitNote]:
    """The notes of submissions, each with its own result in place of the group's."""

    def bind(note: CommitNote, own: AppendResult) -> CommitNote:
        return lambda connection, _: note(connection, own)

    return [
        bind(submission.note, own)
        for submission, own in zip(submissions, results, strict=True)
        if submission.note is not None
    ]


_OTHERS_FILL_DISK = (
    ". Something else fills the disk: the spool has evicted half of what it held, and evicts no more for that"
)


class SpaceUse(NamedTuple):
    """In bytes. `used` includes the write-ahead log; `available` includes free space inside the file."""

    used: int
    wal: int
    available: int
    disk_free: int
    max_bytes: int | None
    min_free_bytes: int

    @property
    def room(self) -> int:
        """What may still be used, 0 or more."""
        room = self.available - self.min_free_bytes
        return max(0, room if self.max_bytes is None else min(room, self.max_bytes - self.used))

    @property
    def over_cap(self) -> int:
        """What exceeds nine tenths of `max_bytes`, 0 or more."""
        return 0 if self.max_bytes is None else max(0, self.used - self.max_bytes * 9 // 10)

    @property
    def under_floor(self) -> int:
        """What is missing to eleven tenths of `min_free_bytes`, 0 or more."""
        return max(0, self.min_free_bytes * 11 // 10 - self.available)

    @property
    def excess(self) -> int:
        """What is to be deleted, 0 or more.

        Readings are accepted up to the limits; between is room for other classes, and time to evict.
        """
        return max(self.over_cap, self.under_floor)


@dataclass(slots=True)
class Capacity:
    """Limits in bytes. `floor_out_of_reach`: something else fills the disk, eviction has done what it may."""

    max_bytes: int | None = None
    min_free_bytes: int = 0
    floor_out_of_reach: bool = False

    async def measure(self, database: Database) -> SpaceUse:
        """What the spool uses now, beside these limits."""
        used, spare = await database.used_and_spare_bytes()
        disk_free = shutil.disk_usage(database.path.parent).free
        wal = wal_size_bytes(database.path)
        return SpaceUse(used, wal, disk_free + spare, disk_free, self.max_bytes, self.min_free_bytes)

    def reconfigure(self, max_bytes: int | None, min_free_bytes: int) -> None:
        """Change the limits for everyone who shares them."""
        self.max_bytes, self.min_free_bytes = max_bytes, min_free_bytes

    async def require_room(self, database: Database) -> None:
        """Raise SpoolFullError with the limit that is reached, if one is."""
        space = await self.measure(database)
        if self.max_bytes is not None and space.used > self.max_bytes:
            raise SpoolFullError(
                f"{database.path}: {space.used} bytes are used; spool.max_bytes is {self.max_bytes}"
            )
        if space.available < self.min_free_bytes:
            raise SpoolFullError(
                f"{database.path}: {space.disk_free} bytes are free on its disk; "
                f"spool.min_free_bytes is {self.min_free_bytes}"
                + (_OTHERS_FILL_DISK if self.floor_out_of_reach else "")
            )


_INLINE_ROWS = 4096
_CAPACITY_CHECK_VALID_S = 0.25

T = TypeVar("T")


class Appender:
    """Appends groups of readings and quarantine items to one spool, one group at a time, whoever calls."""

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
        """Make a group durable: fsynced on return (promise 1). After a SpoolError nothing was written."""
        async with self._turn:
            await self._require_room()
            if readings is None or readings.rows == 0:
                by_submission = (AppendResult(0, 0, 0),) * len(submissions)
                if items or submissions:
                    await self._segments.append(
                        (), items, now_us=now_us, notes=_bind_notes(submissions, by_submission)
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
                notes=_bind_notes(submissions, by_submission),
            )
            for position, run in zip(positions, sealed, strict=True):
                self._duplicates.stored(position, cast("Readings", run.records))
            crash_point("after_append")
            self.device_activity.record(screened.identity, now_us)
            return AppendResult(
                sum(run.rows for run in sealed), screened.duplicates, conflicts.rows, by_submission
            )

    async def append_records(self, records: Records, note: CommitNote, *, now_us: int) -> None:
        """The same for records of another class, which are stored as they are, with what `note` writes."""
        await self._require_room()
        sealed = await _run_inline_or_in_thread(records.rows, lambda: encode_segments(records))
        await self._segments.append(sealed, now_us=now_us, notes=[note])

    async def match_stored(self, readings: Readings) -> AppendResult | None:
        """Duplicates and conflicts of readings that are all in the spool already; None when one is not."""
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

    async def _require_room(self) -> None:
        if time.monotonic() < self._capacity_checked_until:
            return
        await self._capacity.require_room(self._database)
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
    """Run small work here, else in an executor thread, where numpy and pcodec release the GIL."""
    if rows <= _INLINE_ROWS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
