"""Lanes against a naive model: any order of appends, answers, lost answers and crashes: effectively once."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cloud_sync.delivery.batch_sender import BatchSender
from cloud_sync.delivery.lanes import Lane
from cloud_sync.model.errors import RetryLaterError, StoreError
from gateway.spool.delivery_ranges import LIVE_MAX_LAG_US
from tests.support.memory_region import LOST, MemoryRegion
from tests.support.open_spool import NOW_US, OpenSpool, build_retention, open_spool
from tests.support.shipping import build_state

if TYPE_CHECKING:
    from gateway.spool.deliveries import Deliveries

LANES = st.sampled_from((Lane.LIVE, Lane.BACKFILL))
NAMES = st.sampled_from(("one", "two"))


class LanesMachine(RuleBasedStateMachine):
    """`truth` is what was appended, in order of commits; each region counts what it has applied."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp(prefix="tidegate-lanes-"))
        self.path = self.folder / "spool.db"
        self.copies = 0
        self.now_us = NOW_US
        self.commits: list[tuple[int, list]] = []
        self.bad: set = set()
        self.regions = {
            name: MemoryRegion(name, is_bad=lambda row: row in self.bad) for name in ("one", "two")
        }
        self.regions["two"].tells_rows = True

    @initialize()
    def begin(self) -> None:
        self._open()

    def teardown(self) -> None:
        try:
            self._drain()
        finally:
            self._run(self.context.__aexit__(None, None, None))
            self.loop.close()
            shutil.rmtree(self.folder)

    # --- steps

    @rule(rows=st.integers(1, 9), seconds=st.sampled_from((0.1, 0.5, 3.0)), bad=st.integers(0, 12))
    def append(self, rows, seconds, bad) -> None:
        self.now_us += round(seconds * 1e6)
        number = len(self.commits)
        made = [(f"s{n % 2}", number * 100 + n, float(n)) for n in range(rows)]
        if bad < rows:
            self.bad.add(made[bad])
        self._run(self.spool.appender.append(self.spool.readings(made), [], now_us=self.now_us))
        self.commits.append((self.now_us, made))

    @rule(name=NAMES, lane=LANES, outcome=st.sampled_from((None, None, LOST, RetryLaterError("down"))))
    def ship(self, name, lane, outcome) -> None:
        region = self.regions[name]
        region.outcomes.clear()
        region.outcomes.append(outcome)
        error = self._run(self.senders[name, lane].send_once()).error
        assert not isinstance(error, StoreError), error

    @rule(name=NAMES, most=st.sampled_from((3, 10**9)))
    def change_what_is_taken(self, name, most) -> None:
        self.regions[name].most_rows = most

    @rule()
    def compact(self) -> None:
        self._run(self.spool.compaction.compact_once(everything=True))

    @rule()
    def prune(self) -> None:
        self._run(build_retention(self.spool.database, self.spool.segments, "one", "two").prune_once(1 << 60))

    @rule()
    def crash(self) -> None:
        """Go on with a copy of the files as they lie there, as after a kill."""
        self.copies += 1
        copy = self.folder / f"copy{self.copies}.db"
        for suffix in ("", "-wal"):
            source = self.path.with_name(self.path.name + suffix)
            if source.exists():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        self._run(self.context.__aexit__(None, None, None))
        self.path = copy
        self._open()

    # --- what holds

    @invariant()
    def nothing_is_applied_twice_and_nothing_that_never_was(self) -> None:
        known = {row for _, rows in self.commits for row in rows} - self.bad
        for region in self.regions.values():
            assert set(region.applied.values()) <= {1}
            assert set(region.applied) <= known

    @rule(name=NAMES)
    def live_is_never_far_behind_once_it_was_sent(self, name) -> None:
        """Two live batches that are taken, and what was committed last is there."""
        region = self.regions[name]
        if not self.commits or region.most_rows < 100:
            return
        region.outcomes.clear()
        for _ in range(40):
            if not self._send(name, Lane.LIVE):
                break
        newest_us, rows = self.commits[-1]
        if set(rows) & self.bad:
            return  # halves of a refused batch are finished by the other lane
        assert newest_us == self.now_us
        recent = [row for at, rows in self.commits if newest_us - at <= LIVE_MAX_LAG_US // 4 for row in rows]
        missing = set(recent) - set(region.applied) - self.bad
        assert not set(rows) & missing

    def _send(self, name: str, lane: Lane) -> bool:
        result = self._run(self.senders[name, lane].send_once())
        if result.error is not None:
            raise result.error
        return result.claimed is not None

    def _drain(self) -> None:
        for name, region in self.regions.items():
            region.outcomes.clear()
            region.most_rows = 10**9
            for _ in range(3000):
                sent = [self._send(name, lane) for lane in (Lane.LIVE, Lane.BACKFILL)]
                if not any(sent):
                    break
            good = {row for _, rows in self.commits for row in rows} - self.bad
            assert set(region.applied) == good, "everything good is there"
            epoch = self.spool.database.epoch
            complete = {c for first, last in region.commits(epoch) for c in range(first, last + 1)}
            assert complete == set(range(1, len(self.commits) + 1)), "the ledger has no hole"
            assert self._run(self.spool.deliveries.backlog(name)).readings == 0

    # --- the spool

    def _run(self, awaitable):
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, 20))

    def _open(self) -> None:
        self.context = open_spool(self.path)
        self.spool: OpenSpool = self._run(self.context.__aenter__())
        deliveries: Deliveries = self.spool.deliveries
        self.senders = {}
        for name, region in self.regions.items():
            self._run(deliveries.register(name, "ingest", now_us=1))
            delivery_state = build_state(
                deliveries, region, keeps_ledger=True, max_batch_rows=20, chance=lambda: 0.0
            )
            for lane in (Lane.LIVE, Lane.BACKFILL):
                self.senders[name, lane] = BatchSender(delivery_state, [lane])


def test_lanes_deliver_every_commit_once_whatever_happens():
    run_state_machine_as_test(
        LanesMachine,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
