"""Batches of downstream gateways into the spool: each range at most once (promise 4), in columns.

Records keep their series, times and contents and get commits of this gateway; they were checked, rolled up
and watched downstream, so none of it is repeated. Declared losses become alerts, because a downstream
gateway's commits mean nothing under this one's name (docs/decisions/023-chained-gateways.md).
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.ledger_rules import RangeConflictError
from cloud_sync.model.records import (
    Alerts,
    AlertState,
    Declarations,
    Flag,
    Readings,
    Receipt,
    RecordClass,
    Records,
    Series,
    Severity,
)
from gateway.spool.segments import AppendResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud_sync.model.records import Batch
    from gateway.ingress.committer import Committer
    from gateway.spool.appender import Appender
    from gateway.spool.received_ledger import ReceivedLedger
    from gateway.spool.segments import CommitNote
    from gateway.spool.series_catalog import SeriesCatalog


R = TypeVar("R", bound=Records)

LOSS_RULE = "declared_loss"
"""The rule of alerts that stand for what another gateway gave up, and the sensor_type of their series."""

_PROCESSED_FLAG = np.int32(Flag.PROCESSED)


def _now_us() -> int:
    return time.time_ns() // 1000


class BatchReceiver:
    """Takes batches, one of a gateway at a time.

    Args:
        committer: where readings go.
        appender: where other records go.
        catalog: of series.
        ledger: of what was taken.
        process: whether readings are rolled up and watched here all the same.
        clock_us: wall clock, microseconds since 1970.
    """

    def __init__(
        self,
        committer: Committer,
        appender: Appender,
        catalog: SeriesCatalog,
        ledger: ReceivedLedger,
        *,
        process: bool = False,
        clock_us: Callable[[], int] = _now_us,
    ) -> None:
        self._committer = committer
        self._appender = appender
        self._catalog = catalog
        self.ledger = ledger
        self._process = process
        self._clock_us = clock_us
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(self, batch: Batch) -> Receipt:
        """Make a batch durable, or find that it was taken before.

        What was handed over is committed even when whoever waits here is cancelled, and the next batch of its
        gateway waits for that.

        Raises:
            RangeConflict: part of the range was taken, or all of it with other contents.
            RetryLater: there is no room for its series.
            SpoolError: nothing was taken.
        """
        turn = self._turns.setdefault(batch.range.gateway_id, asyncio.Lock())
        await turn.acquire()
        try:
            begun = await self._begin(batch)
        except BaseException:
            turn.release()
            raise
        if isinstance(begun, Receipt):
            turn.release()
            return begun

        def end(done: asyncio.Future[AppendResult]) -> None:
            turn.release()
            if not done.cancelled():
                done.exception()  # looked at, in case nobody waits for it any more

        begun.add_done_callback(end)
        taken = await asyncio.shield(begun)
        return Receipt(batch.rows, taken.stored, taken.duplicates, taken.conflicts)

    async def _begin(self, batch: Batch) -> Receipt | asyncio.Future[AppendResult]:
        """The receipt of a batch that was taken before, or what will tell of one that is new."""
        earlier = await self.ledger.earlier(batch)
        if isinstance(earlier, Receipt):
            return earlier
        note = self.ledger.note(batch, self._clock_us())
        if isinstance(batch.records, Readings):
            readings = self._with_spool_series(batch.records, batch.series)
            if earlier == "covered":
                return await self._recognised(batch, readings)
            if not self._process:
                readings = replace(readings, flags=readings.flags | _PROCESSED_FLAG)
            return self._committer.submit_readings(readings, note=note, checked=True)
        if earlier == "covered":
            raise _range_conflict_error(batch)
        records, series = batch.records, batch.series
        if isinstance(records, Declarations):
            records, series = alerts_from_declarations(records, batch.range.gateway_id)
        own = self._with_spool_series(records, series).in_order()
        return asyncio.ensure_future(self._append_records(own, note, batch.rows))

    async def _append_records(self, records: Records, note: CommitNote, rows: int) -> AppendResult:
        result = AppendResult(rows, 0, 0)
        await self._appender.append_records(records, lambda c, _: note(c, result), now_us=self._clock_us())
        return result

    def _with_spool_series(self, records: R, series: Sequence[Series]) -> R:
        """Records by the spool's numbers of their series."""
        numbers = [self._catalog.assign_number(one) for one in series]
        if None in numbers:
            known = len(self._catalog)
            raise RetryLaterError(f"the spool already knows {known} series (spool.max_series)")
        return records.with_series(np.array(numbers, np.int32)[records.series]) if records.rows else records

    async def _recognised(self, batch: Batch, readings: Readings) -> Receipt:
        """The answer to a batch whose range was taken in other pieces: its rows are there, or it is a no."""
        found = await self._appender.match_stored(readings)
        if found is None:
            raise _range_conflict_error(batch)
        return Receipt(batch.rows, 0, found.duplicates, found.conflicts, applied_before=True)


def alerts_from_declarations(declared: Declarations, gateway_id: str) -> tuple[Alerts, tuple[Series, ...]]:
    """What a gateway gave up, as alerts of a series called like it; one a row, in their order."""
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


def _range_conflict_error(batch: Batch) -> RangeConflictError:
    return RangeConflictError(f"{batch.range}: was applied before with other records", "range_overlap")
