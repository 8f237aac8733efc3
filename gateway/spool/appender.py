"""One append: room, duplicates, encoding, the transaction. What the committer and the tools write through."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar, cast

import msgspec
import numpy as np

from gateway.spool.capacity import Capacity
from gateway.spool.crashpoints import point
from gateway.spool.lots import Appended, notes_of, of_lots
from gateway.spool.presence import Presence
from gateway.spool.quarantine import QuarantineItem
from gateway.spool.segments import Sealed, seal

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Sequence

    from cloud_sync.records import Readings, Records
    from gateway.spool.database import Database
    from gateway.spool.duplicates import Duplicates, Screened
    from gateway.spool.lots import Lot
    from gateway.spool.segments import Segments
    from gateway.spool.series import SeriesBook

_INLINE_ROWS = 4096
_ROOM_HOLDS_S = 0.25  # room that was there is taken for granted so long

T = TypeVar("T")


class Appender:
    """Appends groups of readings and quarantine rows to one spool, one group at a time, whoever asks."""

    def __init__(
        self,
        database: Database,
        segments: Segments,
        duplicates: Duplicates,
        book: SeriesBook,
        capacity: Capacity = Capacity(),  # noqa: B008 - an immutable value
    ) -> None:
        self._database = database
        self._segments = segments
        self._duplicates = duplicates
        self._book = book
        self._capacity = capacity
        self.presence = Presence(book)
        self._room_until = 0.0
        self._turn = asyncio.Lock()

    async def append(
        self,
        readings: Readings | None,
        items: Sequence[QuarantineItem],
        *,
        now_us: int,
        lots: Sequence[Lot] = (),
    ) -> Appended:
        """Make a group durable. On return it is fsynced (promise 1).

        Raises:
            SpoolFull, SpoolFailed: nothing was written; the same call may be made again.
        """
        async with self._turn:
            return await self._append(readings, items, now_us, lots)

    async def pass_on(
        self, records: Records, note: Callable[[sqlite3.Connection], None], *, now_us: int
    ) -> None:
        """Make records of another class durable as they are, with what `note` writes: fsynced on return.

        Raises:
            SpoolFull, SpoolFailed: nothing was written; the same call may be made again.
        """
        await self._require_room()
        sealed = await _offload(records.rows, lambda: seal(records))
        await self._segments.append(sealed, now_us=now_us, notes=[note])

    async def recognise(self, readings: Readings) -> Appended | None:
        """What readings are that are all in the spool already; None when one of them is not."""
        if readings.rows == 0:
            return Appended(0, 0, 0)
        async with self._turn:
            screened = await _offload(readings.rows, lambda: self._duplicates.screen(readings))
            if screened.late.any():
                await self._duplicates.resolve(screened)
        if screened.keep.any():
            return None
        return Appended(0, screened.duplicates, int(screened.conflicting.sum()))

    async def _append(
        self,
        readings: Readings | None,
        items: Sequence[QuarantineItem],
        now_us: int,
        lots: Sequence[Lot],
    ) -> Appended:
        await self._require_room()
        if readings is None or readings.rows == 0:
            nothing = Appended(0, 0, 0)
            by_lot = (nothing,) * len(lots)
            if items or lots:
                await self._segments.append((), items, now_us=now_us, notes=notes_of(lots, by_lot))
            return Appended(0, 0, 0, by_lot)
        screened, sealed = await _offload(readings.rows, lambda: self._screen_and_seal(readings))
        if sealed is None:
            await self._duplicates.resolve(screened)
            sealed = await _offload(readings.rows, lambda: seal(screened.new))
        conflicts = screened.conflicts
        by_lot = of_lots(screened, lots)
        point("before_append")
        positions = await self._segments.append(
            sealed,
            [*items, *self._conflict_items(conflicts, now_us)],
            now_us=now_us,
            notes=notes_of(lots, by_lot),
        )
        for position, run in zip(positions, sealed, strict=True):
            self._duplicates.stored(position, cast("Readings", run.records))
        point("after_append")
        self.presence.note(screened.identity, now_us)
        return Appended(sum(run.rows for run in sealed), screened.duplicates, conflicts.rows, by_lot)

    async def _require_room(self) -> None:
        if time.monotonic() < self._room_until:
            return
        await self._capacity.require(self._database)
        self._room_until = time.monotonic() + _ROOM_HOLDS_S

    def _screen_and_seal(self, readings: Readings) -> tuple[Screened, list[Sealed] | None]:
        """Screen a group, and encode it at once when nothing has to be looked up."""
        screened = self._duplicates.screen(readings)
        return screened, None if screened.late.any() else seal(screened.new)

    def _conflict_items(self, conflicts: Readings, now_us: int) -> Iterator[QuarantineItem]:
        for row in range(conflicts.rows):
            one = conflicts.take(np.array([row]))
            series = self._book[int(one.series[0])]
            yield QuarantineItem.of(
                received_at_us=now_us,
                source="spool",
                topic=f"{series.sensor_id}/{series.sensor_type}",
                reason="conflict",
                detail="another value is stored for this series and time; the first one stays",
                payload=msgspec.json.encode({"value": float(one.value[0]), "ts": int(one.time_us[0])}),
            )


async def _offload(rows: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small, else in an executor thread, where numpy and pcodec let others run."""
    if rows <= _INLINE_ROWS:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
