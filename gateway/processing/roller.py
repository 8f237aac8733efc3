"""The roller: readings in commit order to rollups with revisions. A stage of processing.

Readings become summaries of the shortest windows; what is closed of one length goes up to the next. So each
reading is counted once at every length, whatever the order of arrival: what comes for a window that was
closed before is merged into the revision that is stored, and goes out as the next one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cloud_sync.errors import FormatError
from cloud_sync.summaries import Rollups
from gateway.processing.closing import Instant, Level, RollTerms, due, newest_after
from gateway.processing.open_windows import OpenWindows, pack, pack_times, unpack, unpack_times
from gateway.processing.rollup import merged, summarise
from gateway.processing.steps import Outcome, Step
from gateway.processing.windows import Runs, keys_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from gateway.spool.stored_rollups import Prior

_log = logging.getLogger(__name__)
_NEWEST = "roller/newest"
_RUNS_AT_LEAST = 50_000
_OPEN_AT_LEAST, _OPEN_A_SERIES = 5_000, 3
"""More open windows than this are a backlog that is read fast: they are closed as they come."""


class Stored(Protocol):
    """Where closed windows are kept: the spool."""

    def newest_revisions(self, wanted: Rollups) -> Prior:
        """The newest stored revision of each window that `wanted`, of one length, names.

        Called in an executor thread.
        """
        ...

    def ever(self) -> bool:
        """Whether any window was ever closed."""
        ...


@dataclass(frozen=True, slots=True)
class RollState:
    """All that the roller knows; never changed, only replaced."""

    levels: tuple[Level, ...]
    newest_us: NDArray[np.int64]
    now_us: int = 0
    closed_at_us: int = 0


@dataclass(slots=True)
class RollerCounters:
    """What has happened since start."""

    readings: int = 0
    rollups: int = 0
    revisions: int = 0
    late_unrolled: int = 0


class _Closed(NamedTuple):
    """What closing one length gave."""

    level: Level
    emitted: Rollups
    deltas: OpenWindows
    unrolled: int


@dataclass(slots=True)
class _After:
    """The state that an outcome leads to, and how much of it its snapshot has written."""

    state: RollState
    counted: RollerCounters
    written: bool = False


class Roller:
    """Implements `Stage`."""

    name = "roller"

    def __init__(self, stored: Stored, terms: RollTerms = RollTerms()) -> None:  # noqa: B008 - an immutable value
        self._stored = stored
        self._terms = terms
        self._state = RollState(
            tuple(Level(window_s, OpenWindows.none(), Runs.none()) for window_s in terms.windows_s),
            np.empty(0, np.int64),
        )
        self._durable: RollState | None = None
        self._dropped: frozenset[str] = frozenset()
        self.counters = RollerCounters()

    @property
    def open_windows(self) -> int:
        """Windows that have something to be sent on."""
        return sum(level.windows.rows for level in self._state.levels)

    def load(self, state: Mapping[str, bytes]) -> None:
        """Take up the durable state. What cannot be read of it is assumed to have been closed already."""
        self._durable = None
        self._dropped = frozenset()
        fresh = not state and not self._stored.ever()
        known = {_key(window_s): window_s for window_s in self._terms.windows_s}
        levels = []
        orphans: list[OpenWindows] = []
        for key, window_s in known.items():
            windows, closed = OpenWindows.none(), Runs.none() if fresh else Runs.every()
            if key in state:
                windows, closed = _unpacked(state[key], window_s)
            levels.append(Level(window_s, windows, closed))
        for key in sorted(state.keys() - known.keys() - {_NEWEST}):
            self._dropped |= {key}
            length = key.removeprefix("roller/")
            if length.isdecimal():
                windows, _ = _unpacked(state[key], int(length))
                orphans.append(windows)
        newest_us = np.empty(0, np.int64)
        if _NEWEST in state:
            try:
                newest_us = unpack_times(state[_NEWEST])
            except FormatError as fault:
                _log.warning("the newest times of series are found anew: %s", fault)
        self._state = RollState(_adopted(tuple(levels), orphans), newest_us)

    def retune(self, terms: RollTerms) -> None:
        """Go on by other terms, between two steps; windows that are closed stay closed.

        Args:
            terms: with the lengths of windows that it has.
        """
        if terms.windows_s != self._terms.windows_s:
            raise ValueError("the lengths of windows cannot be changed while some are open")
        self._terms = terms

    def step(self, step: Step) -> Outcome:
        """Roll up the readings of a step, and close what is due."""
        before, now = self._state, Instant(step.now_us, step.clock_trusted)
        levels = list(before.levels)
        if now.us < before.now_us:
            levels = [level._replace(windows=level.windows.not_after(now.us)) for level in levels]
        shortest = levels[0]
        parts = summarise(step.readings, shortest.window_s)
        levels[0] = shortest._replace(
            windows=shortest.windows.with_more(
                OpenWindows.of(parts, shortest.window_s, now.us), shortest.window_s
            )
        )
        newest_us = newest_after(before.newest_us, step.readings, now)
        newest_us = _covering(newest_us, levels)
        counted = RollerCounters(readings=step.readings.rows)
        emitted: list[Rollups] = []
        closed_at_us = before.closed_at_us
        if self._is_time(levels, now.us, before):
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
        after = _After(RollState(tuple(levels), newest_us, now.us, closed_at_us), counted)
        return Outcome(records=tuple(emitted), snapshot=lambda: self._snapshot(after), after=after)

    def accept(self, outcome: Outcome) -> None:
        """Take over what a step has come to."""
        after = outcome.after
        assert isinstance(after, _After)
        self._state = after.state
        if after.written:
            self._durable, self._dropped = after.state, frozenset()
        self.counters.readings += after.counted.readings
        self.counters.rollups += after.counted.rollups
        self.counters.revisions += after.counted.revisions
        self.counters.late_unrolled += after.counted.late_unrolled

    def _is_time(self, levels: list[Level], now_us: int, before: RollState) -> bool:
        since_us = now_us - before.closed_at_us
        usual = _OPEN_AT_LEAST + _OPEN_A_SERIES * len(before.newest_us)
        full = any(level.windows.rows > min(usual, self._terms.max_open) for level in levels)
        return full or since_us < 0 or since_us >= self._terms.close_every_s * 1e6

    def _close(
        self, level: Level, deltas: OpenWindows, newest_us: NDArray[np.int64], now: Instant
    ) -> _Closed:
        """Close what is due of one length, after `deltas` from the length below."""
        windows = level.windows.with_more(deltas, level.window_s)
        is_due = due(level._replace(windows=windows), newest_us, now, self._terms)
        if not is_due.any():
            return _Closed(level._replace(windows=windows), Rollups.none(), OpenWindows.none(), 0)
        closing = windows.take(is_due)
        emitted, unrolled = self._revised(closing, level)
        max_runs = max(_RUNS_AT_LEAST, 2 * len(newest_us))
        after = Level(level.window_s, windows.take(~is_due), level.closed.with_keys(closing.keys, max_runs))
        return _Closed(after, emitted, closing, unrolled)

    def _revised(self, closing: OpenWindows, level: Level) -> tuple[Rollups, int]:
        """Deltas with what is stored of their windows, and how many cannot be completed."""
        again = level.closed.holds(closing.keys)
        first = closing.parts.take(~again)
        parts = [_with_revision(first, np.ones(first.rows, np.int32))]
        unrolled = 0
        if again.any():
            late = closing.parts.take(again)
            prior = self._stored.newest_revisions(late)
            known = np.isin(
                closing.keys[again], keys_of(prior.found.series, prior.found.time_us, level.window_s)
            )
            lost = ~known & (late.time_us < prior.gone_before_us)
            unrolled = int(lost.sum())
            whole = merged(Rollups.concat([prior.found, late.take(~lost)]), level.window_s)
            parts.append(_with_revision(whole, whole.revision + np.int32(1)))
        return Rollups.concat(parts).in_order(), unrolled

    def _snapshot(self, after: _After) -> Mapping[str, bytes | None]:
        """The keys of the state that have changed since they were last written."""
        durable = {} if self._durable is None else {level.window_s: level for level in self._durable.levels}
        given: dict[str, bytes | None] = dict.fromkeys(self._dropped)
        for level in after.state.levels:
            kept = durable.get(level.window_s)
            if kept is None or kept.windows is not level.windows or kept.closed is not level.closed:
                given[_key(level.window_s)] = pack(level.windows, level.closed)
        given[_NEWEST] = pack_times(after.state.newest_us)
        after.written = True
        return given


def _key(window_s: int) -> str:
    return f"roller/{window_s}"


def _unpacked(packed: bytes, window_s: int) -> tuple[OpenWindows, Runs]:
    try:
        return unpack(packed, window_s)
    except FormatError as fault:
        _log.warning("open windows of %d s are lost; their rollups will lack readings: %s", window_s, fault)
        return OpenWindows.none(), Runs.every()


def _adopted(levels: tuple[Level, ...], orphans: list[OpenWindows]) -> tuple[Level, ...]:
    """Deltas of a length that is no longer asked for go to the shortest one that holds its windows whole."""
    adopted = list(levels)
    for windows in orphans:
        if not windows.rows:
            continue
        length = int(windows.parts.window_s[0])
        for at, level in enumerate(adopted):
            if level.window_s % length == 0:
                adopted[at] = level._replace(windows=level.windows.with_more(windows, level.window_s))
                break
    return tuple(adopted)


def _covering(newest_us: NDArray[np.int64], levels: list[Level]) -> NDArray[np.int64]:
    """The newest times, with room for every series that has an open window."""
    series = [int(level.windows.parts.series[-1]) for level in levels if level.windows.rows]
    largest = max(series, default=-1)
    room = largest + 1 - len(newest_us)
    if room <= 0:
        return newest_us
    return np.concatenate([newest_us, np.full(room, np.iinfo(np.int64).min)])


def _with_revision(rollups: Rollups, revision: NDArray[np.int32]) -> Rollups:
    given = {name: getattr(rollups, name) for name in rollups.columns}
    return Rollups(**given | {"revision": revision.astype(np.int32)})
