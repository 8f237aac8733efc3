"""A line drawn with characters, for a terminal: each column shows the span of the values in it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LABEL_WIDTH = 10
_BRIDGED = 3.0
_BLANK = 0x2800
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""Bits of the four rows and two columns of dots in a Braille character (Unicode 15, chapter 21)."""


def line_chart(
    time_us: NDArray[np.int64],
    value: NDArray[np.float64],
    span_us: tuple[int, int],
    *,
    width: int = 80,
    height: int = 12,
) -> list[str]:
    """The points of a line as `height` lines of text, the greatest value at the top.

    Args:
        time_us: times of the points, shape (n,), n > 0, rising.
        value: their values, finite.
        span_us: the times at the left and the right end.
        width: characters, labels included.
        height: lines.
    """
    cells = max(1, width - _LABEL_WIDTH - 2)
    low, high = float(value.min()), float(value.max())
    since_us, until_us = span_us
    across = np.asarray((time_us - since_us) / max(1, until_us - since_us) * (2 * cells), np.float64)
    at = across.astype(np.int64).clip(0, 2 * cells - 1)
    rows = 4 * height
    with np.errstate(over="ignore"):
        share = np.nan_to_num((value / 2 - low / 2) / (high / 2 - low / 2 or 1.0))
    down = np.rint((1 - share) * (rows - 1)).astype(np.int64)
    if low == high:
        down[:] = rows // 2
    top, bottom = np.full(2 * cells, rows), np.full(2 * cells, -1)
    np.minimum.at(top, at, down)
    np.maximum.at(bottom, at, down)
    between = np.flatnonzero(bottom < 0)
    between = between[_is_bridged(np.asarray(between + 0.5, np.float64), across)]
    top[between] = bottom[between] = np.rint(np.interp(between + 0.5, across, down)).astype(np.int64)
    row = np.arange(rows)[:, None]
    dots = ((row >= top) & (row <= bottom)).reshape(height, 4, cells, 2)
    characters = _BLANK + (dots * _DOTS[None, :, None, :]).sum(axis=(1, 3))
    labels = {0: f"{high:.6g}", height - 1: f"{low:.6g}"}
    return [
        f"{labels.get(line, ''):>{_LABEL_WIDTH}} \u2502{''.join(map(chr, characters[line]))}"
        for line in range(height)
    ]


def _is_bridged(places: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each place lies between two points that are no further apart than points here usually are."""
    if len(points) < 2:  # noqa: PLR2004 - there is nothing between
        return np.zeros(len(places), np.bool_)
    after = np.searchsorted(points, places)
    inside = (after > 0) & (after < len(points))
    steps = np.diff(points)
    near = steps <= _BRIDGED * np.median(steps)
    return inside & near[np.clip(after - 1, 0, len(steps) - 1)]
