"""Quarantined input taken in again by the rules of today: on a stopped spool, or inside its gateway.

An item is rehearsed first: only when all of its payload makes readings does it go through the committer, as
if it came in again at the time it first did. What is still bad stays as it is, under its number. The readings
are fsynced before the item is dropped; a crash between the two is met by the duplicate check. A row that a
destination refused is sent to it once more (`refused_rows`).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.ingest.plain import NotPlain, Stamps
from cloud_sync.records import Flag
from gateway.ingress.committer import Committer
from gateway.ingress.http.readings import parse_kept
from gateway.operate.quarantine_items import Item
from gateway.operate.refused_rows import RefusedRows
from gateway.operate.spool_file import opened
from gateway.operate.spool_walk import SQL
from gateway.operate.watcher import Nobody, Watcher
from gateway.spool.appender import Appender
from gateway.spool.database import Database
from gateway.spool.duplicates import Duplicates
from gateway.spool.errors import SpoolFailed
from gateway.spool.lots import Appended
from gateway.spool.segments import Segments
from gateway.spool.series import DEFAULT_MAX_SERIES, SeriesBook

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cloud_sync.records import Readings
    from gateway.ingress.formats.rules import Rules
    from gateway.ingress.topics import TopicTemplate
    from gateway.spool.lots import Lot
    from gateway.spool.quarantine import QuarantineItem

_PUBLISHED = frozenset({"listen", "subscribe", "http", "host"})
_NOTHING_STORED = frozenset({"unknown_topic", "bad_series_name", "not_json", "bad_reading"})
"""Reasons of items whose payload is all that was bad: none of it was stored when it came in."""
_AT_ONCE = 500
_COMMIT_WITHIN_S = 60.0


@dataclass(slots=True)
class Retried:
    """What became of the items.

    Attributes:
        items: how many made readings and left the quarantine.
        stored, duplicates, conflicts: what those readings were to the spool.
        left: number of each item that stays, with the reason in words.
        sent_again: readings that go once more to the destinations that refused them.
    """

    items: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    left: list[tuple[int, str]] = field(default_factory=list)
    sent_again: int = 0


class _Rehearsal(Appender):
    """An appender that stores nothing, and remembers what it was given last."""

    def __init__(self) -> None:
        self.rows = 0
        self.untimed = False
        self.items: Sequence[QuarantineItem] = ()

    def forget(self) -> None:
        """Be as if nothing had been given."""
        self.rows, self.untimed, self.items = 0, False, ()

    async def append(
        self,
        readings: Readings | None,
        items: Sequence[QuarantineItem],
        *,
        now_us: int,  # noqa: ARG002 - the signature of what it stands in for
        lots: Sequence[Lot] = (),  # noqa: ARG002 - as above
    ) -> Appended:
        self.items = items
        if readings is not None:
            self.rows, self.untimed = readings.rows, bool((readings.flags & Flag.TIME_ASSIGNED).any())
        return Appended(self.rows, 0, 0)


@dataclass(slots=True)
class _Clock:
    """The time an item came in while it is decoded, else the wall clock."""

    at_us: int | None = None

    def __call__(self) -> int:
        return time.time_ns() // 1000 if self.at_us is None else self.at_us


async def retry(
    path: Path,
    numbers: Sequence[int],
    template: TopicTemplate | Rules,
    *,
    max_series: int = DEFAULT_MAX_SERIES,
    watcher: Watcher = Nobody(),  # noqa: B008 - it has no state
) -> Retried:
    """Decode items again; those that make readings are stored and leave the quarantine.

    Raises:
        SpoolInUse: a gateway is running on this spool.
        SpoolFailed, SpoolFull: the spool cannot be used or written.
    """
    with opened(path):
        pass  # refuses what is no spool, before a writer would make one of it
    database = await Database.open(path)
    try:
        book = await SeriesBook.load(database, max_series)
        segments = await Segments.load(database, book)
        appender = Appender(database, segments, await Duplicates.load(database, book), book)
        return await retry_within(database, segments, appender, book, template, numbers, watcher=watcher)
    finally:
        await database.close()


async def retry_within(  # noqa: PLR0917 - the parts of one spool
    database: Database,
    segments: Segments,
    appender: Appender,
    book: SeriesBook,
    template: TopicTemplate | Rules,
    numbers: Sequence[int],
    *,
    watcher: Watcher = Nobody(),  # noqa: B008 - it has no state
) -> Retried:
    """The same on the open spool of a running gateway, whose own appends go on between.

    Raises:
        SpoolFailed, SpoolFull: the spool cannot be written.
    """
    watcher.total(len(numbers))
    bench = _Bench(database, segments, appender, book, template)
    for start in range(0, len(numbers), _AT_ONCE):
        for number in numbers[start : start + _AT_ONCE]:
            await bench.take(number)
            watcher.advance()
        await bench.store()
    return bench.result


class _Bench:
    """Two committers on one spool: one to rehearse with, one that stores."""

    def __init__(
        self,
        database: Database,
        segments: Segments,
        appender: Appender,
        book: SeriesBook,
        template: TopicTemplate | Rules,
    ) -> None:
        self._database = database
        self._book = book
        self._refused = RefusedRows(database, segments, book)
        self._stamps = Stamps()
        self._clock = _Clock()
        self._rehearsal = _Rehearsal()
        self._trial = Committer(self._rehearsal, book, template, interval_s=0, clock_us=self._clock)
        self._real = Committer(appender, book, template, interval_s=0, clock_us=self._clock)
        self._taken: list[int] = []
        self.result = Retried()

    async def take(self, number: int) -> None:
        """Rehearse one item; keep it for `store` when all of it makes readings."""
        row = await self._database.read(lambda c: c.execute(SQL["quarantine_item"], (number,)).fetchone())
        if row is None:
            self.result.left.append((number, "there is no such item"))
            return
        item = Item(*row)
        self._clock.at_us = item.received_at_us
        why = await self._take_in(item)
        self._clock.at_us = None
        if why is not None:
            self.result.left.append((number, why))

    async def store(self) -> None:
        """Commit what was taken, then drop its items."""
        sent = await self._refused.send(time.time_ns() // 1000)
        self.result.sent_again += sent
        self.result.items += sent
        if not self._taken:
            return
        try:
            async with asyncio.timeout(_COMMIT_WITHIN_S):
                await self._real.commit_once()
        except TimeoutError:
            reason = self._real.counters.holding_reason
            raise SpoolFailed(f"nothing more was stored: {reason or 'the spool took too long'}") from None
        gone = [(number,) for number in self._taken]
        await self._database.write(lambda c: c.executemany(SQL["drop_quarantine"], gone))
        counters, result = self._real.counters, self.result
        result.items += len(gone)
        result.stored, result.duplicates = counters.readings, counters.duplicates
        result.conflicts = counters.conflicts
        self._taken = []

    async def _take_in(self, item: Item) -> str | None:
        """Keep an item for `store`; or why it stays."""
        if item.is_cut:
            return f"only the first {len(item.payload)} of its {item.payload_bytes} bytes were kept"
        if item.source.partition(":")[0] not in _PUBLISHED:
            return await self._refused.take(item)
        why = self._take_plain(item) if item.source == "http" else await self._rehearse(item)
        if why is None:
            if item.source != "http":
                self._real.offer(item.source, item.topic.encode(), item.payload)
            self._taken.append(item.quarantine_no)
        return why

    def _take_plain(self, item: Item) -> str | None:
        """Take what came over HTTP: a reading, or the part of a pack; why not, None when it is taken."""
        try:
            parsed = parse_kept(item.topic, item.payload, now_us=item.received_at_us, stamps=self._stamps)
        except NotPlain as fault:
            return f"still bad: {fault.reason}: {fault}"
        if parsed.rejected:
            return f"still bad: {parsed.rejected[0].reason}"
        numbers = [self._book.number_of(series) for series in parsed.series]
        if not numbers or None in numbers:
            return "the spool knows as many series as it may" if numbers else "it holds no reading"
        readings = parsed.readings
        self._real.bring(readings.with_series(np.array(numbers, np.int32)[readings.series]))
        return None

    async def _rehearse(self, item: Item) -> str | None:
        """Why the payload does not make readings by the rules of today, None when all of it does."""
        rehearsal = self._rehearsal
        rehearsal.forget()
        self._trial.offer(item.source, item.topic.encode(), item.payload)
        await self._trial.commit_once()
        together = rehearsal.rows + len(rehearsal.items)
        if item.reason not in _NOTHING_STORED and rehearsal.untimed and together > 1:
            return (
                "other readings of the same payload were stored with the time they came in; "
                "storing them again would double them"
            )
        if rehearsal.items:
            return f"still bad: {rehearsal.items[0].reason}: {rehearsal.items[0].detail}"
        return None if rehearsal.rows else "it holds no reading"
