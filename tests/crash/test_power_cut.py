"""The power cut at thousands of moments: the spool opens and holds all that was promised, nothing half.

`TORTURE=n` in the environment multiplies the cuts.
"""

from __future__ import annotations

import os
import random
import sqlite3
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cloud_sync.codec import columns
from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import SEQ_ABSENT, BatchRange, Readings, RecordClass, Series
from gateway.spool.database import Database
from gateway.spool.segments import SegmentWriter, position_span
from gateway.spool.spool import build_spool
from tests.crash.power import DiskVFS, connector, images
from tests.support.open_spool import build_retention

if TYPE_CHECKING:
    from gateway.spool.appender import Appender
    from gateway.spool.compaction import Compaction
    from gateway.spool.deliveries import Deliveries
    from gateway.spool.retention import Retention
    from gateway.spool.series_catalog import SeriesCatalog

TORTURE = int(os.environ.get("TORTURE", "1"))
CUTS = 700
_READING = RecordClass.READING
_BLOCKS = "SELECT block FROM segment WHERE position BETWEEN ? AND ? ORDER BY position"
_SERIES = Series("boiler", "temperature")


@pytest.fixture(scope="module")
def vfs():
    made = DiskVFS()
    yield made
    made.unregister()


@dataclass(frozen=True)
class Promised:
    """What had returned before a cut.

    Attributes:
        groups: readings 0, 1, 2, ... in the groups they were appended in, as (first, stop).
        attempted: the group that was being appended, if any.
        claimed: the open batch.
        settled: batches that were settled.
    """

    groups: tuple[tuple[int, int], ...] = ()
    attempted: tuple[int, int] | None = None
    claimed: BatchRange | None = None
    settled: tuple[BatchRange, ...] = ()


@dataclass
class Site:
    """An open spool with its parts."""

    database: Database
    catalog: SeriesCatalog
    segments: SegmentWriter
    appender: Appender
    deliveries: Deliveries
    compaction: Compaction
    retention: Retention

    @classmethod
    async def opened(cls, path):
        database = await Database.open(path)
        spool = await build_spool(database, "g1")
        return cls(
            database,
            spool.catalog,
            spool.segments,
            spool.appender,
            spool.deliveries,
            spool.compaction,
            build_retention(database, spool.segments, "up"),
        )

    async def append(self, first, stop):
        rows = stop - first
        absent = np.full(rows, np.nan, np.float32)
        time_us = np.arange(first, stop, dtype=np.int64)
        series = np.full(rows, self.catalog.assign_number(_SERIES), np.int32)
        none = np.full(rows, SEQ_ABSENT, np.int64)
        readings = Readings(
            series, time_us, time_us / 8, absent, absent, absent, none, np.zeros(rows, np.int32)
        )
        await self.appender.append(readings, [], now_us=stop)


@dataclass
class Story:
    """A life of a spool on a disk: steps in a seeded order, each noted on the disk as it returns."""

    path: object
    vfs: DiskVFS
    chance: random.Random
    promised: Promised = field(default_factory=Promised)
    epoch: object = None

    async def told(self, steps: int) -> None:
        self.site = await self._opened()
        self.epoch = self.site.database.epoch
        for _ in range(steps):
            names = ("_append", "_claim", "_settle", "_prune", "_compact", "_reopen")
            name = self.chance.choices(names, (10, 3, 3, 1, 1, 1))[0]
            await getattr(self, name)()
            self.vfs.disk.mark(self.promised)
        await self.site.database.close()

    async def _opened(self) -> Site:
        site = await Site.opened(self.path)
        await site.deliveries.register("up", "file", now_us=1)
        return site

    async def _append(self) -> None:
        first = self.promised.groups[-1][1] if self.promised.groups else 0
        group = (first, first + self.chance.choice((1, 1, 2, 5, 30, 3000)))
        self.vfs.disk.mark(replace(self.promised, attempted=group))
        await self.site.append(*group)
        self.promised = replace(self.promised, groups=(*self.promised.groups, group), attempted=None)

    async def _claim(self) -> None:
        claimed = await self.site.deliveries.claim(
            "up", ClaimRequest(now_us=1, max_rows=self.chance.choice((1, 40, 5000)))
        )
        self.promised = replace(self.promised, claimed=claimed)

    async def _settle(self) -> None:
        claimed = self.promised.claimed
        if claimed is not None:
            # what is being settled may be found settled, or open still
            self.vfs.disk.mark(replace(self.promised, claimed=None))
            await self.site.deliveries.settle("up", claimed)
            settled = (*self.promised.settled, claimed)
            self.promised = replace(self.promised, claimed=None, settled=settled)

    async def _prune(self) -> None:
        await self.site.retention.prune_once(1 << 60)

    async def _compact(self) -> None:
        await self.site.compaction.compact_once(everything=True)

    async def _reopen(self) -> None:
        await self.site.database.close()
        self.site = await self._opened()


