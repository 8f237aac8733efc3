"""The follower on a real spool: progress, checkpoints, damage, restarts, what it holds back."""

from __future__ import annotations

from contextlib import asynccontextmanager

import pytest

from cloud_sync.codec import columns
from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import RecordClass, Series
from gateway.processing.commit_consumer import CommitConsumer, ConsumerOptions
from gateway.rollups.open_windows import RollupOptions
from gateway.rollups.roller import Roller
from gateway.spool.compaction import Compaction
from gateway.spool.database import open_read_only
from gateway.spool.errors import SpoolAccessError
from gateway.spool.processing_state import (
    PROGRESS_KEY,
    read_processed_through,
    read_processing_state,
    write_processing_state,
)
from gateway.spool.segment_reader import CommitLogReader, StoredRollups
from gateway.spool.segments import position_span
from tests.support.naive_rollups import naive, of_rows
from tests.support.open_spool import NOW_US, build_retention, open_spool
from tests.support.roller_rig import newest

_SECOND_US = 1_000_000
_LEVELS = (60, 300, 3600, 86400)


class Clock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.us = NOW_US

    def __call__(self) -> int:
        return self.us


@asynccontextmanager
async def following(spool, clock, *, terms=RollupOptions(close_every_s=0.0), chunk_rows=50_000):  # noqa: B008 - an immutable value
    connection = open_read_only(spool.database.path)
    roller = Roller(StoredRollups(connection), terms)
    commit_consumer = CommitConsumer(
        spool.database,
        spool.segments,
        CommitLogReader(connection, spool.catalog),
        [roller],
        ConsumerOptions(interval_s=0, checkpoint_s=3600, chunk_rows=chunk_rows),
        clock_us=clock,
    )
    try:
        await commit_consumer.restore()
        yield commit_consumer, roller
    finally:
        await commit_consumer.aclose()


@pytest.fixture
async def spool(tmp_path):
    async with open_spool(tmp_path / "spool.db") as opened:
        yield opened


@pytest.fixture
def clock():
    return Clock()


async def settle(commit_consumer, clock) -> None:
    while await commit_consumer.consume_once():
        continue
    for _ in range(8):
        clock.us += 86_400 * _SECOND_US
        await commit_consumer.consume_once()


async def stored(spool) -> list:
    """Every rollup segment that can be decoded."""
    blocks = await spool.database.read(
        lambda c: c.execute(
            "SELECT block FROM segment WHERE position BETWEEN ? AND ? ORDER BY position",
            position_span(RecordClass.ROLLUP),
        ).fetchall()
    )
    return [columns.decode_records(block, RecordClass.ROLLUP) for (block,) in blocks]


def minutes(name: str, first: int, count: int) -> list[tuple[str, int, float]]:
    """A reading every ten seconds for so many minutes."""
    start = NOW_US + first * 60 * _SECOND_US
    return [(name, start + n * 10 * _SECOND_US, float(n % 7)) for n in range(6 * count)]


def late(rows):
    """The same readings' windows once more, a moment later each."""
    return [(name, time_us + 1, value + 1) for name, time_us, value in rows]


async def assert_rolled(spool, rows) -> None:
    """The newest revisions are what all these readings come to."""
    numbered = [(spool.catalog.assign_number(Series(name, "t")), t, v, 0) for name, t, v in rows]
    rollups = await stored(spool)
    for window_s in _LEVELS:
        found = of_rows(newest(rollups, window_s))
        expected = naive(numbered, window_s)
        assert {k: v["count"] for k, v in found.items()} == {k: v["count"] for k, v in expected.items()}
        for key, want in expected.items():
            for name in ("minimum", "maximum", "first", "last", "first_at_us", "last_at_us"):
                assert found[key][name] == want[name]
            assert found[key]["mean"] == pytest.approx(want["mean"], rel=1e-12)
            assert found[key]["m2"] == pytest.approx(want["m2"], rel=1e-9, abs=1e-9)


async def test_rollups_equal_the_readings_whatever_the_chunks_and_however_late(spool, clock) -> None:
    first, second = minutes("a", 0, 30) + minutes("b", 0, 7), minutes("a", -90, 20)
    async with following(spool, clock, chunk_rows=50) as (commit_consumer, roller):
        for n in range(0, len(first), 40):
            await spool.append(first[n : n + 40])
            await commit_consumer.consume_once()
        await settle(commit_consumer, clock)
        await assert_rolled(spool, first)
        await spool.append(second)
        await settle(commit_consumer, clock)
        await spool.append(late(first))
        await settle(commit_consumer, clock)
        assert commit_consumer.lag_commits == 0
        assert roller.counters.revisions > 0
        assert roller.counters.late_unrolled == 0
    await assert_rolled(spool, first + second + late(first))


