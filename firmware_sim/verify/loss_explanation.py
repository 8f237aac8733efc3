"""Why readings are missing: what gateways declared as given up, and what they kept to themselves. Pure.

Neither names single readings. A declaration speaks of so many readings between two times; a rollup says how
many readings of a series its window counts that were not delivered one by one. A missing reading is explained
by them only where the times fit, and only as many as they speak of: one too many is lost.
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
    """What a gateway said that it gave up.

    Attributes:
        who: the gateway, why, and what survives, in words.
        rows: how many readings.
        from_us, to_us: time of the earliest and of the latest of them, microseconds since 1970.
        first_commit, last_commit: which of the gateway's commits they were in, 0 where that is not known.
    """

    who: str
    rows: int
    from_us: int = EARLIEST_US
    to_us: int = LATEST_US
    first_commit: int = 0
    last_commit: int = 0


def match_declared_losses(
    times_us: NDArray[np.int64], declarations: Sequence[DeclaredLoss]
) -> NDArray[np.bool_]:
    """Which of some missing readings are explained, as many as can be; shape of `times_us`, which rise.

    Of readings that the same declarations could explain the earliest are.
    """
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
            taken = min(open_[0][1], end - next_)
            explained[next_ : next_ + taken] = True
            open_[0][1] -= taken
            next_ += taken
    return explained


def match_rolled_up(
    series: NDArray[np.int32],
    times_us: NDArray[np.int64],
    candidates: NDArray[np.bool_],
    kept: NDArray[np.void],
    rank: NDArray[np.int8],
) -> NDArray[np.bool_]:
    """Which readings rollups explain: of each window as many candidates as it kept, low ranks first.

    All arrays are of one shape but `kept`, `KEPT` records whose windows of one series do not overlap.
    """
    found = np.zeros(len(series), bool)
    if not len(kept) or not candidates.any():
        return found
    kept = kept[np.lexsort((kept["from_us"], kept["series"]))]
    index = np.flatnonzero(candidates)
    order = np.lexsort((times_us[index], rank[index], series[index]))
    index = index[order]
    window = _find_windows(kept, series[index], times_us[index])
    index, window = index[window >= 0], window[window >= 0]
    together = np.argsort(window, kind="stable")
    index, window = index[together], window[together]
    starts = np.flatnonzero(np.diff(window, prepend=-1))
    number = np.arange(len(window)) - np.repeat(starts, np.diff(starts, append=len(window)))
    found[index[number < kept["rows"][window]]] = True
    return found


def _find_windows(
    kept: NDArray[np.void], series: NDArray[np.int32], times_us: NDArray[np.int64]
) -> NDArray[np.intp]:
    """The position in `kept`, sorted, of the window that each reading lies in; -1 for none."""
    bounds = np.searchsorted(kept["series"], np.arange(int(series.max()) + 2))
    window = np.full(len(series), -1, np.intp)
    for number in np.unique(series).tolist():
        begin, end = bounds[number], bounds[number + 1]
        if begin == end:
            continue
        own = np.flatnonzero(series == number)
        at = begin + np.searchsorted(kept["from_us"][begin:end], times_us[own], side="right") - 1
        inside = (at >= begin) & (times_us[own] < kept["to_us"][np.maximum(at, begin)])
        window[own[inside]] = at[inside]
    return window


def describe_declared_losses(declarations: Sequence[DeclaredLoss]) -> Iterator[str]:
    """One line for each who: how many readings, from when to when, of which commits."""
    by_who: dict[str, list[DeclaredLoss]] = {}
    for declaration in declarations:
        by_who.setdefault(declaration.who, []).append(declaration)
    for who, parts in by_who.items():
        text = f"{sum(part.rows for part in parts):,} by {who}"
        first, last = min(part.from_us for part in parts), max(part.to_us for part in parts)
        if first > EARLIEST_US and last < LATEST_US:
            text += f", of {format_time_us(first)} to {format_time_us(last)}"
        commits = [part for part in parts if part.first_commit]
        if commits:
            low, high = min(part.first_commit for part in commits), max(part.last_commit for part in commits)
            text += f", commits {low}..{high}"
        yield text


def format_time_us(time_us: int) -> str:
    """A time as people write it, to the microsecond, and exact: 2026-01-31T12:00:00.000001Z."""
    return str(np.datetime64(int(time_us), "us")) + "Z"
