"""Windows that are still open, when they close, and their stored form. Pure.

An open window holds a delta since the last revision, never a total. A window closes when its series (event
time) or the clock has passed its end by the lateness; times more than `AHEAD_US` ahead of the clock are
ignored.

Stored form (`pack_windows`): a version byte, then a msgpack map: `rows`, `parts` (a column block of rollups),
`touched_us` and `since_us` (pcodec), `run_first` and `run_last` (pcodec) of the windows closed before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np
from pcodec import ChunkConfig, standalone

from cloud_sync.codec import columns
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import RecordClass, Rollups
from gateway.processing.series_pattern import mark_run_starts
from gateway.rollups.rollup import (
    DEFAULT_WINDOWS_S,
    WindowRuns,
    merge_rollups,
    series_of_keys,
    starts_of_keys,
    window_keys,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Int64s = NDArray[np.int64]
    from cloud_sync.model.records import Readings

FORMAT_VERSION = 1
_MUTABLE_COLUMNS = tuple(
    name for name in Rollups.columns if name not in ("series", "time_us", "window_s", "revision")
)
_PCODEC = ChunkConfig(compression_level=4)


class OpenWindows(NamedTuple):
    """Open windows of one length, each once, in order of `keys`; arrays of shape (rows,).

    `parts` are the deltas, of revision 0. By the gateway's clock, `since_us` is when the first reading of the
    delta arrived and `touched_us` when the last one did.
    """

    keys: Int64s
    parts: Rollups
    touched_us: Int64s
    since_us: Int64s

    @classmethod
    def none(cls) -> OpenWindows:
        """No open windows."""
        empty = np.empty(0, np.int64)
        return cls(empty, Rollups.empty(), empty, empty)

    @property
    def rows(self) -> int:
        """The number of open windows."""
        return len(self.keys)

    def select(self, index: NDArray[np.intp] | NDArray[np.bool_]) -> OpenWindows:
        """The open windows at `index` (rising integers or a mask)."""
        return OpenWindows(
            self.keys[index], self.parts.select(index), self.touched_us[index], self.since_us[index]
        )

    @classmethod
    def from_rollups(cls, parts: Rollups, window_s: int, now_us: int) -> OpenWindows:
        """Windows opened at `now_us` with these summaries, each window once and in order."""
        now = np.full(parts.rows, now_us, np.int64)
        return cls(window_keys(parts.series, parts.time_us, window_s), parts, now, now)

    def merged_with(self, more: OpenWindows, window_s: int) -> OpenWindows:
        """These windows and `more`, which are of this or a shorter length and hold other readings."""
        if not more.rows:
            return self
        if int(more.parts.window_s[0]) != window_s:
            keys = window_keys(more.parts.series, more.parts.time_us, window_s)
            more = more._replace(keys=keys).combined(window_s)
        at = np.searchsorted(self.keys, more.keys)
        if self.rows and at[-1] < self.rows and np.array_equal(self.keys[at], more.keys):
            return self._with_known(more, at, window_s)
        return OpenWindows(
            np.concatenate([self.keys, more.keys]),
            Rollups.concat([self.parts, more.parts]),
            np.concatenate([self.touched_us, more.touched_us]),
            np.concatenate([self.since_us, more.since_us]),
        ).combined(window_s)

    def combined(self, window_s: int) -> OpenWindows:
        """With one row for each key."""
        order = np.argsort(self.keys, kind="stable")
        keys = self.keys[order]
        groups = np.flatnonzero(mark_run_starts(keys))
        return OpenWindows(
            keys[groups],
            merge_rollups(self.parts, window_s),
            np.maximum.reduceat(self.touched_us[order], groups),
            np.minimum.reduceat(self.since_us[order], groups),
        )

    def _with_known(self, more: OpenWindows, at: NDArray[np.intp], window_s: int) -> OpenWindows:
        """Merge with `more`, all of which are open already, at `at`."""
        both = merge_rollups(Rollups.concat([self.parts.select(at), more.parts]), window_s)
        changed = {name: getattr(self.parts, name).copy() for name in _MUTABLE_COLUMNS}
        for name, column in changed.items():
            column[at] = getattr(both, name)
        touched_us, since_us = self.touched_us.copy(), self.since_us.copy()
        touched_us[at] = np.maximum(touched_us[at], more.touched_us)
        since_us[at] = np.minimum(since_us[at], more.since_us)
        return OpenWindows(self.keys, replace(self.parts, **changed), touched_us, since_us)

    def clamped_to(self, now_us: int) -> OpenWindows:
        """The same after the clock was set back: no time is later than now."""
        return self._replace(
            touched_us=np.minimum(self.touched_us, now_us), since_us=np.minimum(self.since_us, now_us)
        )


def pack_windows(windows: OpenWindows, closed: WindowRuns) -> bytes:
    """Encode the open windows of one length, and which were closed before."""
    fields = {
        "rows": windows.rows,
        "parts": columns.encode(windows.parts, level=columns.FAST_LEVEL) if windows.rows else b"",
        "touched_us": _pack_column(windows.touched_us),
        "since_us": _pack_column(windows.since_us),
        "run_first": _pack_column(closed.first),
        "run_last": _pack_column(closed.last),
    }
    return bytes([FORMAT_VERSION]) + msgspec.msgpack.encode(fields)


def unpack_windows(packed: bytes, window_s: int) -> tuple[OpenWindows, WindowRuns]:
    """Decode what `pack_windows` encoded; FormatError when it is damaged or of another version."""
    if packed[:1] != bytes([FORMAT_VERSION]):
        raise FormatError("unsupported", f"open windows of version {packed[:1].hex() or 'none'}")
    try:
        fields = msgspec.msgpack.decode(packed[1:])
        closed = WindowRuns(_unpack_column(fields["run_first"]), _unpack_column(fields["run_last"]))
        if not fields["rows"]:
            return OpenWindows.none(), closed
        parts = columns.decode_records(fields["parts"], RecordClass.ROLLUP)
        assert isinstance(parts, Rollups)
        touched_us, since_us = _unpack_column(fields["touched_us"]), _unpack_column(fields["since_us"])
    except (msgspec.DecodeError, KeyError, TypeError, RuntimeError) as fault:
        raise FormatError("malformed", f"open windows cannot be read: {fault}") from fault
    if not parts.rows == len(touched_us) == len(since_us):
        raise FormatError("malformed", "open windows of unequal columns")
    return OpenWindows(
        window_keys(parts.series, parts.time_us, window_s), parts, touched_us, since_us
    ), closed


def pack_times(times_us: Int64s) -> bytes:
    """Encode times, with a version."""
    return bytes([FORMAT_VERSION]) + _pack_column(times_us)


def unpack_times(packed: bytes) -> Int64s:
    """Decode what `pack_times` encoded; FormatError when it is damaged or of another version."""
    if packed[:1] != bytes([FORMAT_VERSION]):
        raise FormatError("unsupported", f"times of version {packed[:1].hex() or 'none'}")
    try:
        return _unpack_column(packed[1:])
    except (TypeError, RuntimeError) as fault:
        raise FormatError("malformed", f"times cannot be read: {fault}") from fault


def _pack_column(column: Int64s) -> bytes:
    return bytes(standalone.simple_compress(np.ascontiguousarray(column), _PCODEC)) if len(column) else b""


def _unpack_column(packed: bytes) -> Int64s:
    if not packed:
        return np.empty(0, np.int64)
    column = standalone.simple_decompress(packed)
    if column is None or column.dtype != np.int64:
        raise TypeError("not a column of int64")
    return np.asarray(column, np.int64)


AHEAD_US = 300_000_000
NO_TIME_US = np.iinfo(np.int64).min
_FUTURE_WINDOW_IDLE_US = 600_000_000
_REVISION_DELAY_MAX_US = 60_000_000


@dataclass(frozen=True, slots=True)
class RollupOptions:
    """Window lengths, each a multiple of the one below, and when windows close.

    A window stays open for `lateness_s` after its end in the event time of its series; the clock closes it
    only when it was idle for `idle_s`. `close_every_s` is the minimum time between two closings, each a
    transaction. Beyond `max_open` windows of one length the longest idle are closed.
    """

    windows_s: tuple[int, ...] = DEFAULT_WINDOWS_S
    lateness_s: float = 30.0
    idle_s: float = 30.0
    close_every_s: float = 5.0
    max_open: int = 100_000


class WindowLevel(NamedTuple):
    """One window length: the open windows, and the set of those closed before."""

    window_s: int
    windows: OpenWindows
    closed: WindowRuns

    def merged_with(self, windows: OpenWindows) -> WindowLevel:
        """With more open windows, of this or a shorter length."""
        return self._replace(windows=self.windows.merged_with(windows, self.window_s))


class ClockReading(NamedTuple):
    """The gateway's time, and whether it is trusted."""

    us: int
    trusted: bool


