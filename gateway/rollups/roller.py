"""The processing stage that rolls readings up, in commit order, into rollups with revisions.

Readings become summaries of the shortest windows; closed windows are added to those of the next length. So
each reading counts once at every length, in any order of arrival: late ones are merged into the stored
revision of their window, which is sent as the next revision.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import Rollups
from gateway.processing.stage import StageInput, StageOutput
from gateway.rollups.open_windows import (
    ClockReading,
    OpenWindows,
    RollupOptions,
    WindowLevel,
    extend_times,
    find_due_windows,
    pack_times,
    pack_windows,
    unpack_times,
    unpack_windows,
    update_newest_times,
)
from gateway.rollups.rollup import WindowRuns, merge_rollups, roll_up_readings, window_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gateway.spool.segment_reader import StoredRevisions

_log = logging.getLogger(__name__)
_NEWEST_KEY = "roller/newest"
_DEFAULT_OPTIONS = RollupOptions()
_MIN_RUNS = 50_000
_BACKLOG_WINDOWS, _BACKLOG_WINDOWS_PER_SERIES = 5_000, 3
"""More open windows than this are a backlog; windows are then closed without waiting."""


class RevisionStore(Protocol):
    """Where closed windows are stored: the spool, or memory in tests. Called in an executor thread."""

    def newest_revisions(self, windows: Rollups) -> StoredRevisions:
        """The newest stored revision of each of `windows`, which are of one length."""

    def has_rollups(self) -> bool:
        """Whether any window was ever closed."""


@dataclass(frozen=True, slots=True)
class RollerState:
    """The complete state; replaced, never changed."""

    levels: tuple[WindowLevel, ...]
    newest_us: NDArray[np.int64]
    now_us: int = 0
    closed_at_us: int = 0


@dataclass(slots=True)
class RollerCounters:
    """Counts since start; `late_unrolled` readings came after their window was evicted."""

    readings: int = 0
    rollups: int = 0
    revisions: int = 0
    late_unrolled: int = 0


class _CloseResult(NamedTuple):
    """The result of closing the due windows of one length."""

    level: WindowLevel
    emitted: Rollups
    deltas: OpenWindows
    unrolled: int


class _NextState(NamedTuple):
    """The state after a step."""

    state: RollerState
    counted: RollerCounters


class Roller:
    """Implements `ProcessingStage`."""

    name = "roller"

    def __init__(self, stored: RevisionStore, options: RollupOptions = _DEFAULT_OPTIONS) -> None:
        self._stored = stored
        self._options = options
        empty = OpenWindows.none(), WindowRuns.none()
        levels = tuple(WindowLevel(window_s, *empty) for window_s in options.windows_s)
        self._state = RollerState(levels, np.empty(0, np.int64))
        self._durable: RollerState | None = None
        self._dropped: set[str] = set()
        self.counters = RollerCounters()

    @property
    def open_windows(self) -> int:
        """Open windows of all lengths."""
        return sum(level.windows.rows for level in self._state.levels)

    def restore(self, state: Mapping[str, bytes]) -> None:
        """Restore the durable state. Windows whose state is lost count as closed before."""
        self._durable = None
        is_fresh = not state and not self._stored.has_rollups()
        known = {_level_key(window_s): window_s for window_s in self._options.windows_s}
        levels = []
        for key, window_s in known.items():
            windows, closed = OpenWindows.none(), WindowRuns.none() if is_fresh else WindowRuns.every()
            if key in state:
                windows, closed = _unpack_or_discard(state[key], window_s)
            levels.append(WindowLevel(window_s, windows, closed))
        self._dropped = state.keys() - known.keys() - {_NEWEST_KEY}
        for key in sorted(self._dropped):
            length = key.removeprefix("roller/")
            if length.isdecimal():
                _adopt_windows(levels, _unpack_or_discard(state[key], int(length))[0])
        newest_us = np.empty(0, np.int64)
        if _NEWEST_KEY in state:
            try:
                newest_us = unpack_times(state[_NEWEST_KEY])
            except FormatError as fault:
                _log.warning("the newest times of series are lost and start again: %s", fault)
        self._state = RollerState(tuple(levels), newest_us)

    def reconfigure(self, options: RollupOptions) -> None:
        """Change the options between two steps; the window lengths must stay."""
        if options.windows_s != self._options.windows_s:
            raise ValueError("window lengths cannot change while windows are open")
        self._options = options

    def step(self, step: StageInput) -> StageOutput:
        """Roll up the readings of a step, and close what is due."""
        before, now = self._state, ClockReading(step.now_us, step.clock_trusted)
        levels = list(before.levels)
        if now.us < before.now_us:
            levels = [level._replace(windows=level.windows.clamped_to(now.us)) for level in levels]
        parts = roll_up_readings(step.readings, levels[0].window_s)
        levels[0] = levels[0].merged_with(OpenWindows.from_rollups(parts, levels[0].window_s, now.us))
        newest_us = update_newest_times(before.newest_us, step.readings, now)
        last_series = [int(level.windows.parts.series[-1]) for level in levels if level.windows.rows]
        newest_us = extend_times(newest_us, max(last_series, default=-1))
        counted = RollerCounters(readings=step.readings.rows)
        emitted: list[Rollups] = []
        closed_at_us = before.closed_at_us
        if self._should_close(levels, now.us, before):
            closed_at_us = now.us
            deltas = OpenWindows.none()
            for at, level in enumerate(levels):
                done = self._close(level, deltas, newest_us, now)
                levels[at], deltas = done.level, done.deltas
                counted.late_unrolled += done.unrolled
                if done.emitted.rows:
                    emitted.append(done.emitted)
        counted.rollups = sum(records.rows for records in emitted)
        counted.revisions = sum(int((records.revision > 1).sum()) for records in emitted)
        after = _NextState(RollerState(tuple(levels), newest_us, now.us, closed_at_us), counted)
        return StageOutput(records=tuple(emitted), snapshot=lambda: self._snapshot(after.state), after=after)

    def accept(self, outcome: StageOutput, *, durable: bool) -> None:
        """Adopt the state after a step."""
        after = outcome.after
        assert isinstance(after, _NextState)
        self._state = after.state
        if durable:
            self._durable, self._dropped = after.state, set()
        self.counters.readings += after.counted.readings
        self.counters.rollups += after.counted.rollups
        self.counters.revisions += after.counted.revisions
        self.counters.late_unrolled += after.counted.late_unrolled

    def _should_close(self, levels: list[WindowLevel], now_us: int, before: RollerState) -> bool:
        since_us = now_us - before.closed_at_us
        usual = _BACKLOG_WINDOWS + _BACKLOG_WINDOWS_PER_SERIES * len(before.newest_us)
        full = any(level.windows.rows > min(usual, self._options.max_open) for level in levels)
        return full or since_us < 0 or since_us >= self._options.close_every_s * 1e6

    def _close(
        self, level: WindowLevel, deltas: OpenWindows, newest_us: NDArray[np.int64], now: ClockReading
    ) -> _CloseResult:
        """Close the due windows of one length, after adding `deltas` from the length below."""
        level = level.merged_with(deltas)
        is_due = find_due_windows(level, newest_us, now, self._options)
        if not is_due.any():
            return _CloseResult(level, Rollups.empty(), OpenWindows.none(), 0)
        closing = level.windows.select(is_due)
        emitted, unrolled = self._build_revisions(closing, level)
        closed = level.closed.with_keys(closing.keys, max(_MIN_RUNS, 2 * len(newest_us)))
        level = level._replace(windows=level.windows.select(~is_due), closed=closed)
        return _CloseResult(level, emitted, closing, unrolled)

    def _build_revisions(self, closing: OpenWindows, level: WindowLevel) -> tuple[Rollups, int]:
        """The deltas merged with the stored revisions, and how many lack theirs."""
        again = level.closed.holds(closing.keys)
        first = closing.parts.select(~again)
        parts = [replace(first, revision=np.ones(first.rows, np.int32))]
        unrolled = 0
        if again.any():
            late = closing.parts.select(again)
            prior = self._stored.newest_revisions(late)
            known = np.isin(
                closing.keys[again], window_keys(prior.found.series, prior.found.time_us, level.window_s)
            )
            lost = ~known & (late.time_us < prior.evicted_before_us)
            unrolled = int(lost.sum())
            whole = merge_rollups(Rollups.concat([prior.found, late.select(~lost)]), level.window_s)
            parts.append(replace(whole, revision=whole.revision + np.int32(1)))
        return Rollups.concat(parts).in_order(), unrolled

    def _snapshot(self, after: RollerState) -> Mapping[str, bytes | None]:
        """The keys that changed since they were last written."""
        durable = {} if self._durable is None else {level.window_s: level for level in self._durable.levels}
        changed: dict[str, bytes | None] = dict.fromkeys(self._dropped)
        for level in after.levels:
            before = durable.get(level.window_s)
            if before is None or before.windows is not level.windows or before.closed is not level.closed:
                changed[_level_key(level.window_s)] = pack_windows(level.windows, level.closed)
        changed[_NEWEST_KEY] = pack_times(after.newest_us)
        return changed


def _level_key(window_s: int) -> str:
    return f"roller/{window_s}"


def _unpack_or_discard(packed: bytes, window_s: int) -> tuple[OpenWindows, WindowRuns]:
    try:
        return unpack_windows(packed, window_s)
    except FormatError as fault:
        _log.warning("open windows of %d s are lost; their rollups will lack readings: %s", window_s, fault)
        return OpenWindows.none(), WindowRuns.every()


def _adopt_windows(levels: list[WindowLevel], windows: OpenWindows) -> None:
    """Merge open windows of a removed length into the shortest length that is a multiple of it."""
    for at, level in enumerate(levels if windows.rows else ()):
        if level.window_s % int(windows.parts.window_s[0]) == 0:
            levels[at] = level.merged_with(windows)
            return
