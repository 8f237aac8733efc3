"""Windows of event time: which one a time falls into, and which of a series' windows have been closed. Pure.

A window of `window_s` seconds begins at a multiple of its length since 1970 UTC. A `key` is one integer for a
series and one of its windows, so that windows sort by series, then start, and neighbours differ by one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]

_NUMBER_BITS = 36
_MIDDLE = 1 << (_NUMBER_BITS - 1)
_MASK = (1 << _NUMBER_BITS) - 1
DEFAULT_WINDOWS_S = (60, 300, 3600, 86400)


def nesting_fault(windows_s: Sequence[int]) -> str | None:
    """Why these lengths cannot be computed each from the one below it, in words; None when they can."""
    if not windows_s:
        return "there must be at least one window"
    if list(windows_s) != sorted(set(windows_s)):
        return "windows must rise, each one longer than the one before"
    for below, above in pairwise(windows_s):
        if above % below:
            return f"a window of {above} s does not hold whole windows of {below} s"
    return None


def starts_of(time_us: Int64s, window_s: int) -> Int64s:
    """Start of the window that each time falls into, microseconds."""
    return time_us - time_us % (window_s * 1_000_000)


def keys_of(series: NDArray[np.int32], time_us: Int64s, window_s: int) -> Int64s:
    """The key of the window that each reading of a series falls into."""
    return (series.astype(np.int64) << _NUMBER_BITS) | (time_us // (window_s * 1_000_000) + _MIDDLE)


def series_of(keys: Int64s) -> NDArray[np.int32]:
    """The series of each key."""
    return (keys >> _NUMBER_BITS).astype(np.int32)


def start_of(keys: Int64s, window_s: int) -> Int64s:
    """The start of each key's window, microseconds."""
    return ((keys & _MASK) - _MIDDLE) * (window_s * 1_000_000)


class Runs(NamedTuple):
    """A set of windows as runs of neighbours: keys from `first` through `last`, rising, apart."""

    first: Int64s
    last: Int64s

    @classmethod
    def none(cls) -> Runs:
        """No window."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def every(cls) -> Runs:
        """Every window there can be: what is assumed of a past that is not known."""
        edges = np.iinfo(np.int64)
        return cls(np.array([edges.min]), np.array([edges.max - 1]))

    def holds(self, keys: Int64s) -> NDArray[np.bool_]:
        """Whether each key is in one of the runs."""
        if not len(self.first):
            return np.zeros(len(keys), np.bool_)
        at = np.searchsorted(self.first, keys, side="right") - 1
        return (at >= 0) & (keys <= self.last[np.maximum(at, 0)])

    def with_keys(self, keys: Int64s, max_runs: int) -> Runs:
        """These runs and `keys`, which rise; beyond `max_runs` the smallest gaps count as held."""
        if not len(keys):
            return self
        first = np.concatenate([self.first, keys])
        order = np.argsort(first, kind="stable")
        first = first[order]
        last = np.maximum.accumulate(np.concatenate([self.last, keys])[order])
        return _joined(first, last, np.concatenate(([True], first[1:] > last[:-1] + 1)), max_runs)


def _joined(first: Int64s, last: Int64s, begins: NDArray[np.bool_], max_runs: int) -> Runs:
    starts = np.flatnonzero(begins)
    first, last = first[starts], last[np.append(starts[1:], len(last)) - 1]
    if len(first) <= max_runs:
        return Runs(first, last)
    kept = max(1, max_runs * 3 // 4)
    gaps = first[1:] - last[:-1]
    widest = np.sort(np.argpartition(gaps, len(gaps) - (kept - 1))[len(gaps) - (kept - 1) :]) + 1
    return Runs(first[np.append(0, widest)], last[np.append(widest, len(last)) - 1])
