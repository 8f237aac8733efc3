"""Batches of downstream gateways into the spool: each range at most once (promise 4), in columns.

Records keep their series, times and contents and get commits of this gateway; they were checked, rolled up
and watched downstream, so none of it is repeated. Declared losses become alerts, because a downstream
gateway's commits mean nothing under this one's name (docs/decisions/023-chained-gateways.md).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from cloud_sync.model.ledger_rules import RangeConflictError
from cloud_sync.model.records import (
    Alerts,
    AlertState,
    Declarations,
    Flag,
    Readings,
    Receipt,
    RecordClass,
    Series,
    Severity,
)
from gateway.ingress.committer import retrieve_exception
from gateway.spool.segments import AppendResult

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Hashable

    from cloud_sync.model.records import Batch
    from gateway.ingress.committer import Committer
    from gateway.spool.appender import Appender
    from gateway.spool.received_ledger import ReceivedLedger

K = TypeVar("K", bound="Hashable")

LOSS_RULE = "declared_loss"
"""The rule of alerts that stand for what another gateway gave up, and the sensor_type of their series."""

_PROCESSED_FLAG = np.int32(Flag.PROCESSED)


class Lease:
    """A lock that is held: to the end of the block or, when `until` is set, until that is done."""

    until: asyncio.Future[AppendResult] | None = None


class KeyedLocks(Generic[K]):
    """A lock per key that lasts until what was begun under it is durable, its request cancelled or not."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[K, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[Lease]:
        """Hold the lock of `key`."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        await lock.acquire()
        lease = Lease()
        try:
            yield lease
        finally:
            if lease.until is None:
                lock.release()
            else:
                lease.until.add_done_callback(lambda _: lock.release())


class BatchReceiver:
    """Stores batches, one of a gateway at a time; with `process` readings get rollups and alerts here too."""

    def __init__(
        self,
        committer: Committer,
        appender: Appender,
        ledger: ReceivedLedger,
        *,
        process: bool = False,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._committer = committer
        self._resolver = committer.decoder.resolver
        self._appender = appender
        self.ledger = ledger
        self._process = process
        self._clock_us = clock_us
        self._locks = KeyedLocks[str]()

    async def store(self, batch: Batch) -> Receipt:
        """Make a batch durable, or answer as before when it is already.

        What was submitted is committed even when the caller is cancelled, and the next batch of its gateway
        waits for that. RangeConflictError: part of the range was stored, or all of it with other contents.
        """
        async with self._locks.hold(batch.range.gateway_id) as lease:
            earlier = await self.ledger.find_receipt(batch)
            if isinstance(earlier, Receipt):
                return earlier
            if earlier == "covered":
                return await self._match_stored(batch)
            lease.until = future = self._submit(batch)
            result = await asyncio.shield(future)
            return Receipt(batch.rows, result.stored, result.duplicates, result.conflicts)

    def _submit(self, batch: Batch) -> asyncio.Future[AppendResult]:
        note = self.ledger.build_note(batch, self._clock_us())
        records, series = batch.records, batch.series
        if isinstance(records, Readings):
            readings = self._resolver.renumber(records, series, limit_states=False)
            if not self._process:
                readings = replace(readings, flags=readings.flags | _PROCESSED_FLAG)
            return self._committer.submit_readings(readings, note=note, checked=True)
        if isinstance(records, Declarations):
            records, series = alerts_from_declarations(records, batch.range.gateway_id)
        own = self._resolver.renumber(records, series, limit_states=False).in_order()
        result = AppendResult(batch.rows, 0, 0)

        async def append() -> AppendResult:
            await self._appender.append_records(own, lambda c, _: note(c, result), now_us=self._clock_us())
            return result

        future = asyncio.ensure_future(append())
        future.add_done_callback(retrieve_exception)
        return future

    async def _match_stored(self, batch: Batch) -> Receipt:
        """The answer to a range that was stored in other pieces: its readings are there, or it conflicts."""
        if isinstance(batch.records, Readings):
            readings = self._resolver.renumber(batch.records, batch.series, limit_states=False)
            stored = await self._appender.match_stored(readings)
            if stored is not None:
                return Receipt(batch.rows, 0, stored.duplicates, stored.conflicts, applied_before=True)
        raise RangeConflictError(f"{batch.range}: was applied before with other records", "range_overlap")


def alerts_from_declarations(declared: Declarations, gateway_id: str) -> tuple[Alerts, tuple[Series, ...]]:
    """The losses that a gateway declares, as one alert each of a series named after it."""
    rows = declared.rows
    details = np.empty(rows, np.object_)
    details[:] = [_describe_loss(declared, row) for row in range(rows)]
    alerts = Alerts(
        series=np.zeros(rows, np.int32),
        time_us=declared.time_us,
        state=np.full(rows, AlertState.FIRING, np.int32),
        severity=np.full(rows, Severity.WARNING, np.int32),
        value=declared.lost.astype(np.float64),
        threshold=np.zeros(rows),
        count=np.ones(rows, np.int32),
        rule=np.full(rows, LOSS_RULE, np.object_),
        detail=details,
    )
    return alerts, (Series(gateway_id, LOSS_RULE),) if rows else ()


def _describe_loss(declared: Declarations, row: int) -> str:
    of_class = RecordClass(int(declared.of_class[row])).name.lower()
    first, last = (
        datetime.fromtimestamp(int(at_us[row]) / 1e6, UTC).isoformat(timespec="seconds")
        for at_us in (declared.from_us, declared.to_us)
    )
    survives = f"; left as {declared.survives[row]}" if declared.survives[row] else ""
    commits = f"commits {declared.first_commit[row]}..{declared.last_commit[row]}"
    return (
        f"{declared.lost[row]} {of_class} records of {first} to {last} ({commits}) were given up: "
        f"{declared.reason[row]}{survives}"
    )
