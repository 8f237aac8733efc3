"""Sends one batch at a time to a destination: claim -> encode -> send -> settle.

The senders of a destination share a `DeliveryState`: endpoint health, counters, and the batches on their
way. What the answer means for the batch:

    receipt             settled, and the next one claimed in the same transaction
    TooLargeError       split in the spool, and the size is remembered
    RefusedError        because of its rows: split until the bad ones stand alone; these go to quarantine with
                        the destination's own words, the rest is delivered. Not split when it names the rows.
                        Because it knows the range otherwise: the spool is an older copy and takes a new epoch
    any other error     raised to the shipper; the batch stays as it is
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cloud_sync.delivery.lanes import MIN_ROWS, BatchSizer, ClaimRequest, Lane, SendBudget
from cloud_sync.model.errors import RefusalPolicy, RefusedError, RefusedRow, TooLargeError
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.rates import RateMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from cloud_sync.destinations import Destination
    from cloud_sync.model.records import Batch, BatchRange, Receipt

BACKFILL_SPREAD_FRACTION = 0.1
MAX_BACKFILL_SPREAD_S = 30.0


@dataclass(slots=True)
class EndpointHealth:
    """The state of one destination.

    Attributes:
        attempts: sends in a row that failed; 0 while it answers.
        down_since: of the first of them.
        backfill_from: when the backfill may begin after an outage.
    """

    attempts: int = 0
    down_since: float | None = None
    retry_at: float = 0.0
    backfill_from: float = 0.0

    @property
    def is_down(self) -> bool:
        """Whether the newest send failed for a reason that is not the batch's."""
        return self.attempts > 0

    def failed(self, at: float) -> int:
        """Note a failed send; returns the number of this attempt (1, 2, ...)."""
        self.down_since = at if self.down_since is None else self.down_since
        self.attempts += 1
        return self.attempts

    def answered(self, at: float, chance: float) -> None:
        """Note that the destination takes batches again. `chance` is from 0 to 1."""
        if self.down_since is not None:
            self.backfill_from = at + chance * backfill_spread_s(at - self.down_since)
        self.attempts, self.down_since, self.retry_at = 0, None, 0.0


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
    """What one destination has taken since start, and how it is doing now.

    Attributes:
        state: idle, sending, waiting (a retry is due later) or held (a person is needed).
        last_error: the newest fault in words, "" once a batch went through again.
        refused: rows that the destination refused and that went to quarantine.
        delivered: rows per second that receipts came for, a moving rate.
        lanes: the same by lane, "live", "backfill", or "in order".
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

    def settled(self, receipt: Receipt, wire_bytes: int, *, now_us: int, lane: str = "live") -> None:
        """Count a receipt."""
        at = time.monotonic()
        of_lane = self.lanes.setdefault(lane, LaneCounters())
        for counted in (self, of_lane):
            counted.delivered.add(receipt.rows, at)
            counted.batches += 1
            counted.rows += receipt.rows
            counted.wire_bytes += wire_bytes
        self.duplicates += receipt.duplicates
        self.conflicts += receipt.conflicts
        self.last_receipt_at_us = now_us


_log = logging.getLogger(__name__)
_RANGE_CONFLICTS = frozenset({"range_overlap", "range_mismatch"})
_MAX_BATCH_BUDGET_S = 5.0
"""A batch takes no more than so many seconds' worth of a byte budget or a credit."""


class Spool(Protocol):
    """What a courier needs of the durable store. Every method may raise `StoreFault`."""

    async def claim(
        self,
        destination: str,
        *,
        now_us: int,
        max_rows: int,
        lane: Lane | None = None,
        busy: Collection[BatchRange] = (),
        urgent_only: bool = False,
    ) -> BatchRange | None:
        """Fix the next batch of a lane, durably; the same one until it is settled."""
        ...

    async def read_batch(self, claimed: BatchRange, destination: str | None = None) -> Batch | None:
        """The records of a claimed batch; None when nothing of it can be read any more."""
        ...

    async def settle(
        self, destination: str, claimed: BatchRange, *, then: ClaimRequest | None = None
    ) -> BatchRange | None:
        """The destination has answered for the batch; with `then`, claim the next one."""
        ...

    async def renew_epoch(self) -> None:
        """Take a new epoch: this spool is an older copy of one that the destination knows."""
        ...

    async def split(self, destination: str, claimed: BatchRange) -> bool:
        """Make two ranges of a claimed one; False when it cannot be."""
        ...

    async def halve(self, destination: str, claimed: BatchRange) -> bool:
        """Make two parts of a claimed batch; False when it is a single row."""
        ...

    async def refuse(self, destination: str, batch: Batch, bad: Sequence[RefusedRow], *, now_us: int) -> None:
        """Quarantine rows of a batch, durably, and leave them out of it from now on."""
        ...


