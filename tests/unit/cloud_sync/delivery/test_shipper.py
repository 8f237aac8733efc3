"""The shipper settles what a destination answers for, and keeps everything else."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.destinations import EncodedBatch
from cloud_sync.model.errors import (
    RefusedError,
    RetryLaterError,
    TooLargeError,
    UnauthorisedError,
)
from cloud_sync.model.records import Batch, BatchRange, Receipt, RecordClass
from tests.support.open_spool import open_spool
from tests.support.shipping import one_sender, send_one, ship_one


@dataclass
class MemoryDestination:
    """A destination that keeps batches in memory; `faults` are raised first, one a send."""

    name: str = "memory"
    faults: list[Exception] = field(default_factory=list)
    most_rows: int = 10**9
    applied: dict[BatchRange, int] = field(default_factory=dict)
    sends: int = 0

    def encode(self, batch: Batch) -> EncodedBatch:
        return EncodedBatch(batch.range, batch.rows, (b"x" * batch.rows,))

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        self.sends += 1
        if self.faults:
            raise self.faults.pop(0)
        if encoded_batch.rows > self.most_rows:
            raise TooLargeError("too many rows")
        self.applied[encoded_batch.range] = encoded_batch.rows
        return Receipt(encoded_batch.rows, encoded_batch.rows)

    async def aclose(self) -> None:
        return


async def filled(spool, commits: int = 10) -> None:
    for i in range(commits):
        await spool.append([("a", i * 10 + k, 0.0) for k in range(10)])


async def test_a_backlog_is_delivered_once_in_order(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await filled(spool)
        destination = MemoryDestination()
        shipper = one_sender(spool.deliveries, destination, max_batch_rows=30)
        while await send_one(shipper):
            pass
        assert [(r.first_commit, r.last_commit, n) for r, n in destination.applied.items()] == [
            (1, 3, 30),
            (4, 6, 30),
            (7, 9, 30),
            (10, 10, 10),
        ]
        assert (await spool.deliveries.backlog("memory")).readings == 0
        assert shipper.counters.rows == 100


@pytest.mark.parametrize(
    ("fault", "state"),
    [
        (RetryLaterError("down"), "waiting"),
        (UnauthorisedError("no token"), "held"),
        (RefusedError("never"), "held"),
    ],
)
async def test_a_fault_keeps_the_batch_and_the_same_range_is_sent_again(tmp_path, fault, state):
    async with open_spool(tmp_path / "spool.db") as spool:
        await filled(spool)
        destination = MemoryDestination(faults=[fault])
        shipper = one_sender(spool.deliveries, destination, max_batch_rows=30)
        wait_s = await ship_one(shipper)
        assert wait_s is not None
        assert wait_s > 0
        assert (shipper.counters.state, shipper.counters.last_error) == (state, str(fault))
        assert (await spool.deliveries.backlog("memory")).readings == 100
        await filled(spool, commits=1)
        await ship_one(shipper)
        assert list(destination.applied.values()) == [30]
        assert shipper.counters.last_error == ""


async def test_a_batch_too_large_is_halved_until_it_is_taken(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await filled(spool)
        destination = MemoryDestination(most_rows=20)
        shipper = one_sender(spool.deliveries, destination, max_batch_rows=100)
        for _ in range(40):
            if await ship_one(shipper) is None and not (await spool.deliveries.backlog("memory")).readings:
                break
        assert sum(destination.applied.values()) == 100
        assert max(destination.applied.values()) <= 20


async def test_one_destination_does_not_wait_for_another(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await filled(spool)
        dead = one_sender(spool.deliveries, MemoryDestination("dead", faults=[RetryLaterError("gone")] * 99))
        well = one_sender(spool.deliveries, MemoryDestination("well"))
        await asyncio.gather(ship_one(dead), ship_one(well))
        assert (await spool.deliveries.backlog("dead")).readings == 100
        assert (await spool.deliveries.backlog("well")).readings == 0


async def test_a_damaged_segment_is_set_aside_and_the_rest_is_delivered(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await filled(spool, commits=3)
        await spool.database.write(
            lambda c: c.execute("UPDATE segment SET block = zeroblob(60) WHERE position & 255 = 2")
        )
        destination = MemoryDestination()
        shipper = one_sender(spool.deliveries, destination)
        await send_one(shipper)
        assert sum(destination.applied.values()) == 20
        damaged = await spool.database.read(
            lambda c: c.execute("SELECT rows, reason FROM damaged").fetchall()
        )
        assert damaged == [(10, "bad_magic: not a column block")]
        assert not await send_one(shipper)


async def test_the_loop_stops_when_told(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        stop = asyncio.Event()
        running = asyncio.create_task(one_sender(spool.deliveries, MemoryDestination(), flush_s=60).run(stop))
        await asyncio.sleep(0.05)
        stop.set()
        await asyncio.wait_for(running, 2)


async def test_the_commit_of_a_damaged_newest_segment_is_never_used_again(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await filled(spool, commits=3)
        await spool.database.write(
            lambda c: c.execute("UPDATE segment SET block = zeroblob(60) WHERE position & 255 = 3")
        )
        await send_one(one_sender(spool.deliveries, MemoryDestination()))
    async with open_spool(tmp_path / "spool.db") as spool:
        reading = RecordClass.READING
        assert (spool.segments.newest_commit(reading), spool.segments.rows_ever(reading)) == (3, 30)
        await spool.append([("a", 999, 0.0)])
        claimed = await spool.deliveries.claim("memory", ClaimRequest(now_us=1))
        assert claimed is not None
        assert claimed.first_commit == 4


async def test_an_error_that_no_destination_should_raise_delays_the_batch_and_ends_nothing(tmp_path):
    """Seen from an HTTP library whose socket was closed right after it connected."""
    async with open_spool(tmp_path / "spool.db") as spool:
        await filled(spool, 1)
        gone = AttributeError("'NoneType' object has no attribute 'getpeername'")
        destination = MemoryDestination(faults=[gone])
        shipper = one_sender(spool.deliveries, destination)
        with pytest.raises(RetryLaterError, match="AttributeError"):
            await send_one(shipper)
        while await send_one(shipper):
            pass
        assert sum(destination.applied.values()) == 10
