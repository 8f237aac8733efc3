from __future__ import annotations

from dataclasses import replace

import numpy as np

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import RecordClass, Series
from gateway.build import build_retention_policy
from gateway.settings.gateway_settings import GatewaySettings
from gateway.spool import eviction
from gateway.spool.appender import Capacity
from gateway.spool.eviction import RetentionPolicy
from gateway.spool.processing_state import PROGRESS_KEY, write_processing_state
from gateway.spool.retention import Retention
from gateway.spool.segments import encode_segments
from tests.support.open_spool import NOW_US, build_retention, open_spool
from tests.support.summary_examples import alerts, declarations, rollups

LATER_US = NOW_US + 3600 * 1_000_000


async def deliver_all(spool, name: str, max_rows: int = 10**6) -> None:
    claimed = await spool.deliveries.claim(name, ClaimRequest(now_us=NOW_US, max_rows=max_rows))
    await spool.deliveries.settle(name, claimed)


async def count(spool) -> int:
    return await spool.database.read(lambda c: c.execute("SELECT count(*) FROM segment").fetchone()[0])


async def test_only_what_every_destination_has_is_pruned_and_only_after_a_while(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for i in range(10):
            await spool.append([("a", i, 0.0)])
        retention = build_retention(spool.database, spool.segments, "x", "y", keep_s=60)
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
        assert await build_retention(spool.database, spool.segments, "x").prune_once(LATER_US) == 5
    async with open_spool(tmp_path / "spool.db") as spool:
        assert spool.segments.newest_commit(RecordClass.READING) == 5
        assert spool.segments.rows_ever(RecordClass.READING) == 10
        await spool.append([("a", 9, 0.0)])
        claimed = await spool.deliveries.claim("x", ClaimRequest(now_us=NOW_US))
        assert claimed is not None
        assert claimed.first_commit == 6


async def test_a_full_spool_gives_up_what_is_delivered_at_once(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 1, 0.0)])
        await deliver_all(spool, "x")
        patient = build_retention(spool.database, spool.segments, "x", keep_s=10**6)
        assert await patient.prune_once(LATER_US) == 0
        full = build_retention(
            spool.database, spool.segments, "x", keep_s=10**6, capacity=Capacity(max_bytes=1)
        )
        assert await full.prune_once(LATER_US) == 1


async def test_without_destinations_nothing_is_pruned(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 1, 0.0)])
        assert await build_retention(spool.database, spool.segments).prune_once(LATER_US) == 0


async def test_alerts_and_declarations_go_some_day_and_only_once_they_are_delivered(tmp_path):
    (tmp_path / "token").write_text("t")
    settings = GatewaySettings.model_validate(
        {
            "gateway_id": "g",
            "spool": {"path": tmp_path / "spool.db"},
            "destinations": [
                {"name": "x", "kind": "ingest", "url": "http://127.0.0.1:1", "token_file": tmp_path / "token"}
            ],
        }
    )
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.deliveries.register("x", "file", now_us=NOW_US)
        spool.catalog.assign_number(Series("a", "t"))
        for records in (alerts(2, series=1), declarations(2, destination="x")):
            await spool.segments.append(encode_segments(records), now_us=NOW_US)
        later_us = NOW_US + 91 * 86_400_000_000
        policy = build_retention_policy(settings)
        retention = Retention(spool.database, spool.segments, Capacity(), policy)
        classes = (RecordClass.ROLLUP, RecordClass.ALERT, RecordClass.DECLARATION)

        async def prune(now_us: int) -> int:
            return sum([await retention.prune_once(now_us, record_class) for record_class in classes])

        assert await prune(later_us) == 0, "not delivered"
        await deliver_all(spool, "x")
        await deliver_all(spool, "x")
        assert await prune(NOW_US) == 0, "not old"
        assert await prune(later_us) == 2
        assert await count(spool) == 0


async def test_delivered_rollups_go_before_readings_that_somebody_lacks(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for name in ("x", "y"):
            await spool.deliveries.register(name, "file", now_us=NOW_US)
        number = spool.catalog.assign_number(Series("a", "t"))
        made = rollups(200, 1, seed=1)
        made = replace(made, series=np.full(200, number, np.int32))
        await spool.segments.append(encode_segments(made), now_us=NOW_US)
        for name in ("x", "y"):
            await deliver_all(spool, name)
        await spool.append([("a", i, 0.0) for i in range(100)])
        await spool.database.write(lambda c: write_processing_state(c, {PROGRESS_KEY: b"1"}))
        capacity = Capacity(max_bytes=1)
        policy = RetentionPolicy(
            dict.fromkeys(RecordClass, ("x", "y")),
            {RecordClass.READING: 60, RecordClass.ROLLUP: 10**9},
            evicts=True,
        )
        retention = Retention(spool.database, spool.segments, capacity, policy)
        assert await retention.prune_once(LATER_US, RecordClass.ROLLUP) == 0, (
            "a day of rollups is kept for revisions"
        )
        assert await retention.make_room_once(NOW_US + 25 * LATER_US - 25 * NOW_US)
        assert await spool.database.read(eviction.read_loss_totals) == []
        assert await retention.make_room_once(NOW_US + 25 * LATER_US - 25 * NOW_US)
        assert [total.rows for total in await spool.database.read(eviction.read_loss_totals)] == [100, 100]