@dataclass(slots=True, eq=False)
class DeliveryState:
    """What the couriers of one destination share.

    Attributes:
        keeps_ledger: whether the destination notes ranges, and so is told of a batch with no row left in it.
        urgent_only: whether a lane carries only what does not wait for a schedule, for now.
        sizing: by lane.
        busy: batches being carried.
        generation: counts the epochs that were given up here.
    """

    spool: Spool
    destination: Destination
    sizing: dict[Lane | None, BatchSizer]
    budget: SendBudget = field(default_factory=SendBudget)
    link: EndpointHealth = field(default_factory=EndpointHealth)
    evidence: RefusalPolicy = field(default_factory=RefusalPolicy)
    counters: ShipperCounters = field(default_factory=ShipperCounters)
    keeps_ledger: bool = False
    urgent_only: Callable[[Lane | None], bool] = lambda _: False
    busy: set[BatchRange] = field(default_factory=set)
    generation: int = 0
    claim_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    clock_us: Callable[[], int] = lambda: time.time_ns() // 1000
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random


class BatchSender:
    """Carries batches of some lanes, each in turn; `ship_once` is the step."""

    def __init__(self, delivery_state: DeliveryState, lanes: Sequence[Lane | None]) -> None:
        self.lanes = tuple(lanes)
        self.carried: Lane | None = self.lanes[0]
        self.sent_part = False
        self.sent_class = RecordClass.READING
        self._delivery_state = delivery_state
        self._name = delivery_state.destination.name
        self._turn = 0
        self._next_claim: tuple[int, Lane | None, BatchRange] | None = None

    async def ship_once(self, lanes: Sequence[Lane | None] | None = None) -> int:
        """Carry one batch of `lanes` (all of its own); returns its rows, 0 when there was nothing to carry.

        A batch that was halved counts as the rows that are still to be sent.

        Raises:
            DeliveryError: the batch stays claimed and will be sent again.
        """
        open_lanes = self.lanes if lanes is None else lanes
        turns = [*self.lanes[self._turn :], *self.lanes[: self._turn]]
        for lane in turns:
            if lane not in open_lanes:
                continue
            claimed = await self._claim(lane)
            if claimed is None:
                continue
            self.carried = lane
            self.sent_part = claimed.parts > 1
            self.sent_class = claimed.record_class
            self._turn = (self.lanes.index(lane) + 1) % len(self.lanes)
            try:
                return await self._send_claimed(lane, claimed)
            finally:
                self._delivery_state.busy.discard(claimed)
        return 0

    def wanted(self, lane: Lane | None) -> ClaimRequest:
        """What to ask the spool for."""
        delivery_state = self._delivery_state
        sizing = delivery_state.sizing[lane]
        most = delivery_state.budget.max_rows_in(
            _MAX_BATCH_BUDGET_S, lane, sizing.bytes_per_row, delivery_state.clock()
        )
        rows = min(sizing.rows, max(MIN_ROWS, int(min(most, sizing.max_rows))))
        return ClaimRequest(
            lane,
            rows,
            delivery_state.clock_us(),
            frozenset(delivery_state.busy),
            delivery_state.urgent_only(lane),
        )

    async def _claim(self, lane: Lane | None) -> BatchRange | None:
        delivery_state = self._delivery_state
        async with delivery_state.claim_lock:
            following, self._next_claim = self._next_claim, None
            if following is not None and following[:2] == (delivery_state.generation, lane):
                return following[2]
            if following is not None:
                delivery_state.busy.discard(following[2])
            wanted = self.wanted(lane)
            claimed = await delivery_state.spool.claim(
                self._name,
                now_us=wanted.now_us,
                max_rows=wanted.max_rows,
                lane=lane,
                busy=wanted.busy,
                urgent_only=wanted.urgent_only,
            )
            if claimed is not None:
                delivery_state.busy.add(claimed)
            return claimed

    async def _send_claimed(self, lane: Lane | None, claimed: BatchRange) -> int:
        delivery_state = self._delivery_state
        batch = await delivery_state.spool.read_batch(claimed, self._name)
        if batch is None or (
            batch.rows == 0 and not (delivery_state.keeps_ledger and (batch.refused or batch.withheld))
        ):
            await self._settle(lane, claimed, full=True)
            return 1
        encoded_batch = await asyncio.get_running_loop().run_in_executor(
            None, delivery_state.destination.encode, batch
        )
        started = delivery_state.clock()
        try:
            receipt = await delivery_state.destination.send(encoded_batch)
        except TooLargeError:
            self._answered()
            for sizing in delivery_state.sizing.values():
                sizing.too_large(batch.rows)
            if not await self._halve(claimed):
                raise
            _log.info("%s finds %s too large; halved", self._name, claimed)
            return batch.rows
        except RefusedError as fault:
            self._answered()
            return await self._refused(batch, fault)
        finally:
            delivery_state.budget.spend(
                lane, wire_bytes=encoded_batch.wire_bytes, rows=batch.rows, at=delivery_state.clock()
            )
        self._answered()
        if claimed.record_class is RecordClass.READING:
            delivery_state.sizing[lane].took(
                batch.rows, encoded_batch.wire_bytes, delivery_state.clock() - started
            )
        delivery_state.budget.grant(receipt.credit, delivery_state.clock())
        if batch.rows:
            delivery_state.evidence.taken()
        await self._settle(lane, claimed, full=batch.rows >= delivery_state.sizing[lane].rows // 2)
        name = "in order" if lane is None else lane.value
        delivery_state.counters.settled(
            receipt, encoded_batch.wire_bytes, now_us=delivery_state.clock_us(), lane=name
        )
        return max(1, receipt.rows)

    async def _settle(self, lane: Lane | None, claimed: BatchRange, *, full: bool) -> None:
        """Settle, and fix what comes next; readings that have just come in rather wait for company."""
        delivery_state = self._delivery_state
        async with delivery_state.claim_lock:
            delivery_state.busy.discard(claimed)
            backlog = lane is Lane.BACKFILL or (lane is None and full)
            then = self.wanted(lane) if backlog else None
            following = await delivery_state.spool.settle(self._name, claimed, then=then)
            if following is not None:
                delivery_state.busy.add(following)
                self._next_claim = delivery_state.generation, lane, following

    def _answered(self) -> None:
        delivery_state = self._delivery_state
        delivery_state.link.answered(delivery_state.clock(), delivery_state.chance())

    async def _halve(self, claimed: BatchRange) -> bool:
        spool = self._delivery_state.spool
        return await spool.split(self._name, claimed) or await spool.halve(self._name, claimed)

    async def _refused(self, batch: Batch, fault: RefusedError) -> int:
        delivery_state = self._delivery_state
        if fault.reason in _RANGE_CONFLICTS:
            _log.error(
                "%s knows %s otherwise (%s): this spool is an older copy; it takes a new epoch",
                self._name,
                batch.range,
                fault,
            )
            await delivery_state.spool.renew_epoch()
            delivery_state.generation += 1
            return batch.rows
        if not fault.of_rows:
            raise fault
        told = sorted({row for row in fault.rows if 0 <= row < batch.rows})
        if not told and batch.rows > 1:
            if not await self._halve(batch.range):
                raise fault
            return batch.rows
        if not told and not delivery_state.evidence.accepts_refusal(fault.reason):
            raise fault
        bad = [RefusedRow(row, fault.reason, str(fault)) for row in told or [0]]
        await delivery_state.spool.refuse(self._name, batch, bad, now_us=delivery_state.clock_us())
        delivery_state.counters.refused += len(bad)
        _log.warning("%s refuses %d rows of %s: %s", self._name, len(bad), batch.range, fault)
        return batch.rows
