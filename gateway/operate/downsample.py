"""Fewer points that look the same: MinMaxLTTB over a line's points (Van Der Donckt and others, 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tsdownsample import MinMaxLTTBDownsampler

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cloud_sync.summaries import Rollups


def outline(windows: Rollups) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Windows of one length as a line: two points a window, its extremes, a quarter from its ends.

    Returns times in microseconds and values, both of shape (2 * windows with values,). Which extreme comes
    first is what keeps the line shortest.
    """
    some = windows.take(windows.count > 0)
    quarter_us = some.window_s.astype(np.int64) * 250_000
    falls = some.first > some.last
    early = np.where(falls, some.maximum, some.minimum)
    late = np.where(falls, some.minimum, some.maximum)
    times = np.stack([some.time_us + quarter_us, some.time_us + 3 * quarter_us], axis=1).ravel()
    return times, np.stack([early, late], axis=1).ravel()


def chosen(time_us: NDArray[np.int64], value: NDArray[np.float64], points: int) -> NDArray[np.intp]:
    """Which of a line's points to show so that it keeps its shape; rising, at most `points`, at least 3."""
    if len(value) <= points or points < 3:  # noqa: PLR2004 - the method keeps both ends and one between
        return np.arange(len(value))
    shown = MinMaxLTTBDownsampler().downsample(  # type: ignore[no-untyped-call]  # its own stubs
        np.ascontiguousarray(time_us), np.ascontiguousarray(value), n_out=points
    )
    return np.unique(shown.astype(np.intp))
