"""Live data first, the backlog behind it, each commit effectively once, whatever the destination answers."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

import pytest

from cloud_sync.delivery.batch_sender import BatchSender
from cloud_sync.delivery.lanes import ClaimRequest, Lane, Schedule
from cloud_sync.model.errors import (
    MAX_UNEXPLAINED_ROWS,
    RefusedError,
    RetryLaterError,
    TooLargeError,
    UnauthorisedError,
)
from cloud_sync.model.records import BatchRange, Credit, RecordClass
from cloud_sync.runtime.rates import Backoff
from gateway.spool.deliveries import FROM_NOW_ON
from tests.support.memory_region import LOST, MemoryRegion
from tests.support.open_spool import NOW_US, open_spool
from tests.support.shipping import one_sender, send_one, ship_one

if TYPE_CHECKING:
    from cloud_sync.delivery.shipper import Shipper

SECOND_US = 1_000_000


async def fill(spool, commits: int, rows: int = 10, *, at_s: float = 0.0, every_s: float = 1.0) -> list:
    """Commits of `rows` readings each, `every_s` apart; returns the readings."""
    start = spool.segments.newest_commit(RecordClass.READING)
    made = []
    for commit in range(start, start + commits):
        these = [(f"s{n % 7}", commit * 1000 + n, float(n)) for n in range(rows)]
        now_us = NOW_US + round((at_s + (commit - start) * every_s) * 1e6)
        await spool.appender.append(spool.readings(these), [], now_us=now_us)
        made += these
    return made


def shipper_to(spool, region: MemoryRegion, **options) -> Shipper:
    options = {"keeps_ledger": True, "max_batch_rows": 30, "chance": lambda: 0.0, **options}
    return one_sender(spool.deliveries, region, **options)


async def drain(shipper: Shipper, most: int = 3000) -> None:
    for _ in range(most):
        if not await send_one(shipper):
            return
    raise AssertionError("does not come to an end")


def spans(region: MemoryRegion) -> list[tuple[int, int]]:
    return [(r.first_commit, r.last_commit) for r in region.sent]


async def test_after_an_outage_the_newest_goes_first_and_the_gap_is_filled_oldest_first(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 20)
        region = MemoryRegion()
        shipper = shipper_to(spool, region)
        await send_one(shipper)
        assert spans(region) == [(18, 20)], "the newest, within the time that counts as live"
        await fill(spool, 2, at_s=20)
        await drain(shipper)
        live = [span for span in spans(region) if span[0] >= 18]
        gaps = [span for span in spans(region) if span[0] < 18]
        assert live == [(18, 20), (21, 22)]
        assert gaps == sorted(gaps)
        assert gaps[0][0] == 1
        assert region.applied.total() == len(set(truth)) + 20
        assert set(region.applied.values()) == {1}
        assert (await spool.deliveries.backlog("region")).readings == 0


async def test_a_destination_that_keeps_up_gets_everything_in_order(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        region = MemoryRegion()
        shipper = shipper_to(spool, region)
        for second in range(10):
            await fill(spool, 2, at_s=second, every_s=0.5)
            await drain(shipper)
        assert spans(region) == [(n, n + 1) for n in range(1, 20, 2)]


async def claimed(spool, lane: Lane, max_rows: int, *busy: BatchRange) -> BatchRange:
    found = await spool.deliveries.claim("r", ClaimRequest(now_us=1, max_rows=max_rows, lane=lane, busy=busy))
    assert found is not None
    return found


async def test_the_backfill_never_takes_what_live_is_about_to(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 5)
        nothing = await spool.deliveries.claim("r", ClaimRequest(now_us=1, max_rows=10, lane=Lane.BACKFILL))
        assert nothing is None, "all of it is tail, until live has left a gap"
        live = await claimed(spool, Lane.LIVE, 10)
        assert (live.first_commit, live.last_commit) == (5, 5)
        back = await claimed(spool, Lane.BACKFILL, 20)
        assert (back.first_commit, back.last_commit) == (1, 2)
        more = await claimed(spool, Lane.BACKFILL, 20, back)
        assert (more.first_commit, more.last_commit) == (3, 4)


async def test_open_batches_are_handed_out_again_each_to_its_lane_after_a_restart(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 9)
        live = await claimed(spool, Lane.LIVE, 10)
        back = await claimed(spool, Lane.BACKFILL, 20)
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 3, at_s=9)
        assert await spool.deliveries.claim("r", ClaimRequest(now_us=2, max_rows=99, lane=Lane.LIVE)) == live
        assert (
            await spool.deliveries.claim("r", ClaimRequest(now_us=2, max_rows=99, lane=Lane.BACKFILL)) == back
        )


async def test_a_file_gets_everything_in_order_however_far_behind(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 20)
        region = MemoryRegion()
        await drain(shipper_to(spool, region, in_order=True))
        assert spans(region) == [(n, min(n + 2, 20)) for n in range(1, 21, 3)]


@pytest.mark.parametrize("bad_rows", [1, 3])
@pytest.mark.parametrize("compacted", [False, True])
async def test_bad_rows_are_found_by_halving_and_cost_only_themselves(tmp_path, bad_rows, compacted):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 64, rows=64)
        if compacted:
            await spool.compaction.compact_once(everything=True)
        bad = {truth[n] for n in (777, 778, 3000)[:bad_rows]}
        region = MemoryRegion(is_bad=lambda row: row in bad)
        shipper = shipper_to(spool, region, max_batch_rows=5000)
        await drain(shipper)
        assert set(region.applied) == set(truth) - bad
        assert set(region.applied.values()) == {1}
        # each bad row: both halves at every level, then the empty part that completes the ledger
        assert len(region.sent) <= 1 + bad_rows * (2 * math.log2(4096) + 1)
        assert (await spool.deliveries.backlog("region")).readings == 0
        assert sum(last - first + 1 for first, last in region.commits(spool.database.epoch)) == 64
        items = await spool.database.read(
            lambda c: c.execute("SELECT source, topic, reason, detail FROM quarantine").fetchall()
        )
        assert len(items) == bad_rows
        assert {item[0] for item in items} == {"region"}
        assert {item[2:] for item in items} == {("http_400", "1 rows are bad")}
        assert shipper.counters.refused == bad_rows


async def test_rows_that_the_destination_names_cost_one_more_request(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 10, rows=100)
        bad = set(truth[5:9])
        region = MemoryRegion(is_bad=lambda row: row in bad, tells_rows=True)
        await drain(shipper_to(spool, region, max_batch_rows=5000))
        assert set(region.applied) == set(truth) - bad
        assert len(region.sent) == 2


async def test_a_search_for_bad_rows_survives_a_restart_at_any_request(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 4, rows=32)
    bad = {truth[40], truth[100]}
    region = MemoryRegion(is_bad=lambda row: row in bad)
    for _ in range(200):
        async with open_spool(tmp_path / "spool.db") as spool:
            if not await send_one(shipper_to(spool, region, max_batch_rows=500)):
                break
    assert set(region.applied) == set(truth) - bad
    assert set(region.applied.values()) == {1}
    async with open_spool(tmp_path / "spool.db") as spool:
        count = await spool.database.read(
            lambda c: c.execute("SELECT count(*) FROM quarantine").fetchone()[0]
        )
        assert count == 2


async def test_a_destination_that_refuses_everything_is_held_after_a_few_rows(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 10, rows=100)
        region = MemoryRegion(is_bad=lambda _: True)
        shipper = shipper_to(spool, region, max_batch_rows=5000)
        waits = [await ship_one(shipper) or 0.0 for _ in range(100)]
        assert min(waits[-2:]) >= 30, "both lanes"
        assert shipper.counters.state == "held"
        assert shipper.counters.refused == MAX_UNEXPLAINED_ROWS
        region.is_bad = lambda _: False
        await drain(shipper)
        assert region.applied.total() == 1000 - MAX_UNEXPLAINED_ROWS


async def test_a_refusal_that_explains_itself_is_believed_of_every_row(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 1, rows=50)
        region = MemoryRegion(is_bad=lambda _: True, reason="beyond_retention", tells_rows=True)
        shipper = shipper_to(spool, region, max_batch_rows=5000)
        await drain(shipper)
        assert shipper.counters.refused == 50
        assert (await spool.deliveries.backlog("region")).readings == 0


async def test_a_single_segment_that_is_too_large_travels_in_parts_and_the_size_is_remembered(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 1, rows=1000)
        region = MemoryRegion(most_rows=150)
        shipper = shipper_to(spool, region, max_batch_rows=5000)
        await drain(shipper)
        assert set(region.applied) == set(truth)
        assert set(region.applied.values()) == {1}
        assert region.commits(spool.database.epoch) == [(1, 1)]
        before = len(region.sent)
        await fill(spool, 10, rows=100, at_s=1, every_s=0.01)
        await drain(shipper)
        assert len(region.sent) - before == 10, "asks for what was taken before"


async def test_a_segment_far_larger_than_wanted_travels_in_parts_from_the_start(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 1, rows=1000)
        region = MemoryRegion()
        shipper = shipper_to(spool, region, max_batch_rows=100)
        await drain(shipper)
        assert set(region.applied) == set(truth)
        assert set(region.applied.values()) == {1}
        assert region.commits(spool.database.epoch) == [(1, 1)]
        assert len(region.sent) == 16
        assert region.sent[0].parts == 16


async def test_a_single_row_that_is_too_large_is_held(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 1, rows=1)
        shipper = shipper_to(spool, MemoryRegion(most_rows=0))
        with pytest.raises(TooLargeError):
            await send_one(shipper)
        assert (await spool.deliveries.backlog("region")).readings == 1


async def test_a_renewed_epoch_sends_parts_whole_again(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 1, rows=8)
        region = MemoryRegion(most_rows=4)
        shipper = shipper_to(spool, region)
        await send_one(shipper)
        await send_one(shipper)
        region.outcomes.append(RefusedError("known otherwise", "range_overlap"))
        await send_one(shipper)
        await drain(shipper)
        assert region.commits(spool.database.epoch) == [(1, 1)]
        assert set(region.applied) == set(truth)


async def test_wrong_credentials_hold_and_are_told_once(tmp_path, caplog):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 3)
        region = MemoryRegion()
        region.outcomes.extend([UnauthorisedError("no such token")] * 3)
        shipper = shipper_to(spool, region)
        with caplog.at_level(logging.WARNING):
            waits = [await ship_one(shipper) or 0.0 for _ in range(3)]
        assert min(waits) >= 30
        assert shipper.counters.state == "held"
        assert [r.levelname for r in caplog.records if "no such token" in r.getMessage()] == ["ERROR"]
        await ship_one(shipper)
        assert (shipper.counters.state, shipper.counters.last_error) == ("idle", "")


async def test_a_spool_that_cannot_be_written_holds_delivery_and_does_not_end_it(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 3)
        region = MemoryRegion()
        shipper = shipper_to(spool, region)
        await spool.database._writer.run(lambda c: c.execute("PRAGMA query_only = 1").fetchall())
        assert (await ship_one(shipper) or 0.0) > 0
        assert shipper.counters.state == "waiting"
        assert "the spool" in shipper.counters.last_error
        await spool.database._writer.run(lambda c: c.execute("PRAGMA query_only = 0").fetchall())
        await drain(shipper)
        assert region.applied.total() == 30


async def test_a_segment_whose_pages_are_damaged_is_set_aside_and_the_rest_is_delivered(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        truth = []
        for commit in range(3):
            rows = [(f"s{n}", commit * 10**6 + n * 7919 % 10**6, math.sin(n + commit)) for n in range(4000)]
            await spool.append(rows)
            truth.append(rows)
        await spool.database._writer.run(lambda c: c.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
        block = await spool.database.read(
            lambda c: bytes(
                c.execute("SELECT block FROM segment ORDER BY position LIMIT 1 OFFSET 1").fetchone()[0]
            )
        )
        at = path.read_bytes().find(block[9000:9100])
        page = at // 4096 * 4096
        with path.open("r+b") as file:
            file.seek(page)
            file.write(b"\xff\xff\xff\xf0")  # the overflow chain leads nowhere
        await spool.database._reader.run(lambda c: c.execute("PRAGMA cache_size = 0").fetchall())
        await spool.database._writer.run(lambda c: c.execute("PRAGMA shrink_memory").fetchall())
        region = MemoryRegion()
        shipper = shipper_to(spool, region, max_batch_rows=50_000)
        await drain(shipper, 20)
        assert set(region.applied) == {*truth[0], *truth[2]}
        damaged = await spool.database.read(lambda c: c.execute("SELECT rows FROM damaged").fetchall())
        assert damaged == [(4000,)]


async def test_settling_and_claiming_the_next_is_one_transaction(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 40)
        region = MemoryRegion()
        shipper = shipper_to(spool, region)
        await send_one(shipper)
        sender = BatchSender(shipper._state, [Lane.BACKFILL])
        told: list[str] = []
        await spool.database._writer.run(lambda c: c.set_trace_callback(told.append))
        for _ in range(5):
            await sender.send_once()
        await spool.database._writer.run(lambda c: c.set_trace_callback(None))
        assert told.count("COMMIT") == 6, "one to claim the first, then one a batch"


async def test_a_new_destination_starts_where_it_was_told_and_an_old_one_keeps_its_progress(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 10)
        deliveries = spool.deliveries
        await deliveries.register("all", "file", now_us=NOW_US)
        await deliveries.register("now", "file", now_us=NOW_US, since_us=FROM_NOW_ON)
        await deliveries.register("some", "file", now_us=NOW_US, since_us=NOW_US + round(6.5 * SECOND_US))
        backlogs = {name: (await deliveries.backlog(name)).readings for name in ("all", "now", "some")}
        assert backlogs == {"all": 100, "now": 0, "some": 40}, (
            "whole segments: the one that holds the moment too"
        )
        await deliveries.register("all", "file", now_us=NOW_US, since_us=FROM_NOW_ON)
        assert (await deliveries.backlog("all")).readings == 100
        assert await deliveries.drop("now")
        assert not await deliveries.drop("now")
        await deliveries.register("now", "file", now_us=NOW_US)
        assert (await deliveries.backlog("now")).readings == 100


async def run_for(shipper: Shipper, until, within_s: float = 10.0) -> None:
    """Run the loop until something is so."""
    stop = asyncio.Event()
    running = asyncio.create_task(shipper.run(stop))
    try:
        async with asyncio.timeout(within_s):
            while not until():  # noqa: ASYNC110 - any condition
                await asyncio.sleep(0.01)
    finally:
        stop.set()
        await running


async def test_outside_its_windows_the_backlog_waits_and_live_goes_on(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 20)
        region = MemoryRegion()
        midnight_us = 86_400 * SECOND_US * 20_000
        shipper = shipper_to(
            spool,
            region,
            schedule=Schedule.parse(["12:00-13:00"]),
            clock_us=lambda: midnight_us,
            flush_s=0.01,
            concurrency=2,
        )
        await run_for(shipper, lambda: region.sent)
        await asyncio.sleep(0.1)
        assert spans(region) == [(18, 20)]


async def test_a_credit_of_nothing_stops_the_backlog_and_not_live(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 20)
        region = MemoryRegion(credit=Credit(0.0, 600.0))
        shipper = shipper_to(spool, region, flush_s=0.01, concurrency=2)
        await run_for(shipper, lambda: region.sent)
        await fill(spool, 2, at_s=20)
        await run_for(shipper, lambda: (21, 22) in spans(region))
        assert len([span for span in spans(region) if span[0] < 18]) <= 1


async def test_while_the_destination_is_down_only_live_asks_and_the_backlog_starts_when_it_answers(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 20)
        region = MemoryRegion()
        region.outcomes.extend([RetryLaterError("down")] * 5)
        backoff = Backoff(first_s=0.02, ceiling_s=0.05, floor_s=0.01)
        shipper = shipper_to(spool, region, flush_s=0.01, backoff=backoff, concurrency=2)
        await run_for(shipper, lambda: region.applied.total() == len(truth))
        attempts = spans(region)[:6]
        assert attempts[0] == (18, 20)
        assert attempts.count((18, 20)) >= 5, "the backlog tried once, when nobody knew yet"
        assert set(region.applied.values()) == {1}
        assert shipper.counters.lanes["live"].rows == 30
        assert shipper.counters.lanes["backfill"].rows == 170


async def test_a_lost_receipt_is_asked_for_again_and_nothing_is_applied_twice(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 20)
        region = MemoryRegion()
        region.outcomes.extend([LOST, None, LOST, LOST, None, LOST])
        backoff = Backoff(first_s=0.01, ceiling_s=0.02, floor_s=0.01)
        shipper = shipper_to(spool, region, flush_s=0.01, backoff=backoff, concurrency=4)
        await run_for(shipper, lambda: shipper.counters.rows >= len(truth))
        assert set(region.applied) == set(truth)
        assert set(region.applied.values()) == {1}


async def test_one_request_at_a_time_still_serves_both_lanes(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        truth = await fill(spool, 40)
        region = MemoryRegion()
        shipper = shipper_to(spool, region, flush_s=0.05, concurrency=1)
        await run_for(shipper, lambda: region.applied.total() == len(truth))
        assert spans(region)[0] == (38, 40)


async def test_a_byte_budget_bounds_what_goes_out(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, 200)
        region = MemoryRegion()
        shipper = shipper_to(spool, region, flush_s=0.01, max_bytes_per_s=1000.0, concurrency=2)
        stop = asyncio.Event()
        running = asyncio.create_task(shipper.run(stop))
        await asyncio.sleep(0.7)
        stop.set()
        await running
        assert 0 < shipper.counters.wire_bytes < 4000
