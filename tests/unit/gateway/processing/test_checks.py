"""Checks flag what is suspicious: against a plain recomputation reading by reading, and rule by rule."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_sync.model.records import Flag, Readings
from gateway.processing.checks import (
    HISTORY_READINGS,
    REFRESH_EVERY_READINGS,
    LimitRule,
    Limits,
    PlausibleTimes,
    ReadingChecker,
)
from gateway.processing.series_pattern import Pattern, sort_by_specificity

if TYPE_CHECKING:
    from collections.abc import Sequence

NOW_US = 1_790_000_000_000_000
SECOND = 1_000_000
NAN = float("nan")


class Row(NamedTuple):
    series: int
    time_us: int
    value: float
    quality: float = NAN
    battery: float = NAN
    signal: float = NAN


def readings(rows: list[Row]) -> Readings:
    columns = list(zip(*rows, strict=True))
    return Readings(
        np.array(columns[0], np.int32),
        np.array(columns[1], np.int64),
        np.array(columns[2], np.float64),
        np.array(columns[3], np.float32),
        np.array(columns[4], np.float32),
        np.array(columns[5], np.float32),
        np.full(len(rows), -1, np.int64),
        np.zeros(len(rows), np.int32),
    )


def checks(
    rules: Sequence[tuple[str, dict[str, float]]] = (), types: str = "temperature", **options
) -> ReadingChecker:
    """Series n is sensor "dn"; all are of one type, and each is its own identity."""
    return ReadingChecker(
        lambda number: (f"d{number}", types),
        lambda numbers: numbers,
        rules=[LimitRule(Pattern.parse(pattern), limits) for pattern, limits in rules],
        **options,
    )


def flags(checks: ReadingChecker, rows: list[Row], now_us: int = NOW_US) -> list[Flag]:
    return [Flag(f) for f in checks.check(readings(rows), now_us).flags.tolist()]


@pytest.mark.parametrize(
    ("sensor_type", "value", "flagged"),
    [
        ("temperature", -50.0, False),
        ("temperature", 100.0, False),
        ("temperature", -50.1, True),
        ("temperature", 100.1, True),
        ("humidity", 0.0, False),
        ("humidity", -0.5, True),
        ("humidity", 101.0, True),
        ("pressure", 799.0, True),
        ("pressure", 1200.0, False),
        ("pressure", 1200.5, True),
        ("flow", 1e300, False),
    ],
)
def test_values_outside_the_range_of_their_type_are_flagged(sensor_type, value, flagged):
    found = ReadingChecker(lambda _: ("d", sensor_type), lambda n: n)
    assert flags(found, [Row(1, NOW_US, value)]) == [Flag.OUT_OF_RANGE if flagged else Flag(0)]


def test_quality_battery_and_signal_are_flagged_below_their_minima_and_not_when_absent():
    rows = [
        Row(1, NOW_US, 1, 79.9, 9.9, -80.5),
        Row(2, NOW_US, 1, 80, 10, -80),
        Row(3, NOW_US, 1),
        Row(4, NOW_US, 1, battery=3),
    ]
    assert flags(checks(), rows) == [
        Flag.LOW_QUALITY | Flag.LOW_BATTERY | Flag.WEAK_SIGNAL,
        Flag(0),
        Flag(0),
        Flag.LOW_BATTERY,
    ]


def test_flags_that_a_reading_has_already_stay():
    batch = readings([Row(1, NOW_US, 1)])
    batch.flags[:] = Flag.TIME_ASSIGNED
    assert checks(base=Limits(maximum=0)).check(batch, NOW_US).flags.tolist() == [
        Flag.TIME_ASSIGNED | Flag.OUT_OF_RANGE
    ]


def test_the_most_specific_rule_wins_member_by_member():
    found = checks(
        [
            ("d7/temperature", {"maximum": 40}),
            ("*/temperature", {"maximum": 20, "minimum": 0}),
            ("d*/*", {"maximum": 10}),
        ]
    )
    assert flags(found, [Row(7, NOW_US, 30), Row(7, NOW_US, -1), Row(8, NOW_US, 30)]) == [
        Flag(0),
        Flag.OUT_OF_RANGE,
        Flag.OUT_OF_RANGE,
    ]


def test_among_equally_specific_rules_the_later_wins():
    found = checks([("*/temperature", {"maximum": 20}), ("*/temperature", {"maximum": 90})])
    assert flags(found, [Row(1, NOW_US, 80)]) == [Flag(0)]


@pytest.mark.parametrize("text", ["", "temperature", "/temperature", "a/", "/"])
def test_a_pattern_without_both_halves_is_refused(text):
    with pytest.raises(ValueError, match="SENSOR_ID/SENSOR_TYPE"):
        Pattern.parse(text)


def test_wild_characters_do_not_make_a_pattern_specific():
    listed = ["[abc]??*/flow", "ab*/flow", "*/flow"]
    assert [str(p) for p, _ in sort_by_specificity([(Pattern.parse(t), t) for t in listed])] == [
        "[abc]??*/flow",
        "*/flow",
        "ab*/flow",
    ]


def test_a_reading_older_than_the_newest_of_its_own_series_by_more_than_the_lateness_is_late():
    found = checks(base=Limits(late_s=30))
    assert flags(found, [Row(1, NOW_US, 1), Row(2, NOW_US - 40 * SECOND, 1)]) == [Flag(0)] * 2
    rows = [Row(1, NOW_US - 31 * SECOND, 1), Row(1, NOW_US - 30 * SECOND, 1), Row(2, NOW_US - 50 * SECOND, 1)]
    assert flags(found, rows) == [Flag.LATE, Flag(0), Flag(0)]


def test_a_reading_that_is_old_on_arrival_is_late():
    found = checks(base=Limits(old_s=60))
    assert flags(found, [Row(1, NOW_US - 61 * SECOND, 1), Row(2, NOW_US - 59 * SECOND, 1)]) == [
        Flag.LATE,
        Flag(0),
    ]


def test_times_that_cannot_be_true_are_in_doubt_and_do_not_make_what_follows_late():
    year_2106, year_1970 = 4_294_967_295 * SECOND, 86_400 * SECOND
    found = checks(plausible=PlausibleTimes(max_ahead_us=300 * SECOND))
    assert flags(found, [Row(1, year_2106, 1), Row(2, NOW_US + 300 * SECOND, 1)]) == [
        Flag.CLOCK_IN_DOUBT,
        Flag(0),
    ]
    assert flags(found, [Row(1, NOW_US, 1), Row(3, year_1970, 1)]) == [
        Flag(0),
        Flag.CLOCK_IN_DOUBT | Flag.LATE,
    ]


def test_equal_values_are_stuck_once_there_are_enough_over_long_enough():
    found = checks([("*/*", {"stuck_readings": 3, "stuck_s": 10})])
    rows = [Row(1, NOW_US + i * 4 * SECOND, v) for i, v in enumerate([5, 5, 5, 5, 5, 6, 5])]
    expected = [False, False, False, True, True, False, False]
    assert [Flag.STUCK in f for f in flags(found, rows)] == expected
    # a reading that comes again, or late, is no part of the run
    again = [Row(1, NOW_US + 24 * SECOND, 5)] * 5 + [Row(1, NOW_US, 9), Row(1, NOW_US + 40 * SECOND, 5)]
    assert not any(Flag.STUCK in f for f in flags(found, again))


def test_a_spike_is_flagged_and_what_follows_it_is_not():
    found = checks([("*/*", {"spike_z": 8, "spike_min": 2})])
    values = [20 + 0.1 * (i % 5) for i in range(40)]
    values[30] = 60
    rows = [Row(1, NOW_US + i * SECOND, v) for i, v in enumerate(values)]
    assert [i for i, f in enumerate(flags(found, rows)) if Flag.SPIKE in f] == [30]


def test_a_constant_series_has_no_spike_smaller_than_the_least_distance():
    found = checks([("*/*", {"spike_z": 8, "spike_min": 2})])
    rows = [Row(1, NOW_US + i * SECOND, 20) for i in range(20)]
    rows += [Row(1, NOW_US + 20 * SECOND, 22), Row(1, NOW_US + 21 * SECOND, 22.5)]
    assert [i for i, f in enumerate(flags(found, rows)) if Flag.SPIKE in f] == [21]


def test_values_at_the_edge_of_floats_are_judged_without_a_warning():
    found = checks([("*/*", {"spike_z": 8, "spike_min": 2})])
    rows = [Row(1, NOW_US + i * SECOND, v) for i, v in enumerate([1e308, -1e308] * 40)]
    assert len(flags(found, rows)) == 80


class Plain:
    """The same, reading by reading."""

    def __init__(self, limits: Limits, plausible: PlausibleTimes) -> None:
        self.limits, self.plausible = limits, plausible
        self.newest: dict[int, int] = {}
        self.run: dict[int, tuple[float, int, int]] = {}
        self.seen: dict[int, list[float]] = {}
        self.bounds: dict[int, tuple[float, float]] = {}

    def judge(self, row: Row, now_us: int) -> Flag:
        limits, found = self.limits, Flag(0)
        ahead = row.time_us > now_us + self.plausible.max_ahead_us
        if ahead or row.time_us < self.plausible.not_before_us:
            found |= Flag.CLOCK_IN_DOUBT
        newest = self.newest.get(row.series, -(1 << 62))
        if newest - row.time_us > limits.late_s * 1e6 or now_us - row.time_us > limits.old_s * 1e6:
            found |= Flag.LATE
        if not limits.minimum <= row.value <= limits.maximum:
            found |= Flag.OUT_OF_RANGE
        if ahead or row.time_us <= newest:
            return found
        self.newest[row.series] = row.time_us
        value, count, since_us = self.run.get(row.series, (NAN, 0, 0))
        count, since_us = (count + 1, since_us) if value == row.value else (1, row.time_us)
        self.run[row.series] = row.value, count, since_us
        if count >= limits.stuck_readings and row.time_us - since_us >= limits.stuck_s * 1e6:
            found |= Flag.STUCK
        middle, reach = self.bounds.get(row.series, (0.0, float("inf")))
        if abs(row.value - middle) > reach:
            found |= Flag.SPIKE
        seen = self.seen.setdefault(row.series, [])
        seen.append(row.value)
        if len(seen) >= HISTORY_READINGS and len(seen) % REFRESH_EVERY_READINGS == 0:
            history = seen[-HISTORY_READINGS:]
            middle = median(history)
            deviation = median(abs(v - middle) for v in history)
            self.bounds[row.series] = middle, max(limits.spike_z * 1.4826 * deviation, limits.spike_min)
        return found


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_split_into_groups_gives_what_reading_by_reading_gives(data):
    limits = Limits(
        minimum=0, maximum=8, late_s=3, old_s=200, stuck_readings=3, stuck_s=4, spike_z=2, spike_min=1
    )
    plausible = PlausibleTimes(not_before_us=NOW_US - 100 * SECOND, max_ahead_us=20 * SECOND)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    total = data.draw(st.sampled_from([5, 40, 400, 1500]))
    few = data.draw(st.sampled_from([1, 2, 7, 3000]))
    wandering = data.draw(st.sampled_from([0, 3, 60]))
    calm = rng.random() < 0.5
    rows, groups, at = [], [], NOW_US - 30 * SECOND
    for _ in range(total):
        at += int(rng.integers(0, 3)) * SECOND // 4
        value = float(rng.integers(4, 6)) if calm and rng.random() < 0.9 else float(rng.integers(-2, 11))
        time_us = at - int(rng.integers(0, wandering + 1)) * SECOND
        if rng.random() < 0.02:
            time_us += 1000 * SECOND
        rows.append(Row(int(rng.integers(1, few + 1)), time_us, value))
    while rows:
        size = int(rng.integers(1, data.draw(st.sampled_from([2, 30, 1600]))))
        groups.append(rows[:size])
        rows = rows[size:]
    vectorised, plain = checks(base=limits, plausible=plausible), Plain(limits, plausible)
    for group in groups:
        assert flags(vectorised, group, at) == [plain.judge(row, at) for row in group]


def test_series_numbers_of_one_series_share_its_state():
    identities = np.array([0, 1, 1], np.int32)
    found = ReadingChecker(lambda _: ("d", "t"), lambda n: identities[n], base=Limits(late_s=1))
    assert flags(found, [Row(1, NOW_US, 1)]) == [Flag(0)]
    assert flags(found, [Row(2, NOW_US - 5 * SECOND, 1)]) == [Flag.LATE]
