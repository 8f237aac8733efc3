"""One series over a span of time, brought down to as many points as a chart can show.

The span is cut into equal steps; of each that holds readings the chart has the least, the greatest and the
mean value and how many there were. Segments are read newest first, for a bounded time. Where that is not
enough rollups stand in, whose windows may be longer than the steps; without any, what was not reached is
missing at the beginning, and the chart says that it is not complete.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import Flag, RecordClass
from gateway.operate.series_history import SeriesReader
from gateway.operate.spool_file import opened
from gateway.spool.database import SQL
from gateway.spool.segments import fresh_segments, newest_of, span_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from gateway.spool.series import SeriesBook

WITHIN_S = 3.0
_WINDOWS_S = (60, 300, 3600, 86_400)
_SUSPICIOUS = ~np.int32(Flag.PROCESSED | Flag.SUPPRESSED)
MAX_STEPS = 1440
MAX_SPAN_US = 31 * 86_400_000_000


class SeriesName(msgspec.Struct):
    """A series as it is picked from a list."""

    sensor_id: str
    sensor_type: str
    unit: str


class Chart(msgspec.Struct):
    """The lists are parallel, one entry a step that holds readings; times are the beginnings of steps.

    `flagged` counts readings that a check has flagged. `complete` is false when not all of the span could be
    read in the time there is.
    """

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


class Steps:
    """Readings gathered by steps of equal length; `add` takes arrays of shape (rows,) in any order.

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
        """Readings; those outside the span are left out."""
        inside = (time_us >= self.since_us) & (time_us < self.until_us)
        at = (time_us[inside] - self.since_us) // self.step_us
        if not len(at):
            return
        order = np.argsort(at, kind="stable")
        at, value, flagged = at[order], value[inside][order], (flags[inside][order] & _SUSPICIOUS) != 0
        starts = np.flatnonzero(np.concatenate(([True], at[1:] != at[:-1])))
        steps = at[starts]
        self._sum[steps] += np.add.reduceat(value, starts)
        self._least[steps] = np.minimum(self._least[steps], np.minimum.reduceat(value, starts))
        self._greatest[steps] = np.maximum(self._greatest[steps], np.maximum.reduceat(value, starts))
        self._count[steps] += np.diff(starts, append=len(at))
        self._flagged[steps] += np.add.reduceat(flagged.astype(np.int64), starts)

    def chart(self, name: SeriesName, *, complete: bool) -> Chart:
        """What was gathered."""
        at = np.flatnonzero(self._count)
        return Chart(
            name.sensor_id,
            name.sensor_type,
            name.unit,
            self.since_us,
            self.until_us,
            self.step_us,
            int(self._count.sum()),
            complete,
            (self.since_us + at * self.step_us).tolist(),
            (self._sum[at] / self._count[at]).tolist(),
            self._least[at].tolist(),
            self._greatest[at].tolist(),
            self._count[at].tolist(),
            self._flagged[at].tolist(),
        )


def series_named(book: SeriesBook, text: str, limit: int) -> tuple[list[SeriesName], int]:
    """The series whose name holds `text`, whatever the case, in order.

    At most `limit` of them, and how many there are. The unit is that of the newest attribute state.
    """
    wanted = text.casefold()
    found: dict[tuple[str, str], str] = {}
    for _, series in book.after(0):
        if wanted in f"{series.sensor_id}/{series.sensor_type}".casefold():
            found[series.sensor_id, series.sensor_type] = dict(series.attributes).get("unit", "")
    named = [SeriesName(*name, found[name]) for name in sorted(found)[:limit]]
    return named, len(found)


def numbers_of(book: SeriesBook, sensor_id: str, sensor_type: str) -> tuple[SeriesName, list[int]] | None:
    """A series with the numbers of all its attribute states; None when the book does not know it."""
    numbers, unit = [], ""
    for number, series in book.after(0):
        if series.sensor_id == sensor_id and series.sensor_type == sensor_type:
            numbers.append(number)
            unit = dict(series.attributes).get("unit", "")
    return (SeriesName(sensor_id, sensor_type, unit), numbers) if numbers else None


def chart_of(
    path: Path, name: SeriesName, numbers: Sequence[int], steps: Steps, *, within_s: float = WITHIN_S
) -> Chart:
    """Read the series out of a live or stopped spool. Takes up to `within_s`, and a thread of its own.

    Raises:
        SpoolError: the spool cannot be read.
    """
    deadline = time.monotonic() + within_s
    wanted = np.array(numbers, np.int32)
    with opened(path) as connection:
        connection.execute("BEGIN")  # one view for all that follows
        for position in _positions(connection, steps.since_us, steps.until_us):
            if time.monotonic() > deadline:
                connection.execute("COMMIT")
                whole = _from_rollups(connection, name, numbers, steps)
                return steps.chart(name, complete=False) if whole is None else whole
            (block,) = connection.execute(SQL["block_at"], (position,)).fetchone()
            _add(block, wanted, steps)
    return steps.chart(name, complete=True)


def _from_rollups(
    connection: sqlite3.Connection, name: SeriesName, numbers: Sequence[int], steps: Steps
) -> Chart | None:
    """The same span in windows of at least a step; None where there are no rollups of the series."""
    if not newest_of(connection, RecordClass.ROLLUP).commit:
        return None  # everything would be read from readings again
    every_s = next((length for length in _WINDOWS_S if length * 1_000_000 >= steps.step_us), _WINDOWS_S[-1])
    reader = SeriesReader(connection, tuple(numbers), steps.since_us, steps.until_us)
    windows = reader.windows(every_s).windows
    windows = windows.take(windows.count > 0)
    if not windows.rows:
        return None
    return Chart(
        name.sensor_id,
        name.sensor_type,
        name.unit,
        steps.since_us,
        steps.until_us,
        every_s * 1_000_000,
        int(windows.count.sum()),
        complete=True,
        at_us=windows.time_us.tolist(),
        mean=windows.mean.tolist(),
        least=windows.minimum.tolist(),
        greatest=windows.maximum.tolist(),
        count=windows.count.tolist(),
        flagged=windows.flagged.tolist(),
    )


def _positions(connection: sqlite3.Connection, since_us: int, until_us: int) -> list[int]:
    """The segments of readings that may hold a time of the span, newest first."""
    low, high = span_of(RecordClass.READING)
    indexed = connection.execute(SQL["indexed_holding_times"], (until_us - 1, since_us, low, high))
    positions = {position for (position,) in indexed}
    positions |= {
        segment.position
        for segment in fresh_segments(connection)
        if segment.min_time_us < until_us and segment.max_time_us >= since_us
    }
    return sorted(positions, reverse=True)


def _add(block: bytes, wanted: NDArray[np.int32], steps: Steps) -> None:
    """What a segment holds of the series; a damaged one holds nothing (delivery sets it aside)."""
    try:
        (numbers,) = columns.decode_columns(block, ("series",))
        rows = np.isin(numbers, wanted)
        if rows.any():
            picked: list[NDArray[Any]] = columns.decode_columns(block, ("time_us", "value", "flags"))
            steps.add(*(column[rows] for column in picked))
    except FormatError:
        return
