"""The spool against a naive model of it: lists and dictionaries, two destinations, any order of steps.

`TORTURE=n` in the environment tries n times as many, at random.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import SEQ_ABSENT, Readings, RecordClass, Series
from gateway.spool.database import Database
from gateway.spool.segments import AppendResult, first_commit_at, position_span
from gateway.spool.spool import build_spool
from tests.support.open_spool import build_retention

if TYPE_CHECKING:
    from uuid import UUID

TORTURE = int(os.environ.get("TORTURE", "1"))
_READING = RecordClass.READING
_DESTINATIONS = ("cloud", "region")
_SERIES = [
    Series("boiler", "temperature"),
    Series("boiler", "temperature", (("location", "roof"),)),
    Series("boiler", "pressure"),
    Series("attic", "temperature"),
]
_READING_STRATEGY = st.tuples(
    st.integers(0, len(_SERIES) - 1), st.integers(0, 40), st.sampled_from((0.0, 1.5))
)
destinations = st.sampled_from(_DESTINATIONS)


def _key(series_number: int, time_us: int) -> tuple[str, str, int]:
    """What a reading is known by: attributes are no part of it."""
    return (*_SERIES[series_number][:2], time_us)


class SpoolMachine(RuleBasedStateMachine):
    """The model: `commits[n]` is what commit n stored; `live` are those not pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="tidegate-model-"))
        self.copies = 0
        self.commits: list[list[tuple[Series, int, float]]] = [[]]
        self.live: list[int] = []
        self.known: dict[tuple[str, str, int], float] = {}
        self.pruned: set[tuple[str, str, int]] = set()
        self.delivered: dict[str, set[int]] = {name: set() for name in _DESTINATIONS}
        self.open: dict[str, list[tuple[int, int]]] = {name: [] for name in _DESTINATIONS}
        self.epoch: UUID | None = None

    def _run(self, awaitable):
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 20))

    @initialize()
    def begin(self) -> None:
        self.path = self.folder / "spool.db"
        self._open()

    def teardown(self) -> None:
        self._run(self.database.close())
        self.loop.close()
        shutil.rmtree(self.folder)

    # --- steps

    @rule(rows=st.lists(_READING_STRATEGY, min_size=1, max_size=12))
    def append(self, rows) -> None:
        rows = [row for row in rows if _key(*row[:2]) not in self.pruned]
        if not rows:
            return
        new, duplicates, conflicts = [], 0, 0
        for series, time_us, value in rows:
            key = _key(series, time_us)
            if key not in self.known:
                self.known[key] = value
                new.append((_SERIES[series], time_us, value))
            elif self.known[key] == value:
                duplicates += 1
            else:
                conflicts += 1
        appended = self._run(self.appender.append(self._readings(rows), [], now_us=1000 + len(self.commits)))
        assert appended == AppendResult(len(new), duplicates, conflicts)
        if new:
            self.commits.append(new)
            self.live.append(len(self.commits) - 1)

    @rule(name=destinations, max_rows=st.sampled_from((1, 10, 1000)))
    def claim(self, name, max_rows) -> None:
        claimed = self._run(self.deliveries.claim(name, ClaimRequest(now_us=1, max_rows=max_rows)))
        wanted = [c for c in self.live if c not in self.delivered[name]]
        if self.open[name]:
            assert (claimed.first_commit, claimed.last_commit) == self.open[name][0], (
                "an open batch comes first, and unchanged"
            )
        elif not wanted:
            assert claimed is None
        else:
            assert claimed.epoch == self.epoch
            first, last = claimed.first_commit, claimed.last_commit
            assert first == wanted[0]
            assert set(range(first, last + 1)) <= set(wanted), "what is delivered is not claimed again"
            starts = [s for s in self._segments() if first <= s <= last]
            assert sum(len(self.commits[c]) for c in range(first, last + 1)) <= max_rows or len(starts) == 1
            self.open[name].append((first, last))

    @precondition(lambda self: any(self.open.values()))
    @rule(name=destinations)
    def load(self, name) -> None:
        if not self.open[name]:
            return
        claimed = self._run(self.deliveries.claim(name, ClaimRequest(now_us=1)))
        batch = self._run(self.deliveries.read_batch(claimed))
        expected = [
            row
            for commit in range(claimed.first_commit, claimed.last_commit + 1)
            if commit in self.live
            for row in self.commits[commit]
        ]
        if not expected:
            assert batch is None, "all of it was pruned"
            return
        readings = batch.readings
        assert batch.range == claimed
        assert list(batch.series) == sorted(set(batch.series))
        named = [batch.series[number] for number in readings.series]
        rows = list(zip(named, readings.time_us.tolist(), readings.value.tolist(), strict=True))
        assert rows == sorted(expected)

    @precondition(lambda self: any(self.open.values()))
    @rule(name=destinations)
    def settle(self, name) -> None:
        if not self.open[name]:
            return
        first, last = self.open[name].pop(0)
        claimed = self._run(self.deliveries.claim(name, ClaimRequest(now_us=1)))
        assert (claimed.first_commit, claimed.last_commit) == (first, last)
        self._run(self.deliveries.settle(name, claimed))
        self.delivered[name] |= set(range(first, last + 1))

    @precondition(lambda self: any(self.open.values()))
    @rule(name=destinations)
    def split(self, name) -> None:
        if not self.open[name]:
            return
        first, last = self.open[name][0]
        claimed = self._run(self.deliveries.claim(name, ClaimRequest(now_us=1)))
        starts = [s for s in self._segments() if first <= s <= last]
        halved = self._run(self.deliveries.split_segments(name, claimed))
        assert halved == (len(starts) > 1)
        if halved:
            half = self._run(self.deliveries.claim(name, ClaimRequest(now_us=1)))
            assert half.first_commit == first
            assert first <= half.last_commit < last
            self.open[name][:1] = [(first, half.last_commit), (half.last_commit + 1, last)]

    @rule(configured=st.sampled_from((_DESTINATIONS, _DESTINATIONS, ("cloud",), ("region",))))
    def prune(self, configured) -> None:
        retention = build_retention(self.database, self.segments, *configured)
        self._run(retention.prune_once(1 << 60))
        prefix = list(takewhile(lambda c: all(c in self.delivered[n] for n in configured), self.live))
        whole = self._covered()
        left = [c for c in self.live if c in whole]
        gone = set(self.live) - set(left)
        assert gone <= set(prefix), "what was pruned had been delivered everywhere"
        if left and left[0] in prefix:  # only as a part of a segment that is needed still
            ends = [s for s in self._segments() if s > left[0]] or [len(self.commits)]
            assert not set(range(left[0], ends[0])) <= set(prefix), "delivered everywhere and kept"
        self.live = left
        for commit in gone:
            for series, time_us, _ in self.commits[commit]:
                key = (series.sensor_id, series.sensor_type, time_us)
                self.pruned.add(key)

    @rule()
    def compact(self) -> None:
        self._run(self.compaction.compact_once(everything=True))

    @rule()
    def reopen(self) -> None:
        self._run(self.database.close())
        self._open()

    @rule()
    def crash(self) -> None:
        """Go on with a copy of the files as they lie there, as after a kill."""
        self.copies += 1
        copy = self.folder / f"copy{self.copies}" / "spool.db"
        copy.parent.mkdir()
        for suffix in ("", "-wal"):
            source = self.path.with_name(self.path.name + suffix)
            if source.exists():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        self._run(self.database.close())
        self.path = copy
        self._open()

    # --- invariants

    @invariant()
    def counts_agree(self) -> None:
        assert self.segments.newest_commit(_READING) == len(self.commits) - 1
        assert self.segments.rows_ever(_READING) == sum(map(len, self.commits))
        assert self._covered() == set(self.live), "commits are covered once, without gaps"

    @invariant()
    def the_backlog_is_what_is_not_delivered(self) -> None:
        for name in _DESTINATIONS:
            lacking = [c for c in self.live if c not in self.delivered[name]]
            backlog = self._run(self.deliveries.backlog(name))
            assert backlog.readings == sum(len(self.commits[c]) for c in lacking)
            assert (backlog.oldest_written_at_us is None) == (not lacking)

    @invariant()
    def delivered_ranges_are_merged(self) -> None:
        for name in _DESTINATIONS:
            rows = self._rows(
                "SELECT first_commit, last_commit FROM delivered WHERE destination = ? ORDER BY 1", (name,)
            )
            assert all(last + 1 < first for (_, last), (first, _) in pairwise(rows))
            commits = {c for first, last in rows for c in range(first, last + 1)}
            assert commits == self.delivered[name]

    # --- the spool

    def _open(self) -> None:
        self._run(self._opened())
        assert self.epoch in (None, self.database.epoch)
        self.epoch = self.database.epoch

    async def _opened(self) -> None:
        self.database = await Database.open(self.path)
        spool = await build_spool(self.database, "g1")
        self.catalog, self.segments, self.appender = spool.catalog, spool.segments, spool.appender
        self.compaction, self.deliveries = spool.compaction, spool.deliveries
        for name in _DESTINATIONS:
            await self.deliveries.register(name, "file", now_us=1)

    def _readings(self, rows) -> Readings:
        count = len(rows)
        absent = np.full(count, np.nan, np.float32)
        numbers = [self.catalog.assign_number(_SERIES[series]) for series, _, _ in rows]
        return Readings(
            np.array(numbers, np.int32),
            np.array([time_us for _, time_us, _ in rows], np.int64),
            np.array([value for _, _, value in rows], np.float64),
            absent,
            absent,
            absent,
            np.full(count, SEQ_ABSENT, np.int64),
            np.zeros(count, np.int32),
        )

    def _rows(self, statement: str, parameters=()) -> list[tuple]:
        return self._run(self.database.read(lambda c: c.execute(statement, parameters).fetchall()))

    def _segments(self) -> list[int]:
        """First commits of the segments in the file."""
        query = "SELECT position FROM segment WHERE position BETWEEN ? AND ? ORDER BY 1"
        return [first_commit_at(position) for (position,) in self._rows(query, position_span(_READING))]

    def _covered(self) -> set[int]:
        """The commits of the segments in the file; none twice."""
        query = "SELECT position, last_commit FROM segment WHERE position BETWEEN ? AND ? ORDER BY 1"
        commits = [
            commit
            for position, last in self._rows(query, position_span(_READING))
            for commit in range(first_commit_at(position), last + 1)
        ]
        assert len(commits) == len(set(commits))
        return set(commits)


@pytest.mark.timeout(120 + 60 * TORTURE)
def test_the_spool_does_what_a_naive_model_of_it_does():
    run_state_machine_as_test(
        SpoolMachine,
        settings=settings(
            max_examples=60 * TORTURE,
            stateful_step_count=40,
            deadline=None,
            derandomize=TORTURE == 1,
            # to shrink takes minutes; the steps of one failure fit on a page
            phases=(Phase.explicit, Phase.generate),
            suppress_health_check=list(HealthCheck),
        ),
    )
