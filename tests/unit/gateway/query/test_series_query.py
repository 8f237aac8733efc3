"""Questions about one series: from rollups, from readings, and from both; lines of few points; charts."""

from __future__ import annotations

import math
from contextlib import asynccontextmanager

import numpy as np
import pytest

from cloud_sync.model.records import Rollups, Series
from gateway.processing.commit_consumer import CommitConsumer, ConsumerOptions
from gateway.query.series_chart import draw_line_chart
from gateway.query.series_query import (
    SeriesQuery,
    SeriesResult,
    choose_points,
    find_series,
    moving_average,
    outline_windows,
    run_query,
)
from gateway.rollups.open_windows import RollupOptions
from gateway.rollups.roller import Roller
from gateway.spool.database import open_read_only, open_spool_read_only
from gateway.spool.segment_reader import CommitLogReader, StoredRollups
from gateway.spooltools.reading_selection import ReadingFilter
from tests.support.naive_rollups import naive
from tests.support.open_spool import NOW_US, open_spool

_SECOND_US = 1_000_000
_START_US = NOW_US // 86_400_000_000 * 86_400_000_000


@asynccontextmanager
async def rolled(path, *groups):
    """A spool with these groups of rows; the first ones were processed, what follows None was not."""
    async with open_spool(path) as spool:
        connection = open_read_only(path)
        commit_consumer = CommitConsumer(
            spool.database,
            spool.segments,
            CommitLogReader(connection, spool.catalog),
            [Roller(StoredRollups(connection), RollupOptions(windows_s=(60, 300), close_every_s=0))],
            ConsumerOptions(),
            clock_us=lambda: NOW_US,
        )
        try:
            await commit_consumer.restore()
            processed = True
            for rows in groups:
                if rows is None:
                    processed = False
                    continue
                await spool.append(rows)
                if processed:
                    await commit_consumer.consume_once()
            await spool.compaction.compact_once(everything=True)
            yield spool
        finally:
            await commit_consumer.aclose()


def every(name: str, step_s: int, count: int, *, start_s: int = 0) -> list[tuple[str, int, float]]:
    return [(name, _START_US + (start_s + n * step_s) * _SECOND_US, math.sin(n / 9)) for n in range(count)]


def asked(path, name: str, question: SeriesQuery) -> SeriesResult:
    with open_spool_read_only(path) as connection:
        (known,) = find_series(connection, ReadingFilter(patterns=(f"{name}/t",)))
        return run_query(connection, known, question)


def span(hours: float = 24) -> tuple[int, int]:
    return _START_US, _START_US + round(hours * 3600 * _SECOND_US)


