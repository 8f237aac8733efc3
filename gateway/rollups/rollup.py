"""Window arithmetic, rollups of readings by window, and merging of rollups. Pure; works on columns.

Windows start at multiples of their length since 1970 UTC. A window key is one int64 for series and window,
so that keys sort by series and start. Mean and M2 are merged as by Chan, Golub and LeVeque (1983): against a
computation over all readings the mean differs by at most `MEAN_ERROR` of the largest magnitude, M2 by at most
`M2_ERROR` of count times its square; everything else is exact.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cloud_sync.model.records import Flag, Rollups
from gateway.processing.series_pattern import mark_run_starts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]
    from cloud_sync.model.records import Readings

    Floats = NDArray[np.float64]

_WINDOW_NUMBER_BITS = 36
_WINDOW_NUMBER_OFFSET = 1 << (_WINDOW_NUMBER_BITS - 1)
_WINDOW_NUMBER_MASK = (1 << _WINDOW_NUMBER_BITS) - 1
DEFAULT_WINDOWS_S = (60, 300, 3600, 86400)


def find_nesting_error(windows_s: Sequence[int]) -> str | None:
    """Why each length cannot be computed from the one below it; None when it can."""
    if not windows_s:
        return "there must be at least one window"
    if list(windows_s) != sorted(set(windows_s)):
        return "windows must be in rising order, without duplicates"
    for below, above in pairwise(windows_s):
        if above % below:
            return f"a window of {above} s is not a multiple of {below} s"
    return None


def window_starts(time_us: Int64s, window_s: int) -> Int64s:
    """Start of the window of each time, microseconds."""
    return time_us - time_us % (window_s * 1_000_000)


def window_keys(series: NDArray[np.int32], time_us: Int64s, window_s: int) -> Int64s:
    """The window key of each series and time."""
    return (series.astype(np.int64) << _WINDOW_NUMBER_BITS) | (
        time_us // (window_s * 1_000_000) + _WINDOW_NUMBER_OFFSET
    )


def series_of_keys(keys: Int64s) -> NDArray[np.int32]:
    """The series of each key."""
    return (keys >> _WINDOW_NUMBER_BITS).astype(np.int32)


def starts_of_keys(keys: Int64s, window_s: int) -> Int64s:
    """The start of each key's window, microseconds."""
    return ((keys & _WINDOW_NUMBER_MASK) - _WINDOW_NUMBER_OFFSET) * (window_s * 1_000_000)


