"""One series over a span of time, reduced to what a chart can show; drawn with characters for a terminal.

The span is cut into equal steps; for each that holds readings the chart has the least, the greatest and the
mean value and their count. Segments are read newest first, for a bounded time. Where that is not enough
rollups stand in, whose windows may be longer than the steps; without any, what was not reached is missing at
the beginning, and `complete` is false.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cloud_sync.model.records import Flag, RecordClass
from gateway.query.series_query import SeriesReader
from gateway.spool.database import open_spool_read_only
from gateway.spool.segment_reader import DamagedSegment, decode_segment_columns, find_positions, read_block
from gateway.spool.segments import read_commit_counter

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from gateway.spool.series_catalog import KnownSeries, SeriesCatalog

_LABEL_WIDTH = 10
_BRIDGED = 3.0
_BLANK = 0x2800
_DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
"""Bits of the four rows and two columns of dots in a Braille character (Unicode 15, chapter 21)."""


def draw_line_chart(
    time_us: NDArray[np.int64],
    value: NDArray[np.float64],
    span_us: tuple[int, int],
    *,
    width: int = 80,
    height: int = 12,
) -> list[str]:
    """Points of shape (n,), n > 0, times rising, values finite, as `height` lines of Braille characters.

    `span_us` are the times at the left and right end; `width` includes the labels.
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
    if len(points) <= 1:
        return np.zeros(len(places), np.bool_)
    after = np.searchsorted(points, places)
    inside = (after > 0) & (after < len(points))
    steps = np.diff(points)
    near = steps <= _BRIDGED * np.median(steps)
    return inside & near[np.clip(after - 1, 0, len(steps) - 1)]


READ_WITHIN_S = 3.0
_WINDOWS_S = (60, 300, 3600, 86_400)
_CHECK_FLAGS = ~np.int32(Flag.PROCESSED | Flag.SUPPRESSED)
MAX_STEPS = 1440
MAX_SPAN_US = 31 * 86_400_000_000


class ChartSeries(msgspec.Struct):
    """A series in a list to pick from."""

    sensor_id: str
    sensor_type: str
    unit: str


class Chart(msgspec.Struct):
    """Parallel lists, an entry a step that holds readings; `complete`: all of the span was read in time."""

    sensor_id: str
    sensor_type: str
    unit: str
    since_us: int
    until_us: int
    step_us: int
    readings: int
    complete: bool
    at_us: list[int]
    mean: list[float]
    least: list[float]
    greatest: list[float]
    count: list[int]
    flagged: list[int]


