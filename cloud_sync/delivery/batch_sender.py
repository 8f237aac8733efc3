"""Sends one batch at a time to a destination: claim -> encode -> send -> settle.

The senders of a destination share a `DeliveryState`. What the answer means for the batch:

    receipt             settled, and the next one claimed in the same transaction
    TooLargeError       split in the spool, and the size is remembered
    RefusedError        because of its rows: split until the bad ones stand alone; these go to quarantine with
                        the destination's own words, the rest is delivered. Not split when it names the rows.
                        Because it knows the range otherwise: the spool is an older copy and takes a new epoch
    any other error     the batch stays as it is, and will be sent again
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from cloud_sync.delivery.lanes import MIN_ROWS, BatchSizer, ClaimRequest, Lane, Schedule, SendBudget
from cloud_sync.model.errors import (
    DeliveryError,
    RefusalPolicy,
    RefusedError,
    RefusedRow,
    RetryLaterError,
    TooLargeError,
)
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.rates import Backoff, RateMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud_sync.destinations import Destination
    from cloud_sync.model.records import Batch, BatchRange, Receipt

BACKFILL_SPREAD_FRACTION = 0.1
MAX_BACKFILL_SPREAD_S = 30.0
LIVE_TARGET_S = 0.5

_log = logging.getLogger(__name__)
_RANGE_CONFLICTS = frozenset({"range_overlap", "range_mismatch"})
_MAX_BATCH_BUDGET_S = 5.0
"""A batch takes no more than so many seconds' worth of a byte budget or a credit."""


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """How one destination is served.

    `concurrency`: batches in flight; the first sender takes live, the others backfill; one takes turns.
    `keeps_ledger`: the destination records ranges, so it is sent batches whose rows were all left out.
    `target_s`: how long one request of backfill should take; `flush_s`: the wait to fill a live batch.
    `urgent`: alerts and declarations are sent whatever the schedule says.
    `hold_s`: shortest wait before the next try where an operator is needed.
    """

    kind: str = ""
    concurrency: int = 2
    in_order: bool = False
    keeps_ledger: bool = False
    max_batch_rows: int = 50_000
    max_batch_bytes: int = 4 << 20
    target_s: float = 0.5
    flush_s: float = 0.8
    max_bytes_per_s: float | None = None
    schedule: Schedule = field(default_factory=Schedule)
    schedule_for: Literal["backfill", "everything"] = "backfill"
    urgent: bool = True
    backoff: Backoff = field(default_factory=Backoff)
    hold_s: float = 30.0

    @property
    def lanes(self) -> tuple[Lane | None, ...]:
        """The lanes that there are; None is everything, in order."""
        return (None,) if self.in_order else (Lane.LIVE, Lane.BACKFILL)


@dataclass(slots=True)
class EndpointHealth:
    """Whether a destination answers; `failures` in a row are those that are not the batch's fault.

    Backfill waits until `backfill_from` after an outage.
    """

    failures: int = 0
    down_since: float | None = None
    retry_at: float = 0.0
    backfill_from: float = 0.0

    @property
    def is_down(self) -> bool:
        """Whether the newest send failed."""
        return self.failures > 0

    def record_failure(self, at: float) -> int:
        """Count a failed send; returns how many there are in a row."""
        self.down_since = at if self.down_since is None else self.down_since
        self.failures += 1
        return self.failures

    def record_answer(self, at: float, chance: float) -> None:
        """The destination answers; after an outage `chance`, 0 to 1, spreads when backfill begins."""
        if self.down_since is not None:
            self.backfill_from = at + chance * backfill_spread_s(at - self.down_since)
        self.failures, self.down_since, self.retry_at = 0, None, 0.0


def backfill_spread_s(outage_s: float) -> float:
    """Over how many seconds the gateways that shared an outage spread the beginning of their backfill."""
    return min(MAX_BACKFILL_SPREAD_S, BACKFILL_SPREAD_FRACTION * max(0.0, outage_s))


@dataclass(slots=True)
class LaneCounters:
    """What one lane has delivered. `delivered` is rows per second that receipts came for, a moving rate."""

    batches: int = 0
    rows: int = 0
    wire_bytes: int = 0
    delivered: RateMeter = field(default_factory=RateMeter)


