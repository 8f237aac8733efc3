"""A query over one series of a spool: windows, readings, or a line of few points.

Windows of a length come from the longest rollups that divide it; what was not closed yet is summarised from
shorter ones, and finally from readings. Segments that hold nothing of the series cost one column each. Lines
are downsampled with MinMaxLTTB (Van Der Donckt and others, 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np

from cloud_sync.model.records import Flag, Readings, RecordClass, Rollups
from gateway.rollups.rollup import merge_rollups, roll_up_readings
from gateway.spool.database import read_view
from gateway.spool.segment_reader import (
    DamagedSegment,
    decode_segment,
    decode_segment_columns,
    find_indexed,
    find_positions,
    keep_newest_revisions,
    read_block,
)
from gateway.spool.segments import read_segments
from gateway.spool.series_catalog import SeriesCatalog, read_all_series

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from gateway.spool.series_catalog import KnownSeries
    from gateway.spooltools.reading_selection import ReadingFilter

R = TypeVar("R", Readings, Rollups)
_SECOND_US = 1_000_000
_NOT_CLOSED_S = 900
"""Windows that ended so long before the newest rollup are closed: their readings need not be looked at."""


@dataclass(slots=True)
class SeriesHistory:
    """Found in order of time: `windows` of one length, or `readings`. So many `segments` were decoded."""

    windows: Rollups
    readings: Readings
    damaged_rows: int = 0
    segments: int = 0


def find_series(connection: sqlite3.Connection, selection: ReadingFilter) -> list[KnownSeries]:
    """The series that are selected, by name."""
    catalog = SeriesCatalog(rows=read_all_series(connection))
    return [known for known in catalog.list_known() if selection.names(known.series)]


class SeriesReader:
    """Reads one series out of a spool; since_us <= time < until_us."""

    def __init__(
        self, connection: sqlite3.Connection, numbers: Sequence[int], since_us: int, until_us: int
    ) -> None:
        self._connection = connection
        self._numbers = np.array(numbers, np.int32)
        self._since_us = since_us
        self._until_us = until_us
        self._damaged_rows = self._segments = 0

    def readings(self) -> SeriesHistory:
        """The readings of the series."""
        with read_view(self._connection):
            readings = self._readings_from(self._since_us)
        return SeriesHistory(Rollups.empty(), readings, self._damaged_rows, self._segments)

    def windows(self, every_s: int) -> SeriesHistory:
        """Windows of a length; the first one begins at or before `since_us`, and is whole."""
        every_us = every_s * _SECOND_US
        self._since_us = self._since_us // every_us * every_us
        with read_view(self._connection):
            rollups, closed_until_us = self._rollups(every_s)
            parts, from_us = [], self._since_us
            for length in sorted(set(rollups.window_s.tolist()), reverse=True):
                part = rollups.select((rollups.window_s == length) & (rollups.time_us >= from_us))
                if part.rows:
                    parts.append(part)
                    from_us = int(part.time_us.max()) + length * _SECOND_US
            rest = roll_up_readings(self._readings_from(max(from_us, closed_until_us)), every_s)
        parts.append(rest)
        windows = merge_rollups(Rollups.concat(parts), every_s)
        return SeriesHistory(windows, Readings.empty(), self._damaged_rows, self._segments)

    def _rollups(self, every_s: int) -> tuple[Rollups, int]:
        """Newest revisions of every length that divides `every_s`, and until when all windows are closed."""
        segments = find_indexed(self._connection, RecordClass.ROLLUP, self._since_us, self._until_us - 1)
        closed_until_us = -(1 << 62)
        parts = []
        for position, _, max_time_us in sorted(segments, key=itemgetter(2), reverse=True):
            stored = self._decode(position, read_block(self._connection, position) or b"", Rollups)
            if stored is None:
                continue
            fits = every_s % stored.window_s == 0
            if closed_until_us < 0 and fits.any():
                closed_until_us = min(max_time_us, self._until_us) - _NOT_CLOSED_S * _SECOND_US
            inside = (stored.time_us >= self._since_us) & (stored.time_us < self._until_us)
            parts.append(self._identified(stored, fits & inside & np.isin(stored.series, self._numbers)))
        return keep_newest_revisions(Rollups.concat(parts)) if parts else Rollups.empty(), closed_until_us

    def _readings_from(self, since_us: int) -> Readings:
        """Readings from then on, in order of time, by identity."""
        since_us = max(since_us, self._since_us)
        parts = []
        for position in find_positions(self._connection, since_us, self._until_us):
            part = self._rows_of_series(position)
            if part is not None:
                parts.append(part.select((part.time_us >= since_us) & (part.time_us < self._until_us)))
        if not parts:
            return Readings.empty()
        readings = Readings.concat(parts).in_order()
        return replace(readings, flags=readings.flags & ~np.int32(Flag.PROCESSED))

    def _rows_of_series(self, position: int) -> Readings | None:
        """What a segment of readings holds of the series; None when nothing, or when it is damaged."""
        block = read_block(self._connection, position) or b""
        column = decode_segment_columns(block, ("series",))
        if not isinstance(column, DamagedSegment) and not np.isin(column[0], self._numbers).any():
            return None
        readings = self._decode(position, block, Readings)
        if readings is None:
            return None
        return self._identified(readings, np.isin(readings.series, self._numbers))

    def _decode(self, position: int, block: bytes, kind: type[R]) -> R | None:
        """All records of a segment; None when it is damaged, which is counted."""
        self._segments += 1
        records = decode_segment(block, kind)
        if isinstance(records, DamagedSegment):
            self._damaged_rows += read_segments(self._connection, (position, position))[0].rows
            return None
        return records

    def _identified(self, records: R, rows: NDArray[np.bool_]) -> R:
        """Some rows under the identity of the series, whatever attribute state they came with."""
        own = records.select(rows)
        return own.with_series(np.full(own.rows, self._numbers[0], np.int32))


def outline_windows(windows: Rollups) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Windows of one length as a line of extremes: times (us), values; shape (2 * windows with values,).

    The points lie a quarter from each end, in the order of the extremes that keeps the line shorter.
    """
    some = windows.select(windows.count > 0)
    quarter_us = some.window_s.astype(np.int64) * 250_000
    falls = some.first > some.last
    early = np.where(falls, some.maximum, some.minimum)
    late = np.where(falls, some.minimum, some.maximum)
    times = np.stack([some.time_us + quarter_us, some.time_us + 3 * quarter_us], axis=1).ravel()
    return times, np.stack([early, late], axis=1).ravel()


