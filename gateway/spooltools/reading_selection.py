"""Readings selected by time and series, read out of a spool segment by segment in bounded memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.model.records import Readings
from gateway.spool.database import NO_PROGRESS, ProgressListener
from gateway.spool.segment_reader import DamagedSegment, SegmentWalk, count_kept_rows, decode_segment
from gateway.spool.segments import MAX_SEGMENT_ROWS
from gateway.spool.series_catalog import SeriesCatalog, read_all_series

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from cloud_sync.model.records import Series


@dataclass(frozen=True, slots=True)
class ReadingFilter:
    """Readings with since_us <= time < until_us of series that any of `patterns` names.

    A pattern is SENSOR_ID/SENSOR_TYPE, exact or with `*`, `?` and `[...]`; without a slash it names a
    sensor, with all its types. No pattern means every series.
    """

    since_us: int | None = None
    until_us: int | None = None
    patterns: tuple[str, ...] = ()

    def may_match(self, min_time_us: int, max_time_us: int) -> bool:
        """Whether a segment of these times can hold a selected reading."""
        return (self.since_us is None or max_time_us >= self.since_us) and (
            self.until_us is None or min_time_us < self.until_us
        )

    def names(self, series: Series) -> bool:
        """Whether the readings of a series are selected."""
        if not self.patterns:
            return True
        name = f"{series.sensor_id}/{series.sensor_type}"
        return any(
            pattern in (name, series.sensor_id)
            or fnmatchcase(name if "/" in pattern else series.sensor_id, pattern)
            for pattern in self.patterns
        )

    def select(self, readings: Readings, selected: NDArray[np.bool_]) -> Readings:
        """The selected readings; `selected` says of each series number whether it is."""
        mask = selected[readings.series]
        if self.since_us is not None:
            mask &= readings.time_us >= self.since_us
        if self.until_us is not None:
            mask &= readings.time_us < self.until_us
        return readings if mask.all() else readings.select(mask)


RUN_ROWS = 65_536
_MAX_DAMAGED_KEPT = 1000


class SelectedSeries:
    """The spool's series by number, and which are selected; read again when a live gateway has added some."""

    def __init__(self, connection: sqlite3.Connection, selection: ReadingFilter) -> None:
        self._connection = connection
        self._selection = selection
        self.catalog = SeriesCatalog()
        self.selected: NDArray[np.bool_] = np.zeros(0, np.bool_)

    def knows(self, numbers: NDArray[np.int32]) -> bool:
        """Whether every number names a series."""
        if not self.catalog.knows(numbers):
            rows = read_all_series(self._connection)
            self.catalog = SeriesCatalog(rows=rows)
            self.selected = np.zeros(max((number for number, _ in rows), default=0) + 1, np.bool_)
            self.selected[[number for number, series in rows if self._selection.names(series)]] = True
        return self.catalog.knows(numbers)


@dataclass(slots=True)
class ReadSummary:
    """What a scan of the spool found; `damaged` describes the first segments that cannot be decoded."""

    segments: int = 0
    rows: int = 0
    damaged_rows: int = 0
    damaged: list[str] = field(default_factory=list)


def read_selected(
    connection: sqlite3.Connection,
    path: Path,
    selection: ReadingFilter,
    names: SelectedSeries,
    found: ReadSummary,
    *,
    newest_first: bool = False,
    progress: ProgressListener = NO_PROGRESS,
) -> Iterator[Readings]:
    """Selected readings, one segment at a time, in commit order or against it; each reading once.

    A segment that cannot be decoded is added to `found` and passed over. `progress` counts rows.
    """
    walk = SegmentWalk(connection, path, newest_first=newest_first)
    recent = _RecentReadings()
    progress.total(count_kept_rows(connection))
    for head in walk:
        found.segments += 1
        if selection.may_match(head.min_time_us, head.max_time_us):
            readings = decode_segment(walk.block(head), Readings, knows=names.knows)
            if isinstance(readings, DamagedSegment):
                found.damaged_rows += head.rows
                if len(found.damaged) < _MAX_DAMAGED_KEPT:
                    found.damaged.append(f"{head}: {readings.detail}")
            else:
                if walk.overlaps(head):
                    readings = recent.without(readings)
                recent.add(readings)
                readings = selection.select(readings, names.selected) if readings.rows else readings
                found.rows += readings.rows
                if readings.rows:
                    yield readings
        progress.advance(head.rows)


class _RecentReadings:
    """What was yielded lately: as much as one merged segment can hold."""

    def __init__(self) -> None:
        self._parts: deque[Readings] = deque()
        self._rows = 0

    def add(self, readings: Readings) -> None:
        self._parts.append(readings)
        self._rows += readings.rows
        while self._rows - self._parts[0].rows >= MAX_SEGMENT_ROWS:
            self._rows -= self._parts.popleft().rows

    def without(self, readings: Readings) -> Readings:
        """The readings of a merged segment that were not yielded before it was merged."""
        known = {key for part in self._parts for key in _reading_keys(part)}
        fresh = (key not in known for key in _reading_keys(readings))
        return readings.select(np.fromiter(fresh, np.bool_, readings.rows))


def group_into_runs(parts: Iterable[Readings], rows: int = RUN_ROWS) -> Iterator[Readings]:
    """The same readings in runs of at least `rows`, so that small segments cost no more than large ones."""
    run: list[Readings] = []
    gathered = 0
    for part in parts:
        run.append(part)
        gathered += part.rows
        if gathered >= rows:
            yield Readings.concat(run)
            run, gathered = [], 0
    if run:
        yield Readings.concat(run)


def _reading_keys(readings: Readings) -> Iterator[tuple[int, int, float]]:
    columns_ = (readings.series, readings.time_us, readings.value)
    return zip(*(column.tolist() for column in columns_), strict=True)
