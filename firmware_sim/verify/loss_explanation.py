"""Why readings are missing: losses that gateways declared, and readings that only rollups count. Pure.

Neither names single readings. A declaration counts readings between two times; a rollup counts the readings
of a series in its window that were not delivered one by one. Each explains missing readings only within its
times, and at most as many as it counts: one more is lost.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

EARLIEST_US, LATEST_US = -(1 << 62), 1 << 62

ROLLED_UP_DTYPE = np.dtype([("series", "<i4"), ("from_us", "<i8"), ("to_us", "<i8"), ("rows", "<i8")])
"""Readings of a series, `from_us` <= time < `to_us`, that were rolled up and not delivered one by one."""


class DeclaredLoss(NamedTuple):
    """Readings that a gateway declared as given up; commits are 0 where they are not known.

    `origin` is the gateway or destination, why, and what survives, as text.
    """

    origin: str
    rows: int
    from_us: int = EARLIEST_US
    to_us: int = LATEST_US
    first_commit: int = 0
    last_commit: int = 0


def match_declared_losses(
    times_us: NDArray[np.int64], lost: NDArray[np.bool_], declarations: Sequence[DeclaredLoss]
) -> NDArray[np.bool_]:
    """Which of the lost readings declarations explain: as many as possible, the earliest first."""
    index = np.flatnonzero(lost)
    index = index[np.argsort(times_us[index], kind="stable")]
    explained = np.zeros(len(lost), bool)
    explained[index] = _match_sorted(times_us[index], declarations)
    return explained


def _match_sorted(times_us: NDArray[np.int64], declarations: Sequence[DeclaredLoss]) -> NDArray[np.bool_]:
    explained = np.zeros(len(times_us), bool)
    waiting = sorted((d for d in declarations if d.rows > 0), key=lambda d: -d.from_us)
    edges = sorted({d.from_us for d in waiting} | {d.to_us + 1 for d in waiting})
    at = np.searchsorted(times_us, edges).tolist()
    open_: list[list[int]] = []  # [to_us, rows left], the one that ends first on top
    for edge, begin, end in zip(edges, at, at[1:], strict=False):
        while waiting and waiting[-1].from_us <= edge:
            heappush(open_, [waiting[-1].to_us, waiting.pop().rows])
        next_ = begin
        while open_ and next_ < end:
            if open_[0][0] < edge or not open_[0][1]:
                heappop(open_)
                continue
            count = min(open_[0][1], end - next_)
            explained[next_ : next_ + count] = True
            open_[0][1] -= count
            next_ += count
    return explained


def match_rolled_up(
    series: NDArray[np.int32],
    times_us: NDArray[np.int64],
    windows: NDArray[np.void],
    *,
    lost: NDArray[np.bool_],
    suppressed: NDArray[np.bool_],
    declared: Sequence[DeclaredLoss],
) -> NDArray[np.bool_]:
    """Which readings rollups explain: of each window as many as it counts.

    Those already known as suppressed are among the ones that a window counts; those that a declaration may
    explain as well come last. `windows` are `ROLLED_UP_DTYPE` records that do not overlap within a series.
    """
    candidates = lost | suppressed
    found = np.zeros(len(series), bool)
    if not len(windows) or not candidates.any():
        return found
    rank = np.zeros(len(series), np.int8)
    for declaration in declared:
        rank[(times_us >= declaration.from_us) & (times_us <= declaration.to_us)] = 1
    rank[suppressed] = -1
    windows = windows[np.lexsort((windows["from_us"], windows["series"]))]
    index = np.flatnonzero(candidates)
    order = np.lexsort((times_us[index], rank[index], series[index]))
    index = index[order]
    window = _find_windows(windows, series[index], times_us[index])
    index, window = index[window >= 0], window[window >= 0]
    together = np.argsort(window, kind="stable")
    index, window = index[together], window[together]
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    number = np.arange(len(window)) - np.repeat(starts, np.diff(starts, append=len(window)))
    found[index[number < windows["rows"][window]]] = True
    return found


def _find_windows(
    windows: NDArray[np.void], series: NDArray[np.int32], times_us: NDArray[np.int64]
) -> NDArray[np.intp]:
    """The position in the sorted windows of the one that contains each reading; -1 for none."""
    bounds = np.searchsorted(windows["series"], np.arange(int(series.max()) + 2))
    window = np.full(len(series), -1, np.intp)
    for number in np.unique(series).tolist():
        begin, end = bounds[number], bounds[number + 1]
        if begin == end:
            continue
        own = np.flatnonzero(series == number)
        at = begin + np.searchsorted(windows["from_us"][begin:end], times_us[own], side="right") - 1
        inside = (at >= begin) & (times_us[own] < windows["to_us"][np.maximum(at, begin)])
        window[own[inside]] = at[inside]
    return window


def describe_declared_losses(declarations: Sequence[DeclaredLoss]) -> Iterator[str]:
    """One line for each origin: how many readings, from when to when, of which commits."""
    by_origin: dict[str, list[DeclaredLoss]] = {}
    for declaration in declarations:
        by_origin.setdefault(declaration.origin, []).append(declaration)
    for origin, parts in by_origin.items():
        text = f"{sum(part.rows for part in parts):,} by {origin}"
        first, last = min(part.from_us for part in parts), max(part.to_us for part in parts)
        if first > EARLIEST_US and last < LATEST_US:
            text += f", of {format_time_us(first)} to {format_time_us(last)}"
        commits = [part for part in parts if part.first_commit]
        if commits:
            low, high = min(part.first_commit for part in commits), max(part.last_commit for part in commits)
            text += f", commits {low}..{high}"
        yield text


def format_time_us(time_us: int) -> str:
    """A time as exact ISO 8601 text: 2026-01-31T12:00:00.000001Z."""
    return str(np.datetime64(int(time_us), "us")) + "Z"