class WindowRuns(NamedTuple):
    """A set of windows as runs of neighbours: keys from `first` through `last`, rising, apart."""

    first: Int64s
    last: Int64s

    @classmethod
    def none(cls) -> WindowRuns:
        """No window."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def every(cls) -> WindowRuns:
        """Every window: assumed of an unknown past."""
        edges = np.iinfo(np.int64)
        return cls(np.array([edges.min]), np.array([edges.max - 1]))

    def holds(self, keys: Int64s) -> NDArray[np.bool_]:
        """Whether each key is in one of the runs."""
        if not len(self.first):
            return np.zeros(len(keys), np.bool_)
        at = np.searchsorted(self.first, keys, side="right") - 1
        return (at >= 0) & (keys <= self.last[np.maximum(at, 0)])

    def with_keys(self, keys: Int64s, max_runs: int) -> WindowRuns:
        """These runs and `keys`, which rise; beyond `max_runs` the smallest gaps are closed."""
        if not len(keys):
            return self
        first = np.concatenate([self.first, keys])
        order = np.argsort(first, kind="stable")
        first = first[order]
        last = np.maximum.accumulate(np.concatenate([self.last, keys])[order])
        return _join_runs(first, last, np.concatenate(([True], first[1:] > last[:-1] + 1)), max_runs)


def _join_runs(first: Int64s, last: Int64s, begins: NDArray[np.bool_], max_runs: int) -> WindowRuns:
    starts = np.flatnonzero(begins)
    first, last = first[starts], last[np.append(starts[1:], len(last)) - 1]
    if len(first) <= max_runs:
        return WindowRuns(first, last)
    kept = max(1, max_runs * 3 // 4)
    gaps = first[1:] - last[:-1]
    widest = np.sort(np.argpartition(gaps, len(gaps) - (kept - 1))[len(gaps) - (kept - 1) :]) + 1
    return WindowRuns(first[np.append(0, widest)], last[np.append(widest, len(last)) - 1])


MEAN_ERROR = 1e-12
M2_ERROR = 1e-11
_FLOAT64_MAX = np.finfo(np.float64).max
_COUNT_MAX = np.iinfo(np.int32).max


def roll_up_readings(readings: Readings, window_s: int) -> Rollups:
    """One summary, of revision 0, for each series and window with readings; in order of series and start."""
    if not readings.rows:
        return Rollups.empty()
    keys = window_keys(readings.series, readings.time_us, window_s)
    order = np.lexsort((readings.time_us, keys))
    keys, flags = keys[order], readings.flags[order]
    groups = np.flatnonzero(mark_run_starts(keys))
    excluded = (flags & Flag.OUT_OF_RANGE) != 0
    marked = (flags & ~np.int32(Flag.SUPPRESSED)) != 0
    held_back = (flags & (Flag.SUPPRESSED | Flag.OUT_OF_RANGE)) == Flag.SUPPRESSED
    summaries = _group_statistics(readings.value[order], readings.time_us[order], ~excluded, groups)
    return Rollups(
        series=readings.series[order[groups]],
        time_us=starts_of_keys(keys[groups], window_s),
        window_s=np.full(len(groups), window_s, np.int32),
        revision=np.zeros(len(groups), np.int32),
        **_cast_columns(summaries, starts_of_keys(keys[groups], window_s)),
        flagged=_group_sums(marked, groups),
        excluded=_group_sums(excluded, groups),
        suppressed=_group_sums(held_back, groups),
    )


def _group_statistics(
    value: Floats, time_us: Int64s, counted: NDArray[np.bool_], groups: NDArray[np.intp]
) -> dict[str, NDArray[Any]]:
    """Count to last of each group's counted rows, which are in order of time."""
    rows = len(value)
    sizes = np.diff(groups, append=rows)
    count = np.add.reduceat(counted.astype(np.int64), groups)
    mean = _group_means(np.where(counted, value, 0.0), count, groups, sizes)
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.where(counted, value - np.repeat(mean, sizes), 0.0)
        astray = np.add.reduceat(off, groups) / np.maximum(count, 1)  # what rounding has left in the mean
        m2 = np.add.reduceat(off * off, groups) - count * astray * astray
        mean = np.where(np.isfinite(astray), mean + astray, mean)
        m2 = np.where(np.isnan(m2), _FLOAT64_MAX, np.clip(m2, 0.0, _FLOAT64_MAX))
    at = np.arange(rows)
    first = np.minimum.reduceat(np.where(counted, at, rows - 1), groups)
    last = np.maximum.reduceat(np.where(counted, at, 0), groups)
    return {
        "count": count,
        "mean": mean,
        "m2": m2,
        "minimum": np.minimum.reduceat(np.where(counted, value, np.inf), groups),
        "maximum": np.maximum.reduceat(np.where(counted, value, -np.inf), groups),
        "first": value[first],
        "first_at_us": time_us[first],
        "last": value[last],
        "last_at_us": time_us[last],
    }