@dataclass(slots=True)
class ShipperCounters:
    """What one destination has accepted since start, and its state now.

    `state`: idle, sending, waiting (for a retry) or held (an operator is needed). `last_error` is "" once
    a batch got through again. Refused rows went to quarantine. `lanes`: "live" and "backfill", or "in order".
    """

    state: str = "idle"
    batches: int = 0
    rows: int = 0
    duplicates: int = 0
    conflicts: int = 0
    refused: int = 0
    wire_bytes: int = 0
    failures: int = 0
    last_error: str = ""
    last_receipt_at_us: int | None = None
    delivered: RateMeter = field(default_factory=RateMeter)
    lanes: dict[str, LaneCounters] = field(default_factory=dict)

    def count_receipt(self, receipt: Receipt, lane: Lane | None, wire_bytes: int, now_us: int) -> None:
        """Count the rows of a batch, of all lanes and of its own."""
        at = time.monotonic()
        of_lane = self.lanes.setdefault("in order" if lane is None else lane.value, LaneCounters())
        for counters in (self, of_lane):
            counters.delivered.add(receipt.rows, at)
            counters.batches += 1
            counters.rows += receipt.rows
            counters.wire_bytes += wire_bytes
        self.duplicates += receipt.duplicates
        self.conflicts += receipt.conflicts
        self.last_receipt_at_us = now_us


class Spool(Protocol):
    """What a sender needs of the durable store. Every method may raise `StoreError`."""

    async def claim(self, destination: str, request: ClaimRequest) -> BatchRange | None:
        """Fix the next batch of a lane, durably; the same one until it is settled."""

    async def read_batch(self, claimed: BatchRange, destination: str | None = None) -> Batch | None:
        """The records of a claimed batch; None when nothing of it can be read any more."""

    async def settle(
        self, destination: str, claimed: BatchRange, *, then: ClaimRequest | None = None
    ) -> BatchRange | None:
        """Record that a batch is delivered; with `then`, claim the next one in the same transaction."""

    async def renew_epoch(self) -> None:
        """Take a new epoch: this spool is an older copy of one that the destination knows."""

    async def split_segments(self, destination: str, claimed: BatchRange) -> bool:
        """Make two ranges of a claimed batch; False when it is one segment."""

    async def split_rows(self, destination: str, claimed: BatchRange) -> bool:
        """Make two parts of a claimed batch; False when it is one row."""

    async def refuse(self, destination: str, batch: Batch, bad: Sequence[RefusedRow], *, now_us: int) -> None:
        """Quarantine rows of a batch, durably, and leave them out of it from now on."""


