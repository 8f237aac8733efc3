"""Selected readings out of a spool, segment by segment, in memory that does not grow with it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import Readings, Series
from gateway.operate.spool_walk import Walk, kept_rows
from gateway.operate.watcher import Nobody, Watcher
from gateway.spool.segments import MAX_SEGMENT_ROWS
from gateway.spool.series import all_series

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from gateway.operate.selection import Selection
    from gateway.operate.spool_walk import Head

RUN_ROWS = 65_536
_DAMAGED_KEPT = 1000
UNKNOWN = Series("", "")
"""Stands for a series number the spool does not know."""


class SeriesNames:
    """The spool's series by number; read again when a live gateway has added some."""

    def __init__(self, connection: sqlite3.Connection, selection: Selection) -> None:
        self._connection = connection
        self._selection = selection
        self.named: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._known: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._series: dict[int, Series] = {}

    def __getitem__(self, number: int) -> Series:
        return self._series.get(number, UNKNOWN)

    def learn(self, readings: Readings) -> bool:
        """Know the series of `readings`; False when one of them is not in the spool."""
        if not self._knows(readings):
            self._series = dict(all_series(self._connection))
            size = max(self._series, default=0) + 1
            self._known, self.named = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
            self._known[list(self._series)] = True
            self.named[[n for n, series in self._series.items() if self._selection.names(series)]] = True
        return self._knows(readings)

    def _knows(self, readings: Readings) -> bool:
        lowest, highest = int(readings.series.min()), int(readings.series.max())
        return lowest >= 0 and highest < len(self._known) and bool(self._known[readings.series].all())


@dataclass(slots=True)
class Found:
    """What a reading of the spool came across.

    Attributes:
        segments: how many were looked at.
        rows: readings found.
        damaged_rows: readings in segments that cannot be decoded, and are left out.
        damaged: the first of those segments, each with what is wrong.
    """

    segments: int = 0
    rows: int = 0
    damaged_rows: int = 0
    damaged: list[str] = field(default_factory=list)


def selected(
    connection: sqlite3.Connection,
    path: Path,
    selection: Selection,
    names: SeriesNames,
    found: Found,
    *,
    newest_first: bool = False,
    watcher: Watcher = Nobody(),  # noqa: B008 - it has no state
) -> Iterator[Readings]:
    """Selected readings, one segment at a time, in commit order or against it; each reading once.

    A segment that cannot be decoded is noted in `found` and passed over. `watcher` is told of
    the rows of every segment.
    """
    walk = Walk(connection, path, newest_first=newest_first)
    given = _Lately()
    watcher.total(kept_rows(connection))
    for head in walk:
        found.segments += 1
        if selection.touches(head.min_time_us, head.max_time_us):
            readings = _decoded(walk.block(head), head, names, found)
            if readings is not None:
                if walk.overlaps(head):
                    readings = given.without(readings)
                given.add(readings)
                readings = selection.of(readings, names.named) if readings.rows else readings
                found.rows += readings.rows
                if readings.rows:
                    yield readings
        watcher.advance(head.rows)


def _decoded(block: bytes, head: Head, names: SeriesNames, found: Found) -> Readings | None:
    try:
        readings = columns.decode(block)
        if names.learn(readings):
            return readings
        reason = "it names a series that the spool does not know"
    except FormatError as fault:
        reason = str(fault)
    found.damaged_rows += head.rows
    if len(found.damaged) < _DAMAGED_KEPT:
        found.damaged.append(f"{head}: {reason}")
    return None


class _Lately:
    """What was given lately: as much as one merged segment can hold."""

    def __init__(self) -> None:
        self._parts: deque[Readings] = deque()
        self._rows = 0

    def add(self, readings: Readings) -> None:
        self._parts.append(readings)
        self._rows += readings.rows
        while self._rows - self._parts[0].rows >= MAX_SEGMENT_ROWS:
            self._rows -= self._parts.popleft().rows

    def without(self, readings: Readings) -> Readings:
        """The readings of a merged segment that were not given before it was merged."""
        known = {key for part in self._parts for key in _keys(part)}
        fresh = (key not in known for key in _keys(readings))
        return readings.take(np.fromiter(fresh, np.bool_, readings.rows))


def in_runs(parts: Iterable[Readings], rows: int = RUN_ROWS) -> Iterator[Readings]:
    """The same readings in runs of at least `rows`, so that small segments cost no more than large ones."""
    waiting: list[Readings] = []
    gathered = 0
    for part in parts:
        waiting.append(part)
        gathered += part.rows
        if gathered >= rows:
            yield Readings.concat(waiting)
            waiting, gathered = [], 0
    if waiting:
        yield Readings.concat(waiting)


def _keys(readings: Readings) -> Iterator[tuple[int, int, float]]:
    columns_ = (readings.series, readings.time_us, readings.value)
    return zip(*(column.tolist() for column in columns_), strict=True)