class ChartSteps:
    """Readings aggregated by steps of equal length; `add` takes arrays of shape (rows,) in any order.

    The span is widened to whole steps, so that a step keeps its readings while the span moves on.
    """

    def __init__(self, since_us: int, until_us: int, steps: int) -> None:
        self.step_us = max(1, -(-(until_us - since_us) // steps))
        self.since_us = since_us // self.step_us * self.step_us
        size = -(-(until_us - self.since_us) // self.step_us)
        self.until_us = self.since_us + size * self.step_us
        self._sum = np.zeros(size)
        self._least = np.full(size, np.inf)
        self._greatest = np.full(size, -np.inf)
        self._count = np.zeros(size, np.int64)
        self._flagged = np.zeros(size, np.int64)

    def add(self, time_us: NDArray[np.int64], value: NDArray[np.float64], flags: NDArray[np.int32]) -> None:
        """Add readings; those outside the span are left out."""
        inside = (time_us >= self.since_us) & (time_us < self.until_us)
        at = (time_us[inside] - self.since_us) // self.step_us
        if not len(at):
            return
        order = np.argsort(at, kind="stable")
        at, value, flagged = at[order], value[inside][order], (flags[inside][order] & _CHECK_FLAGS) != 0
        starts = np.flatnonzero(np.concatenate(([True], at[1:] != at[:-1])))
        steps = at[starts]
        self._sum[steps] += np.add.reduceat(value, starts)
        self._least[steps] = np.minimum(self._least[steps], np.minimum.reduceat(value, starts))
        self._greatest[steps] = np.maximum(self._greatest[steps], np.maximum.reduceat(value, starts))
        self._count[steps] += np.diff(starts, append=len(at))
        self._flagged[steps] += np.add.reduceat(flagged.astype(np.int64), starts)

    def chart(self, known: KnownSeries, *, complete: bool) -> Chart:
        """The aggregates so far."""
        at = np.flatnonzero(self._count)
        count, mean = self._count[at], self._sum[at] / self._count[at]
        time_us, flagged = self.since_us + at * self.step_us, self._flagged[at]
        columns = (time_us, mean, self._least[at], self._greatest[at], count, flagged)
        return self.build_chart(known, self.step_us, columns, complete=complete)

    def build_chart(
        self, known: KnownSeries, step_us: int, columns: Sequence[NDArray[Any]], *, complete: bool
    ) -> Chart:
        """A chart of this span; `columns` are its lists from `at_us` on, as arrays."""
        at_us, mean, least, greatest, count, flagged = (column.tolist() for column in columns)
        return Chart(
            *(known.series.sensor_id, known.series.sensor_type, known.unit),
            *(self.since_us, self.until_us, step_us, sum(count)),
            complete,
            *(at_us, mean, least, greatest, count, flagged),
        )


def search_series(catalog: SeriesCatalog, text: str, limit: int) -> tuple[list[ChartSeries], int]:
    """The first `limit` series whose name contains `text`, ignoring case, by name; and how many there are."""
    folded = text.casefold()
    found = [
        known
        for known in catalog.list_known()
        if folded in f"{known.series.sensor_id}/{known.series.sensor_type}".casefold()
    ]
    named = [ChartSeries(k.series.sensor_id, k.series.sensor_type, k.unit) for k in found[:limit]]
    return named, len(found)


def read_chart(
    path: Path, known: KnownSeries, steps: ChartSteps, *, within_s: float = READ_WITHIN_S
) -> Chart:
    """Read the series from a live or stopped spool, for up to `within_s`. Raises SpoolError."""
    deadline = time.monotonic() + within_s
    numbers = np.array(known.numbers, np.int32)
    with open_spool_read_only(path) as connection:
        connection.execute("BEGIN")  # one view for all that follows
        for position in reversed(find_positions(connection, steps.since_us, steps.until_us)):
            if time.monotonic() > deadline:
                connection.execute("COMMIT")
                whole = _chart_from_rollups(connection, known, steps)
                return steps.chart(known, complete=False) if whole is None else whole
            _add_segment(read_block(connection, position) or b"", numbers, steps)
    return steps.chart(known, complete=True)


def _chart_from_rollups(
    connection: sqlite3.Connection, known: KnownSeries, steps: ChartSteps
) -> Chart | None:
    """The same span in windows of at least a step; None when the series has no rollups."""
    if not read_commit_counter(connection, RecordClass.ROLLUP).commit:
        return None  # everything would be read from readings again
    every_s = next((length for length in _WINDOWS_S if length * 1_000_000 >= steps.step_us), _WINDOWS_S[-1])
    reader = SeriesReader(connection, known.numbers, steps.since_us, steps.until_us)
    windows = reader.windows(every_s).windows
    windows = windows.select(windows.count > 0)
    if not windows.rows:
        return None
    names = ("time_us", "mean", "minimum", "maximum", "count", "flagged")
    columns: list[NDArray[Any]] = [getattr(windows, name) for name in names]
    return steps.build_chart(known, every_s * 1_000_000, columns, complete=True)


def _add_segment(block: bytes, numbers: NDArray[np.int32], steps: ChartSteps) -> None:
    """Add what a segment holds of the series: nothing when it is damaged (delivery sets it aside)."""
    series = decode_segment_columns(block, ("series",))
    if isinstance(series, DamagedSegment):
        return
    rows = np.isin(series[0], numbers)
    if rows.any():
        picked = decode_segment_columns(block, ("time_us", "value", "flags"))
        if not isinstance(picked, DamagedSegment):
            steps.add(*(column[rows] for column in picked))
