"""One series over a span of time, from its rollups and, where there are none yet, from its readings.

Windows of a length come from the longest rollups that divide it; what was not closed yet is summarised from
shorter ones, and at last from readings. Segments that hold nothing of the series cost one column each.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple, TypeVar, cast

import numpy as np

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import Flag, Readings, RecordClass, Series
from cloud_sync.summaries import Rollups
from gateway.processing.rollup import merged, summarise
from gateway.spool.database import SQL
from gateway.spool.segments import fresh_segments, span_of
from gateway.spool.series import all_series
from gateway.spool.stored_rollups import newest_of_each

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from cloud_sync.records import Records
    from gateway.operate.selection import Selection

Kept = TypeVar("Kept", Readings, Rollups)
_SECOND_US = 1_000_000
_NOT_CLOSED_S = 900
"""Windows that ended so long before the newest rollup are closed: their readings need not be looked at."""


class Known(NamedTuple):
    """A series of the spool.

    Attributes:
        series: in its newest attribute state.
        numbers: of all its attribute states, the first one being its identity.
    """

    series: Series
    numbers: tuple[int, ...]


@dataclass(slots=True)
class History:
    """What was found, in order of time: `windows` of one length, or `readings`; the other has no rows.

    Attributes:
        damaged_rows: rows of segments that could not be decoded; they are not in it.
        segments: how many were looked into.
    """

    windows: Rollups
    readings: Readings
    damaged_rows: int = 0
    segments: int = 0


def known_series(connection: sqlite3.Connection, selection: Selection) -> list[Known]:
    """The series that are selected, by name."""
    found: dict[tuple[str, str], Known] = {}
    for number, series in all_series(connection):
        if selection.names(series):
            name = (series.sensor_id, series.sensor_type)
            numbers = found[name].numbers if name in found else ()
            found[name] = Known(series, (*numbers, number))
    return [found[name] for name in sorted(found)]


class SeriesReader:
    """Reads one series out of a spool; since_us <= time < until_us."""

    def __init__(
        self, connection: sqlite3.Connection, numbers: tuple[int, ...], since_us: int, until_us: int
    ) -> None:
        self._connection = connection
        self._numbers = np.array(numbers, np.int32)
        self._since_us = since_us
        self._until_us = until_us
        self._damaged_rows = self._segments = 0

    def readings(self) -> History:
        """Its readings."""
        with _one_view(self._connection):
            readings = self._readings_from(self._since_us)
        return self._history(readings=readings)

    def windows(self, every_s: int) -> History:
        """Its windows of a length; the first one begins at or before `since_us`, and is whole."""
        every_us = every_s * _SECOND_US
        self._since_us = self._since_us // every_us * every_us
        with _one_view(self._connection):
            rollups, closed_until_us = self._rollups(every_s)
            parts, from_us = [], self._since_us
            for length in sorted(set(rollups.window_s.tolist()), reverse=True):
                part = rollups.take((rollups.window_s == length) & (rollups.time_us >= from_us))
                if part.rows:
                    parts.append(part)
                    from_us = int(part.time_us.max()) + length * _SECOND_US
            rest = summarise(self._readings_from(max(from_us, closed_until_us)), every_s)
        parts.append(rest)
        return self._history(windows=merged(Rollups.concat(parts), every_s))

    def _rollups(self, every_s: int) -> tuple[Rollups, int]:
        """Newest revisions of every length that divides `every_s`, and until when all windows are closed."""
        span = (self._until_us - 1, self._since_us, *span_of(RecordClass.ROLLUP))
        segments = self._connection.execute(SQL["indexed_between_times"], span).fetchall()
        closed_until_us = -(1 << 62)
        parts = []
        for position, _, max_time_us in sorted(segments, key=itemgetter(2), reverse=True):
            stored = cast("Rollups | None", self._decoded(position, RecordClass.ROLLUP))
            if stored is None:
                continue
            fits = every_s % stored.window_s == 0
            if closed_until_us < 0 and fits.any():
                closed_until_us = min(max_time_us, self._until_us) - _NOT_CLOSED_S * _SECOND_US
            inside = (stored.time_us >= self._since_us) & (stored.time_us < self._until_us)
            parts.append(self._identified(stored, fits & inside & np.isin(stored.series, self._numbers)))
        return newest_of_each(Rollups.concat(parts)) if parts else Rollups.none(), closed_until_us

    def _readings_from(self, since_us: int) -> Readings:
        """Its readings from then on, in order of time; `series` being its identity."""
        since_us = max(since_us, self._since_us)
        low, high = span_of(RecordClass.READING)
        span = (self._until_us - 1, since_us, low, high)
        positions = {p for p, _, _ in self._connection.execute(SQL["indexed_between_times"], span)}
        positions |= {
            segment.position
            for segment in fresh_segments(self._connection)
            if segment.min_time_us < self._until_us and segment.max_time_us >= since_us
        }
        parts = []
        for position in sorted(positions):
            part = self._of_series(position)
            if part is not None:
                parts.append(part.take((part.time_us >= since_us) & (part.time_us < self._until_us)))
        if not parts:
            return Readings.none()
        readings = Readings.concat(parts).in_order()
        return replace(readings, flags=readings.flags & ~np.int32(Flag.PROCESSED))

    def _of_series(self, position: int) -> Readings | None:
        """What a segment of readings holds of the series; None when nothing, or when it cannot be decoded."""
        (block,) = self._connection.execute(SQL["block_at"], (position,)).fetchone()
        try:
            (numbers,) = columns.decode_columns(block, ("series",))
        except FormatError:
            numbers = self._numbers  # so that the damage is counted
        if not np.isin(numbers, self._numbers).any():
            return None
        readings = cast("Readings | None", self._decoded(position, RecordClass.READING))
        if readings is None:
            return None
        return self._identified(readings, np.isin(readings.series, self._numbers))

    def _decoded(self, position: int, record_class: RecordClass) -> Records | None:
        """A segment, None when it is damaged."""
        block, rows = self._connection.execute(SQL["block_and_rows_at"], (position,)).fetchone()
        self._segments += 1
        try:
            return columns.decode_records(block, record_class)
        except FormatError:
            self._damaged_rows += rows
            return None

    def _identified(self, records: Kept, rows: NDArray[np.bool_]) -> Kept:
        """The rows of the series, whatever attribute state they came with, by its identity."""
        taken = records.take(rows)
        return taken.with_series(np.full(taken.rows, self._numbers[0], np.int32))

    def _history(self, *, windows: Rollups | None = None, readings: Readings | None = None) -> History:
        return History(
            Rollups.none() if windows is None else windows,
            Readings.none() if readings is None else readings,
            self._damaged_rows,
            self._segments,
        )


@contextmanager
def _one_view(connection: sqlite3.Connection) -> Iterator[None]:
    """One state of the file for all that is read: compaction may move segments meanwhile."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")
