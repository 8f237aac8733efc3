"""A link of bad habits for a while: every reading arrives once. A dead destination costs another nothing.

`TIDEGATE_TEST_CHAOS_S` and `TIDEGATE_TEST_CHAOS_SEED` make it longer, or another one.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import asyncpg
import pytest

from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.model.records import Receipt, RecordClass
from cloud_sync.runtime.rates import Backoff
from tests.support.fault_proxy import (
    DROP_ANSWER,
    DUPLICATE,
    HALF_CLOSE,
    PASS,
    RESET,
    STALL,
    STALL_ANSWER,
    TRUNCATE,
    Fault,
    fault_proxy,
)
from tests.support.http_stub import Answer, answering, http_stub
from tests.support.ingest_service import running
from tests.support.memory_region import MemoryRegion
from tests.support.open_spool import OpenSpool, open_spool
from tests.support.shipping import build_shipper

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud_sync.delivery.shipper import Shipper
    from cloud_sync.destinations import EncodedBatch

CHAOS_S = float(os.environ.get("TIDEGATE_TEST_CHAOS_S", "40"))
SEED = int(os.environ.get("TIDEGATE_TEST_CHAOS_SEED", "7"))
QUICK = Backoff(first_s=0.05, ceiling_s=0.5, floor_s=0.02)
HABITS = {
    PASS: 8,
    Fault("delay", seconds=0.3): 2,
    STALL: 0.3,
    STALL_ANSWER: 0.5,
    RESET: 1,
    Fault("reset", after_bytes=300): 1,
    HALF_CLOSE: 1,
    TRUNCATE: 1,
    Fault("truncate", after_bytes=200): 1,
    DROP_ANSWER: 2,
    DUPLICATE: 2,
}


class MovingClient(IngestClient):
    """One request in eight meets somebody else than the region, as behind a portal or a changed route."""

    strangers = ""

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        if not self.strangers or random.random() > 0.12:
            return await super().send(encoded_batch)
        client = IngestClient(self.name, self.strangers, "token", timeout_s=1.0)
        try:
            return await client.send(encoded_batch)
        finally:
            await client.aclose()


def stranger() -> Answer:
    """What proxies, portals and overloaded servers say."""
    return random.choice(
        [
            Answer(503, "busy"),
            Answer(503, "busy", {"retry-after": "0"}),
            Answer(429, "slow down", {"retry-after": "1"}),
            Answer(200, "<html>Welcome to the hotel</html>", {"content-type": "text/html"}),
            Answer(302, "", {"location": "/login"}),
            Answer(502, "<html>bad gateway</html>", {"date": "Thu, 01 Jan 1970 00:00:00 GMT"}),
            Answer(401, "who are you"),
            Answer(413, "too large"),
        ]
    )


@pytest.mark.timeout(CHAOS_S * 2 + 120)
async def test_a_link_of_bad_habits_loses_and_doubles_nothing(tmp_path, postgres_dsn):  # noqa: PLR0915 - one story
    chance = random.Random(SEED)
    truth: dict[tuple[str, int], float] = {}
    async with (
        running(postgres_dsn, tmp_path) as service,
        fault_proxy("127.0.0.1", urlsplit(service.url).port or 0) as proxy,
        http_stub(lambda _: stranger()) as strangers,
        open_spool(tmp_path / "spool.db") as spool,
    ):
        random.seed(SEED)
        spool.deliveries._gateway_id = "gw-1"
        proxy.at_random(SEED, HABITS)
        regional = MovingClient("region", proxy.url, service.token, timeout_s=1.0)
        regional.strangers = strangers.url
        ends_at = time.monotonic() + CHAOS_S
        shipper = build_shipper(
            spool.deliveries,
            regional,
            keeps_ledger=True,
            flush_s=0.1,
            backoff=QUICK,
            concurrency=3,
            max_batch_rows=2000,
            hold_s=0.5,
        )
        stop = asyncio.Event()
        shipping = asyncio.create_task(shipper.run(stop))
        number = 0
        while time.monotonic() < ends_at:
            now_us = time.time_ns() // 1000
            rows = [(f"s{n % 5}", now_us + n, chance.gauss(20, 3)) for n in range(chance.randint(1, 200))]
            await spool.appender.append(spool.readings(rows), [], now_us=now_us)
            truth.update({(sensor, at): value for sensor, at, value in rows})
            number += 1
            if number % 50 == 0:
                await spool.compaction.compact_once(everything=True)
            if chance.random() < 0.02:
                await proxy.down()
                await asyncio.sleep(chance.uniform(0.1, 1.5))
                await proxy.up()
            await asyncio.sleep(0.02)
        proxy.at_random(SEED, {PASS: 1})
        regional.strangers = ""
        least, deadline = len(truth) + 1, time.monotonic()
        while backlog := (await spool.deliveries.backlog("region")).readings:
            if backlog < least:
                least, deadline = backlog, time.monotonic() + 60
            assert time.monotonic() < deadline, f"no progress in 60 s: {shipper.counters}"
            await asyncio.sleep(0.1)
        stop.set()
        await shipping
        await regional.aclose()
        await proxy.settled()
        asking = service.client()
        known = await asking.applied_ranges("gw-1", spool.database.epoch)
        await asking.aclose()
        newest = spool.segments.newest_commit(RecordClass.READING)
    connection = await asyncpg.connect(postgres_dsn)
    found = await connection.fetch("SELECT sensor_id, time, value FROM sensor_data")
    conflicts = await connection.fetchval("SELECT count(*) FROM reading_conflict")
    await connection.close()
    stored = {(r["sensor_id"], round(r["time"].timestamp() * 1e6)): r["value"] for r in found}
    spoiled = {exchange.fault.kind for exchange in proxy.exchanges}
    assert len(found) == len(truth)
    assert stored == truth
    assert conflicts == 0
    assert [(r.first_commit, r.last_commit) for r in known] == [(1, newest)], "the ledger has no hole"
    assert spoiled >= {"pass", "reset", "truncate", "drop_answer", "duplicate", "half_close"}
    assert strangers.requests


async def test_a_dead_destination_does_not_delay_another(tmp_path):
    """Measured: the delay from the commit to the receipt, alone and beside one that never answers."""

    async def delays(folder, *dead: Callable[[OpenSpool], Shipper]) -> list[float]:
        async with open_spool(folder / "spool.db") as spool:
            well = MemoryRegion("well")
            shippers = [build_shipper(spool.deliveries, well, keeps_ledger=True, flush_s=0.02)]
            shippers += [make(spool) for make in dead]
            stop = asyncio.Event()
            running_ = [asyncio.create_task(shipper.run(stop)) for shipper in shippers]
            found = []
            for n in range(60):
                row = (f"s{n}", n, 1.0)
                await spool.append([row])
                since = time.monotonic()
                while not well.applied[row]:  # noqa: ASYNC110 - the region in memory tells nobody
                    await asyncio.sleep(0.002)
                found.append(time.monotonic() - since)
            stop.set()
            await asyncio.gather(*running_)
            for shipper in shippers[1:]:
                assert (await spool.deliveries.backlog(shipper.name)).readings == 60
                await shipper.aclose()
            return found

    def unreachable(spool: OpenSpool) -> Shipper:
        client = IngestClient("unreachable", "http://127.0.0.1:9", "token")
        return build_shipper(spool.deliveries, client, keeps_ledger=True, flush_s=0.02, backoff=QUICK)

    (tmp_path / "alone").mkdir()
    (tmp_path / "beside").mkdir()
    async with http_stub(answering(Answer(hang_s=3600))) as silent:

        def speechless(spool: OpenSpool) -> Shipper:
            client = IngestClient("speechless", silent.url, "token", timeout_s=0.5)
            return build_shipper(spool.deliveries, client, keeps_ledger=True, flush_s=0.02, backoff=QUICK)

        alone = statistics.median(await delays(tmp_path / "alone"))
        beside = statistics.median(await delays(tmp_path / "beside", unreachable, speechless))
    # T201: the measurement, for those who ask for it with -s
    print(f"\nmedian delay alone {alone * 1000:.0f} ms, beside two dead ones {beside * 1000:.0f} ms")  # noqa: T201
    assert beside < 3 * alone + 0.1
