"""Batches of other gateways into the spool: each range at most once (promise 4), in columns.

What a gateway passes on is told upstream as its own: the readings keep their series, times, values and flags,
and get commits of this gateway (docs/decisions/023-chained-gateways.md).
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from cloud_sync.applied import RangeConflict
from cloud_sync.errors import Refused, RetryLater
from cloud_sync.records import Readings, Receipt, RecordClass

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud_sync.records import Batch
    from gateway.ingress.committer import Committer
    from gateway.spool.appender import Appender
    from gateway.spool.received import ReceivedRanges
    from gateway.spool.series import SeriesBook


def _now_us() -> int:
    return time.time_ns() // 1000


class BatchIntake:
    """Takes batches, one of a gateway at a time."""

    def __init__(
        self,
        committer: Committer,
        appender: Appender,
        book: SeriesBook,
        ledger: ReceivedRanges,
        *,
        clock_us: Callable[[], int] = _now_us,
    ) -> None:
        self._committer = committer
        self._appender = appender
        self._book = book
        self.ledger = ledger
        self._clock_us = clock_us
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def take(self, batch: Batch) -> Receipt:
        """Make a batch durable, or find that it was taken before.

        A batch that was handed to the committer is committed even when whoever waits here is cancelled, and
        the next batch of its gateway waits for that.

        Raises:
            RangeConflict: part of the range was taken, or all of it with other contents.
            Refused: records of a class that is not taken.
            RetryLater: there is no room for its series.
            SpoolError: nothing was taken.
        """
        if batch.range.record_class is not RecordClass.READING:
            what = batch.range.record_class.name.lower()
            raise Refused(f"{batch.range}: {what} records are not passed on", "unsupported_class")
        turn = self._turns.setdefault(batch.range.gateway_id, asyncio.Lock())
        await turn.acquire()
        try:
            earlier = await self.ledger.earlier(batch)
            if isinstance(earlier, Receipt):
                turn.release()
                return earlier
            readings = self._renumbered(batch)
            if earlier == "covered":
                receipt = await self._recognised(batch, readings)
                turn.release()
                return receipt
            note = self.ledger.note(batch, self._clock_us())
            promised = self._committer.bring(readings, note=note, checked=True)
        except BaseException:
            turn.release()
            raise
        promised.add_done_callback(lambda _: turn.release())
        taken = await asyncio.shield(promised)
        return Receipt(batch.rows, taken.stored, taken.duplicates, taken.conflicts)

    def _renumbered(self, batch: Batch) -> Readings:
        """The batch's readings, their series by the spool's numbers."""
        numbers = [self._book.number_of(series) for series in batch.series]
        if None in numbers:
            known = len(self._book)
            raise RetryLater(f"the spool already knows {known} series (spool.max_series)")
        readings = batch.readings
        return readings.with_series(np.array(numbers, np.int32)[readings.series]) if batch.rows else readings

    async def _recognised(self, batch: Batch, readings: Readings) -> Receipt:
        """The answer to a batch whose range was taken in other pieces: its rows are there, or it is a no."""
        found = await self._appender.recognise(readings)
        if found is None:
            message = f"{batch.range}: was applied before with other readings"
            raise RangeConflict(message, "range_overlap")
        return Receipt(batch.rows, 0, found.duplicates, found.conflicts, applied_before=True)
