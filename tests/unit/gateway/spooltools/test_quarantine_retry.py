"""What a destination refused is sent to it again on demand, and what came over HTTP is read again."""

from __future__ import annotations

import json

import numpy as np

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.errors import RefusedRow
from cloud_sync.model.records import Flag
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.topics import TopicTemplate
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spooltools.quarantine_retry import RetryResult, retry_open_spool
from tests.support.open_spool import NOW_US, OpenSpool, open_spool

T0 = 1_700_000_000_000_000
TEMPLATE = TopicTemplate("sensors/{sensor_id}/{sensor_type}")


async def retried(spool: OpenSpool, *numbers: int) -> RetryResult:
    return await retry_open_spool(spool, RuleSet(TEMPLATE), numbers)


async def items(spool: OpenSpool) -> list[tuple[int, str]]:
    query = "SELECT quarantine_no, source FROM quarantine ORDER BY quarantine_no"
    return await spool.database.read(lambda c: c.execute(query).fetchall())


async def next_batch(spool: OpenSpool, name: str):
    claimed = await spool.deliveries.claim(name, ClaimRequest(now_us=NOW_US))
    return None if claimed is None else await spool.deliveries.read_batch(claimed, name)


async def test_a_refused_reading_goes_again_to_that_destination_only_with_all_it_has(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for name in ("region", "cloud"):
            await spool.deliveries.register(name, "ingest", now_us=1)
        readings = spool.readings([("a", T0, 1.5), ("a", T0 + 1, 2.5), ("b", T0, 3.5)])
        readings.quality[1], readings.seq[1], readings.flags[1] = 77, 9, Flag.LATE
        await spool.appender.append(readings, [], now_us=NOW_US)
        for name in ("region", "cloud"):
            batch = await next_batch(spool, name)
            if name == "region":
                bad = [RefusedRow(1, "too_old", "HTTP 422: no"), RefusedRow(2, "too_old", "HTTP 422: no")]
                await spool.deliveries.refuse(name, batch, bad, now_us=NOW_US)
            await spool.deliveries.settle(name, batch.range)
        assert await items(spool) == [(1, "region"), (2, "region")]
        result = await retried(spool, 1, 2, 7)
        assert (result.items, result.sent_again, result.stored) == (2, 2, 0)
        assert result.left == [(7, "there is no such item")]
        assert await items(spool) == []
        assert await next_batch(spool, "cloud") is None
        again = await next_batch(spool, "region")
        assert [again.series[n].sensor_id for n in again.readings.series] == ["a", "b"]
        assert again.readings.value.tolist() == [2.5, 3.5]
        assert again.readings.time_us.tolist() == [T0 + 1, T0]
        assert again.readings.seq.tolist() == [9, -1]
        assert again.readings.flags.tolist() == [Flag.LATE, 0]
        assert np.isnan(again.readings.quality).tolist() == [False, True]
        await spool.deliveries.settle("region", again.range)
        assert (await spool.deliveries.backlog("region")).readings == 0


async def test_what_cannot_be_sent_again_stays_and_says_why(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.deliveries.register("region", "ingest", now_us=1)
        rows = [
            ("gone", b"{}"),
            ("region", b'{"rule": "hot", "time_us": 5}'),
            ("spool", b'{"value": 1, "ts": 5}'),
        ]
        await spool.appender.append(None, [kept(s, "a/t", p) for s, p in rows], now_us=NOW_US)
        result = await retried(spool, 1, 2, 3)
        assert (result.items, [number for number, _ in result.left]) == (0, [1, 2, 3])
        assert "quarantined by gone" in result.left[0][1]
        assert "not a single reading" in result.left[1][1]
        assert len(await items(spool)) == 3


async def test_what_came_over_http_is_read_again_by_what_it_was_said_to_be(tmp_path):
    one = {"sensor_id": "s", "sensor_type": "t", "value": 1, "ts": T0}
    record = {"n": "urn:dev:ow:1:t", "v": 3, "t": 1_700_000_002}
    bodies = [
        ("application/json", json.dumps(one).encode()),
        ("text/plain; precision=s", b"t,sensor_id=s value=2 1700000001"),
        (
            "application/senml+json",
            json.dumps([record]).encode(),
        ),
        ("application/x-ndjson", b'{"sensor_id": "s", "sensor_type": "t", "value": 4}'),
        ("application/json", b'{"sensor_id": "s"}'),
        ("application/json", b"{"),
    ]
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.appender.append(None, [kept("http", kind, body) for kind, body in bodies], now_us=NOW_US)
        result = await retried(spool, *range(1, 7))
        assert (result.items, result.stored, result.sent_again) == (4, 4, 0)
        assert [number for number, _ in result.left] == [5, 6]
        contents = await spool.contents()
        assert sorted(value for _, _, value in contents) == [1.0, 2.0, 3.0, 4.0]
        assert ("s", 5, 4.0) in contents
        assert [number for number, _ in await items(spool)] == [5, 6]


def kept(source: str, topic: str, payload: bytes) -> QuarantineItem:
    return QuarantineItem.from_payload(
        received_at_us=5, source=source, topic=topic, reason="r", detail="d", payload=payload
    )