async def test_what_was_not_durable_is_read_again_after_a_restart(spool, clock) -> None:
    rows = minutes("a", 0, 12)
    await spool.append(rows[:30])
    async with following(spool, clock) as (commit_consumer, _):
        await commit_consumer.consume_once()
        await spool.append(rows[30:31])
        await commit_consumer.consume_once()
        assert commit_consumer.progress == 2
        assert await spool.database.read(read_processed_through) == 1
    async with following(spool, clock) as (commit_consumer, _):
        assert commit_consumer.progress == 1
        await spool.append(rows[31:])
        await settle(commit_consumer, clock)
    await assert_rolled(spool, rows)


async def test_a_checkpoint_keeps_what_is_open(spool, clock) -> None:
    rows = minutes("a", 0, 1)
    await spool.append(rows[:3])
    async with following(spool, clock) as (commit_consumer, _):
        await commit_consumer.consume_once(durable=True)
        assert await spool.database.read(read_processed_through) == 1
    async with following(spool, clock) as (commit_consumer, roller):
        assert roller.open_windows == 1
        await spool.append(rows[3:])
        await settle(commit_consumer, clock)
    await assert_rolled(spool, rows)


async def test_a_transaction_that_fails_has_not_happened(spool, clock, monkeypatch) -> None:
    rows = minutes("a", 0, 12)
    await spool.append(rows)
    write = spool.database.write

    async def failing(work):
        raise SpoolAccessError("no")

    async with following(spool, clock) as (commit_consumer, roller):
        monkeypatch.setattr(type(spool.database), "write", staticmethod(failing))
        with pytest.raises(SpoolAccessError):
            await commit_consumer.consume_once()
        assert (commit_consumer.progress, roller.open_windows) == (0, 0)
        monkeypatch.setattr(type(spool.database), "write", staticmethod(write))
        await settle(commit_consumer, clock)
    await assert_rolled(spool, rows)


async def test_a_damaged_segment_is_passed_over_and_counted(spool, clock) -> None:
    first, second = minutes("a", 0, 1), minutes("a", 5, 1)
    await spool.append(first)
    await spool.append(second)
    await spool.database.write(
        lambda c: c.execute("UPDATE segment SET block = x'00' WHERE rowid = (SELECT min(rowid) FROM segment)")
    )
    async with following(spool, clock) as (commit_consumer, _):
        await settle(commit_consumer, clock)
        assert commit_consumer.counters.damaged_rows == 6
    await assert_rolled(spool, second)


async def test_commits_that_are_gone_do_not_keep_it_behind(spool, clock) -> None:
    await spool.append(minutes("a", 0, 1))
    await spool.database.write(lambda c: c.execute("DELETE FROM segment"))
    async with following(spool, clock) as (commit_consumer, _):
        await commit_consumer.consume_once()
        assert commit_consumer.lag_commits == 0


async def test_compaction_and_retention_keep_what_was_not_processed(spool, clock) -> None:
    async with following(spool, clock) as (commit_consumer, _):
        for n in range(4):
            await spool.append(minutes("a", n, 1))
        assert await spool.compaction.compact_once(everything=True) == 0
        await spool.deliveries.register("d", "file", now_us=NOW_US, classes=[RecordClass.READING])
        while (claimed := await spool.deliveries.claim("d", ClaimRequest(now_us=NOW_US))) is not None:
            await spool.deliveries.settle("d", claimed)
        retention = build_retention(spool.database, spool.segments, "d")
        assert await retention.prune_once(NOW_US + 10**12) == 0
        for n in range(4, 12):
            await spool.append(minutes("a", n, 1))
            clock.us = NOW_US + (n + 1) * 60 * _SECOND_US
            await commit_consumer.consume_once()
        await settle(commit_consumer, clock)
        before = await stored(spool)
        await spool.compaction.compact_once(everything=True)
        readings = await spool.database.read(
            lambda c: c.execute(
                "SELECT rows FROM segment WHERE position BETWEEN ? AND ?", position_span(RecordClass.READING)
            ).fetchall()
        )
        assert sum(rows for (rows,) in readings) == 72
        after = await stored(spool)
        assert len(after) < len(before)
        assert sum(part.rows for part in after) == sum(part.rows for part in before)
        assert all(len(set(part.window_s.tolist())) == 1 for part in after)  # so that they can be thinned
        assert await retention.prune_once(NOW_US + 10**12) > 0


