"""A question about one series, answered from a spool: windows, readings, or a line of few points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from gateway.operate.series_history import History, Known, SeriesReader

if TYPE_CHECKING:
    import sqlite3

    from numpy.typing import NDArray

    from cloud_sync.records import Readings
    from cloud_sync.summaries import Rollups

_SECOND_US = 1_000_000
_STEPS_S = (60, 300, 3600, 86400)
_WINDOWS_MAX = 750
_RAW_BELOW_S = 900


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a series; since_us <= time < until_us.

    Attributes:
        every_s: length of the windows, 0 for the readings themselves, None for what suits the span.
        points: at most so many points of a line that keeps its shape, None for windows or readings.
        average: windows that a moving average goes over, the one itself included; 0 for none.
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
        most = _WINDOWS_MAX if self.points is None else max(_WINDOWS_MAX, 2 * self.points)
        return next((step for step in _STEPS_S if span_s / step <= most), _STEPS_S[-1])


class Answer(msgspec.Struct):
    """What a series was; `columns` are parallel lists, the first one `time_us`. NaN is None.

    `every_s` is 0 where the rows are readings.
    """

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
        """How many."""
        return len(self.columns["time_us"])


def answer(connection: sqlite3.Connection, known: Known, question: Question) -> Answer:
    """Read and reckon. The connection reads a spool; nothing is written."""
    reader = SeriesReader(connection, known.numbers, question.since_us, question.until_us)
    window_s = question.window_s
    history = reader.windows(window_s) if window_s else reader.readings()
    return Answer(
        known.series.sensor_id,
        known.series.sensor_type,
        dict(known.series.attributes).get("unit", ""),
        question.since_us,
        question.until_us,
        window_s,
        {name: _plain(column) for name, column in _columns(history, question).items()},
        history.damaged_rows,
    )


def _columns(history: History, question: Question) -> dict[str, NDArray[Any]]:
    if question.points is not None:
        return _line(history, question.points)
    if question.window_s:
        return _of_windows(history.windows, question.average)
    return _of_readings(history.readings)


def _line(history: History, points: int) -> dict[str, NDArray[Any]]:
    from gateway.operate.downsample import chosen, outline  # noqa: PLC0415 - loads a compiled library

    if history.windows.rows:
        time_us, value = outline(history.windows)
    else:
        time_us, value = history.readings.time_us, history.readings.value
    shown = chosen(time_us, value, points)
    return {"time_us": time_us[shown], "value": value[shown]}


def _of_windows(windows: Rollups, average: int) -> dict[str, NDArray[Any]]:
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.sqrt(np.where(windows.count > 1, windows.m2 / (windows.count - 1), np.nan))
    given: dict[str, NDArray[Any]] = {
        "time_us": windows.time_us,
        "count": windows.count,
        "mean": windows.mean,
        "minimum": windows.minimum,
        "maximum": windows.maximum,
        "deviation": deviation,
        "first": windows.first,
        "last": windows.last,
        "flagged": windows.flagged,
        "excluded": windows.excluded,
    }
    if average:
        given["average"] = moving_average(windows, average)
    return given


def moving_average(windows: Rollups, over: int) -> NDArray[np.float64]:
    """The mean of all readings of each window and of those before it within `over` lengths; shape (rows,).

    Windows are of one length, of one series and in order; missing ones count for nothing.
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


def _of_readings(readings: Readings) -> dict[str, NDArray[Any]]:
    return {
        "time_us": readings.time_us,
        "value": readings.value,
        "quality": readings.quality,
        "battery_level": readings.battery_level,
        "signal_strength": readings.signal_strength,
        "flags": readings.flags,
    }


def _plain(column: NDArray[Any]) -> list[Any]:
    """A column as a list, None for NaN."""
    listed = column.tolist()
    return [None if value != value else value for value in listed] if column.dtype.kind == "f" else listed  # noqa: PLR0124 - what NaN is told by