async def faults_after(path, promised, story: Story) -> str:  # noqa: PLR0911 - one return a kind of fault
    """Open what a cut left and say what is wrong with it; "" when nothing is."""
    site = await Site.opened(path)
    try:
        if promised.groups and site.database.epoch != story.epoch:
            return "another epoch"
        check = await site.database.read(lambda c: c.execute("PRAGMA integrity_check").fetchone()[0])
        if check != "ok":
            return check
        newest = site.segments.newest_commit(_READING)
        if newest < len(promised.groups):
            return f"commit {len(promised.groups)} is gone; the newest is {newest}"
        blocks = await site.database.read(lambda c: c.execute(_BLOCKS, position_span(_READING)).fetchall())
        times = [t for (block,) in blocks for t in columns.decode(block).time_us.tolist()]
        fault = _fault_in_readings(times, promised)
        if fault:
            return fault
        if (
            promised.claimed is not None
            and await site.deliveries.claim("up", ClaimRequest(now_us=2)) != promised.claimed
        ):
            return "an open batch is not handed out again"
        for settled in promised.settled:
            if not await site.database.read(lambda c, s=settled: _is_delivered(c, s)):
                return f"{settled} is not delivered any more"
        await site.append(times[-1] + 1 if times else 10**6, times[-1] + 2 if times else 10**6 + 1)
        return "" if site.segments.newest_commit(_READING) == newest + 1 else "a commit number is wrong"
    finally:
        await site.database.close()


def _fault_in_readings(times: list[int], promised: Promised) -> str:
    there = set(times)
    if len(there) != len(times):
        return "a reading is there twice"
    delivered_commits = {c for s in promised.settled for c in range(s.first_commit, s.last_commit + 1)}
    expected = set()
    for commit, group in enumerate(promised.groups, 1):
        readings = set(range(*group))
        if commit in delivered_commits and not readings & there:
            continue  # pruned
        if not readings <= there:
            return f"commit {commit} lacks {len(readings - there)} of {len(readings)} readings"
        expected |= readings
    more = there - expected
    attempted = set(range(*promised.attempted)) if promised.attempted else set()
    return f"{len(more)} readings from nowhere, or half a group" if more and more != attempted else ""


def _is_delivered(connection, settled: BatchRange) -> bool:
    span = (settled.last_commit, settled.first_commit)
    rows = connection.execute(
        "SELECT first_commit <= ?2 AND last_commit >= ?1 FROM delivered "
        "WHERE destination = 'up' AND first_commit <= ?2 AND last_commit >= ?2",
        span,
    ).fetchall()
    return rows == [(1,)]


async def _cut(tmp_path, vfs, monkeypatch, *, seed: int, cuts: int, replaced=None) -> list[str]:
    """Tell a story, cut it at many moments, and return what was found wrong."""
    monkeypatch.setattr(sqlite3, "connect", connector(vfs, replaced))
    chance = random.Random(seed)
    vfs.disk = type(vfs.disk)()
    story = Story(tmp_path / "spool.db", vfs, chance)
    await story.told(200)
    record = vfs.disk.record
    moments = sorted(chance.randrange(len(record) + 1) for _ in range(cuts))
    found = []
    for number, (files, fact) in enumerate(images(record, moments, chance)):
        vfs.disk = type(vfs.disk)(files)
        try:
            fault = await faults_after(story.path, fact or Promised(), story)
        except Exception as error:  # noqa: BLE001 - whatever stops the spool from opening is a finding
            fault = f"{type(error).__name__}: {error}"
        if fault:
            found.append(f"seed {seed}, cut {number} at {moments[number]}: {fault}")
    return found


@pytest.mark.timeout(120 + 60 * TORTURE)
@pytest.mark.parametrize("seed", range(3))
async def test_nothing_that_returned_is_lost_wherever_the_power_is_cut(tmp_path, vfs, monkeypatch, seed):
    assert await _cut(tmp_path, vfs, monkeypatch, seed=seed, cuts=CUTS * TORTURE) == []


@pytest.mark.parametrize("mode", ["NORMAL", "OFF"])
async def test_a_spool_that_does_not_sync_its_commits_is_caught(tmp_path, vfs, monkeypatch, mode):
    weaker = {"PRAGMA synchronous = FULL": f"PRAGMA synchronous = {mode}"}
    assert await _cut(tmp_path, vfs, monkeypatch, seed=7, cuts=60, replaced=weaker)