@pytest.mark.parametrize("destinations", [[], ["d"]])
async def test_rollups_go_by_their_age_once_they_are_delivered(spool, clock, destinations) -> None:
    retention = build_retention(
        spool.database, spool.segments, *destinations, keep_s=86_400, record_class=RecordClass.ROLLUP
    )
    await spool.append(minutes("a", 0, 3))
    async with following(spool, clock) as (commit_consumer, roller):
        await settle(commit_consumer, clock)
        kept = len(await stored(spool))
        assert await retention.prune_once(NOW_US + 80_000 * _SECOND_US, RecordClass.ROLLUP) == 0
        if destinations:
            assert await retention.prune_once(clock.us + 10**12, RecordClass.ROLLUP) == 0
            await spool.deliveries.register("d", "file", now_us=NOW_US)
            while (claimed := await spool.deliveries.claim("d", ClaimRequest(now_us=NOW_US))) is not None:
                await spool.deliveries.settle("d", claimed)
        assert await retention.prune_once(clock.us + 10**12, RecordClass.ROLLUP) == kept
        assert await stored(spool) == []
        await spool.append(late(minutes("a", 0, 3)))
        await settle(commit_consumer, clock)
        assert await stored(spool) == []
        assert roller.counters.late_unrolled == 8


async def test_delivered_rollups_are_merged_whatever_their_windows(spool, clock) -> None:
    compaction = Compaction(spool.database, spool.catalog, spool.duplicates)
    compaction.rollup_receivers = ("d",)
    rows = minutes("a", 0, 30)
    await spool.append(rows)
    await spool.deliveries.register("d", "file", now_us=NOW_US)
    async with following(spool, clock) as (commit_consumer, _):
        await settle(commit_consumer, clock)
        while (claimed := await spool.deliveries.claim("d", ClaimRequest(now_us=NOW_US))) is not None:
            await spool.deliveries.settle("d", claimed)
        await compaction.compact_once(everything=True)
        assert len(await stored(spool)) == 1
        await spool.append(late(rows))
        await settle(commit_consumer, clock)
    await assert_rolled(spool, rows + late(rows))


async def test_rollups_are_not_begun_twice_when_the_progress_is_lost(spool, clock) -> None:
    rows = minutes("a", 0, 12)
    await spool.append(rows)
    async with following(spool, clock) as (commit_consumer, _):
        await settle(commit_consumer, clock)
    await spool.database.write(lambda c: write_processing_state(c, {PROGRESS_KEY: None}))
    async with following(spool, clock) as (commit_consumer, _):
        await spool.append(late(rows))
        await settle(commit_consumer, clock)
    await assert_rolled(spool, rows + late(rows))


async def test_a_late_reading_whose_rollup_is_damaged_does_not_replace_it(spool, clock) -> None:
    rows = minutes("a", 0, 3)
    await spool.append(rows)
    async with following(spool, clock) as (commit_consumer, roller):
        await settle(commit_consumer, clock)
        before = await spool.database.read(lambda c: c.execute("SELECT count(*) FROM segment").fetchone())
    await spool.database.write(
        lambda c: c.execute(
            "UPDATE segment SET block = x'00' WHERE position BETWEEN ? AND ?",
            position_span(RecordClass.ROLLUP),
        )
    )
    async with following(spool, clock) as (commit_consumer, roller):
        await spool.append(late(rows[:1]))
        await settle(commit_consumer, clock)
        assert roller.counters.late_unrolled == len(_LEVELS)
        after = await spool.database.read(lambda c: c.execute("SELECT count(*) FROM segment").fetchone())
        assert after[0] == before[0] + 1


async def test_the_state_is_written_in_one_transaction_with_the_rollups(spool, clock) -> None:
    await spool.append(minutes("a", 0, 12))
    async with following(spool, clock) as (commit_consumer, _):
        await commit_consumer.consume_once()
        state = await spool.database.read(read_processing_state)
        assert state[PROGRESS_KEY] == b"1"
        assert {"roller/60", "roller/300", "roller/newest"} <= state.keys()
        assert len(await stored(spool)) > 0
