"""Report by exception: what is close to the last reported reading is suppressed, and nothing else."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_sync.model.records import Flag, Readings
from gateway.processing.deadband import Band, BandRule, Deadband
from gateway.processing.series_pattern import Pattern

NOW_US = 1_790_000_000_000_000
SECOND = 1_000_000
EIGHTH = Band(0.125, 0, 60 * SECOND)


class Row(NamedTuple):
    series: int
    time_us: int
    value: float
    flags: Flag = Flag(0)


def readings(rows: list[Row]) -> Readings:
    absent = np.full(len(rows), np.nan, np.float32)
    return Readings(
        np.array([r.series for r in rows], np.int32),
        np.array([r.time_us for r in rows], np.int64),
        np.array([r.value for r in rows], np.float64),
        absent,
        absent,
        absent,
        np.full(len(rows), -1, np.int64),
        np.array([int(r.flags) for r in rows], np.int32),
    )


def deadband(*rules: tuple[str, Band]) -> Deadband:
    return Deadband(
        lambda number: (f"d{number}", "t"),
        lambda numbers: numbers,
        [BandRule(Pattern.parse(pattern), band) for pattern, band in rules],
    )


def suppressed(found: Deadband, rows: list[Row]) -> list[int]:
    """Positions of the suppressed ones; everything else about them stays."""
    given = readings(rows)
    marked = found.mark(given)
    for name in Readings.columns:
        if name != "flags":
            assert getattr(marked, name) is getattr(given, name)
    assert (marked.flags & ~np.int32(Flag.SUPPRESSED) == given.flags).all()
    return np.flatnonzero(marked.flags & Flag.SUPPRESSED).tolist()


def in_time(values: list[float], series: int = 1) -> list[Row]:
    return [Row(series, NOW_US + i * SECOND, v) for i, v in enumerate(values)]


def test_what_is_within_the_band_of_the_last_reported_value_is_suppressed():
    # a slow drift is reported once it has left the band, though no single step does
    assert suppressed(deadband(("*/*", EIGHTH)), in_time([1, 1.0625, 1.125, 1.1875, 1.25, 1.5, 1.0])) == [
        1,
        2,
        4,
    ]


def test_a_band_in_percent_is_of_the_last_reported_value():
    found = deadband(("*/*", Band(0, 10, 60 * SECOND)))
    assert suppressed(found, in_time([100, 109, 90, 89, 97, -1, -1.05])) == [1, 2, 4, 6]


def test_the_first_of_a_series_is_reported_and_series_do_not_mix():
    found = deadband(("*/*", EIGHTH))
    assert suppressed(found, [Row(1, NOW_US, 1), Row(2, NOW_US, 1), Row(1, NOW_US + 1, 1)]) == [2]
    assert suppressed(found, [Row(2, NOW_US + 5, 1), Row(3, NOW_US, 1)]) == [0]


def test_a_reading_long_after_the_last_reported_one_is_reported():
    rows = [Row(1, NOW_US + i * 25 * SECOND, 1) for i in range(6)]
    assert suppressed(deadband(("*/*", EIGHTH)), rows) == [1, 2, 4, 5]


def test_a_change_of_flags_is_reported():
    rows = [
        r._replace(flags=f)
        for r, f in zip(in_time([1, 1, 1]), [Flag(0), Flag.LOW_BATTERY, Flag(0)], strict=True)
    ]
    assert suppressed(deadband(("*/*", EIGHTH)), rows) == []


def test_late_readings_and_times_in_doubt_are_reported_and_change_nothing():
    found = deadband(("*/*", EIGHTH))
    far = Row(1, NOW_US + 10**15, 1, Flag.CLOCK_IN_DOUBT)
    rows = [*in_time([1, 1]), Row(1, NOW_US - 5, 9), far, Row(1, NOW_US + 2 * SECOND, 1)]
    assert suppressed(found, rows) == [1, 4]


def test_only_series_that_a_rule_is_for_are_looked_at_and_the_most_specific_rule_wins():
    found = deadband(("d1/t", Band(0, 0, 60 * SECOND)), ("d*/t", EIGHTH), ("other/*", EIGHTH))
    rows = [*in_time([1, 1.05, 1.05], 1), *in_time([1, 1.05], 2)]
    assert suppressed(found, rows) == [2, 4]
    assert suppressed(deadband(("other/*", EIGHTH)), rows) == []


def test_values_at_the_edge_of_floats_are_compared_without_a_warning():
    assert suppressed(deadband(("*/*", Band(0, 5, 9 * SECOND))), in_time([1e308, -1e308] * 80)) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from([1, 3, 500]), st.sampled_from([2, 50, 900]))
def test_any_split_into_groups_gives_what_reading_by_reading_gives(seed, series, largest):
    rng = np.random.default_rng(seed)
    rows = [
        Row(
            int(rng.integers(1, series + 1)),
            NOW_US + (i // 3 - int(rng.integers(0, 3))) * SECOND,
            float(rng.integers(0, 12)) / 4,
            Flag(int(rng.choice([0, 0, 0, 0, 2, 256]))),
        )
        for i in range(600)
    ]
    band = Band(0.25, 20, 20 * SECOND)
    expected: list[int] = []
    last: dict[int, tuple[float, int, Flag]] = {}
    newest: dict[int, int] = {}
    for position, row in enumerate(rows):
        if row.flags & Flag.CLOCK_IN_DOUBT or row.time_us <= newest.get(row.series, 0):
            continue
        newest[row.series] = row.time_us
        if row.series in last:
            value, time_us, flags = last[row.series]
            near = abs(row.value - value) <= max(0.25, 0.2 * abs(value))
            if near and row.time_us - time_us < 20 * SECOND and row.flags == flags:
                expected.append(position)
                continue
        last[row.series] = row.value, row.time_us, row.flags
    found, at, got = deadband(("*/*", band)), 0, []
    while at < len(rows):
        size = int(rng.integers(1, largest + 1))
        got += [at + p for p in suppressed(found, rows[at : at + size])]
        at += size
    assert got == expected
