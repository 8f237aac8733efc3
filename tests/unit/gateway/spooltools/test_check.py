from __future__ import annotations

import sqlite3
from contextlib import closing

import numpy as np
import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import RecordClass
from gateway.spool.errors import SpoolAccessError, SpoolTooNewError
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spool.segments import segment_position
from gateway.spooltools.checker import check_spool
from tests.support.open_spool import NOW_US, build_retention, open_spool


def at(commit: int) -> int:
    return segment_position(RecordClass.READING, commit)


async def made(path) -> None:
    """Ten commits of ten readings, 1..4 delivered to `region`, 5..6 on their way."""
    async with open_spool(path) as spool:
        for start in range(0, 100, 10):
            await spool.append([(f"s{i % 3}", i, float(i)) for i in range(start, start + 10)])
        item = QuarantineItem.from_payload(
            received_at_us=NOW_US, source="listen", topic="a", reason="r", detail="d", payload=b"abc"
        )
        await spool.appender.append(None, [item], now_us=NOW_US)
        await spool.deliveries.register("region", "ingest", now_us=NOW_US)
        claimed = await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US, max_rows=40))
        assert claimed is not None
        await spool.deliveries.settle("region", claimed)
        await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US, max_rows=20))


def change(path, *statements: str | tuple[str, tuple[object, ...]]) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(*([statement] if isinstance(statement, str) else statement))


def problems(path, *, decode: bool = True) -> list[str]:
    return [f"{p.where}: {p.what}" for p in check_spool(path, decode=decode).problems]


async def test_a_sound_spool_has_no_problems_live_or_stopped(tmp_path):
    path = tmp_path / "spool.db"
    await made(path)
    result = check_spool(path, full=True)
    assert (result.problems, result.segments, result.decoded_segments, result.rows) == ([], 10, 10, 100)
    assert check_spool(path, decode=False).decoded_segments == 0
    async with open_spool(path) as spool:
        await spool.append([("new", 1000, 1.0)])
        assert problems(path) == []


async def test_compaction_pruning_and_setting_aside_leave_a_sound_spool(tmp_path):
    path = tmp_path / "spool.db"
    await made(path)
    change(path, ("UPDATE segment SET block = zeroblob(100) WHERE position = ?", (at(5),)))
    async with open_spool(path) as spool:
        claimed = await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US))
        assert claimed is not None
        await spool.deliveries.read_batch(claimed)
        await spool.compaction.compact_once(everything=True)
        await build_retention(spool.database, spool.segments, "region").prune_once(NOW_US + 1)
    result = check_spool(path)
    assert result.problems == []
    assert (result.set_aside_segments, result.set_aside_rows) == (1, 10)
    assert result.rows == 50


