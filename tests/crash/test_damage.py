"""Damage to the spool's files, one kind at a time: what the gateway makes of it, and what it says.

Three outcomes. It goes on: what was not hit is there, what was hit is counted, new readings are taken and
delivered. It sets the file aside: renamed with its date, a new spool is begun. It stops with one clear
sentence, because only a person can help; then no byte of the file has changed.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from cloud_sync.codec import columns
from cloud_sync.model.records import RecordClass
from gateway.spool.database import Database
from gateway.spool.errors import SpoolError
from gateway.spool.segments import segment_position
from tests.crash.spools import ROWS, OpenSpool, made

COMMITS = 24
_ALL = set(range(COMMITS * ROWS))
_NEXT = range(10**6, 10**6 + 5)
_PAGE = 4096


def _times(commits) -> set[int]:
    return {t for k in commits for t in range((k - 1) * ROWS, k * ROWS)}


def _patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def _flip(path: Path, at: int) -> None:
    _patch(path, at, bytes((path.read_bytes()[at] ^ 0xFF,)))


def _wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _blocks(path: Path) -> list[bytes]:
    with closing(sqlite3.connect(path)) as connection:
        return [block for (block,) in connection.execute("SELECT block FROM segment ORDER BY position")]


def _damage_block(path: Path, commit: int) -> None:
    """Flip one byte in the middle of the stored bytes of one commit."""
    block = _blocks(path)[commit - 1]
    piece = block[200:232]  # lies on one page wherever the cell begins
    content = path.read_bytes()
    assert content.count(piece) == 1
    _flip(path, content.index(piece) + 7)


def _root_page(path: Path, table: str) -> int:
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = ?"
        return connection.execute(query, (table,)).fetchone()[0]


async def _goes_on(path: Path) -> set[int]:
    """Open, append, drain, compact, prune and reopen; returns the old times that were delivered."""
    spool = await OpenSpool.opened(path)
    try:
        before = spool.newest
        await spool.append(_NEXT)
        assert spool.newest == before + 1
        await spool.compaction.compact_once(everything=True)
        times = await spool.drained()
        await spool.retention.prune_once(1 << 60)
    finally:
        await spool.database.close()
    spool = await OpenSpool.opened(path)
    try:
        assert spool.newest == before + 1, "a commit number would be used again"
    finally:
        await spool.database.close()
    assert set(_NEXT) <= times
    return times - set(_NEXT)


def _set_aside(path: Path) -> list[Path]:
    """The files that were renamed out of the way, without their -wal and -shm."""
    found = path.parent.glob(path.name + ".*")
    return [p for p in found if re.search(r"20\d\d", p.name) and not p.name.endswith(("-wal", "-shm"))]


# --- a spool that was closed in order


@pytest.mark.parametrize("commit", [1, 7, COMMITS])
async def test_a_flipped_byte_in_a_block_costs_that_commit_and_is_counted(tmp_path, commit):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=False)
    _damage_block(path, commit)
    assert await _goes_on(path) == _times(set(range(1, COMMITS + 1)) - {commit})
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT position, rows FROM damaged").fetchall()
    assert rows == [(segment_position(RecordClass.READING, commit), ROWS)]


async def test_a_damaged_newest_commit_leaves_its_number_taken(tmp_path):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=False)
    _damage_block(path, COMMITS)
    for expected in (COMMITS, COMMITS):  # the first delivers and sets aside, the second opens after it
        spool = await OpenSpool.opened(path)
        assert spool.newest == expected
        await spool.drained()
        await spool.database.close()


async def test_a_truncated_block_or_one_that_is_no_block_costs_that_commit(tmp_path):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=False)
    wrong = {3: b"", 5: b"TC\x01", 8: bytes(500), 9: b"TC\x63" + bytes(500)}
    with closing(sqlite3.connect(path)) as connection, connection:
        for commit, block in wrong.items():
            where = (block, segment_position(RecordClass.READING, commit))
            connection.execute("UPDATE segment SET block = ? WHERE position = ?", where)
    assert await _goes_on(path) == _times(set(range(1, COMMITS + 1)) - set(wrong))


async def test_a_block_that_names_a_series_nobody_knows_costs_that_commit(tmp_path):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=False)
    readings = columns.decode(_blocks(path)[4])
    strange = columns.encode(readings.with_series(readings.series + 5000))
    with closing(sqlite3.connect(path)) as connection, connection:
        where = (strange, segment_position(RecordClass.READING, 5))
        connection.execute("UPDATE segment SET block = ? WHERE position = ?", where)
    assert await _goes_on(path) == _times(set(range(1, COMMITS + 1)) - {5})


@pytest.mark.parametrize("table", ["segment", "meta", "series", "delivered", "sqlite_schema"])
async def test_a_zeroed_root_page_never_keeps_the_gateway_from_taking_readings(tmp_path, table):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=False)
    page = 1 if table == "sqlite_schema" else _root_page(path, table)
    _patch(path, (page - 1) * _PAGE + (100 if page == 1 else 0), bytes(_PAGE - (100 if page == 1 else 0)))
    assert await _goes_on(path) <= _ALL


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
async def test_a_truncated_file_never_keeps_the_gateway_from_taking_readings(tmp_path, part):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=False)
    os.truncate(path, int(path.stat().st_size * part) // _PAGE * _PAGE)
    assert await _goes_on(path) <= _ALL


@pytest.mark.parametrize("byte", [0, 16, 18, 47, 59])
async def test_a_flipped_byte_in_the_header_never_keeps_the_gateway_from_taking_readings(tmp_path, byte):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=False)
    _flip(path, byte)  # magic, page size, write version, schema format, text encoding
    assert await _goes_on(path) <= _ALL


@pytest.mark.parametrize("content", [b"\xa5" * 50_000, b"SQLite format 3\x00" + b"\xff" * 5000])
async def test_a_file_that_is_no_database_is_set_aside_with_its_date(tmp_path, content, caplog):
    path = tmp_path / "spool.db"
    path.write_bytes(content)
    assert await _goes_on(path) == set()
    (aside,) = _set_aside(path)
    assert aside.read_bytes() == content
    assert any(r.levelname == "ERROR" and aside.name in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("content", [b"", b"x"])
async def test_an_empty_file_becomes_a_new_spool(tmp_path, content):
    path = tmp_path / "spool.db"
    path.write_bytes(content)
    assert await _goes_on(path) == set()


async def test_random_bytes_anywhere_never_keep_the_gateway_from_taking_readings(tmp_path):
    master = tmp_path / "master" / "spool.db"
    await made(master, COMMITS, killed=False)
    size = master.stat().st_size
    faults = []
    for number, at in enumerate(range(100, size, size // 60)):
        path = tmp_path / str(number) / "spool.db"
        path.parent.mkdir()
        shutil.copyfile(master, path)
        _patch(path, at, b"\xde\xad\xbe\xef")
        try:
            assert await _goes_on(path) <= _ALL
        except Exception as fault:  # noqa: BLE001 - every kind of end is a finding
            faults.append(f"bytes {at}..{at + 3}: {type(fault).__name__}: {fault}")
    assert faults == []


# --- a spool that was killed


@pytest.mark.parametrize("suffixes", [("-shm",), ()])
async def test_a_killed_spool_loses_nothing_with_or_without_its_shm(tmp_path, suffixes):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=True)
    for suffix in suffixes:
        path.with_name(path.name + suffix).unlink()
    assert await _goes_on(path) == _ALL


async def test_a_garbage_shm_is_built_again(tmp_path):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=True)
    path.with_name(path.name + "-shm").write_bytes(os.urandom(32768))
    assert await _goes_on(path) == _ALL


@pytest.mark.parametrize("part", [0.0, 0.3, 0.7, 0.99])
async def test_a_torn_wal_is_cut_at_the_tear(tmp_path, part):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=True)
    os.truncate(_wal(path), int(_wal(path).stat().st_size * part))
    times = await _goes_on(path)
    kept = len(times) // ROWS
    assert times == _times(range(1, kept + 1))
    assert kept >= COMMITS // 2


@pytest.mark.parametrize("part", [0.0, 0.2, 0.6, 0.98])
async def test_a_flipped_byte_in_the_wal_cuts_it_there(tmp_path, part):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=True)
    _flip(_wal(path), int(_wal(path).stat().st_size * part))
    times = await _goes_on(path)
    kept = len(times) // ROWS
    assert times == _times(range(1, kept + 1))
    assert kept >= COMMITS // 2


async def test_a_deleted_wal_costs_what_was_only_in_it(tmp_path):
    path = tmp_path / "spool.db"
    await made(path, COMMITS, killed=True)
    _wal(path).unlink()
    assert await _goes_on(path) == _times(range(1, COMMITS // 2 + 1))


# --- a person is needed


def _run(path: Path, *, under: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """`tidegate gateway` on this spool, without destinations; it must end by itself."""
    config = path.parent.parent / "gateway.toml"
    config.write_text(
        f'gateway_id = "g1"\n[spool]\npath = "{path}"\n[ingress.listen]\nport = 0\n'
        "[ingress.host]\nenabled = false\n[status]\nenabled = false\n"
    )
    plain = {k: v for k, v in os.environ.items() if not k.upper().startswith("TIDEGATE_")}
    plain["PYTHONPATH"] = os.pathsep.join((str(Path.cwd()), plain.get("PYTHONPATH", "")))
    return subprocess.run(
        [*under, sys.executable, "-m", "gateway", "gateway", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=8,
        env=plain,
        check=False,
    )


def _stopped(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("tidegate: ")
    for word in words:
        assert word in last


@pytest.fixture
def site(tmp_path):
    (tmp_path / "state").mkdir()
    return tmp_path


@pytest.fixture
def obeying():
    """A command prefix under which file permissions count, for root too."""
    if os.getuid() != 0:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("root needs setpriv (util-linux) to run a child that obeys file permissions")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


async def test_a_spool_of_a_later_release_stops_the_gateway_and_stays_as_it_is(site):
    path = site / "state" / "spool.db"
    await made(path, 2, killed=False)
    _patch(path, 60, struct.pack(">I", 99))
    before = path.read_bytes()
    _stopped(_run(path), str(path), "version 99", "reads up to")
    assert path.read_bytes() == before


async def test_a_database_of_another_program_is_not_written_into(site):
    path = site / "state" / "spool.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE customers (name TEXT)")
    before = path.read_bytes()
    _stopped(_run(path), str(path), "not a Tidegate spool")
    assert path.read_bytes() == before


async def test_a_second_gateway_on_the_same_spool_stops(site):
    path = site / "state" / "spool.db"
    database = await Database.open(path)
    try:
        _stopped(_run(path), str(path), "another gateway")
    finally:
        await database.close()


async def test_a_read_only_file_stops_the_gateway(site, obeying):
    path = site / "state" / "spool.db"
    await made(path, 2, killed=False)
    path.chmod(0o444)
    _stopped(_run(path, under=obeying), str(path), "ermission")


async def test_a_file_that_may_not_be_read_stops_the_gateway_and_is_not_set_aside(site, obeying):
    path = site / "state" / "spool.db"
    await made(path, 2, killed=False)
    path.chmod(0o000)
    _stopped(_run(path, under=obeying), str(path), "ermission")
    assert path.exists()


async def test_a_folder_that_may_not_be_written_stops_the_gateway(site, obeying):
    path = site / "state" / "spool.db"
    path.parent.chmod(0o555)
    _stopped(_run(path, under=obeying), str(path), "ermission denied")
    path.parent.chmod(0o755)


async def test_a_folder_in_the_place_of_the_file_stops_the_gateway(site):
    path = site / "state" / "spool.db"
    path.mkdir()
    _stopped(_run(path), str(path))
    assert path.is_dir()


async def test_a_file_in_the_place_of_the_folder_stops_the_gateway(site):
    (site / "state" / "taken").touch()
    with pytest.raises(SpoolError, match="taken"):
        await Database.open(site / "state" / "taken" / "spool.db")


async def test_a_missing_folder_is_made(tmp_path):
    assert await _goes_on(tmp_path / "a" / "b" / "spool.db") == set()
