"""Whatever comes in whatever order, wherever it stops: the newest revisions are what all readings give."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_sync.model.records import Flag
from gateway.rollups.open_windows import RollupOptions
from gateway.rollups.rollup import M2_ERROR, MEAN_ERROR
from tests.support.naive_rollups import naive, of_rows
from tests.support.roller_rig import START_US, MemoryLog, Rolling, newest

LEVELS = (60, 300, 3600, 86400)
_MINUTE_US = 60_000_000
_YEAR_2106_US = 4_300_000_000_000_000


def assert_rolled(rolling: Rolling, windows_s: tuple[int, ...] = LEVELS) -> None:
    rows = [row for commit in rolling.log.commits for row in commit]
    for window_s in windows_s:
        found = of_rows(newest(rolling.log.rollups, window_s))
        expected = naive(rows, window_s)
        assert found.keys() == expected.keys(), window_s
        for key, want in expected.items():
            _assert_same(found[key], want, f"{key} of {window_s} s")


def _assert_same(have: dict, want: dict, where: str) -> None:
    largest = max(abs(want["minimum"]), abs(want["maximum"])) if want["count"] else 0.0
    for name, value in want.items():
        if name in ("mean", "m2") and want["count"]:
            bound = MEAN_ERROR * largest if name == "mean" else M2_ERROR * want["count"] * largest**2
            assert abs(have[name] - value) <= bound, f"{name} {where}"
        else:
            assert have[name] == value or (math.isnan(have[name]) and math.isnan(value)), f"{name} {where}"


offset_s = st.one_of(
    st.integers(-30, 5),
    st.integers(-400, 400),
    st.integers(-200_000, 0),
    st.just((_YEAR_2106_US - START_US) // 1_000_000),
)
reading = st.tuples(
    st.integers(1, 3),
    offset_s,
    st.floats(-1e6, 1e6, allow_nan=False),
    st.sampled_from([0, 0, 0, int(Flag.OUT_OF_RANGE), int(Flag.SUPPRESSED)]),
)
action = st.one_of(
    st.tuples(st.just("commit"), st.lists(reading, min_size=1, max_size=8)),
    st.tuples(st.just("step"), st.integers(1, 3)),
    st.tuples(st.just("checkpoint"), st.just(1)),
    st.tuples(st.just("fail"), st.integers(1, 3)),
    st.tuples(st.just("kill"), st.just(0)),
    st.tuples(st.just("clock"), st.sampled_from([1, 20, 61, 95, 400, 90_000, -1, -61, -4000, -100_000])),
    st.tuples(st.just("trust"), st.booleans()),
)
terms_ = st.builds(
    RollupOptions,
    lateness_s=st.sampled_from([0.0, 30.0]),
    idle_s=st.sampled_from([0.0, 30.0]),
    close_every_s=st.sampled_from([0.0, 5.0]),
    max_open=st.sampled_from([1, 2, 100_000]),
)


@settings(max_examples=150, deadline=None)
@given(terms_, st.lists(action, max_size=40))
def test_the_newest_revisions_equal_a_full_computation(terms: RollupOptions, actions: list) -> None:
    rolling = Rolling(terms)
    seen: set[tuple[int, int]] = set()
    stamp = 0
    for name, given_ in actions:
        if name == "commit":
            rows = []
            for series, offset, value, flag in given_:
                stamp += 1  # within the second, so that no time comes twice
                at_us = rolling.now_us + offset * 1_000_000 + stamp
                if (series, at_us) not in seen:
                    seen.add((series, at_us))
                    rows.append((series, at_us, value, flag))
            rolling.commit(rows)
        elif name == "step":
            rolling.step(most=given_)
        elif name == "checkpoint":
            rolling.step(durable=True)
        elif name == "fail":
            rolling.step(most=given_, durable=True, fails=True)
        elif name == "kill":
            rolling.restart()
        elif name == "clock":
            rolling.now_us += given_ * 1_000_000
        else:
            rolling.trusted = given_
    rolling.trusted = True
    rolling.settle()
    assert rolling.roller.open_windows == 0
    assert rolling.roller.counters.late_unrolled == 0
    assert_rolled(rolling)


def _minutes(series: int, first: int, count: int, *, value: float = 1.0) -> list:
    return [(series, START_US + (first + n) * _MINUTE_US, value, 0) for n in range(count)]


def test_a_window_is_closed_once_when_its_series_has_gone_on_and_the_lateness_is_over() -> None:
    rolling = Rolling(RollupOptions(windows_s=(60,), close_every_s=0.0))
    start = START_US // _MINUTE_US * _MINUTE_US
    rolling.commit([(1, start + 1, 1.0, 0)])
    assert rolling.step().rows == 0
    rolling.commit([(1, start + 89_999_999, 2.0, 0)])
    assert rolling.step().rows == 0
    rolling.commit([(1, start + 90_000_000, 3.0, 0)])
    closed = rolling.step()
    assert closed.time_us.tolist() == [start]
    assert closed.revision.tolist() == [1]


def test_an_idle_series_is_closed_by_time() -> None:
    rolling = Rolling(RollupOptions(close_every_s=0.0))
    rolling.commit([(1, START_US, 5.0, 0)])
    rolling.step()
    rolling.now_us += 86_400_000_000 + 60_000_000
    closed = rolling.step()
    assert sorted(closed.window_s.tolist()) == list(LEVELS)


def test_a_device_in_the_year_2106_closes_nothing_of_others_nor_of_itself() -> None:
    rolling = Rolling(RollupOptions(windows_s=(60,), close_every_s=0.0))
    rolling.commit([(1, START_US, 1.0, 0), (2, START_US, 1.0, 0), (2, _YEAR_2106_US, 1.0, 0)])
    assert rolling.step().rows == 0


def test_a_late_reading_makes_a_higher_revision_of_every_length() -> None:
    rolling = Rolling(RollupOptions(close_every_s=0.0))
    rolling.commit([(1, START_US, 1.0, 0)])
    rolling.settle()
    rolling.commit([(1, START_US + 1, 3.0, 0)])
    rolling.settle()
    for window_s in LEVELS:
        (row,) = of_rows(newest(rolling.log.rollups, window_s)).values()
        assert (row["revision"], row["count"], row["mean"]) == (2, 2, 2.0)


def test_filling_a_gap_looks_nothing_up() -> None:
    class Unasked(MemoryLog):
        def newest_revisions(self, wanted):
            raise AssertionError(f"looked for {wanted.rows} windows")

    rolling = Rolling(RollupOptions(windows_s=(60,), close_every_s=0.0), Unasked())
    rolling.commit(_minutes(1, 0, 10))
    rolling.settle()
    rolling.commit(_minutes(1, -100, 50))
    rolling.settle()
    assert_rolled(rolling, (60,))


def test_what_was_pruned_is_not_overwritten_by_less() -> None:
    rolling = Rolling(RollupOptions(windows_s=(60,), close_every_s=0.0))
    rolling.commit(_minutes(1, 0, 5))
    rolling.settle()
    rolling.log.pruned, rolling.log.evicted_before_us = len(rolling.log.rollups), rolling.now_us
    before = len(rolling.log.rollups)
    rolling.commit([(1, START_US + 1, 9.0, 0)])
    rolling.settle()
    assert len(rolling.log.rollups) == before
    assert rolling.roller.counters.late_unrolled == 1


def test_a_backlog_that_is_read_fast_does_not_pile_up() -> None:
    rolling = Rolling(RollupOptions(windows_s=(60,), close_every_s=5.0))
    for day in range(-40, -30):
        rolling.commit(_minutes(1, day * 1440, 1440))
    while rolling.at < len(rolling.log.commits):
        rolling.step()
        assert rolling.roller.open_windows <= 5_003
    rolling.settle()
    assert_rolled(rolling, (60,))


@pytest.mark.parametrize("lengths", [(60, 600), (60,), (60, 300, 1800, 3600, 86400), (120, 3600)])
def test_lengths_may_change_between_two_starts(lengths: tuple[int, ...]) -> None:
    rolling = Rolling(RollupOptions(close_every_s=0.0))
    rolling.commit(_minutes(1, 0, 90))
    rolling.step(durable=True)
    rolling.terms = RollupOptions(windows_s=lengths, close_every_s=0.0)
    rolling.restart()
    rolling.settle()
    kept = tuple(length for length in lengths if length in LEVELS)
    assert_rolled(rolling, kept)


def test_state_that_cannot_be_read_never_counts_a_reading_twice() -> None:
    rolling = Rolling(RollupOptions(close_every_s=0.0))
    rolling.commit(_minutes(1, 0, 90))
    rolling.step(durable=True)
    rolling.log.state = {key: b"\x63" + value[1:] for key, value in rolling.log.state.items()}
    rolling.restart()
    rolling.commit(_minutes(1, 90, 10))
    rolling.settle()
    closed = newest(rolling.log.rollups, 60)
    assert set(closed.count.tolist()) == {1}
