"""Summaries of readings, and their merging, against a computation from all readings at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync.model.records import Flag, Rollups
from gateway.rollups.rollup import M2_ERROR, MEAN_ERROR, merge_rollups, roll_up_readings
from tests.support.naive_rollups import naive, of_rows, readings_of

_MINUTE_US = 60_000_000


def _one(rollups: Rollups) -> dict:
    assert rollups.rows == 1
    return {name: getattr(rollups, name)[0] for name in rollups.columns}


def test_a_summary_says_what_the_readings_of_its_window_were() -> None:
    rows = [(7, 61_000_000, 2.0, 0), (7, 65_000_000, 4.0, 0), (7, 119_999_999, 9.0, 0)]
    summary = _one(roll_up_readings(readings_of(rows), 60))
    assert summary["series"] == 7
    assert summary["time_us"] == _MINUTE_US
    assert summary["window_s"] == 60
    assert summary["count"] == 3
    assert summary["mean"] == 5.0
    assert summary["m2"] == 26.0
    assert (summary["minimum"], summary["maximum"]) == (2.0, 9.0)
    assert (summary["first"], summary["first_at_us"]) == (2.0, 61_000_000)
    assert (summary["last"], summary["last_at_us"]) == (9.0, 119_999_999)


def test_out_of_range_readings_are_left_out_and_counted_apart() -> None:
    bad = int(Flag.OUT_OF_RANGE)
    rows = [(1, 0, 1e9, bad), (1, 1, 2.0, int(Flag.STUCK)), (1, 2, -1e9, bad), (1, 3, 4.0, 0)]
    summary = _one(roll_up_readings(readings_of(rows), 60))
    assert (summary["count"], summary["excluded"], summary["flagged"]) == (2, 2, 3)
    assert (summary["minimum"], summary["mean"], summary["maximum"]) == (2.0, 3.0, 4.0)
    assert (summary["first_at_us"], summary["last_at_us"]) == (1, 3)


def test_suppressed_readings_count_for_the_mean_and_are_counted() -> None:
    held = int(Flag.SUPPRESSED)
    rows = [(1, 0, 1.0, 0), (1, 1, 3.0, held), (1, 2, 5.0, held | int(Flag.LOW_QUALITY))]
    summary = _one(roll_up_readings(readings_of(rows), 60))
    assert (summary["count"], summary["suppressed"], summary["flagged"]) == (3, 2, 1)
    assert summary["mean"] == 3.0


def test_a_window_of_nothing_but_excluded_readings_has_no_values() -> None:
    rows = [(1, _MINUTE_US + 5, 1e9, int(Flag.OUT_OF_RANGE))]
    summary = _one(roll_up_readings(readings_of(rows), 60))
    assert summary["count"] == 0
    assert summary["excluded"] == 1
    assert all(math.isnan(summary[name]) for name in ("mean", "m2", "minimum", "maximum", "first", "last"))
    assert summary["first_at_us"] == summary["last_at_us"] == _MINUTE_US


def test_windows_before_1970_begin_at_multiples_too() -> None:
    summary = _one(roll_up_readings(readings_of([(1, -1, 1.0, 0)]), 60))
    assert summary["time_us"] == -_MINUTE_US


def test_values_as_large_as_they_may_be_have_a_mean() -> None:
    largest = np.finfo(np.float64).max
    summary = _one(roll_up_readings(readings_of([(1, 0, largest, 0), (1, 1, largest, 0)]), 60))
    assert summary["mean"] == largest
    halves = [roll_up_readings(readings_of([(1, at, largest, 0)]), 60) for at in (0, 1, 2)]
    assert _one(merge_rollups(Rollups.concat(halves), 60))["mean"] == pytest.approx(largest, rel=1e-15)
    wide = [(1, 0, largest, 0), (1, 1, -largest, 0)]
    assert np.isfinite(_one(roll_up_readings(readings_of(wide), 60))["m2"])


def test_equal_values_have_no_variance_however_they_are_merged() -> None:
    parts = [
        roll_up_readings(readings_of([(1, at, 0.1, 0) for at in range(n, n + 7)]), 60)
        for n in range(0, 700, 7)
    ]
    whole = _one(merge_rollups(Rollups.concat(parts), 60))
    assert (whole["mean"], whole["m2"], whole["count"]) == (0.1, 0.0, 700)


values = st.one_of(
    st.floats(-100, 100, allow_nan=False), st.floats(-1e12, 1e12, allow_nan=False), st.just(20.5)
)
flags = st.sampled_from([0, 0, 0, int(Flag.OUT_OF_RANGE), int(Flag.STUCK), int(Flag.SUPPRESSED)])
row = st.tuples(st.integers(1, 3), st.integers(-7_200_000_000, 7_200_000_000), values, flags)
rows_ = st.lists(row, min_size=1, max_size=120, unique_by=lambda r: r[:2])


@given(rows_, st.sampled_from([60, 300, 3600]), st.data())
def test_merging_any_split_equals_a_computation_at_once(rows: list, window_s: int, data) -> None:
    parts = data.draw(st.lists(st.integers(0, 5), min_size=len(rows), max_size=len(rows)))
    summaries = [
        roll_up_readings(readings_of([r for r, p in zip(rows, parts, strict=True) if p == part]), 60)
        for part in sorted(set(parts))
    ]
    found = of_rows(merge_rollups(Rollups.concat(summaries), window_s))
    expected = naive(rows, window_s)
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        have = found[key]
        largest = max(abs(want["minimum"]), abs(want["maximum"])) if want["count"] else 0.0
        for name, value in want.items():
            if name == "mean" and want["count"]:
                assert abs(have[name] - value) <= MEAN_ERROR * largest
            elif name == "m2" and want["count"]:
                assert abs(have[name] - value) <= M2_ERROR * want["count"] * largest**2
            else:
                assert have[name] == value or (math.isnan(have[name]) and math.isnan(value)), name
