"""Rollups that are in the spool already, looked up by series and window.

Rollup segments are in the index of times from their commit on. A lookup decodes those that may hold one of
the windows asked for; some are kept decoded, bounded in rows.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.records import RecordClass
from cloud_sync.summaries import Rollups
from gateway.spool.database import SQL, value_of
from gateway.spool.segments import commit_of, newest_of, span_of

if TYPE_CHECKING:
    import sqlite3

    from numpy.typing import NDArray

_ROLLUPS = span_of(RecordClass.ROLLUP)
_CACHED_ROWS = 100_000
_CLUSTER_US = 3_600_000_000
_AHEAD_US = 300_000_000
_GONE = "rollups_given_up_us"
UNKNOWN_US = 1 << 62
"""Windows of any time may be gone."""


def note_gone(connection: sqlite3.Connection, newest_us: int) -> None:
    """Remember that rollups of windows that begin up to then were given up; inside a transaction."""
    known = int(value_of(connection.execute(SQL["meta"], (_GONE,)).fetchone(), newest_us))
    connection.execute(SQL["set_meta"], (_GONE, str(max(known, newest_us))))


class Prior(NamedTuple):
    """Stored revisions that were looked for.

    Attributes:
        found: the newest revision of each window that is stored; in any order.
        gone_before_us: windows that begin earlier may have been stored and be gone since.
    """

    found: Rollups
    gone_before_us: int


class StoredRollups:
    """Reads the rollups of one spool through a connection of its own; for one thread at a time."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._cache: OrderedDict[tuple[int, int], Rollups] = OrderedDict()

    def ever(self) -> bool:
        """Whether a rollup was ever committed."""
        return newest_of(self._connection, RecordClass.ROLLUP).commit > 0

    def newest_revisions(self, wanted: Rollups) -> Prior:
        """The newest stored revision of the windows that `wanted`, of one length, names."""
        self._connection.execute("BEGIN")  # one state of the file: compaction may move segments meanwhile
        try:
            return self._newest_revisions(wanted)
        finally:
            self._connection.execute("COMMIT")

    def _newest_revisions(self, wanted: Rollups) -> Prior:
        gone_before_us = self._gone_before_us()
        found = []
        for first_us, last_us in _clusters(wanted.time_us):
            span = (last_us, first_us, *_ROLLUPS)
            for position, last_commit, _ in self._connection.execute(
                SQL["indexed_between_times"], span
            ).fetchall():
                try:
                    stored = self._decoded(position, last_commit)
                except FormatError:
                    gone_before_us = UNKNOWN_US
                    continue
                hits = _naming(stored, wanted)
                if hits.any():
                    found.append(stored.take(hits))
        newest = newest_of_each(Rollups.concat(found)) if found else Rollups.none()
        return Prior(newest, gone_before_us)

    def _gone_before_us(self) -> int:
        """Windows that begin before this may have been pruned, or set aside as damaged."""
        aside_us = value_of(self._connection.execute(SQL["last_set_aside"], _ROLLUPS).fetchone())
        oldest = self._connection.execute(SQL["first_segment_from"], _ROLLUPS).fetchone()
        if oldest is None:
            return UNKNOWN_US if self.ever() else -UNKNOWN_US
        gone_us = -UNKNOWN_US if aside_us is None else int(aside_us)
        position, _, written_at_us, _ = oldest
        if commit_of(position) > 1:
            gone_us = max(gone_us, written_at_us)
        given_up_us = value_of(self._connection.execute(SQL["meta"], (_GONE,)).fetchone())
        if given_up_us is not None:
            gone_us = max(gone_us, int(given_up_us) + 1)
        return gone_us + _AHEAD_US

    def _decoded(self, position: int, last_commit: int) -> Rollups:
        key = (position, last_commit)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        (block,) = self._connection.execute(SQL["block_at"], (position,)).fetchone()
        rollups = cast("Rollups", columns.decode_records(block, RecordClass.ROLLUP))
        self._cache[key] = rollups
        while sum(kept.rows for kept in self._cache.values()) > _CACHED_ROWS and len(self._cache) > 1:
            self._cache.popitem(last=False)
        return rollups


def newest_of_each(rollups: Rollups) -> Rollups:
    """Of each series, window length and start the newest revision, in canonical order."""
    ordered = rollups.in_order()
    follows = np.ones(max(0, ordered.rows - 1), np.bool_)
    for name in ("series", "window_s", "time_us"):
        column = getattr(ordered, name)
        follows &= column[1:] == column[:-1]
    return ordered.take(np.append(~follows, [True])) if ordered.rows else ordered


def _clusters(time_us: NDArray[np.int64]) -> list[tuple[int, int]]:
    """First and last of times that lie close together."""
    times = np.unique(time_us)
    cuts = np.flatnonzero(np.diff(times) > _CLUSTER_US) + 1
    return [(int(part[0]), int(part[-1])) for part in np.split(times, cuts) if len(part)]


def _naming(stored: Rollups, wanted: Rollups) -> NDArray[np.bool_]:
    """Which stored rows are of a window that `wanted` names."""
    of_length = stored.window_s == wanted.window_s[0]
    at = np.flatnonzero(
        of_length & np.isin(stored.time_us, wanted.time_us) & np.isin(stored.series, wanted.series)
    )
    named = set(zip(wanted.series.tolist(), wanted.time_us.tolist(), strict=True))
    keys = zip(stored.series[at].tolist(), stored.time_us[at].tolist(), strict=True)
    names = np.zeros(stored.rows, np.bool_)
    names[at] = np.fromiter((key in named for key in keys), np.bool_, len(at))
    return names
