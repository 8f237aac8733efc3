"""A long outage, drained: all of it is there, memory does not grow with it, and what is live stays live.

`TIDEGATE_TEST_OFFLINE_DAYS` says how many days at 100 readings a second (30 is 259 million readings: hours);
without it a fraction of a day.
"""

from __future__ import annotations

import asyncio
import os
import time

import asyncpg
import numpy as np
import psutil
import pytest

from cloud_sync.model.records import Readings, RecordClass, Series
from tests.support.ingest_service import running
from tests.support.open_spool import open_spool
from tests.support.shipping import build_shipper

DAYS = float(os.environ.get("TIDEGATE_TEST_OFFLINE_DAYS", "0.5"))
RATE = 100
SERIES = 100
GROUP_S = 60
LIVE_WITHIN_S = 2.0
T0_US = 1_790_000_000_000_000


def minute_of(spool, minute: int) -> Readings:
    """One minute of `SERIES` sensors, one reading a second each, at jittered times."""
    chance = np.random.default_rng(minute)
    rows = RATE * GROUP_S
    numbers = [spool.catalog.assign_number(Series(f"s{n:03}", "temperature")) for n in range(SERIES)]
    at_s = np.arange(rows) // SERIES + minute * GROUP_S
    absent = np.full(rows, np.nan, np.float32)
    return Readings(
        np.tile(np.array(numbers, np.int32), GROUP_S),
        T0_US + at_s * 1_000_000 + chance.integers(0, 900_000, rows),
        np.round(chance.normal(20, 3, rows), 2),
        absent,
        absent,
        absent,
        np.full(rows, -1, np.int64),
        np.zeros(rows, np.int32),
    )


@pytest.mark.timeout(max(120, int(DAYS * 3600)))
async def test_a_long_outage_is_drained_whole_in_flat_memory_while_live_stays_live(tmp_path, postgres_dsn):
    process = psutil.Process()
    minutes = int(DAYS * 1440)
    async with running(postgres_dsn, tmp_path) as service, open_spool(tmp_path / "spool.db") as spool:
        spool.deliveries._gateway_id = "gw-1"
        for minute in range(minutes):
            await spool.appender.append(
                minute_of(spool, minute), [], now_us=T0_US + minute * GROUP_S * 1_000_000
            )
            if minute % 300 == 299:
                await spool.compaction.compact_once(everything=True)
        await spool.compaction.compact_once(everything=True)
        backlog = minutes * GROUP_S * RATE
        assert spool.segments.rows_ever(RecordClass.READING) == backlog
        before_bytes = process.memory_info().rss
        destination = service.client()
        shipper = build_shipper(spool.deliveries, destination, keeps_ledger=True, flush_s=0.2, kind="ingest")
        stop = asyncio.Event()
        connection = await asyncpg.connect(postgres_dsn)
        shipping = asyncio.create_task(shipper.run(stop))
        delays, live, peak_bytes = [], 0, 0
        started = time.monotonic()
        try:
            while shipper.counters.rows < backlog + live:
                sent_us = T0_US + minutes * GROUP_S * 1_000_000 + round((time.monotonic() - started) * 1e6)
                rows = [(f"live{n}", sent_us + n, 1.0) for n in range(RATE // 2)]
                await spool.appender.append(spool.readings(rows), [], now_us=sent_us)
                live += len(rows)
                appended = time.monotonic()
                behind = (await spool.deliveries.backlog("region")).readings > 2 * RATE
                await visible(connection, sent_us)
                if behind:
                    delays.append(time.monotonic() - appended)
                peak_bytes = max(peak_bytes, process.memory_info().rss)
                await asyncio.sleep(max(0.0, appended + 0.5 - time.monotonic()))
        finally:
            stop.set()
            await shipping
            await destination.aclose()
        elapsed_s = time.monotonic() - started
        count = await connection.fetchval("SELECT count(*) FROM reading")
        backlog_sum = await connection.fetchval(
            "SELECT sum(value) FROM sensor_data WHERE sensor_type = 'temperature'"
        )
        await connection.close()
    print(  # noqa: T201 - the measurement, for those who ask for it with -s
        f"\n{backlog} readings in {elapsed_s:.1f} s ({backlog / elapsed_s:.0f}/s), live delays: "
        f"median {np.median(delays):.2f} s, p99 {np.quantile(delays, 0.99):.2f} s, "
        f"max {max(delays):.2f} s of {len(delays)}; "
        f"memory +{(peak_bytes - before_bytes) >> 20} MB"
    )
    assert count == backlog + live
    truth = sum(float(minute_of(spool, minute).value.sum()) for minute in range(minutes))
    assert backlog_sum == pytest.approx(truth)
    assert len(delays) >= 2, "live readings were sent while the backlog drained"
    assert np.median(delays) <= LIVE_WITHIN_S
    assert peak_bytes - before_bytes < 150 << 20


async def visible(connection: asyncpg.Connection, time_us: int) -> None:
    """Wait until a reading of a moment can be read at the region."""
    while await stored(connection, time_us) == 0:  # noqa: ASYNC110 - another program's tables make no event
        await asyncio.sleep(0.02)


async def stored(connection: asyncpg.Connection, time_us: int) -> int:
    """How many readings of a moment are visible; none while the region has no tables yet.

    By series and time, for which there is an index: the one on time alone is summarised by vacuum only, and
    until then a look-up reads everything that is new.
    """
    try:
        return await connection.fetchval(
            """SELECT count(*) FROM reading WHERE time = to_timestamp($1::float8 / 1e6) AND series_no =
               (SELECT series_no FROM series JOIN sensor USING (sensor_no) WHERE sensor_id = 'live0')""",
            time_us,
        )
    except asyncpg.UndefinedTableError:
        return 0