def update_newest_times(newest_us: Int64s, readings: Readings, now: ClockReading) -> Int64s:
    """The newest event time of each series, shape (identities,), after `readings`."""
    newest = extend_times(newest_us, int(readings.series.max(initial=-1))).copy()
    series, times = readings.series, readings.time_us
    if now.trusted:
        newest = np.where(newest > now.us + AHEAD_US, now.us, newest)
        believed = times <= now.us + AHEAD_US
        series, times = series[believed], times[believed]
    np.maximum.at(newest, series, times)
    return newest


def extend_times(newest_us: Int64s, number: int) -> Int64s:
    """The newest times, with an element for series `number`."""
    missing = max(0, number + 1 - len(newest_us))
    return np.append(newest_us, np.full(missing, NO_TIME_US)) if missing else newest_us


def find_due_windows(
    level: WindowLevel, newest_us: Int64s, now: ClockReading, options: RollupOptions
) -> NDArray[np.bool_]:
    """Which open windows must be closed now; shape (rows,)."""
    window_s, windows, closed = level
    start = starts_of_keys(windows.keys, window_s)
    ripe_at = start + window_s * 1_000_000 + round(options.lateness_s * 1e6)
    untouched_us = now.us - windows.touched_us
    passed = newest_us[series_of_keys(windows.keys)] >= ripe_at
    if now.trusted:
        passed |= (now.us >= ripe_at) & (untouched_us >= options.idle_s * 1e6)
    late = closed.holds(windows.keys)
    settled = (untouched_us >= options.close_every_s * 1e6) | (
        now.us - windows.since_us >= _REVISION_DELAY_MAX_US
    )
    far = (start > now.us + AHEAD_US) & (untouched_us >= _FUTURE_WINDOW_IDLE_US)
    due = np.asarray((passed & (~late | settled)) | far, np.bool_)
    excess = windows.rows - options.max_open
    if excess > 0:  # the longest idle are closed early
        due[np.argpartition(windows.touched_us, excess - 1)[:excess]] = True
    return due