def assert_answers(found: SeriesResult, rows, window_s: int) -> None:
    expected = {
        start: want for (_, start), want in naive(((1, t, v, 0) for _, t, v in rows), window_s).items()
    }
    assert found.columns["time_us"] == sorted(expected)
    for at, start in enumerate(found.columns["time_us"]):
        want = expected[start]
        for name in ("count", "minimum", "maximum", "first", "last"):
            assert found.columns[name][at] == want[name]
        assert found.columns["mean"][at] == pytest.approx(want["mean"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("every_s", [60, 300, 600, 90, 3600])
async def test_windows_equal_the_readings_wherever_they_come_from(tmp_path, every_s: int) -> None:
    early, late = every("a", 7, 2000), every("a", 7, 300, start_s=14_000)
    unrolled = every("a", 7, 100, start_s=16_100)
    path = tmp_path / "spool.db"
    async with rolled(path, early, every("b", 1, 500), late, None, unrolled):
        found = asked(path, "a", SeriesQuery(*span(), every_s))
        assert found.every_s == every_s
        assert_answers(found, early + late + unrolled, every_s)


async def test_the_first_window_is_whole(tmp_path) -> None:
    rows = every("a", 10, 60)
    path = tmp_path / "spool.db"
    async with rolled(path, rows):
        found = asked(path, "a", SeriesQuery(_START_US + 90 * _SECOND_US, span()[1], 60))
        assert found.columns["time_us"][0] == _START_US + 60 * _SECOND_US
        assert found.columns["count"][0] == 6


async def test_a_short_span_gives_the_readings_themselves(tmp_path) -> None:
    rows = every("a", 10, 60)
    path = tmp_path / "spool.db"
    async with rolled(path, rows):
        found = asked(path, "a", SeriesQuery(_START_US, _START_US + 300 * _SECOND_US))
        assert found.every_s == 0
        assert found.columns["time_us"] == [t for _, t, _ in rows[:30]]
        assert found.columns["quality"] == [None] * 30


async def test_every_attribute_state_belongs_to_the_series(tmp_path) -> None:
    path = tmp_path / "spool.db"
    async with rolled(path, None, every("a", 10, 12)) as spool:
        other = spool.readings(every("a", 10, 12, start_s=3600))
        number = spool.catalog.assign_number(Series("a", "t", (("unit", "K"),)))
        await spool.appender.append(other.with_series(np.full(12, number, np.int32)), [], now_us=NOW_US)
        found = asked(path, "a", SeriesQuery(*span(), 3600))
        assert found.unit == "K"
        assert found.columns["count"] == [12, 12]


async def test_damaged_segments_are_left_out_and_counted(tmp_path) -> None:
    path = tmp_path / "spool.db"
    async with rolled(path, None, every("a", 10, 12)) as spool:
        await spool.database.write(lambda c: c.execute("UPDATE segment SET block = x'00'"))
        found = asked(path, "a", SeriesQuery(*span(), 60))
        assert (found.rows, found.damaged_rows) == (0, 12)


async def test_points_are_few_and_keep_the_extremes(tmp_path) -> None:
    rows = every("a", 2, 3000)
    rows[1234] = (*rows[1234][:2], 99.0)
    path = tmp_path / "spool.db"
    async with rolled(path, rows):
        for question in (SeriesQuery(*span(2), 0, 100), SeriesQuery(*span(2), 60, 100)):
            found = asked(path, "a", question)
            assert 50 < found.rows <= 100
            assert max(found.columns["value"]) == 99.0
            assert found.columns["time_us"] == sorted(found.columns["time_us"])


def windows_of(counts, means) -> Rollups:
    n = len(counts)
    at = _START_US + np.arange(n) * 60 * _SECOND_US
    value = np.array(means, np.float64)
    none = np.zeros(n, np.int32)
    return Rollups(
        none, at, np.full(n, 60, np.int32), none + 1, np.array(counts, np.int32), value, value * 0,
        value - 1, value + 1, value, at, value, at, none, none, none,
    )  # fmt: skip


def test_a_moving_average_weighs_windows_by_their_readings() -> None:
    windows = windows_of([1, 3, 0, 2], [4.0, 8.0, math.nan, 1.0])
    assert moving_average(windows, 2).tolist() == pytest.approx([4.0, 7.0, 8.0, 1.0])
    gap = windows.select(np.array([0, 3]))
    assert moving_average(gap, 2).tolist() == [4.0, 1.0]


def test_an_outline_goes_through_both_extremes_of_every_window() -> None:
    time_us, value = outline_windows(windows_of([1, 0, 1], [4.0, math.nan, 8.0]))
    assert value.tolist() == [3.0, 5.0, 7.0, 9.0]
    assert (np.diff(time_us) > 0).all()


def test_few_points_are_all_chosen() -> None:
    assert choose_points(np.arange(5), np.arange(5.0), 10).tolist() == [0, 1, 2, 3, 4]


def test_a_chart_shows_the_greatest_at_the_top_and_leaves_gaps_open() -> None:
    at = np.concatenate([np.arange(50), np.arange(150, 200)])
    value = np.where(at < 100, 5.0, -5.0)
    lines = draw_line_chart(at, value, (0, 200), width=112, height=5)
    assert len(lines) == 5
    assert lines[0].split()[0] == "5"
    assert lines[-1].split()[0] == "-5"
    drawn = [line.partition("│")[2] for line in lines]
    assert set(drawn[0][:25]) != {chr(0x2800)}
    assert {c for line in drawn for c in line[30:70]} == {chr(0x2800)}


def test_a_chart_of_one_value_or_of_the_largest_ones_can_be_drawn() -> None:
    assert len(draw_line_chart(np.array([5]), np.array([1.0]), (0, 10))) == 12
    largest = np.finfo(np.float64).max
    assert len(draw_line_chart(np.array([1, 5]), np.array([-largest, largest]), (0, 10))) == 12
