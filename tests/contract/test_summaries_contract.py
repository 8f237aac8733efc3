"""Rollups, alerts and declarations at the region and in the cloud: there once, the newest revision holds."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np
import pytest

from cloud_sync.destinations.influxdb import InfluxDestination, InfluxOptions
from cloud_sync.model.errors import RefusedError
from cloud_sync.model.records import Batch, Series
from cloud_sync.timescale.row_store import delete_old_rollups
from cloud_sync.timescale.sink import TimescaleSink
from tests.support.fixtures_postgres import fresh_database
from tests.support.ingest_service import running
from tests.support.summary_examples import alerts, declarations, rollups
from tests.support.wire_examples import batch, readings
from tests.support.wire_examples import series as example_series

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cloud_sync.destinations import Destination
    from cloud_sync.model.records import Records


def of_class(records: Records, first: int = 1, last: int = 1) -> Batch:
    named = example_series() if records.has_series else ()
    return Batch(
        batch(first, last).range._replace(record_class=records.record_class), named, records.in_order()
    )


@asynccontextmanager
async def at_region(kind: str, dsn: str, tmp_path) -> AsyncIterator[Destination]:
    if kind == "timescaledb":
        sink = TimescaleSink(dsn)
        yield sink
        await sink.aclose()
        return
    async with running(dsn, tmp_path) as service:
        client = service.client()
        yield client
        await client.aclose()


@pytest.fixture(params=["timescaledb", "ingest"])
async def region(request, postgres_server, tmp_path):
    async with (
        fresh_database(postgres_server.dsn()) as dsn,
        at_region(request.param, dsn, tmp_path) as destination,
    ):
        yield destination, dsn


async def fetch(dsn: str, query: str) -> list[dict[str, Any]]:
    connection = await asyncpg.connect(dsn)
    try:
        return [dict(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def send(destination: Destination, sent: Batch):
    return await destination.send(destination.encode(sent))


async def test_a_rollup_arrives_whole(region):
    destination, dsn = region
    sent = rollups(4, 2)
    receipt = await send(destination, of_class(sent))

    assert (receipt.rows, receipt.stored, receipt.duplicates) == (4, 4, 0)
    found = await fetch(
        dsn,
        "SELECT *, (extract(epoch FROM time) * 1e6)::int8 AS time_us,"
        " (extract(epoch FROM last_at) * 1e6)::int8 AS last_at_us FROM sensor_rollup"
        " ORDER BY sensor_id, time",
    )
    for name in (
        "time_us",
        "last_at_us",
        "window_s",
        "count",
        "flagged",
        "excluded",
        "suppressed",
        "revision",
    ):
        assert [row[name] for row in found] == getattr(sent, name).tolist(), name
    for name in ("mean", "minimum", "maximum", "first", "last"):
        here = [None if np.isnan(v) else v for v in getattr(sent, name).tolist()]
        assert [row[name] for row in found] == here, name
    assert found[0]["stddev"] == pytest.approx((sent.m2[0] / (sent.count[0] - 1)) ** 0.5)
    assert {row["gateway_id"] for row in found} == {batch().range.gateway_id}
    assert [row["sensor_id"] for row in found] == ["sensor-0"] * 2 + ["sensor-1"] * 2


async def test_the_newest_revision_of_a_window_holds_in_whatever_order_they_come(region):
    destination, dsn = region
    first, second, third = (
        replace(rollups(3), mean=np.full(3, float(n)), revision=np.full(3, n, np.int32)) for n in (1, 2, 3)
    )
    await send(destination, of_class(second, 2, 2))
    late = await send(destination, of_class(first, 1, 1))
    newer = await send(destination, of_class(third, 3, 3))

    assert (late.stored, late.duplicates, newer.stored) == (0, 3, 3)
    assert {(r["revision"], r["mean"]) for r in await fetch(dsn, "SELECT * FROM rollup")} == {(3, 3.0)}


async def test_of_two_revisions_in_one_batch_the_newer_one_holds(region):
    destination, dsn = region
    both = rollups().concat([rollups(3, revision=2), rollups(3, revision=1)])
    receipt = await send(destination, of_class(both))

    assert (receipt.rows, receipt.stored) == (6, 3)
    assert {r["revision"] for r in await fetch(dsn, "SELECT revision FROM rollup")} == {2}


@pytest.mark.parametrize("make", [rollups, alerts, declarations])
async def test_a_batch_sent_again_gets_the_same_receipt_and_changes_nothing(region, make):
    destination, dsn = region
    sent = of_class(make())
    receipts = [await send(destination, sent) for _ in range(3)]

    assert [r.applied_before for r in receipts] == [False, True, True]
    assert {r[:4] if isinstance(r, tuple) else (r.rows, r.stored, r.duplicates) for r in receipts} == {
        (sent.rows, sent.rows, 0)
    }
    counts = [await fetch(dsn, f"SELECT FROM {table}") for table in ("rollup", "alert", "declared_loss")]
    assert sum(map(len, counts)) == sent.rows


async def test_an_alert_arrives_with_its_words(region):
    destination, dsn = region
    await send(destination, of_class(alerts(2)))

    found = await fetch(dsn, "SELECT * FROM sensor_alert ORDER BY time")
    assert [(r["rule"], r["state"], r["severity"], r["value"], r["threshold"]) for r in found] == [
        ("too_hot", "firing", "critical", 36.5, 35.0),
        ("silent", "recovered", "critical", None, 35.0),
    ]
    assert found[0]["detail"] == "reading 0 ü was too high"


async def test_a_declaration_is_shown_with_the_progress_of_its_gateway(region):
    destination, dsn = region
    await send(destination, batch(11, 20, content=readings()))
    await send(destination, of_class(declarations(1)))
    sink = TimescaleSink(dsn)
    (progress,) = await sink.progress()
    await sink.aclose()

    (loss,) = progress.declared
    assert (loss.range.first_commit, loss.range.last_commit, loss.rows) == (1, 10, 100)
    assert (loss.reason, loss.survives) == ("max_bytes", "rollup 60 s")


async def test_a_rollup_that_comes_before_any_reading_does_not_take_the_place_of_newer_attributes(region):
    destination, dsn = region
    named = tuple(Series(s.sensor_id, s.sensor_type, (("location", "old"),)) for s in example_series())
    old = of_class(rollups())
    await send(destination, Batch(old.range, named, old.records))
    now = tuple(Series(s.sensor_id, s.sensor_type, (("location", "new"),)) for s in example_series())
    await send(destination, batch(1, 1, content=readings(), of=now))
    await send(
        destination, Batch(old.range._replace(first_commit=2, last_commit=2), named, rollups(revision=2))
    )

    assert await fetch(dsn, "SELECT DISTINCT location FROM sensor") == [{"location": "new"}]


async def test_a_time_that_no_client_can_read_is_refused(region):
    destination, _ = region
    wrong = rollups(3)
    wrong.last_at_us[1] = 1 << 61
    with pytest.raises(RefusedError) as refusal:
        await send(destination, of_class(wrong))
    assert refusal.value.reason == "time_out_of_range"


async def test_rollups_of_a_window_are_forgotten_after_their_time(postgres_server):
    async with fresh_database(postgres_server.dsn()) as dsn:
        sink = TimescaleSink(dsn)
        old, new = rollups(3), rollups(3)
        new.time_us[:] = 4_000_000_000_000_000
        await sink.apply(of_class(old.concat([old, new])))
        await sink.transact(lambda c: delete_old_rollups(c, 60, timedelta(days=30)))
        await sink.transact(lambda c: delete_old_rollups(c, 300, timedelta(days=0)))
        await sink.aclose()

        assert len(await fetch(dsn, "SELECT FROM rollup")) == 3


async def test_in_the_cloud_a_newer_revision_takes_the_place_of_the_older_one(influxd):
    database = influxd.new_database()
    destination = InfluxDestination("cloud", InfluxOptions(influxd.url, api="v1", database=database))
    for revision in (1, 2):
        await send(
            destination,
            of_class(replace(rollups(3), revision=np.full(3, revision, np.int32)), revision, revision),
        )
    await send(destination, of_class(alerts(2)))
    await send(destination, of_class(declarations(2)))
    await destination.aclose()
    points = influxd.points(database)

    found = [p for p in points if p["measurement"] == "rollup"]
    assert [p["revision"] for p in found] == [2, 2, 2]
    assert {p["window_s"] for p in found} == {"60"}
    assert sorted(p["state"] for p in points if p["measurement"] == "alert") == ["firing", "recovered"]
    assert sorted(p["rows"] for p in points if p["measurement"] == "declared_loss") == [100, 100]
