"""The shipper of one destination: claim -> encode -> send -> settle.

Each step can be called alone; the loop around them is short. A batch that was not settled is sent again,
the same range, until the destination answers for it; nothing is dropped because of retries. What else may
happen to a batch is said by the error classes (`cloud_sync.errors`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cloud_sync.backoff import Backoff
from cloud_sync.errors import DeliveryError, Refused, RetryLater, StoreTrouble, TooLarge, Unauthorised
from cloud_sync.rates import Rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud_sync.destinations import Destination
    from cloud_sync.records import Batch, BatchRange, Receipt

_log = logging.getLogger(__name__)
_HOLD_S = 30.0
_FOREIGN_RANGE = frozenset({"range_overlap", "range_mismatch"})


class Spool(Protocol):
    """What a shipper needs of the durable store."""

    async def claim(self, destination: str, *, now_us: int, max_rows: int) -> BatchRange | None:
        """Fix the next range to send, durably; the same one until it is settled."""
        ...

    async def load(self, claimed: BatchRange) -> Batch | None:
        """The records of a claimed range; None when nothing of it can be read any more."""
        ...

    async def settle(self, destination: str, claimed: BatchRange) -> None:
        """The destination has answered for the range."""
        ...

    async def renew_epoch(self) -> None:
        """Take a new epoch: this spool is an older copy of one that the destination knows."""
        ...

    async def split(self, destination: str, claimed: BatchRange) -> bool:
        """Halve a claimed range; False when it cannot be."""
        ...


@dataclass(slots=True)
class ShipperCounters:
    """What one destination has taken since start, and how it is doing now.

    Attributes:
        state: idle, sending, waiting (a retry is due later) or held (a person is needed).
        last_error: the newest fault in words, "" once a batch went through again.
        delivered: rows per second that receipts came for, a moving rate.
    """

    state: str = "idle"
    batches: int = 0
    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    wire_bytes: int = 0
    failures: int = 0
    last_error: str = ""
    last_receipt_at_us: int | None = None
    delivered: Rate = field(default_factory=Rate)

    def settled(self, receipt: Receipt, wire_bytes: int, *, now_us: int) -> None:
        """Count a receipt."""
        self.delivered.add(receipt.rows, time.monotonic())
        self.batches += 1
        self.rows += receipt.rows
        self.duplicates += receipt.duplicates
        self.conflicts += receipt.conflicts
        self.wire_bytes += wire_bytes
        self.last_error = ""
        self.last_receipt_at_us = now_us


class Shipper:
    """Delivers one destination's backlog. `ship_once` is the step, `run` the loop."""

    def __init__(
        self,
        spool: Spool,
        destination: Destination,
        *,
        kind: str = "",
        max_batch_rows: int = 50_000,
        flush_s: float = 1.0,
        backoff: Backoff = Backoff(),  # noqa: B008 - an immutable value
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.name = destination.name
        self.kind = kind
        self._spool = spool
        self._destination = destination
        self._max_batch_rows = max_batch_rows
        self._flush_s = flush_s
        self._backoff = backoff
        self._clock_us = clock_us
        self._attempt = 0
        self.counters = ShipperCounters()

    async def aclose(self) -> None:
        """Release the destination's connections."""
        await self._destination.aclose()

    async def run(self, stop: asyncio.Event) -> None:
        """Ship until `stop` is set: batch after batch while there is backlog, else every `flush_s`."""
        while not stop.is_set():
            started = time.monotonic()
            wait_s = await self.ship_or_wait()
            if wait_s is None:
                wait_s = max(0.0, started + self._flush_s - time.monotonic())
            await _sleep_unless(stop, wait_s)

    async def ship_or_wait(self) -> float | None:
        """Ship one batch; returns seconds to wait: 0 when more is ready, None when all is delivered."""
        try:
            rows = await self.ship_once()
        except RetryLater as fault:
            self._failed("waiting", fault)
            return self._backoff.wait_s(self._attempt, fault.retry_after_s)
        except StoreTrouble as fault:
            self._failed("waiting", fault)
            return self._backoff.wait_s(self._attempt)
        except (Unauthorised, Refused, TooLarge) as fault:
            self._failed("held", fault)
            return max(_HOLD_S, self._backoff.wait_s(self._attempt))
        self._attempt = 0
        self.counters.state = "idle"
        return 0.0 if rows >= self._max_batch_rows // 2 else None

    async def ship_once(self) -> int:
        """Claim, encode, send and settle one batch; returns its rows, 0 when there was nothing to send.

        Raises:
            DeliveryError: the batch stays claimed and will be sent again.
        """
        claimed = await self._spool.claim(self.name, now_us=self._clock_us(), max_rows=self._max_batch_rows)
        if claimed is None:
            return 0
        self.counters.state = "sending"
        batch = await self._spool.load(claimed)
        if batch is None:
            await self._spool.settle(self.name, claimed)
            return 0
        parcel = await asyncio.get_running_loop().run_in_executor(None, self._destination.encode, batch)
        try:
            receipt = await self._destination.send(parcel)
        except TooLarge:
            if await self._spool.split(self.name, claimed):
                _log.info("%s finds %s too large; halved", self.name, claimed)
                return self._max_batch_rows
            raise
        except Refused as fault:
            if fault.reason not in _FOREIGN_RANGE:
                raise
            _log.error(
                "%s knows %s otherwise (%s): this spool is an older copy; it takes a new epoch",
                self.name,
                claimed,
                fault,
            )
            await self._spool.renew_epoch()
            return self._max_batch_rows
        await self._spool.settle(self.name, claimed)
        self.counters.settled(receipt, parcel.wire_bytes, now_us=self._clock_us())
        return receipt.rows

    def _failed(self, state: str, fault: DeliveryError | StoreTrouble) -> None:
        self._attempt += 1
        self.counters.failures += 1
        self.counters.state = state
        if self.counters.last_error != str(fault):
            _log.warning("%s: %s (%s; the backlog is kept)", self.name, fault, state)
        self.counters.last_error = str(fault)


async def _sleep_unless(stop: asyncio.Event, seconds: float) -> None:
    """Sleep, or return early when `stop` is set."""
    if seconds <= 0:
        return
    try:
        async with asyncio.timeout(seconds):
            await stop.wait()
    except TimeoutError:
        pass
