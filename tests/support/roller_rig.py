"""A commit log in memory with a roller after it, that can be killed at any step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.model.records import Readings, Rollups
from gateway.processing.stage import StageInput
from gateway.rollups.roller import Roller
from gateway.spool.segment_reader import StoredRevisions
from tests.support.naive_rollups import Row, readings_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.rollups.open_windows import RollupOptions

START_US = 1_790_000_000_000_000


@dataclass
class MemoryLog:
    """What is durable: readings by commit, rollups, the state, and the progress that belongs to it."""

    commits: list[list[Row]] = field(default_factory=list)
    rollups: list[Rollups] = field(default_factory=list)
    state: dict[str, bytes] = field(default_factory=dict)
    progress: int = 0
    pruned: int = 0
    evicted_before_us: int = -(1 << 62)

    def newest_revisions(self, wanted: Rollups) -> StoredRevisions:
        """Implements the roller's `Stored`."""
        kept = self.rollups[self.pruned :]
        known = newest(kept, int(wanted.window_s[0]))
        named = set(zip(wanted.series.tolist(), wanted.time_us.tolist(), strict=True))
        keys = zip(known.series.tolist(), known.time_us.tolist(), strict=True)
        return StoredRevisions(
            known.select(np.array([key in named for key in keys], np.bool_)), self.evicted_before_us
        )

    def has_rollups(self) -> bool:
        """Implements the roller's `Stored`."""
        return bool(self.rollups)


def newest(rollups: Sequence[Rollups], window_s: int) -> Rollups:
    """The newest revision of each window of a length; a revision must not come twice."""
    if not rollups:
        return Rollups.empty()
    every = Rollups.concat(rollups)
    every = every.select(every.window_s == window_s).in_order()
    if not every.rows:
        return every
    same = (every.series[1:] == every.series[:-1]) & (every.time_us[1:] == every.time_us[:-1])
    assert not (same & (every.revision[1:] == every.revision[:-1])).any(), "a revision twice"
    return every.select(np.append(~same, [True]))


class Rolling:
    """The way of a follower, one step at a time."""

    def __init__(self, terms: RollupOptions, log: MemoryLog | None = None) -> None:
        self.terms = terms
        self.log = log or MemoryLog()
        self.now_us = START_US
        self.trusted = True
        self.restart()

    def restart(self) -> None:
        """As after a kill: only what is durable is left."""
        self.roller = Roller(self.log, self.terms)
        self.roller.restore(dict(self.log.state))
        self.at = self.log.progress

    def commit(self, rows: list[Row]) -> None:
        """Readings become durable."""
        self.log.commits.append(rows)

    def step(self, *, most: int = 1, durable: bool = False, fails: bool = False) -> Rollups:
        """One step over at most so many commits; what it closed. When it fails it has not happened."""
        taken = self.log.commits[self.at : self.at + most]
        readings = Readings.concat([readings_of(rows) for rows in taken]) if taken else Readings.empty()
        outcome = self.roller.step(StageInput(readings, now_us=self.now_us, clock_trusted=self.trusted))
        durable = durable or bool(outcome.records)
        if durable:
            assert outcome.snapshot is not None
            state = outcome.snapshot()
            if fails:
                return Rollups.empty()
            self.log.rollups += [r for r in outcome.records if isinstance(r, Rollups)]
            self.log.state |= {key: value for key, value in state.items() if value is not None}
            for key in [key for key, value in state.items() if value is None]:
                self.log.state.pop(key, None)
            self.log.progress = self.at + len(taken)
        self.roller.accept(outcome, durable=durable)
        self.at += len(taken)
        closed = [r for r in outcome.records if isinstance(r, Rollups)]
        return Rollups.concat(closed) if closed else Rollups.empty()

    def settle(self) -> None:
        """Read what is left, then let time pass until nothing is open any more."""
        while self.at < len(self.log.commits):
            self.step(most=3)
        for _ in range(12):
            self.now_us += 86_400_000_000
            self.step()
