from __future__ import annotations

from cloud_sync.records import RecordClass
from gateway.spool.capacity import Capacity
from gateway.spool.retention import Retention
from tests.spools import NOW_US, open_spool

LATER_US = NOW_US + 3600 * 1_000_000


async def deliver_all(spool, name: str, max_rows: int = 10**6) -> None:
    claimed = await spool.deliveries.claim(name, now_us=NOW_US, max_rows=max_rows)
    await spool.deliveries.settle(name, claimed)


async def count(spool) -> int:
    return await spool.database.read(lambda c: c.execute("SELECT count(*) FROM segment").fetchone()[0])


async def test_only_what_every_destination_has_is_pruned_and_only_after_a_while(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for i in range(10):
            await spool.append([("a", i, 0.0)])
        retention = Retention(spool.database, ["x", "y"], keep_s=60)
        await deliver_all(spool, "x")
        assert await retention.prune_once(LATER_US) == 0
        await deliver_all(spool, "y", max_rows=4)
        assert await retention.prune_once(NOW_US) == 0, "younger than keep_s"
        assert await retention.prune_once(LATER_US) == 4
        assert await count(spool) == 6
        assert (await spool.deliveries.backlog("y")).readings == 6
        assert (await spool.deliveries.backlog("x")).readings == 0


async def test_commit_numbers_go_on_after_everything_was_pruned(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for i in range(5):
            await spool.append([("a", i, 0.0), ("b", i, 0.0)])
        await deliver_all(spool, "x")
        assert await Retention(spool.database, ["x"], keep_s=0).prune_once(LATER_US) == 5
    async with open_spool(tmp_path / "spool.db") as spool:
        assert spool.segments.newest_commit(RecordClass.READING) == 5
        assert spool.segments.rows_ever(RecordClass.READING) == 10
        await spool.append([("a", 9, 0.0)])
        claimed = await spool.deliveries.claim("x", now_us=NOW_US)
        assert claimed is not None
        assert claimed.first_commit == 6


async def test_a_full_spool_gives_up_what_is_delivered_at_once(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 1, 0.0)])
        await deliver_all(spool, "x")
        patient = Retention(spool.database, ["x"], keep_s=10**6)
        assert await patient.prune_once(LATER_US) == 0
        full = Retention(spool.database, ["x"], keep_s=10**6, capacity=Capacity(max_bytes=1))
        assert await full.prune_once(LATER_US) == 1


async def test_without_destinations_nothing_is_pruned(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 1, 0.0)])
        assert await Retention(spool.database, [], keep_s=0).prune_once(LATER_US) == 0
