"""When a window is closed, and which ones are. Pure.

A window is due when its own series has gone on past its end by the lateness; or when the clock has and
nothing came for it for a while; or, if it was closed before or lies in the future, when nothing comes for it
any more.
Each series has an event time of its own, and one that is ahead of the clock by more than `AHEAD_US` counts
for nothing, so that a device in the year 2106 closes no windows, not even its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gateway.processing.windows import DEFAULT_WINDOWS_S, series_of, start_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cloud_sync.records import Readings
    from gateway.processing.open_windows import OpenWindows
    from gateway.processing.windows import Runs

    Int64s = NDArray[np.int64]

AHEAD_US = 300_000_000
NEVER = np.iinfo(np.int64).min
_FAR_IDLE_US = 600_000_000
_LATE_AT_MOST_US = 60_000_000


@dataclass(frozen=True, slots=True)
class RollTerms:
    """How readings are rolled up.

    Attributes:
        windows_s: lengths, rising, each holding whole ones of the one below.
        lateness_s: how long after its end a window waits for readings, in event time of its series.
        idle_s: how long nothing must have come for a window that the clock closes.
        close_every_s: windows are closed at most so often: each time is a transaction.
        max_open: windows of one length that may be open; beyond it those touched longest ago are closed.
    """

    windows_s: tuple[int, ...] = DEFAULT_WINDOWS_S
    lateness_s: float = 30.0
    idle_s: float = 30.0
    close_every_s: float = 5.0
    max_open: int = 100_000


class Level(NamedTuple):
    """One window length: what is open, and which windows were closed before."""

    window_s: int
    windows: OpenWindows
    closed: Runs


class Instant(NamedTuple):
    """Now, by the gateway's clock, and whether that may be relied on."""

    us: int
    trusted: bool


def newest_after(newest_us: Int64s, readings: Readings, now: Instant) -> Int64s:
    """The newest event time of each series, shape (identities,), after `readings`."""
    largest = int(readings.series.max()) if readings.rows else -1
    room = max(0, largest + 1 - len(newest_us))
    newest = np.concatenate([newest_us, np.full(room, NEVER, np.int64)])
    series, times = readings.series, readings.time_us
    if now.trusted:
        newest = np.where(newest > now.us + AHEAD_US, now.us, newest)
        believed = times <= now.us + AHEAD_US
        series, times = series[believed], times[believed]
    np.maximum.at(newest, series, times)
    return newest


def due(level: Level, newest_us: Int64s, now: Instant, terms: RollTerms) -> NDArray[np.bool_]:
    """Which open windows are to be closed now; bool, shape (rows,)."""
    window_s, windows, closed = level
    start = start_of(windows.keys, window_s)
    ripe_at = start + window_s * 1_000_000 + round(terms.lateness_s * 1e6)
    untouched_us = now.us - windows.touched_us
    passed = newest_us[series_of(windows.keys)] >= ripe_at
    if now.trusted:
        passed |= (now.us >= ripe_at) & (untouched_us >= terms.idle_s * 1e6)
    late = closed.holds(windows.keys)
    settled = (untouched_us >= terms.close_every_s * 1e6) | (now.us - windows.since_us >= _LATE_AT_MOST_US)
    far = (start > now.us + AHEAD_US) & (untouched_us >= _FAR_IDLE_US)
    return np.asarray((passed & (~late | settled)) | far | _too_many(windows, terms.max_open), np.bool_)


def _too_many(windows: OpenWindows, max_open: int) -> NDArray[np.bool_]:
    """Those touched longest ago, as many as there are too many."""
    chosen = np.zeros(windows.rows, np.bool_)
    excess = windows.rows - max_open
    if excess > 0:
        chosen[np.argpartition(windows.touched_us, excess - 1)[:excess]] = True
    return chosen
