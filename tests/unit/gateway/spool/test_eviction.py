"""What a spool without room gives up, in which order, and that every bit of it is declared (promise 5)."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import Declarations, RecordClass, Series
from gateway.spool import eviction
from gateway.spool.appender import Capacity
from gateway.spool.errors import SpoolFullError
from gateway.spool.eviction import Evictor, RetentionPolicy
from gateway.spool.processing_state import PROGRESS_KEY, write_processing_state
from gateway.spool.segments import encode_segments
from gateway.spooltools.checker import check_spool
from tests.support.memory_region import MemoryRegion
from tests.support.open_spool import NOW_US, OpenSpool, build_retention, open_spool
from tests.support.shipping import one_sender, send_one
from tests.support.summary_examples import rollups

WINDOWS = (60, 300, 3600)
ROWS = 1000


async def fill(spool: OpenSpool, commits: int, *, at: int = 0) -> None:
    """Commits of `ROWS` readings that do not compress well, a second apart."""
    random = np.random.default_rng(at)
    for commit in range(at, at + commits):
        readings = spool.readings((f"s{n % 7}", commit * ROWS + n, 0.0) for n in range(ROWS))
        readings = replace(readings, value=random.random(ROWS))
        await spool.appender.append(readings, [], now_us=NOW_US + commit * 1_000_000)


async def roll(spool: OpenSpool, window_s: int, minutes: int = 200) -> None:
    """A segment of rollups of one window length."""
    number = spool.catalog.assign_number(Series("s0", "t"))
    made = rollups(minutes, 1, seed=window_s)
    made = replace(
        made, series=np.full(minutes, number, np.int32), window_s=np.full(minutes, window_s, np.int32)
    )
    await spool.segments.append(encode_segments(made), now_us=NOW_US)


async def processed(spool: OpenSpool, commit: int) -> None:
    await spool.database.write(lambda c: write_processing_state(c, {PROGRESS_KEY: str(commit).encode()}))


async def pages_bytes(spool: OpenSpool) -> int:
    used, _ = await spool.database.used_and_spare_bytes()
    return used


def evictor(spool: OpenSpool, max_bytes: int | None, *destinations: str, **options) -> Evictor:
    policy = RetentionPolicy(
        dict.fromkeys(RecordClass, destinations), evicts=True, **{"windows_s": WINDOWS, **options}
    )
    return Evictor(spool.database, spool.segments, Capacity(max_bytes=max_bytes), policy)


async def kept(spool: OpenSpool, record_class: RecordClass = RecordClass.READING) -> list[tuple[int, int]]:
    low, high = int(record_class) << 56, (int(record_class) + 1) << 56
    rows = await spool.database.read(
        lambda c: c.execute(
            "SELECT position, last_commit FROM segment WHERE position >= ? AND position < ?", (low, high)
        ).fetchall()
    )
    return [(position & ((1 << 56) - 1), last) for position, last in rows]


async def register(spool: OpenSpool, *names: str) -> None:
    for name in names:
        await spool.deliveries.register(name, "ingest", now_us=NOW_US)


async def deliver(spool: OpenSpool, name: str, max_rows: int) -> None:
    claimed = await spool.deliveries.claim(name, ClaimRequest(now_us=NOW_US, max_rows=max_rows))
    assert claimed is not None
    await spool.deliveries.settle(name, claimed)


async def until_it_fits(spool: OpenSpool, means: Evictor) -> None:
    """Give up until nothing more has to be; the log is folded in, so that pages are what counts."""
    for _ in range(100):
        await spool.database.write(lambda c: c.execute("SELECT 1"))
        if not await means.evict_once(NOW_US):
            return
    raise AssertionError("does not come to an end")


async def test_the_oldest_readings_go_and_what_is_delivered_and_declared_is_what_was_acknowledged(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.database.limit_wal(100_000)
        await register(spool, "regional")
        await fill(spool, 40)
        await processed(spool, 40)
        cap = (await pages_bytes(spool)) * 6 // 10
        means = evictor(spool, cap, "regional")
        await until_it_fits(spool, means)

        left = await kept(spool)
        assert left == [(n, n) for n in range(left[0][0], 41)]
        assert 1 < left[0][0] <= 40
        region = MemoryRegion("regional")
        shipper = one_sender(spool.deliveries, region, keeps_ledger=True, chance=lambda: 0.0)
        while await send_one(shipper):
            pass
        told = [b.records for b in region.others if isinstance(b.records, Declarations)]
        assert sum(int(d.lost.sum()) for d in told) + region.applied.total() == 40 * ROWS
        assert {w for d in told for w in d.survives} == {"rollup 60 s"}
        assert {w for d in told for w in d.reason} == {"no_room"}
        (total,) = await spool.database.read(eviction.read_loss_totals)
        assert (total.destination, total.rows) == ("regional", sum(int(d.lost.sum()) for d in told))
        assert (await spool.deliveries.backlog("regional")).readings == 0


async def test_nothing_is_given_up_while_there_is_room(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional")
        await fill(spool, 3)
        await processed(spool, 3)
        for cap in (None, 1 << 30):
            assert await evictor(spool, cap, "regional").evict_once(NOW_US) == 0
        assert await spool.database.read(eviction.read_loss_totals) == []


async def test_readings_that_are_not_rolled_up_yet_stay(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional")
        await fill(spool, 6)
        await processed(spool, 2)
        means = evictor(spool, 1, "regional")
        await until_it_fits(spool, means)
        assert (await kept(spool))[0] == (3, 3)


async def test_an_open_batch_stays_and_what_comes_after_it_goes(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional")
        await fill(spool, 6)
        await processed(spool, 6)
        await deliver(spool, "regional", ROWS)
        await spool.deliveries.claim("regional", ClaimRequest(now_us=NOW_US, max_rows=ROWS))
        await until_it_fits(spool, evictor(spool, 1, "regional"))
        assert await kept(spool) == [(2, 2)], "the first is delivered; the second is open"
        assert (await spool.deliveries.backlog("regional")).readings == ROWS
        assert check_spool(spool.database.path).problems == []


async def test_only_those_who_do_not_have_it_are_told(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional", "cloud")
        await fill(spool, 6)
        await processed(spool, 6)
        await deliver(spool, "regional", 4 * ROWS)
        await until_it_fits(spool, evictor(spool, 1, "regional", "cloud"))
        found = await spool.database.read(eviction.read_loss_totals)
        assert [(t.destination, t.rows) for t in found] == [("cloud", 6 * ROWS), ("regional", 2 * ROWS)]
        rows = await spool.database.read(lambda c: c.execute("SELECT count(*) FROM loss").fetchone()[0])
        assert rows == 2, "what follows one another is one row"


async def test_a_destination_that_does_not_want_readings_loses_none(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "cloud")
        await fill(spool, 3)
        await processed(spool, 3)
        means = evictor(spool, 1)
        means._policy = replace(means._policy, receivers={RecordClass.ROLLUP: ("cloud",)})
        await until_it_fits(spool, means)
        found = await spool.database.read(eviction.read_loss_totals)
        assert [(t.destination, t.rows) for t in found] == [("", 3 * ROWS)]
        assert await kept(spool, RecordClass.DECLARATION) == []


async def test_after_the_readings_the_shortest_windows_go_and_the_longest_never(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional")
        await fill(spool, 2)
        for _ in range(3):
            for window_s in WINDOWS:
                await roll(spool, window_s)
        await processed(spool, 2)
        await until_it_fits(spool, evictor(spool, 1, "regional"))
        found = await spool.database.read(eviction.read_loss_totals)

        assert [(t.record_class.name, t.survives, t.rows) for t in found] == [
            ("ROLLUP", "rollup 300 s", 600),
            ("ROLLUP", "rollup 3600 s", 600),
            ("READING", "rollup 60 s", 2 * ROWS),
        ]
        assert await kept(spool, RecordClass.ROLLUP) == [(3, 3), (6, 6), (9, 9)]
    assert check_spool(tmp_path / "spool.db").problems == []


async def test_readings_older_than_their_greatest_age_go_whatever_room_there_is(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional")
        await fill(spool, 6)
        await processed(spool, 6)
        means = evictor(spool, None, "regional", max_age_s=60.0)
        assert await means.evict_once(NOW_US + 63_500_000) == 4 * ROWS
        (total,) = await spool.database.read(eviction.read_loss_totals)
        assert (total.reason, total.rows) == ("max_age", 4 * ROWS)


async def test_what_was_damaged_before_it_was_delivered_is_declared_to_those_without_it(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional", "cloud")
        await fill(spool, 3)
        await deliver(spool, "cloud", 3 * ROWS)
        position = (int(RecordClass.READING) << 56) + 2
        await spool.database.write(
            lambda c: c.execute("UPDATE segment SET block = zeroblob(50) WHERE position = ?", (position,))
        )
        await deliver_all_to(spool, "regional")
        await evictor(spool, None, "regional", "cloud").evict_once(NOW_US)
        await evictor(spool, None, "regional", "cloud").evict_once(NOW_US)

        (total,) = await spool.database.read(eviction.read_loss_totals)
        assert (total.destination, total.reason, total.rows, total.survives) == (
            "regional",
            "damaged",
            ROWS,
            "",
        )
        assert len(await kept(spool, RecordClass.DECLARATION)) == 1


async def deliver_all_to(spool: OpenSpool, name: str) -> None:
    region = MemoryRegion(name)
    shipper = one_sender(spool.deliveries, region, keeps_ledger=True, chance=lambda: 0.0)
    while await send_one(shipper):
        pass
    assert region.applied.total() == 2 * ROWS


async def test_what_somebody_claims_meanwhile_is_not_taken_away(tmp_path, monkeypatch):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional")
        await fill(spool, 3)
        await processed(spool, 3)
        means = evictor(spool, 1, "regional")
        evict = means._evict

        async def late(*arguments):
            await spool.deliveries.claim("regional", ClaimRequest(now_us=NOW_US, max_rows=ROWS))
            return await evict(*arguments)

        monkeypatch.setattr(means, "_evict", late)
        assert await means.evict_once(NOW_US) == 0
        assert await kept(spool) == [(1, 1), (2, 2), (3, 3)]
        assert await spool.database.read(eviction.read_loss_totals) == []


async def test_delivered_readings_go_before_anything_is_given_up(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional")
        await fill(spool, 10)
        await processed(spool, 10)
        await deliver(spool, "regional", 5 * ROWS)
        retention = build_retention(
            spool.database,
            spool.segments,
            "regional",
            keep_s=10**6,
            capacity=Capacity(max_bytes=1),
            evicts=True,
        )
        await retention.prune_once(NOW_US + 3600 * 1_000_000)
        assert (await kept(spool))[0] == (6, 6)
        assert await spool.database.read(eviction.read_loss_totals) == []


@pytest.mark.parametrize("gone", [1, 2])
async def test_commit_numbers_go_on_after_everything_was_given_up(tmp_path, gone):
    async with open_spool(tmp_path / "spool.db") as spool:
        await fill(spool, gone)
        await processed(spool, gone)
        await until_it_fits(spool, evictor(spool, 1))
    async with open_spool(tmp_path / "spool.db") as spool:
        assert spool.segments.newest_commit(RecordClass.READING) == gone


async def test_thinning_holds_one_segment_of_rollups_in_memory_however_many_there_are(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for _ in range(30):
            await roll(spool, 60, 5000)
        means = evictor(spool, 1, "regional")
        tracemalloc.start()
        assert await means.evict_once(NOW_US) == 30 * 5000
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        (held,) = await spool.database.read(
            lambda c: c.execute("SELECT count(*) FROM segment WHERE position >> 56 = 3").fetchone()
        )
        assert held == 0
        assert highest < 5_000_000


async def test_a_disk_that_something_else_fills_costs_half_of_the_spool_and_no_more(tmp_path):
    capacity = Capacity(min_free_bytes=1 << 61)
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.database.limit_wal(100_000)
        await register(spool, "regional")
        await fill(spool, 120)
        await processed(spool, 120)
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.database.limit_wal(100_000)
        means = evictor(spool, None, "regional")
        means._capacity = capacity
        await until_it_fits(spool, means)
        left = len(await kept(spool))
        assert 35 <= left <= 75
        with pytest.raises(SpoolFullError, match="Something else fills the disk"):
            await capacity.require_room(spool.database)
    async with open_spool(tmp_path / "spool.db") as spool:
        again = evictor(spool, None, "regional")
        again._capacity = capacity
        await until_it_fits(spool, again)
        assert len(await kept(spool)) == left, "a restart is no reason to give up another half"
        capacity.min_free_bytes = 0
        await again.evict_once(NOW_US)
        assert not capacity.floor_out_of_reach


async def test_what_a_destination_that_was_taken_out_lacks_is_kept_until_it_is_dropped(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional", "cloud")
        await fill(spool, 4)
        await processed(spool, 4)
        await deliver(spool, "regional", 4 * ROWS)
        await deliver(spool, "cloud", ROWS)
        retention = build_retention(spool.database, spool.segments, "regional", configured=["regional"])
        assert await retention.prune_once(NOW_US + 3600 * 1_000_000) == 1
        assert await kept(spool) == [(2, 2), (3, 3), (4, 4)]
        await spool.deliveries.drop("cloud")
        assert await retention.prune_once(NOW_US + 3600 * 1_000_000) == 3


async def test_what_is_given_up_is_declared_to_a_destination_that_was_taken_out(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await register(spool, "regional", "cloud")
        await fill(spool, 2)
        await processed(spool, 2)
        await until_it_fits(spool, evictor(spool, 1, "regional", configured=["regional"]))
        found = await spool.database.read(eviction.read_loss_totals)
        assert [(t.destination, t.rows) for t in found] == [("cloud", 2 * ROWS), ("regional", 2 * ROWS)]
