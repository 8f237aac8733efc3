"""A courier carries one batch at a time for a destination: claim -> encode -> send -> settle.

The couriers of a destination share an `Office`: what is known of the destination, and which batches are being
carried. What an answer means for the batch:

    receipt       settled, and the next one claimed in the same transaction
    TooLarge      halved in the spool, and remembered as a size
    Refused       because of its rows: halved again and again until the bad ones stand alone; these go to
                  quarantine with the destination's own words, the rest is delivered. A destination that says
                  which rows saves the halving
                  because it knows the range otherwise: the spool is an older copy, it takes a new epoch
    anything else raised to the shipper; the batch stays as it is
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cloud_sync.budget import Budget
from cloud_sync.counters import ShipperCounters
from cloud_sync.errors import Refused, TooLarge
from cloud_sync.evidence import BadRow, Evidence
from cloud_sync.lanes import Lane, Wanted
from cloud_sync.link import Link
from cloud_sync.records import RecordClass
from cloud_sync.sizing import SMALLEST_ROWS, Sizing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from cloud_sync.destinations import Destination
    from cloud_sync.records import Batch, BatchRange

_log = logging.getLogger(__name__)
_FOREIGN_RANGE = frozenset({"range_overlap", "range_mismatch"})
_BATCH_WITHIN_S = 5.0
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

    async def load(self, claimed: BatchRange, destination: str | None = None) -> Batch | None:
        """The records of a claimed batch; None when nothing of it can be read any more."""
        ...

    async def settle(
        self, destination: str, claimed: BatchRange, *, then: Wanted | None = None
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

    async def refuse(self, destination: str, batch: Batch, bad: Sequence[BadRow], *, now_us: int) -> None:
        """Quarantine rows of a batch, durably, and leave them out of it from now on."""
        ...


@dataclass(slots=True, eq=False)
class Office:
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
    sizing: dict[Lane | None, Sizing]
    budget: Budget = field(default_factory=Budget)
    link: Link = field(default_factory=Link)
    evidence: Evidence = field(default_factory=Evidence)
    counters: ShipperCounters = field(default_factory=ShipperCounters)
    keeps_ledger: bool = False
    urgent_only: Callable[[Lane | None], bool] = lambda _: False
    busy: set[BatchRange] = field(default_factory=set)
    generation: int = 0
    claiming: asyncio.Lock = field(default_factory=asyncio.Lock)
    clock_us: Callable[[], int] = lambda: time.time_ns() // 1000
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random


class Courier:
    """Carries batches of some lanes, each in turn; `ship_once` is the step."""

    def __init__(self, office: Office, lanes: Sequence[Lane | None]) -> None:
        self.lanes = tuple(lanes)
        self.carried: Lane | None = self.lanes[0]
        self.carried_part = False
        self.carried_class = RecordClass.READING
        self._office = office
        self._name = office.destination.name
        self._turn = 0
        self._following: tuple[int, Lane | None, BatchRange] | None = None

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
            self.carried_part = claimed.parts > 1
            self.carried_class = claimed.record_class
            self._turn = (self.lanes.index(lane) + 1) % len(self.lanes)
            try:
                return await self._carry(lane, claimed)
            finally:
                self._office.busy.discard(claimed)
        return 0

    def wanted(self, lane: Lane | None) -> Wanted:
        """What to ask the spool for."""
        office = self._office
        sizing = office.sizing[lane]
        most = office.budget.max_rows_in(_BATCH_WITHIN_S, lane, sizing.bytes_per_row, office.clock())
        rows = min(sizing.rows, max(SMALLEST_ROWS, int(min(most, sizing.max_rows))))
        return Wanted(lane, rows, office.clock_us(), frozenset(office.busy), office.urgent_only(lane))

    async def _claim(self, lane: Lane | None) -> BatchRange | None:
        office = self._office
        async with office.claiming:
            following, self._following = self._following, None
            if following is not None and following[:2] == (office.generation, lane):
                return following[2]
            if following is not None:
                office.busy.discard(following[2])
            wanted = self.wanted(lane)
            claimed = await office.spool.claim(
                self._name,
                now_us=wanted.now_us,
                max_rows=wanted.max_rows,
                lane=lane,
                busy=wanted.busy,
                urgent_only=wanted.urgent_only,
            )
            if claimed is not None:
                office.busy.add(claimed)
            return claimed

    async def _carry(self, lane: Lane | None, claimed: BatchRange) -> int:
        office = self._office
        batch = await office.spool.load(claimed, self._name)
        if batch is None or (
            batch.rows == 0 and not (office.keeps_ledger and (batch.refused or batch.withheld))
        ):
            await self._settle(lane, claimed, full=True)
            return 1
        parcel = await asyncio.get_running_loop().run_in_executor(None, office.destination.encode, batch)
        started = office.clock()
        try:
            receipt = await office.destination.send(parcel)
        except TooLarge:
            self._answered()
            for sizing in office.sizing.values():
                sizing.too_large(batch.rows)
            if not await self._halve(claimed):
                raise
            _log.info("%s finds %s too large; halved", self._name, claimed)
            return batch.rows
        except Refused as fault:
            self._answered()
            return await self._refused(batch, fault)
        finally:
            office.budget.spend(lane, wire_bytes=parcel.wire_bytes, rows=batch.rows, at=office.clock())
        self._answered()
        if claimed.record_class is RecordClass.READING:
            office.sizing[lane].took(batch.rows, parcel.wire_bytes, office.clock() - started)
        office.budget.grant(receipt.credit, office.clock())
        if batch.rows:
            office.evidence.taken()
        await self._settle(lane, claimed, full=batch.rows >= office.sizing[lane].rows // 2)
        name = "in order" if lane is None else lane.value
        office.counters.settled(receipt, parcel.wire_bytes, now_us=office.clock_us(), lane=name)
        return max(1, receipt.rows)

    async def _settle(self, lane: Lane | None, claimed: BatchRange, *, full: bool) -> None:
        """Settle, and fix what comes next; readings that have just come in rather wait for company."""
        office = self._office
        async with office.claiming:
            office.busy.discard(claimed)
            backlog = lane is Lane.BACKFILL or (lane is None and full)
            then = self.wanted(lane) if backlog else None
            following = await office.spool.settle(self._name, claimed, then=then)
            if following is not None:
                office.busy.add(following)
                self._following = office.generation, lane, following

    def _answered(self) -> None:
        office = self._office
        office.link.answered(office.clock(), office.chance())

    async def _halve(self, claimed: BatchRange) -> bool:
        spool = self._office.spool
        return await spool.split(self._name, claimed) or await spool.halve(self._name, claimed)

    async def _refused(self, batch: Batch, fault: Refused) -> int:
        office = self._office
        if fault.reason in _FOREIGN_RANGE:
            _log.error(
                "%s knows %s otherwise (%s): this spool is an older copy; it takes a new epoch",
                self._name,
                batch.range,
                fault,
            )
            await office.spool.renew_epoch()
            office.generation += 1
            return batch.rows
        if not fault.of_rows:
            raise fault
        told = sorted({row for row in fault.rows if 0 <= row < batch.rows})
        if not told and batch.rows > 1:
            if not await self._halve(batch.range):
                raise fault
            return batch.rows
        if not told and not office.evidence.believes(fault.reason):
            raise fault
        bad = [BadRow(row, fault.reason, str(fault)) for row in told or [0]]
        await office.spool.refuse(self._name, batch, bad, now_us=office.clock_us())
        office.counters.refused += len(bad)
        _log.warning("%s refuses %d rows of %s: %s", self._name, len(bad), batch.range, fault)
        return batch.rows