def choose_points(time_us: NDArray[np.int64], value: NDArray[np.float64], points: int) -> NDArray[np.intp]:
    """Indices of at most `points` (at least 3) points that keep a line's shape, rising."""
    if len(value) <= points or points < 3:  # noqa: PLR2004 - the method keeps both ends and one between
        return np.arange(len(value))
    from tsdownsample import MinMaxLTTBDownsampler  # noqa: PLC0415 - loads a compiled library

    shown = MinMaxLTTBDownsampler().downsample(  # type: ignore[no-untyped-call]  # its own stubs
        np.ascontiguousarray(time_us), np.ascontiguousarray(value), n_out=points
    )
    return np.unique(shown.astype(np.intp))


_WINDOW_LENGTHS_S = (60, 300, 3600, 86400)
_MAX_WINDOWS = 750
_RAW_BELOW_S = 900
_READING_COLUMNS = ("time_us", "value", "quality", "battery_level", "signal_strength", "flags")
_WINDOW_COLUMNS = (
    *("time_us", "count", "mean", "minimum", "maximum", "deviation"),
    *("first", "last", "flagged", "excluded"),
)


@dataclass(frozen=True, slots=True)
class SeriesQuery:
    """A query; since_us <= time < until_us.

    `every_s` is the length of the windows, 0 for readings, None for what suits the span. With `points` the
    result is a line of at most so many points. `average` is how many windows a moving average spans.
    """

    since_us: int
    until_us: int
    every_s: int | None = None
    points: int | None = None
    average: int = 0

    @property
    def window_s(self) -> int:
        """The length of the windows to read, 0 for readings."""
        if self.every_s is not None:
            return self.every_s
        span_s = (self.until_us - self.since_us) / _SECOND_US
        if span_s <= _RAW_BELOW_S:
            return 0
        most = _MAX_WINDOWS if self.points is None else max(_MAX_WINDOWS, 2 * self.points)
        return next((step for step in _WINDOW_LENGTHS_S if span_s / step <= most), _WINDOW_LENGTHS_S[-1])


