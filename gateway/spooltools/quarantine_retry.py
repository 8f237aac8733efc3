"""Quarantined input decoded again by the current rules: on a stopped spool, or inside its gateway.

An item is decoded in a dry run first: only when all of its payload makes readings does it go through the
committer, as if received again at its original time. What is still invalid stays, under its number. The
readings are fsynced before the item is dropped; a crash between the two is met by the duplicate check.

Readings that a destination refused are sent to it once more. The stored copy lies in a range that is
delivered, so they are committed again, marked as processed, and counted as delivered to every other
destination, in the transaction that drops the items.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cloud_sync.codec.plain_readings import AssignedTimes, PlainBodyError
from cloud_sync.model.reading_builder import ColumnBuilder, InvalidReadingError, build_reading
from cloud_sync.model.records import Flag, Readings, RecordClass
from gateway.ingress.committer import Committer, CommitterOptions
from gateway.ingress.http.readings import parse_quarantined_body
from gateway.ingress.publish_decoder import PublishDecoder, SeriesResolver
from gateway.spool import delivery_ranges
from gateway.spool.appender import Appender
from gateway.spool.database import NO_PROGRESS, SQL, ProgressListener
from gateway.spool.delivery_ranges import CommitRange, DeliveryQueue
from gateway.spool.errors import SpoolAccessError
from gateway.spool.quarantine_items import StoredQuarantineItem
from gateway.spool.segments import AppendResult, encode_segments, read_commit_counter
from gateway.spool.series_catalog import DEFAULT_MAX_SERIES
from gateway.spool.spool import open_spool

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from pathlib import Path

    from gateway.payloads.decoder_registry import RuleSet
    from gateway.spool.quarantine_items import QuarantineItem
    from gateway.spool.spool import Spool

_CLASS = RecordClass.READING


class _RefusedReading(msgspec.Struct):
    """The payload of an item, as `Deliveries.refuse` writes it; `ts` counts microseconds."""

    value: float
    ts: int
    sensor_id: str
    sensor_type: str
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    flags: int = 0
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


_refused_decoder = msgspec.json.Decoder(_RefusedReading)


class RefusedRowSender:
    """Collects items that a destination refused, and sends them to it again together."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._builders: dict[str, ColumnBuilder] = defaultdict(ColumnBuilder)
        self._numbers: dict[str, list[int]] = defaultdict(list)

    async def add(self, item: StoredQuarantineItem) -> str | None:
        """Add an item to `send`; returns why it cannot be sent again, or None."""
        known = await self._spool.database.read(
            lambda c: c.execute(SQL["destination_known"], (item.source,)).fetchone()
        )
        if known is None:
            return f"it was quarantined by {item.source}, which is not a known destination"
        try:
            refused = _refused_decoder.decode(item.payload)
            name = (refused.sensor_id, refused.sensor_type)
            reading = build_reading(name, refused.ts, refused.value, refused)
            self._builders[item.source].add(reading._replace(flags=refused.flags | Flag.PROCESSED))
        except (msgspec.DecodeError, UnicodeDecodeError, InvalidReadingError):
            return "its payload is not a single reading"
        self._numbers[item.source].append(item.quarantine_no)
        return None

    async def send(self, now_us: int) -> int:
        """Commit what was collected and delete its items; returns how many readings that are."""
        sent = 0
        for destination in list(self._builders):
            series, readings = self._builders.pop(destination).build()
            gone = [(number,) for number in self._numbers.pop(destination)]
            numbers = np.array([self._spool.catalog.assign_number(one) for one in series], np.int32)
            own = readings.with_series(numbers[readings.series]).in_order()
            await self._commit(destination, own, gone, now_us)
            sent += own.rows
        return sent

    async def _commit(
        self, destination: str, readings: Readings, gone: list[tuple[int]], now_us: int
    ) -> None:
        segments = encode_segments(readings)

        def note(connection: sqlite3.Connection, _: AppendResult) -> None:
            newest = read_commit_counter(connection, _CLASS).commit
            new = CommitRange(newest + 1, newest + len(segments))
            for name, *_ in connection.execute(SQL["destinations"]).fetchall():
                if name != destination:
                    delivery_ranges.add_delivered(connection, DeliveryQueue(name, _CLASS), new)
            connection.executemany(SQL["drop_quarantine"], gone)

        await self._spool.segments.append(segments, now_us=now_us, notes=[note])


_INGRESS_SOURCES = frozenset({"listen", "subscribe", "http", "host"})
_NOTHING_STORED_REASONS = frozenset({"unknown_topic", "bad_series_name", "not_json", "bad_reading"})
"""Reasons of items whose payload is all that was bad: none of it was stored when it came in."""
_AT_ONCE = 500
_COMMIT_WITHIN_S = 60.0


@dataclass(slots=True)
class RetryResult:
    """What became of the items: `items` made readings and left, `left` stay, each with the reason.

    `sent_again` readings go once more to the destinations that refused them.
    """

    items: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    left: list[tuple[int, str]] = field(default_factory=list)
    sent_again: int = 0


class _DryRunAppender(Appender):
    """Stores nothing, and keeps what the last append was given."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the last append."""
        self.rows = 0
        self.untimed = False
        self.items: Sequence[QuarantineItem] = ()

    async def append(
        self, readings: Readings | None, items: Sequence[QuarantineItem], **_: object
    ) -> AppendResult:
        self.items = items
        if readings is not None:
            self.rows, self.untimed = readings.rows, bool((readings.flags & Flag.TIME_ASSIGNED).any())
        return AppendResult(self.rows, 0, 0)