def _group_means(
    weighed: Floats, weight: Int64s, groups: NDArray[np.intp], sizes: NDArray[np.intp]
) -> Floats:
    """Sum of each group's values, divided by its weight; also where the sum alone would overflow."""
    divisor = np.maximum(weight, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        mean = np.add.reduceat(weighed, groups) / divisor
        if not np.isfinite(mean).all():
            mean = np.add.reduceat(weighed / np.repeat(divisor, sizes), groups)
    return np.asarray(mean, np.float64)


def merge_rollups(parts: Rollups, window_s: int) -> Rollups:
    """Merge summaries of disjoint readings into one for each series and window of `window_s`.

    `parts` are of windows of this length or of divisors of it. The revision is the highest.
    """
    if not parts.rows:
        return parts
    keys = window_keys(parts.series, parts.time_us, window_s)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    begins = mark_run_starts(keys)
    if begins.all():
        return _assign_window(parts.select(order), window_s)
    is_single = begins & np.append(begins[1:], True)
    several, single = np.flatnonzero(~is_single), np.flatnonzero(is_single)
    groups = np.flatnonzero(begins[several])
    joined = _merge_groups(parts.select(order[several]), groups, window_s)
    both = Rollups.concat([_assign_window(parts.select(order[single]), window_s), joined])
    return both.select(np.argsort(np.concatenate([keys[single], keys[several][groups]]), kind="stable"))


def _assign_window(parts: Rollups, window_s: int) -> Rollups:
    """The same summaries as of the windows of `window_s` that contain theirs."""
    if (parts.window_s == window_s).all():
        return parts
    start = window_starts(parts.time_us, window_s)
    empty = parts.count == 0
    return replace(
        parts,
        time_us=start,
        window_s=np.full(parts.rows, window_s, np.int32),
        first_at_us=np.where(empty, start, parts.first_at_us),
        last_at_us=np.where(empty, start, parts.last_at_us),
    )


def _merge_groups(parts: Rollups, groups: NDArray[np.intp], window_s: int) -> Rollups:
    """Merge each group of rows into one."""
    sizes = np.diff(groups, append=parts.rows)
    some = parts.count > 0
    weight = parts.count.astype(np.int64)
    count = np.add.reduceat(weight, groups)
    mean = _merge_means(np.where(some, parts.mean, 0.0), weight, count, groups, sizes)
    with np.errstate(over="ignore", invalid="ignore"):
        off = np.where(some, parts.mean - np.repeat(mean, sizes), 0.0)
        m2 = np.add.reduceat(np.where(some, parts.m2, 0.0) + weight * off * off, groups)
    at = np.arange(parts.rows)
    ends = np.iinfo(np.int64)
    earliest = np.where(some, parts.first_at_us, ends.max)
    latest = np.where(some, parts.last_at_us, ends.min)
    first_at = np.minimum.reduceat(earliest, groups)
    last_at = np.maximum.reduceat(latest, groups)
    first = np.minimum.reduceat(np.where(earliest == np.repeat(first_at, sizes), at, parts.rows - 1), groups)
    last = np.maximum.reduceat(np.where(latest == np.repeat(last_at, sizes), at, 0), groups)
    start = window_starts(parts.time_us[groups], window_s)
    summaries = {
        "count": count,
        "mean": mean,
        "m2": np.where(np.isnan(m2), _FLOAT64_MAX, np.minimum(m2, _FLOAT64_MAX)),
        "minimum": np.minimum.reduceat(np.where(some, parts.minimum, np.inf), groups),
        "maximum": np.maximum.reduceat(np.where(some, parts.maximum, -np.inf), groups),
        "first": parts.first[first],
        "first_at_us": first_at,
        "last": parts.last[last],
        "last_at_us": last_at,
    }
    return Rollups(
        series=parts.series[groups],
        time_us=start,
        window_s=np.full(len(groups), window_s, np.int32),
        revision=np.maximum.reduceat(parts.revision, groups),
        **_cast_columns(summaries, start),
        flagged=_group_sums(parts.flagged, groups),
        excluded=_group_sums(parts.excluded, groups),
        suppressed=_group_sums(parts.suppressed, groups),
    )


def _merge_means(
    mean: Floats, weight: Int64s, count: Int64s, groups: NDArray[np.intp], sizes: NDArray[np.intp]
) -> Floats:
    """Weighted means, as differences from each group's heaviest part: equal parts give an exact mean."""
    heaviest = np.maximum.reduceat(weight, groups)
    at = np.arange(len(weight))
    chosen = np.minimum.reduceat(np.where(weight == np.repeat(heaviest, sizes), at, len(weight) - 1), groups)
    base = mean[chosen]
    share = weight / np.repeat(np.maximum(count, 1), sizes)
    with np.errstate(over="ignore", invalid="ignore"):
        result = base + np.add.reduceat(
            np.where(weight > 0, mean - np.repeat(base, sizes), 0.0) * share, groups
        )
        if not np.isfinite(result).all():
            result = np.add.reduceat(mean * share, groups)
    return np.asarray(result, np.float64)


def _cast_columns(summaries: dict[str, NDArray[Any]], start: Int64s) -> dict[str, NDArray[Any]]:
    """The summaries with their types; without readings values are NaN and times the window's start."""
    count = np.minimum(summaries["count"], _COUNT_MAX)
    empty = count == 0
    columns = {}
    for name, dtype in Rollups.columns.items():
        if name in summaries:
            absent = start if name.endswith("_at_us") else np.nan
            column = count if name == "count" else np.where(empty, absent, summaries[name])
            columns[name] = column.astype(dtype)
    return columns


def _group_sums(column: NDArray[Any], groups: NDArray[np.intp]) -> NDArray[np.int32]:
    total = np.add.reduceat(column.astype(np.int64), groups)
    return np.minimum(total, _COUNT_MAX).astype(np.int32)