class SeriesResult(msgspec.Struct):
    """A series as parallel lists, `time_us` first, None for NaN. `every_s` is 0 when rows are readings."""

    sensor_id: str
    sensor_type: str
    unit: str
    since_us: int
    until_us: int
    every_s: int
    columns: dict[str, list[Any]]
    damaged_rows: int = 0

    @property
    def rows(self) -> int:
        """How many rows."""
        return len(self.columns["time_us"])


def run_query(connection: sqlite3.Connection, known: KnownSeries, query: SeriesQuery) -> SeriesResult:
    """Run a query on a connection to a spool."""
    reader = SeriesReader(connection, known.numbers, query.since_us, query.until_us)
    window_s = query.window_s
    history = reader.windows(window_s) if window_s else reader.readings()
    return SeriesResult(
        known.series.sensor_id,
        known.series.sensor_type,
        known.unit,
        query.since_us,
        query.until_us,
        window_s,
        {name: _to_list(column) for name, column in _result_columns(history, query).items()},
        history.damaged_rows,
    )


def _result_columns(history: SeriesHistory, query: SeriesQuery) -> dict[str, NDArray[Any]]:
    if query.points is not None:
        time_us, value = history.readings.time_us, history.readings.value
        if history.windows.rows:
            time_us, value = outline_windows(history.windows)
        shown = choose_points(time_us, value, query.points)
        return {"time_us": time_us[shown], "value": value[shown]}
    if not query.window_s:
        return {name: getattr(history.readings, name) for name in _READING_COLUMNS}
    windows = history.windows
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.sqrt(np.where(windows.count > 1, windows.m2 / (windows.count - 1), np.nan))
    columns = {name: deviation if name == "deviation" else getattr(windows, name) for name in _WINDOW_COLUMNS}
    if query.average:
        columns["average"] = moving_average(windows, query.average)
    return columns


def moving_average(windows: Rollups, over: int) -> NDArray[np.float64]:
    """The mean of the readings of each window and of those before it within `over` lengths; shape (rows,).

    Windows are of one length, of one series and in order; missing ones count as empty.
    """
    if not windows.rows:
        return np.empty(0, np.float64)
    weight = windows.count.astype(np.float64)
    before = np.searchsorted(
        windows.time_us, windows.time_us - (over - 1) * windows.window_s.astype(np.int64) * _SECOND_US
    )
    base = np.nanmean(windows.mean) if (windows.count > 0).any() else 0.0
    weighed = np.where(windows.count > 0, weight * (windows.mean - base), 0.0)
    total, count = (np.concatenate(([0.0], np.cumsum(column))) for column in (weighed, weight))
    at = np.arange(1, windows.rows + 1)
    within = count[at] - count[before]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(
            np.where(within > 0, base + (total[at] - total[before]) / within, np.nan), np.float64
        )


def _to_list(column: NDArray[Any]) -> list[Any]:
    listed = column.tolist()
    return [None if math.isnan(value) else value for value in listed] if column.dtype.kind == "f" else listed
