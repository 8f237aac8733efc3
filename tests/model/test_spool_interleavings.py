"""Two steps of the spool at once: one looks, the other writes in between, then the first one writes.

The steps run as tasks of one loop, each with reads and writes of its own, so every step may find between
its look and its write that another one has been at work.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import RecordClass
from gateway.spool.appender import Appender
from gateway.spool.compaction import Compaction
from gateway.spool.deliveries import Deliveries
from gateway.spool.duplicates import DuplicateFilter
from gateway.spool.segments import first_commit_at, position_span
from tests.crash.spools import ROWS, OpenSpool
from tests.support.open_spool import build_retention

if TYPE_CHECKING:
    from gateway.spool.database import Database

COMMITS = 9


def interrupted(database: Database, step, *, nth: int = 1, before: str = "write") -> Any:
    """A database as one step sees it; `step` of somebody else runs before its n-th write or read, or just
    "after" its n-th read, as when a commit ends between the look and what is made of it.
    """
    return _Interrupted(database, step, nth, before)


class _Interrupted:
    def __init__(self, database: Database, step, nth: int, before: str) -> None:
        self._database = database
        self._step = step
        self._before = before
        self._countdown = nth

    def __getattr__(self, name):
        return getattr(self._database, name)

    async def read(self, work):
        await self._count("read")
        result = await self._database.read(work)
        await self._count("after")
        return result

    async def write(self, work):
        await self._count("write")
        return await self._database.write(work)

    async def _count(self, kind: str) -> None:
        if kind == self._before:
            self._countdown -= 1
            if self._countdown == 0:
                await self._step()


@asynccontextmanager
async def _spool(path):
    spool = await OpenSpool.opened(path)
    try:
        for number in range(1, COMMITS + 1):
            await spool.append_commit(number)
        yield spool
    finally:
        await spool.database.close()


async def _covered(spool) -> list[tuple[int, int]]:
    query = "SELECT position, last_commit FROM segment WHERE position BETWEEN ? AND ? ORDER BY 1"
    rows = await spool.database.read(
        lambda c: c.execute(query, position_span(RecordClass.READING)).fetchall()
    )
    return [(first_commit_at(position), last) for position, last in rows]


def _deliveries(spool, database: Any) -> Deliveries:
    return Deliveries(database, spool.segments, spool.catalog, "g1")


async def _compact_everything(spool) -> None:
    await spool.compaction.compact_once(everything=True)


async def test_a_batch_that_is_claimed_while_segments_are_merged_holds_exactly_its_commits(tmp_path):
    async with _spool(tmp_path / "spool.db") as spool:
        seen = interrupted(spool.database, lambda: _compact_everything(spool))
        claimed = await _deliveries(spool, seen).claim("up", ClaimRequest(now_us=1, max_rows=3 * ROWS))
        assert claimed is not None
        batch = await spool.deliveries.read_batch(claimed)
        assert batch is not None
        commits = claimed.last_commit - claimed.first_commit + 1
        assert batch.rows == commits * ROWS
        await spool.deliveries.settle("up", claimed)
        rest = await spool.drained()
        assert len(rest) == (COMMITS - commits) * ROWS


@pytest.mark.parametrize("nth", [1, 2])
async def test_segments_that_are_claimed_while_they_are_merged_are_not_merged(tmp_path, nth):
    async with _spool(tmp_path / "spool.db") as spool:
        claims = []

        async def claim():
            claims.append(await spool.deliveries.claim("up", ClaimRequest(now_us=1, max_rows=3 * ROWS)))

        seen = interrupted(spool.database, claim, nth=nth)
        duplicates = await DuplicateFilter.open(spool.database, spool.catalog)
        await Compaction(seen, spool.catalog, duplicates).compact_once(everything=True)
        for claimed in claims:
            batch = await spool.deliveries.read_batch(claimed)
            assert batch.rows == (claimed.last_commit - claimed.first_commit + 1) * ROWS
            await spool.deliveries.settle("up", claimed)
        rest = await spool.drained()
        assert len(rest) + sum((c.last_commit - c.first_commit + 1) * ROWS for c in claims) == COMMITS * ROWS


async def test_a_prune_that_finds_its_segments_merged_takes_nothing_that_is_needed(tmp_path):
    async with _spool(tmp_path / "spool.db") as spool:
        for _ in range(2):
            claimed = await spool.deliveries.claim("up", ClaimRequest(now_us=1, max_rows=2 * ROWS))
            await spool.deliveries.settle("up", claimed)
        seen = interrupted(spool.database, lambda: _compact_everything(spool))
        await build_retention(seen, spool.segments, "up").prune_once(1 << 60)
        assert len(await spool.drained()) == (COMMITS - 4) * ROWS
        await build_retention(spool.database, spool.segments, "up").prune_once(1 << 60)
        assert await _covered(spool) == []


@pytest.mark.parametrize(("before", "nth"), [("write", 1), ("read", 2), ("read", 3)])
async def test_a_merge_that_finds_its_segments_pruned_does_not_bring_them_back(tmp_path, before, nth):
    async with _spool(tmp_path / "spool.db") as spool:
        await spool.drained()
        prune = build_retention(spool.database, spool.segments, "up")
        seen = interrupted(spool.database, lambda: prune.prune_once(1 << 60), nth=nth, before=before)
        duplicates = await DuplicateFilter.open(spool.database, spool.catalog)
        await Compaction(seen, spool.catalog, duplicates).compact_once(everything=True)
        assert await _covered(spool) == []


async def test_a_damaged_segment_is_set_aside_once_by_two_destinations_at_a_time(tmp_path):
    async with _spool(tmp_path / "spool.db") as spool:
        position = position_span(RecordClass.READING, 1)[0]
        spoil = "UPDATE segment SET block = x'00' WHERE position = ?"
        await spool.database.write(lambda c: c.execute(spoil, (position,)))
        claimed = await spool.deliveries.claim("up", ClaimRequest(now_us=1))

        async def load():
            await spool.deliveries.read_batch(claimed)

        batch = await _deliveries(spool, interrupted(spool.database, load)).read_batch(claimed)
        assert batch is not None
        assert batch.rows == (COMMITS - 1) * ROWS
        count = await spool.database.read(lambda c: c.execute("SELECT count(*) FROM damaged").fetchone()[0])
        assert count == 1


async def test_a_reading_sent_again_while_segments_are_merged_is_stored_once(tmp_path):
    async with _spool(tmp_path / "spool.db") as spool:
        armed = False
        merged = []

        async def merge():
            if armed:
                merged.append(await compaction.compact_once(everything=True))

        reads = COMMITS + 2  # the marks, the keys of every fresh segment, then the look for indexed ones
        duplicates = await DuplicateFilter.open(
            interrupted(spool.database, merge, nth=reads, before="after"), spool.catalog
        )
        compaction = Compaction(spool.database, spool.catalog, duplicates)
        spool.appender = Appender(spool.database, spool.segments, duplicates, spool.catalog)
        armed = True
        await spool.append_commit(COMMITS // 2)
        assert merged, "the look has moved; let the merge come just after it"
        assert spool.newest == COMMITS