_SEGMENT = "UPDATE segment SET {} WHERE position = " + str(at(3))
_DELIVERED = "INSERT INTO delivered VALUES ('region', 4, {}, {})"
_BATCH = "INSERT INTO batch VALUES ('region', 4, {}, {}, 0)"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_SEGMENT.format("block = zeroblob(200)"), "reading segment 3: not a column block"),
        (_SEGMENT.format("block = x'00'"), "reading segment 3: a column block of 1 bytes is too short"),
        (_SEGMENT.format("rows = 11"), "reading segment 3: its block holds 10 rows, its row says 11"),
        (_SEGMENT.format("rows_before = 21"), "reading segment 3: it says 21 rows came before it; 20 did"),
        (
            _SEGMENT.format("min_time_us = 0"),
            "reading segment 3: its times are 20..29 us, its row says 0..29",
        ),
        (
            _SEGMENT.format("min_time_us = 99"),
            "reading segment 3: its smallest time is later than its largest",
        ),
        (_SEGMENT.format("last_commit = 2"), "reading segment 3..2: 3..2 is no range of commits"),
        (_SEGMENT.format("last_commit = 4"), "it overlaps what came before it, which ends at commit 4"),
        (_SEGMENT.format("rows = 0"), "reading segment 3: it has 0 rows; at least one is expected"),
        (_SEGMENT.format("rows = 'many'"), "is damaged"),
        (_SEGMENT.format("position = 7"), "segment at 7: its position names no class of records"),
        (f"DELETE FROM segment WHERE position = {at(3)}", "commits 3..3 before it are missing"),
        (f"DELETE FROM segment WHERE position = {at(1)}", "commits 1..1 before it are missing"),
        ("DELETE FROM series WHERE series_no = 2", "it names series that the spool does not know, such as 2"),
        (
            "UPDATE series SET attributes = '[]' WHERE series_no = 2",
            "series 2: its attributes are no JSON object",
        ),
        ("UPDATE meta SET value = 'x' WHERE key = 'epoch'", "meta: the epoch 'x' is no UUID"),
        ("UPDATE quarantine SET payload_bytes = 1", "quarantine 1: it keeps more bytes than it says"),
        (_DELIVERED.format(9, 99), "9..99: it reaches beyond the newest commit ever, 10"),
        (_DELIVERED.format(3, 3), "3..3: it overlaps the one before it, which ends at 4"),
        (_DELIVERED.format(9, 8), "9..8: it is no range of commits"),
        (_BATCH.format(4, 4), "open batch reading 4..4: 4..4 of it is delivered already"),
        (_BATCH.format(6, 7), "6..7: it overlaps the one before it, which ends at 6"),
        ("DELETE FROM destination", "the spool does not know the destination"),
        (
            f"UPDATE segment SET last_commit = 7 WHERE position = {at(6)}",
            "the segment 6..7 lies across its edge",
        ),
        (
            f"INSERT INTO damaged VALUES ({at(3)}, 3, 10, 0, 'bad_checksum', NULL, 0, 0, '[]')",
            "reading segment 3: its commits were those of a segment that was set aside",
        ),
        ("INSERT INTO delivered VALUES ('region', 9, 1, 1)", "9 is no class of records"),
    ],
)
async def test_damage_is_found_and_said_where(tmp_path, damage, expected):
    path = tmp_path / "spool.db"
    await made(path)
    change(path, damage)
    found = problems(path)
    assert any(expected in problem for problem in found), found


async def test_a_flipped_byte_of_a_block_is_found_and_not_looked_for_when_quick(tmp_path):
    path = tmp_path / "spool.db"
    await made(path)
    with closing(sqlite3.connect(path)) as connection:
        (block,) = connection.execute("SELECT block FROM segment WHERE position = ?", (at(7),)).fetchone()
    flipped = bytearray(block)
    flipped[len(block) // 2] ^= 1
    change(path, ("UPDATE segment SET block = ? WHERE position = ?", (bytes(flipped), at(7))))
    assert problems(path) == [
        "reading segment 7: the checksum of the column block does not match its bytes (bad_checksum)"
    ]
    assert problems(path, decode=False) == []


@pytest.mark.parametrize("page", range(2, 12))
async def test_a_page_of_rubbish_is_found_and_never_a_traceback(tmp_path, page):
    path = tmp_path / "spool.db"
    await made(path)
    with path.open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(np.random.default_rng(page).bytes(4096))
    assert problems(path)


async def test_what_is_no_database_is_a_problem_and_what_is_missing_or_too_new_is_no_spool(tmp_path):
    path = tmp_path / "spool.db"
    await made(path)
    path.write_bytes(b"rubbish" * 1000)
    assert "not looked at" in problems(path)[0]
    with pytest.raises(SpoolAccessError):
        check_spool(tmp_path / "missing.db")
    fresh = tmp_path / "fresh.db"
    await made(fresh)
    change(fresh, "PRAGMA user_version = 99")
    with pytest.raises(SpoolTooNewError):
        check_spool(fresh)


async def test_a_missing_table_is_a_problem(tmp_path):
    path = tmp_path / "spool.db"
    await made(path)
    change(path, "DROP TABLE outbox")
    assert problems(path) == ["table outbox: it is missing"]
