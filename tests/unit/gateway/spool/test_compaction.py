from __future__ import annotations

from cloud_sync.delivery.lanes import ClaimRequest
from gateway.spool.compaction import MergeBounds, group_mergeable_runs
from gateway.spool.delivery_ranges import CommitRange, find_gaps, merge_ranges
from gateway.spool.segments import MAX_SEGMENT_ROWS, StoredSegment
from tests.support.open_spool import NOW_US, open_spool


def segment(commit: int, rows: int = 10, last: int | None = None) -> StoredSegment:
    return StoredSegment(4 << 56 | commit, last or commit, rows, 0, 0, 1, 0)


def commits(runs: list[list[StoredSegment]]) -> list[list[int]]:
    return [[s.first_commit for s in run] for run in runs]


def test_runs_end_where_a_destinations_progress_does():
    bounds = MergeBounds(frozenset({1, 4}), ())
    assert commits(group_mergeable_runs([segment(i) for i in range(1, 7)], bounds)) == [[1, 2, 3], [4, 5, 6]]


def test_segments_of_an_open_batch_are_left_as_they_are():
    bounds = MergeBounds(frozenset({3, 5}), (CommitRange(3, 4),))
    assert commits(group_mergeable_runs([segment(i) for i in range(1, 7)], bounds)) == [
        [1, 2],
        [3],
        [4],
        [5, 6],
    ]


def test_runs_do_not_bridge_missing_commits_or_grow_past_the_limit():
    bounds = MergeBounds(frozenset(), ())
    assert commits(group_mergeable_runs([segment(1), segment(2), segment(4)], bounds)) == [[1, 2], [4]]
    half = MAX_SEGMENT_ROWS // 2
    assert commits(group_mergeable_runs([segment(i, half) for i in range(1, 4)], bounds)) == [[1, 2], [3]]


def test_ranges_merge_and_leave_gaps():
    assert merge_ranges([(5, 6), (1, 2), (3, 3), (9, 9)]) == [(1, 3), (5, 6), (9, 9)]
    assert list(find_gaps([CommitRange(1, 3), CommitRange(5, 6)], 1, 10)) == [(4, 4), (7, 10)]
    assert list(find_gaps([], 1, 0)) == []


async def test_compaction_changes_nothing_that_can_be_read(tmp_path):
    rows = [(f"s{i % 3}", i, float(i)) for i in range(2000)]
    async with open_spool(tmp_path / "spool.db") as spool:
        for start in range(0, 2000, 5):
            await spool.append(rows[start : start + 5])
        await spool.deliveries.register("region", "ingest", now_us=NOW_US)
        claimed = await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US, max_rows=400))
        assert claimed is not None
        before = await spool.deliveries.read_batch(claimed)
        await spool.deliveries.settle("region", claimed)
        open_batch = await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US, max_rows=400))
        assert open_batch is not None
        assert await spool.compaction.compact_once(everything=True) > 200
        again = await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US, max_rows=999_999))
        assert again == open_batch, "an open batch is handed out unchanged"
        assert (await spool.deliveries.read_batch(claimed)) is not None
        assert before is not None
        batch = await spool.deliveries.read_batch(again)
        assert batch is not None
        assert batch.rows == 400
        assert await spool.deliveries.split_segments("region", again), "its segments are still apart"
        backlog = await spool.deliveries.backlog("region")
        assert backlog.readings == 1600
        assert await spool.contents() == sorted(rows)


async def test_small_merged_segments_are_merged_again(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        for i in range(60):
            await spool.append([("a", i * 10 + k, 0.0) for k in range(10)])
            if i % 6 == 5:
                await spool.compaction.compact_once(everything=True)
        count = await spool.database.read(lambda c: c.execute("SELECT count(*) FROM segment").fetchone()[0])
        assert count == 1


async def test_the_file_shrinks_when_segments_are_merged(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        for i in range(600):
            await spool.append([("a", i * 50 + k, float(k)) for k in range(50)])
        before = sum(await spool.database.used_and_spare_bytes())
        await spool.compaction.compact_once(everything=True)
        _, spare = await spool.database.used_and_spare_bytes()
        assert spare == 0
    assert path.stat().st_size < before / 3