class DeliveryState:
    """What the senders of one destination share."""

    def __init__(
        self,
        spool: Spool,
        destination: Destination,
        options: DeliveryOptions,
        *,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.spool = spool
        self.destination = destination
        self.options = options
        self.clock_us = clock_us
        self.clock = clock
        self.chance = chance
        live_target_s = min(options.target_s, LIVE_TARGET_S)
        self.sizers = {
            lane: BatchSizer(
                options.max_batch_rows,
                options.max_batch_bytes,
                live_target_s if lane is Lane.LIVE else options.target_s,
            )
            for lane in options.lanes
        }
        self.budget = SendBudget(options.max_bytes_per_s)
        self.health = EndpointHealth()
        self.refusals = RefusalPolicy()
        self.counters = ShipperCounters()
        self.busy: set[BatchRange] = set()
        self.generation = 0
        self.claim_lock = asyncio.Lock()

    def is_closed(self, lane: Lane | None) -> bool:
        """Whether the schedule keeps a lane from sending now."""
        scheduled = self.options.schedule_for == "everything" or lane is not Lane.LIVE
        return scheduled and not self.options.schedule.is_open(self.clock_us())

    def build_claim_request(self, lane: Lane | None) -> ClaimRequest:
        """As many rows as the sizer and the budget allow."""
        sizer = self.sizers[lane]
        most = self.budget.max_rows_in(_MAX_BATCH_BUDGET_S, lane, sizer.bytes_per_row, self.clock())
        rows = min(sizer.rows, max(MIN_ROWS, int(min(most, sizer.max_rows))))
        return ClaimRequest(self.clock_us(), rows, lane, frozenset(self.busy), self.is_closed(lane))

    def is_full(self, lane: Lane | None, rows: int) -> bool:
        """Whether a batch of so many rows shows that more is waiting."""
        return rows >= self.sizers[lane].rows // 2

    def record_answer(self) -> None:
        """The destination answers, whatever it says."""
        self.health.record_answer(self.clock(), self.chance())


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """What one step did: the batch, None when there was nothing to send, and its rows.

    With an `error` it stays claimed.
    """

    lane: Lane | None = None
    claimed: BatchRange | None = None
    rows: int = 0
    error: DeliveryError | None = None


class BatchSender:
    """Sends batches of some lanes, the lanes in turn; `send_once` is the step."""

    def __init__(self, delivery_state: DeliveryState, lanes: Sequence[Lane | None]) -> None:
        self.lanes = tuple(lanes)
        self._state = delivery_state
        self._name = delivery_state.destination.name
        self._first = 0
        self._next_claim: tuple[int, Lane | None, BatchRange] | None = None

    async def send_once(self, lanes: Sequence[Lane | None] | None = None) -> DeliveryResult:
        """Send one batch of `lanes`, by default of all its lanes."""
        open_lanes = self.lanes if lanes is None else lanes
        lane, claimed, rows = open_lanes[0], None, 0
        try:
            for lane in (*self.lanes[self._first :], *self.lanes[: self._first]):
                claimed = await self._claim(lane) if lane in open_lanes else None
                if claimed is not None:
                    self._first = (self.lanes.index(lane) + 1) % len(self.lanes)
                    batch = await self._state.spool.read_batch(claimed, self._name)
                    rows = 0 if batch is None else batch.rows
                    await self._send(lane, claimed, batch)
                    return DeliveryResult(lane, claimed, rows)
        except DeliveryError as fault:
            return DeliveryResult(lane, claimed, rows, fault)
        finally:
            if claimed is not None:
                self._state.busy.discard(claimed)
        return DeliveryResult()

    async def _claim(self, lane: Lane | None) -> BatchRange | None:
        state = self._state
        async with state.claim_lock:
            following, self._next_claim = self._next_claim, None
            if following is not None and following[:2] == (state.generation, lane):
                return following[2]
            if following is not None:
                state.busy.discard(following[2])
            claimed = await state.spool.claim(self._name, state.build_claim_request(lane))
            if claimed is not None:
                state.busy.add(claimed)
            return claimed

    async def _send(self, lane: Lane | None, claimed: BatchRange, batch: Batch | None) -> None:
        state = self._state
        if batch is None or not (
            batch.rows or (state.options.keeps_ledger and (batch.refused or batch.withheld))
        ):
            await self._settle(lane, claimed, full=True)
            return
        loop = asyncio.get_running_loop()
        encoded_batch = await loop.run_in_executor(None, state.destination.encode, batch)
        started = state.clock()
        try:
            receipt = await state.destination.send(encoded_batch)
        except TooLargeError:
            state.record_answer()
            for sizer in state.sizers.values():
                sizer.record_too_large(batch.rows)
            if not await self._split(claimed):
                raise
            _log.info("%s: %s is too large; split", self._name, claimed)
            return
        except RefusedError as fault:
            state.record_answer()
            await self._resolve_refusal(batch, fault)
            return
        except DeliveryError:
            raise
        except Exception as error:
            _log.exception("%s: unexpected error in the destination", self._name)
            raise RetryLaterError(f"unexpected {type(error).__name__}: {error}") from error
        finally:
            state.budget.spend(lane, wire_bytes=encoded_batch.wire_bytes, rows=batch.rows, at=state.clock())
        state.record_answer()
        if claimed.record_class is RecordClass.READING:
            state.sizers[lane].record_sent(batch.rows, encoded_batch.wire_bytes, state.clock() - started)
        state.budget.grant(receipt.credit, state.clock())
        if batch.rows:
            state.refusals.unexplained = 0
        await self._settle(lane, claimed, full=state.is_full(lane, batch.rows))
        state.counters.count_receipt(receipt, lane, encoded_batch.wire_bytes, state.clock_us())

    async def _settle(self, lane: Lane | None, claimed: BatchRange, *, full: bool) -> None:
        """Settle, and claim what comes next; live readings are given time to fill a batch."""
        state = self._state
        async with state.claim_lock:
            state.busy.discard(claimed)
            backlog = lane is Lane.BACKFILL or (lane is None and full)
            then = state.build_claim_request(lane) if backlog else None
            following = await state.spool.settle(self._name, claimed, then=then)
            if following is not None:
                state.busy.add(following)
                self._next_claim = state.generation, lane, following

    async def _split(self, claimed: BatchRange) -> bool:
        spool = self._state.spool
        return await spool.split_segments(self._name, claimed) or await spool.split_rows(self._name, claimed)

    async def _resolve_refusal(self, batch: Batch, fault: RefusedError) -> None:
        """Renew the epoch, split the batch, or quarantine rows of it; otherwise raise the refusal."""
        state = self._state
        if fault.reason in _RANGE_CONFLICTS:
            message = "%s has other contents for %s (%s): this spool is an older copy; it takes a new epoch"
            _log.error(message, self._name, batch.range, fault)
            await state.spool.renew_epoch()
            state.generation += 1
            return
        if not fault.of_rows:
            raise fault
        named = sorted({row for row in fault.rows if 0 <= row < batch.rows})
        if not named and batch.rows > 1:
            if not await self._split(batch.range):
                raise fault
            return
        if not named and not state.refusals.accepts_refusal(fault.reason):
            raise fault
        bad = [RefusedRow(row, fault.reason, str(fault)) for row in named or [0]]
        await state.spool.refuse(self._name, batch, bad, now_us=state.clock_us())
        state.counters.refused += len(bad)
        _log.warning("%s refuses %d rows of %s: %s", self._name, len(bad), batch.range, fault)
