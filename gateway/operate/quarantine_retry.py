"""Quarantined publishes decoded again by the rules of today, on a stopped spool.

An item is rehearsed first: only when all of its payload makes readings does it go through the committer, as if
it came in again at the time it first did. What is still bad stays as it is, under its number. The readings are
fsynced before the item is dropped; a crash between the two is met by the duplicate check.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from gateway.ingress.committer import Committer
from gateway.operate.quarantine_items import Item, item_of
from gateway.operate.spool_walk import SQL
from gateway.spool.appender import Appended, Appender
from gateway.spool.database import Database
from gateway.spool.duplicates import Duplicates
from gateway.spool.errors import SpoolFailed
from gateway.spool.segments import Segments
from gateway.spool.series import DEFAULT_MAX_SERIES, SeriesBook

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cloud_sync.records import Readings
    from gateway.ingress.topics import TopicTemplate
    from gateway.spool.quarantine import QuarantineItem

_PUBLISHED = frozenset({"listen", "subscribe", "http", "host"})
_NOTHING_STORED = frozenset({"unknown_topic", "bad_series_name", "not_json", "bad_reading"})
_AT_ONCE = 500
_COMMIT_WITHIN_S = 60.0


@dataclass(slots=True)
class Retried:
    """What became of the items.

    Attributes:
        items: how many made readings and left the quarantine.
        stored, duplicates, conflicts: what those readings were to the spool.
        left: number of each item that stays, with the reason in words.
    """

    items: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    left: list[tuple[int, str]] = field(default_factory=list)


class _Rehearsal(Appender):
    """An appender that stores nothing, and remembers what it was given last."""

    def __init__(self) -> None:
        self.rows = 0
        self.items: Sequence[QuarantineItem] = ()

    async def append(
        self,
        readings: Readings | None,
        items: Sequence[QuarantineItem],
        *,
        now_us: int,  # noqa: ARG002 - the signature of what it stands in for
    ) -> Appended:
        self.rows, self.items = 0 if readings is None else readings.rows, items
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
    template: TopicTemplate,
    *,
    max_series: int = DEFAULT_MAX_SERIES,
    on_item: Callable[[int], None] = lambda _: None,
) -> Retried:
    """Decode items again; those that make readings are stored and leave the quarantine.

    Raises:
        SpoolInUse: a gateway is running on this spool.
        SpoolFailed, SpoolFull: the spool cannot be used or written.
    """
    found = [(number, item_of(path, number)) for number in numbers[:1]]  # refuses what is no spool
    database = await Database.open(path)
    try:
        book = await SeriesBook.load(database, max_series)
        segments = await Segments.load(database, book)
        appender = Appender(database, segments, await Duplicates.load(database, book), book)
        clock, rehearsal, result = _Clock(), _Rehearsal(), Retried()
        trial = Committer(rehearsal, book, template, interval_s=0, clock_us=clock)
        real = Committer(appender, book, template, interval_s=0, clock_us=clock)
        for start in range(0, len(numbers), _AT_ONCE):
            taken: list[int] = []
            for number in numbers[start : start + _AT_ONCE]:
                item = await database.read(lambda c, n=number: _item(c, n))
                clock.at_us = None if item is None else item.received_at_us
                why = "there is no such item" if item is None else _why_not(item)
                if item is not None and why is None:
                    why = await _rehearsed(trial, rehearsal, item)
                if item is not None and why is None:
                    real.offer(item.source, item.topic.encode(), item.payload)
                    taken.append(number)
                elif why is not None:
                    result.left.append((number, why))
                on_item(1)
            clock.at_us = None
            await _store(database, real, taken)
            result.items += len(taken)
        counters = real.counters
        result.stored, result.duplicates = counters.readings, counters.duplicates
        result.conflicts = counters.conflicts
    finally:
        await database.close()
    return result
