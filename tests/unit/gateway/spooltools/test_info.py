from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from gateway.spool.errors import SpoolAccessError
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spooltools.spool_info import read_spool_info
from tests.support.open_spool import NOW_US, open_spool

_BAD = QuarantineItem.from_payload(
    received_at_us=NOW_US, source="listen", topic="a/b", reason="not_json", detail="no", payload=b"x"
)


def rows(first: int, count: int, sensors: int = 3):
    return [(f"s{i % sensors}", i, float(i)) for i in range(first, first + count)]


async def test_it_tells_what_is_kept_and_what_each_destination_lacks(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        for start in range(0, 100, 10):
            await spool.append(rows(start, 10))
        await spool.appender.append(None, [_BAD], now_us=NOW_US)
        await spool.deliveries.register("region", "ingest", now_us=NOW_US)
        await spool.deliveries.register("cloud", "influxdb", now_us=NOW_US)
        claimed = await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US, max_rows=40))
        assert claimed is not None
        await spool.deliveries.settle("region", claimed)
        await spool.deliveries.claim("region", ClaimRequest(now_us=NOW_US, max_rows=20))
        live = read_spool_info(path, "gw-1")
    info = read_spool_info(path)
    assert (live.live, info.live) == (True, False)
    assert (live.gateway_id, info.gateway_id) == ("gw-1", None)
    held = info.classes["reading"]
    assert (held.rows, held.rows_ever, held.segments, held.oldest_commit, held.newest_commit) == (
        100,
        100,
        10,
        1,
        10,
    )
    assert (held.min_time_us, held.max_time_us, held.estimated) == (0, 99, False)
    assert (info.series, info.quarantined) == (3, 1)
    lacks = {d.name: (d.backlog, d.open_batches, d.delivered_ranges) for d in info.destinations}
    assert lacks == {"cloud": ({"reading": 100}, 0, 0), "region": ({"reading": 60}, 1, 1)}
    assert info.bytes_per_reading == info.used_bytes / 100


async def test_an_estimate_of_unlike_segments_comes_out_right(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        for start in range(300):
            await spool.append(rows(start * 5, 5))
        await spool.compaction.compact_once(everything=True)
        for start in range(300, 400):
            await spool.append(rows(start * 5, 5))
    counted, guessed = (
        read_spool_info(path).classes["reading"],
        read_spool_info(path, scan_within_s=-1).classes["reading"],
    )
    assert not counted.estimated
    assert guessed.estimated
    assert counted.segments == 101
    for name in ("rows", "segments", "min_time_us", "max_time_us"):
        assert getattr(guessed, name) == getattr(counted, name)
    assert guessed.block_bytes == pytest.approx(counted.block_bytes, rel=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: None, "there is no spool here"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text("hello, this is some text " * 50), "file is not a database"),
        (lambda path: path.write_bytes(b""), "is no spool"),
        (lambda path: sqlite3.connect(path).executescript("CREATE TABLE t (a)").close(), "is no spool"),
    ],
)
def test_what_is_no_spool_is_said_to_be_none_and_left_as_it_is(tmp_path, make, message):
    path = tmp_path / "spool.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(SpoolAccessError, match=message):
        read_spool_info(path)
    assert (path.read_bytes() if path.is_file() else None) == before


async def test_a_stopped_spool_is_read_where_nothing_can_be_written_beside_it(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        await spool.append(rows(0, 10))
    with nothing_to_be_written(path) as there:
        assert read_spool_info(there).classes["reading"].rows == 10
    tmp_path.joinpath("spool.db-wal").write_bytes(b"commits that would not be seen")
    with nothing_to_be_written(path) as there, pytest.raises(SpoolAccessError, match="would not be seen"):
        read_spool_info(there)


@contextmanager
def nothing_to_be_written(path):
    """A copy of the spool and its log in a folder that cannot be written, also not by root."""
    folder = Path(tempfile.mkdtemp())
    for source in (path, path.with_name(f"{path.name}-wal")):
        if source.exists():
            shutil.copyfile(source, folder / source.name)
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield folder / path.name
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)
