"""Alerts before declarations before rollups before readings; what is not for a destination is left out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cloud_sync.delivery.lanes import ClaimRequest, Lane, Schedule
from cloud_sync.model.errors import RefusedError
from cloud_sync.model.records import BatchRange, Declarations, Flag, RecordClass, Series
from gateway.spool.segments import encode_segments
from tests.support.memory_region import MemoryRegion
from tests.support.open_spool import NOW_US, OpenSpool, open_spool
from tests.support.shipping import one_sender, send_one
from tests.support.summary_examples import alerts, declarations, rollups

if TYPE_CHECKING:
    from cloud_sync.delivery.shipper import Shipper

MIDNIGHT_US = 86_400_000_000 * 20_000


async def keep(spool: OpenSpool, records) -> None:
    """Append records of any class, of the series s0 to s2."""
    if records.has_series:
        numbers = [spool.catalog.assign_number(Series(f"s{n}", "t")) for n in range(3)]
        records = records.with_series(np.array(numbers, np.int32)[records.series]).in_order()
    await spool.segments.append(encode_segments(records), now_us=NOW_US)


def shipper_to(spool: OpenSpool, region: MemoryRegion, **options) -> Shipper:
    return one_sender(spool.deliveries, region, **{"keeps_ledger": True, "chance": lambda: 0.0, **options})


async def drain(shipper: Shipper) -> None:
    while await send_one(shipper):
        pass


async def fill(spool: OpenSpool) -> None:
    await spool.append([("s0", 1, 1.0), ("s1", 1, 2.0)])
    await keep(spool, rollups())
    await keep(spool, declarations())
    await keep(spool, alerts())


async def claimed(spool: OpenSpool, *, max_rows: int = 10, **wanted) -> BatchRange:
    found = await spool.deliveries.claim("r", ClaimRequest(now_us=1, max_rows=max_rows, **wanted))
    assert found is not None
    return found


async def test_alerts_go_first_then_declarations_then_rollups_then_readings(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool)
        region = MemoryRegion("regional")
        await drain(shipper_to(spool, region))

        assert [r.record_class for r in region.sent] == list(RecordClass)
        for sent, kept in zip(region.others, (alerts(), declarations(), rollups()), strict=True):
            assert sent.rows == kept.rows
            assert sent.series == (
                () if not kept.has_series else tuple(Series(f"s{n}", "t") for n in range(3))
            )
            for name in kept.columns:
                if name != "series":
                    theirs = getattr(sent.records, name)
                    assert theirs.dtype == kept.columns[name]
                    np.testing.assert_array_equal(theirs, getattr(kept, name), err_msg=name)


async def test_an_open_batch_of_one_class_does_not_hide_one_of_another_with_the_same_commits(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool)
        first = await claimed(spool)
        second = await claimed(spool, busy=[first])

        assert (first.record_class, second.record_class) == (RecordClass.ALERT, RecordClass.DECLARATION)
        assert first[3:] == second[3:]


async def test_the_backfill_never_takes_alerts_and_the_live_lane_takes_all_of_them_oldest_first(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for _ in range(3):
            await keep(spool, alerts(2))
        assert (
            await spool.deliveries.claim("r", ClaimRequest(now_us=1, max_rows=10, lane=Lane.BACKFILL)) is None
        )
        live = await claimed(spool, max_rows=4, lane=Lane.LIVE)
        assert (live.first_commit, live.last_commit) == (1, 2)


async def test_a_destination_gets_only_the_classes_it_is_to_have(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool)
        region = MemoryRegion("cloud")
        only = [RecordClass.ALERT, RecordClass.ROLLUP]
        await spool.deliveries.register("cloud", "influxdb", now_us=NOW_US, classes=only)
        await drain(shipper_to(spool, region))

        assert [r.record_class for r in region.sent] == only
        assert (await spool.deliveries.backlog("cloud")).readings == 0
        assert (await spool.deliveries.backlog("other")).readings == 2


@pytest.mark.parametrize("urgent", [True, False])
async def test_alerts_do_not_wait_for_the_windows_unless_they_are_told_to(tmp_path, urgent):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool)
        region = MemoryRegion("regional")
        shipper = shipper_to(
            spool,
            region,
            schedule=Schedule.parse(["12:00-13:00"]),
            schedule_for="everything",
            clock_us=lambda: MIDNIGHT_US,
            urgent=urgent,
            flush_s=0.01,
        )
        stop = asyncio.Event()
        running = asyncio.create_task(shipper.run(stop))
        async with asyncio.timeout(5):
            while urgent and len(region.sent) < 2:  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        stop.set()
        await running

        expected = [RecordClass.ALERT, RecordClass.DECLARATION] if urgent else []
        assert [r.record_class for r in region.sent] == expected


async def test_suppressed_readings_stay_here_and_the_range_is_settled_with_their_number(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        readings = spool.readings([("s0", at, float(at)) for at in range(10)])
        readings.flags[[1, 2, 5]] = Flag.SUPPRESSED | Flag.LATE
        await spool.appender.append(readings, [], now_us=NOW_US)
        batch = await spool.deliveries.read_batch(await claimed(spool), "regional")

        assert batch is not None
        assert (batch.rows, batch.withheld, batch.refused) == (7, 3, 0)
        assert batch.readings.time_us.tolist() == [0, 3, 4, 6, 7, 8, 9]
        region = MemoryRegion("regional")
        await drain(shipper_to(spool, region))
        assert region.applied.total() == 7


async def test_a_range_of_nothing_but_suppressed_readings_is_told_to_the_ledger(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        readings = spool.readings([("s0", at, float(at)) for at in range(4)])
        readings.flags[:] = Flag.SUPPRESSED
        await spool.appender.append(readings, [], now_us=NOW_US)
        region = MemoryRegion("regional")
        await drain(shipper_to(spool, region))

        assert [(r.first_commit, r.last_commit) for r in region.sent] == [(1, 1)]
        assert region.applied.total() == 0
        assert (await spool.deliveries.backlog("regional")).readings == 0


async def test_a_row_refused_behind_a_suppressed_one_is_the_one_that_is_left_out(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        readings = spool.readings([("s0", at, float(at)) for at in range(8)])
        readings.flags[[0, 3]] = Flag.SUPPRESSED
        await spool.appender.append(readings, [], now_us=NOW_US)
        region = MemoryRegion("regional", is_bad=lambda row: row[1] == 4, tells_rows=True)
        await drain(shipper_to(spool, region))

        assert sorted(t for _, t, _ in region.applied) == [1, 2, 5, 6, 7]


async def test_declarations_of_another_destination_are_withheld(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        mine, others = declarations(2), declarations(1, destination="cloud")
        await keep(spool, mine.concat([mine, others]).in_order())
        region = MemoryRegion("regional")
        await drain(shipper_to(spool, region))

        (sent,) = region.others
        assert isinstance(sent.records, Declarations)
        assert (sent.rows, sent.withheld) == (2, 1)
        assert set(sent.records.destination) == {"regional"}


async def test_a_refused_alert_goes_to_quarantine_with_its_words(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await keep(spool, alerts(1))
        region = MemoryRegion("regional")
        region.outcomes.append(RefusedError("no room for it", "unacceptable_data", of_rows=True, rows=[0]))
        await drain(shipper_to(spool, region))

        rows = await spool.database.read(
            lambda c: c.execute("SELECT topic, reason, detail FROM quarantine").fetchall()
        )
        assert rows == [("s0/t", "unacceptable_data", "no room for it")]


async def test_reading_duplicates_are_not_looked_for_among_rollups(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("s0", 5_000_000, 1.0)])
        await keep(spool, replace(rollups(3), time_us=np.zeros(3, np.int64)))
        await spool.compaction.compact_once(everything=True)

        appended = await spool.append([("s0", 5_000_000, 1.0), ("s0", 0, 2.0)])
        assert (appended.stored, appended.duplicates) == (1, 1)
