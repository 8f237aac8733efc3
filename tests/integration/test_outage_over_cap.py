"""An outage that outgrows the spool: what was delivered and what was declared is what was acknowledged.

`TIDEGATE_TEST_OFFLINE_DAYS` says how many days (30 takes some minutes); without it some hours.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import asyncpg
import numpy as np
import pytest

from cloud_sync.model.records import Readings, RecordClass, Series
from gateway.processing.commit_consumer import CommitConsumer, ConsumerOptions
from gateway.rollups.open_windows import RollupOptions
from gateway.rollups.roller import Roller
from gateway.spool import eviction
from gateway.spool.appender import Capacity
from gateway.spool.database import open_read_only
from gateway.spool.segment_reader import CommitLogReader, StoredRollups
from gateway.spool.segments import encode_segments
from tests.support.ingest_service import running
from tests.support.open_spool import build_retention, open_spool
from tests.support.shipping import one_sender, send_one
from tests.support.summary_examples import alerts

if TYPE_CHECKING:
    from tests.support.open_spool import OpenSpool

DAYS = float(os.environ.get("TIDEGATE_TEST_OFFLINE_DAYS", "2"))
SERIES = 2
PER_MINUTE = 1200
MINUTES_A_COMMIT = 10
RAW_BYTES = 2.1
T0_US = 1_790_000_040_000_000 // 60_000_000 * 60_000_000
MINUTE_US = 60_000_000


def readings_of(spool: OpenSpool, minute: int) -> Readings:
    """Some minutes of noisy readings, evenly spread."""
    chance = np.random.default_rng(minute)
    rows = SERIES * PER_MINUTE * MINUTES_A_COMMIT
    numbers = [spool.catalog.assign_number(Series(f"s{n}", "temperature")) for n in range(SERIES)]
    at_us = np.repeat(np.arange(PER_MINUTE * MINUTES_A_COMMIT) * (MINUTE_US // PER_MINUTE), SERIES)
    absent = np.full(rows, np.nan, np.float32)
    return Readings(
        np.tile(np.array(numbers, np.int32), PER_MINUTE * MINUTES_A_COMMIT),
        T0_US + minute * MINUTE_US + at_us.astype(np.int64),
        np.round(chance.normal(20, 3, rows), 2),
        absent,
        absent,
        absent,
        np.full(rows, -1, np.int64),
        np.zeros(rows, np.int32),
    )


def alert_at(spool: OpenSpool, time_us: int):
    number = spool.catalog.assign_number(Series("s0", "temperature"))
    made = alerts(1)
    return replace(made, series=np.array([number], np.int32), time_us=np.array([time_us], np.int64))


async def at_region(dsn: str) -> tuple[int, ...]:
    """Readings, minutes, readings in minutes, readings declared lost, alerts, and the mean of everything."""
    region = await asyncpg.connect(dsn)
    try:
        row = await region.fetchrow(
            """SELECT (SELECT count(*) FROM reading), (SELECT count(*) FROM rollup WHERE window_s = 60),
                      (SELECT sum(count) FROM rollup WHERE window_s = 60),
                      (SELECT sum(rows)::int8 FROM declared_loss), (SELECT count(*) FROM alert),
                      (SELECT sum(mean * count) / sum(count) FROM rollup WHERE window_s = 60)"""
        )
        return tuple(row)
    finally:
        await region.close()


@pytest.mark.timeout(max(240, int(DAYS * 120)))
async def test_after_an_outage_at_a_tenth_of_the_room_every_minute_is_there_and_the_loss_adds_up(
    tmp_path, postgres_dsn
):
    minutes = int(DAYS * 1440)
    acknowledged = minutes * PER_MINUTE * SERIES
    cap = int(acknowledged * RAW_BYTES / 10)
    capacity = Capacity(max_bytes=cap)
    async with open_spool(tmp_path / "spool.db", capacity=capacity) as spool:
        spool.deliveries._gateway_id = "gw-1"
        await spool.database.limit_wal(cap // 8)
        await spool.deliveries.register("region", "ingest", now_us=T0_US)
        now_us = [T0_US]
        with closing(open_read_only(spool.database.path)) as connection:
            roller = Roller(StoredRollups(connection), RollupOptions())
            commit_consumer = CommitConsumer(
                spool.database,
                spool.segments,
                CommitLogReader(connection, spool.catalog),
                [roller],
                ConsumerOptions(),
                clock_us=lambda: now_us[0],
            )
            await commit_consumer.restore()
            retention = build_retention(
                spool.database,
                spool.segments,
                "region",
                capacity=capacity,
                evicts=True,
                windows_s=RollupOptions().windows_s,
            )
            for minute in range(0, minutes, MINUTES_A_COMMIT):
                now_us[0] = T0_US + (minute + MINUTES_A_COMMIT) * MINUTE_US
                await spool.appender.append(readings_of(spool, minute), [], now_us=now_us[0])
                while await commit_consumer.consume_once(durable=True):
                    pass
                if minute % 60 == 0:
                    await spool.segments.append(encode_segments(alert_at(spool, now_us[0])), now_us=now_us[0])
                if minute % 120 == 0:
                    await spool.compaction.compact_once(everything=True)
                while await retention.make_room_once(now_us[0]):
                    pass
                used, _ = await spool.database.used_and_spare_bytes()
                assert used <= cap, f"after {minute} minutes"
            for _ in range(3):
                now_us[0] += 86_400_000_000
                await commit_consumer.consume_once(durable=True)
            declared = await spool.database.read(eviction.read_loss_totals)
            async with running(postgres_dsn, tmp_path) as service:
                destination = service.client()
                shipper = one_sender(spool.deliveries, destination, keeps_ledger=True, kind="ingest")
                while await send_one(shipper):
                    pass
                await destination.aclose()
            await commit_consumer.aclose()

    stored, per_minute, counted, told, rung, mean = await at_region(postgres_dsn)
    lost = sum(t.rows for t in declared)
    print(  # noqa: T201 - the measurement, for those who ask for it with -s
        f"\n{acknowledged} readings, room for {cap} bytes: {stored} stored, {told} declared lost, "
        f"{per_minute} minutes"
    )
    assert {(t.record_class, t.reason, t.survives) for t in declared} == {
        (RecordClass.READING, "no_room", "rollup 60 s")
    }
    assert told == lost
    assert stored + told == acknowledged
    assert lost > acknowledged // 2
    assert per_minute == minutes * SERIES
    assert counted == acknowledged
    assert rung == minutes // 60
    truth = np.mean([readings_of(spool, m).value.mean() for m in range(0, minutes, MINUTES_A_COMMIT)])
    assert mean == pytest.approx(truth)
