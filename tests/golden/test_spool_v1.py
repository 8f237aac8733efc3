"""The frozen spool of format 1 (`spool_v1.db`, made by `spool_v1_made`): every later release reads it."""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import RecordClass
from gateway.spool import database as spool_database
from gateway.spool.database import Database
from gateway.spool.deliveries import Deliveries
from gateway.spool.segments import SegmentWriter
from gateway.spool.series_catalog import SeriesCatalog
from tests.support.free_ports import free_port
from tests.support.programs import run

_HERE = Path(__file__).parent
_EXPECTED = json.loads((_HERE / "spool_v1.json").read_text())
_COLUMNS = ("time_us", "value", "quality", "battery_level", "signal_strength", "seq", "flags")


@pytest.fixture
async def spool(tmp_path):
    path = tmp_path / "spool.db"
    shutil.copyfile(_HERE / "spool_v1.db", path)
    database = await Database.open(path)
    yield database
    await database.close()


@pytest.fixture
async def parts(spool):
    catalog = await SeriesCatalog.read(spool)
    segments = await SegmentWriter.open(spool, catalog)
    return catalog, segments, Deliveries(spool, segments, catalog, "g1")


def _rows(batch) -> list[tuple]:
    columns = [getattr(batch.readings, name).tolist() for name in _COLUMNS]
    names = [batch.series[number] for number in batch.readings.series]
    return [
        ((s.sensor_id, s.sensor_type, s.attributes), *map(_comparable, row))
        for s, *row in zip(names, *columns, strict=True)
    ]


def _comparable(value):
    return "absent" if isinstance(value, float) and math.isnan(value) else value


def _expected_rows(first: int, last: int) -> list[tuple]:
    series = [(s, t, tuple(sorted(a.items()))) for s, t, a in _EXPECTED["series"]]
    rows = [
        (series[number], *map(_comparable, rest))
        for commit in range(first, last + 1)
        for number, *rest in _EXPECTED["commits"][str(commit)]
    ]
    return sorted(rows, key=lambda row: row[:2])


async def test_every_reading_of_the_frozen_spool_is_read_back(parts):
    _, segments, deliveries = parts
    assert segments.newest_commit(RecordClass.READING) == _EXPECTED["newest_commit"]
    rows = []
    while (claimed := await deliveries.claim("cloud", ClaimRequest(now_us=1, max_rows=60))) is not None:
        batch = await deliveries.read_batch(claimed)
        assert _rows(batch) == _expected_rows(claimed.first_commit, claimed.last_commit)
        rows += _rows(batch)
        await deliveries.settle("cloud", claimed)
    first = _EXPECTED["pruned_through"] + 1
    assert len(rows) == len(_expected_rows(first, _EXPECTED["newest_commit"]))


async def test_progress_and_open_batches_of_the_frozen_spool_are_kept(spool, parts):
    _, _, deliveries = parts
    for name, ranges in _EXPECTED["delivered"].items():
        query = "SELECT first_commit, last_commit FROM delivered WHERE destination = ?"
        found = await spool.read(lambda c, n=name, q=query: c.execute(q, (n,)).fetchall())
        assert [list(row) for row in found] == ranges
    for name, (first, last) in _EXPECTED["open"].items():
        claimed = await deliveries.claim(name, ClaimRequest(now_us=1))
        assert (claimed.first_commit, claimed.last_commit) == (first, last)
    count = await spool.read(lambda c: c.execute("SELECT count(*) FROM quarantine").fetchone()[0])
    assert count == _EXPECTED["quarantined"]


async def test_a_new_spool_of_format_1_has_the_schema_of_the_frozen_one(tmp_path):
    """Whoever changes the schema writes a migration, not the first script."""
    if spool_database.FORMAT_VERSION != 1:
        pytest.skip("this release writes a later format")
    fresh = tmp_path / "spool.db"
    await (await Database.open(fresh)).close()

    def schema(path: Path) -> list[tuple]:
        with closing(sqlite3.connect(path)) as connection:
            query = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name"
            return connection.execute(query).fetchall()

    frozen = tmp_path / "frozen.db"
    shutil.copyfile(_HERE / "spool_v1.db", frozen)
    assert schema(fresh) == schema(frozen)


@pytest.mark.parametrize("command", ["gateway", "status"])
def test_a_spool_from_before_the_format_was_fixed_is_refused_in_words(tmp_path, command):
    path, config = tmp_path / "spool.db", tmp_path / "gateway.toml"
    shutil.copyfile(_HERE / "spool_v1.db", path)
    with closing(sqlite3.connect(path)) as connection:
        for table in ("processing_state", "loss", "outbox", "parked", "received", "answered"):
            connection.execute(f"DROP TABLE {table}")
        connection.commit()
    config.write_text(
        f'gateway_id = "g"\n[spool]\npath = "{path}"\n'
        f"[ingress.listen]\nport = 0\n[status]\nport = {free_port()}\n"
    )
    ended = run(command, "--config", str(config))
    said = ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert "development version" in " ".join(said.split())
    assert "Traceback" not in said
    assert path.exists()