async def retry_stopped_spool(
    path: Path,
    numbers: Sequence[int],
    rules: RuleSet,
    *,
    max_series: int = DEFAULT_MAX_SERIES,
    progress: ProgressListener = NO_PROGRESS,
) -> RetryResult:
    """Decode items again; those that make readings are stored and leave the quarantine."""
    async with open_spool(path, max_series=max_series, create=False) as spool:
        return await retry_open_spool(spool, rules, numbers, progress=progress)


async def retry_open_spool(
    spool: Spool, rules: RuleSet, numbers: Sequence[int], *, progress: ProgressListener = NO_PROGRESS
) -> RetryResult:
    """The same on the open spool of a running gateway, which goes on appending meanwhile."""
    progress.total(len(numbers))
    run = _RetryRun(spool, rules)
    for start in range(0, len(numbers), _AT_ONCE):
        for number in numbers[start : start + _AT_ONCE]:
            await run.prepare(number)
            progress.advance()
        await run.store()
    return run.result


class _RetryRun:
    """Two committers on one spool: one for the dry run, one that stores."""

    def __init__(self, spool: Spool, rules: RuleSet) -> None:
        self._database = spool.database
        self._catalog = spool.catalog
        self._refused = RefusedRowSender(spool)
        self._stamps = AssignedTimes()
        self._item_received_us: int | None = None
        self._dry_run_appender = _DryRunAppender()
        self._dry_run_committer, self._real = (
            Committer(
                appender,
                PublishDecoder(rules, SeriesResolver(spool.catalog)),
                CommitterOptions(interval_s=0),
                clock_us=self._now_us,
            )
            for appender in (self._dry_run_appender, spool.appender)
        )
        self._prepared: list[int] = []
        self.result = RetryResult()

    async def prepare(self, number: int) -> None:
        """Decode one item in a dry run; keep it for `store` when all of it makes readings."""
        row = await self._database.read(lambda c: c.execute(SQL["quarantine_item"], (number,)).fetchone())
        if row is None:
            self.result.left.append((number, "there is no such item"))
            return
        item = StoredQuarantineItem(*row)
        self._item_received_us = item.received_at_us
        why = await self._prepare_item(item)
        self._item_received_us = None
        if why is not None:
            self.result.left.append((number, why))

    def _now_us(self) -> int:
        """The time an item came in while it is decoded, else the wall clock."""
        return time.time_ns() // 1000 if self._item_received_us is None else self._item_received_us

    async def store(self) -> None:
        """Commit the prepared items, then delete them from the quarantine."""
        sent = await self._refused.send(time.time_ns() // 1000)
        self.result.sent_again += sent
        self.result.items += sent
        if not self._prepared:
            return
        try:
            async with asyncio.timeout(_COMMIT_WITHIN_S):
                await self._real.commit_once()
        except TimeoutError:
            reason = self._real.counters.holding_reason
            raise SpoolAccessError(
                f"nothing more was stored: {reason or 'the spool took too long'}"
            ) from None
        gone = [(number,) for number in self._prepared]
        await self._database.write(lambda c: c.executemany(SQL["drop_quarantine"], gone))
        counters, result = self._real.counters, self.result
        result.items += len(gone)
        result.stored, result.duplicates = counters.readings, counters.duplicates
        result.conflicts = counters.conflicts
        self._prepared = []

    async def _prepare_item(self, item: StoredQuarantineItem) -> str | None:
        """Prepare an item for `store`; returns why it stays, or None."""
        if item.is_cut:
            return f"only the first {len(item.payload)} of its {item.payload_bytes} bytes were kept"
        if item.source.partition(":")[0] not in _INGRESS_SOURCES:
            return await self._refused.add(item)
        why = self._prepare_http_item(item) if item.source == "http" else await self._dry_run(item)
        if why is None:
            if item.source != "http":
                self._real.submit_payload(item.source, item.topic.encode(), item.payload)
            self._prepared.append(item.quarantine_no)
        return why

    def _prepare_http_item(self, item: StoredQuarantineItem) -> str | None:
        """The same for a reading, or part of a SenML pack, that came over HTTP."""
        try:
            parsed = parse_quarantined_body(
                item.topic, item.payload, now_us=item.received_at_us, stamps=self._stamps
            )
        except PlainBodyError as fault:
            return f"still bad: {fault.reason}: {fault}"
        if parsed.rejected:
            return f"still bad: {parsed.rejected[0].reason}"
        numbers = [self._catalog.assign_number(series) for series in parsed.series]
        if not numbers or None in numbers:
            return "the spool knows as many series as it may" if numbers else "it holds no reading"
        readings = parsed.readings
        self._real.submit_readings(readings.with_series(np.array(numbers, np.int32)[readings.series]))
        return None

    async def _dry_run(self, item: StoredQuarantineItem) -> str | None:
        """Why the payload does not make readings by the present rules; None when all of it does."""
        dry_run = self._dry_run_appender
        dry_run.clear()
        self._dry_run_committer.submit_payload(item.source, item.topic.encode(), item.payload)
        await self._dry_run_committer.commit_once()
        total = dry_run.rows + len(dry_run.items)
        if item.reason not in _NOTHING_STORED_REASONS and dry_run.untimed and total > 1:
            return (
                "other readings of the same payload were stored with the time they came in; "
                "storing them again would double them"
            )
        if dry_run.items:
            return f"still bad: {dry_run.items[0].reason}: {dry_run.items[0].detail}"
        return None if dry_run.rows else "it holds no reading"
