"""Every store is compared row by row with the record: a real spool, its exports, a real region; each kind of
difference is planted and found."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
import zlib
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import asyncpg
import numpy as np
import pytest

from firmware_sim.ground_truth import load_ground_truth
from firmware_sim.verify.comparison import compare_readings
from firmware_sim.verify.spools import BlockError, decode_block
from firmware_sim.verify.stored_files import read_export_files
from tests.support.programs import Site, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCENARIO = """
seed = 5
rate = 2000
seconds = 1.2
span = "10h"
readings_per_publish = 4
[[groups]]
name = "pump"
devices = 6
types = ["temperature", "pressure"]
firmware_version = "1.0"
upgrades = [{ to = "2.0", at = "4h", over = "2h" }]
faults = [
    { kind = "spike", probability = 0.02, size = 200 },
    { kind = "late", probability = 0.05, hold = 9 },
    { kind = "duplicate", probability = 0.05 },
    { kind = "malformed", probability = 0.02 },
]
"""


@pytest.fixture
def site(tmp_path: Path, postgres_dsn: str) -> Iterator[Site]:
    made = Site(tmp_path, postgres_dsn)
    made.gateway.start()
    yield made
    made.close()


@pytest.fixture
def truth(site: Site, tmp_path: Path) -> Path:
    """The record of a run that the gateway has whole."""
    (tmp_path / "s.toml").write_text(SCENARIO)
    done = run(
        *("sim", "run", "--broker", site.broker, "--truth", str(tmp_path / "truth"), "--quiet", "--json"),
        *("--scenario", str(tmp_path / "s.toml"), "--drain-timeout", "30"),
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["acknowledged"] == outcome["produced"] > 2000
    return tmp_path / "truth"


def counts(found: dict[str, Any], *more: str) -> dict[str, int]:
    return {kind: found[kind] for kind in ("lost", "duplicated", "altered", "unknown", *more)}


CLEAN = {"lost": 0, "duplicated": 0, "altered": 0, "unknown": 0}


def test_a_spool_and_its_exports_hold_what_was_acknowledged_and_a_damaged_segment_is_named(
    site: Site, truth: Path, tmp_path: Path
):
    found = site.verify(truth, "--spool", str(site.spool))
    assert counts(found) == CLEAN, found["examples"]
    assert found["stored"] == found["acknowledged"] == found["produced"]
    assert found["flagged"].get("out_of_range", 0) > 10
    record = load_ground_truth(truth)
    for suffix in ("parquet", "jsonl", "csv.gz"):
        out = tmp_path / suffix / f"export.{suffix}"
        out.parent.mkdir()
        done = run("spool", "export", str(site.spool), "--out", str(out))
        assert done.returncode == 0, done.stderr
        exported = asdict(compare_readings(record, read_export_files([out], record, on_rows=lambda _: None)))
        assert counts(exported) == CLEAN, (suffix, exported["examples"])
        assert exported["matched"] == found["acknowledged"]
        assert exported["flagged"] == found["flagged"]
    lines = gzip.decompress((tmp_path / "csv.gz" / "export.csv.gz").read_bytes()).decode().splitlines()
    (tmp_path / "planted").mkdir()
    planted = [lines[0], *lines[2:], lines[5], lines[9].replace("pump-", "pumq-")]
    (tmp_path / "planted" / "x.csv").write_text("\n".join(planted) + "\n")
    found = site.verify(truth, "--files", str(tmp_path / "planted"))
    assert counts(found, "foreign") == {**CLEAN, "lost": 1, "duplicated": 1, "foreign": 1}
    site.gateway.stop()
    copy = tmp_path / "copy.db"
    shutil.copy(site.spool, copy)
    with closing(sqlite3.connect(copy)) as connection:
        position, block, rows = connection.execute(
            "SELECT position, block, rows FROM segment WHERE position >> 56 = 4 ORDER BY rows DESC LIMIT 1"
        ).fetchone()
        flipped = bytearray(block)
        flipped[len(block) // 2] ^= 1
        connection.execute("UPDATE segment SET block = ? WHERE position = ?", (bytes(flipped), position))
        connection.commit()
    found = site.verify(truth, "--spool", str(copy))
    assert counts(found) == {**CLEAN, "lost": rows}
    assert "cannot be read: its checksum is wrong" in found["notes"][0]


async def test_region_and_stick_hold_what_was_acknowledged_and_each_kind_of_difference_is_named(
    site: Site, truth: Path
):
    site.ingest.start()
    site.drain()
    region = site.verify(truth)
    assert counts(region) == CLEAN, region["examples"]
    assert region["stored"] == region["produced"]
    assert region["late"] == region["flagged"]["late"] > 0
    (site.files / "manifest.jsonl").write_text('{"file": "x.lp"}\n')  # as the sink itself leaves one there
    stick = site.verify(truth, "--files", str(site.files))
    assert counts(stick) == CLEAN, stick["examples"]
    assert stick["matched"] == stick["produced"]
    connection = await asyncpg.connect(site.dsn)
    taken = await connection.fetch(
        "DELETE FROM reading WHERE ctid IN (SELECT ctid FROM reading ORDER BY time LIMIT 7) RETURNING *"
    )
    assert len(taken) == 7
    await connection.execute(
        "UPDATE reading SET value = value + 1 "
        "WHERE ctid IN (SELECT ctid FROM reading ORDER BY time DESC LIMIT 2)"
    )
    waiting = site.verify(truth, "--postgres", site.dsn, "--spool", str(site.spool))
    assert counts(waiting, "waiting", "ok") == {**CLEAN, "altered": 2, "waiting": 7, "ok": False}
    assert len(waiting["examples"]["waiting"]) == 5
    assert "was stored as" in waiting["examples"]["altered"][0]
    await connection.execute(
        "INSERT INTO declared_loss"
        " (gateway_id, epoch, class, first_commit, last_commit, rows, reason, survives, declared_at)"
        " VALUES ('gw-1', gen_random_uuid(), 4, 1, 2, 5, 'spool full', 'rollup 60 s', now())"
    )
    declared = site.verify(truth)
    assert counts(declared, "declared") == {**CLEAN, "lost": 2, "altered": 2, "declared": 5}
    assert declared["examples"]["declared"] == ["5 by gw-1: spool full, rollup 60 s survives, commits 1..2"]
    await connection.execute("UPDATE sensor SET location = 'moon' WHERE sensor_id = 'pump-0003'")
    await connection.close()
    moved = site.verify(truth)
    assert moved["altered"] > 100


def test_a_block_is_decoded_as_the_format_says_and_refused_when_it_is_not():
    def column(number, encoding, payload):
        return (number, encoding, payload)

    columns = [
        column(1, 4, (1).to_bytes(4, "little") + b"\x00\x04\x00\x00\x00" + np.int32(7).tobytes()
               + b"\x01\x04\x00\x00\x00" + np.int32(3).tobytes()),
        column(2, 1, np.array([5, 6, 7], "<i8").tobytes()),
        column(3, 0, np.float64(2.5).tobytes()),
        column(99, 77, b"skipped"),
    ]  # fmt: skip
    head = (
        b"TC\x01\x04" + (3).to_bytes(4, "little") + np.array([5, 7], "<i8").tobytes() + bytes([len(columns)])
    )
    head += b"".join(bytes([n, e]) + len(p).to_bytes(4, "little") for n, e, p in columns)
    body = head + b"".join(p for _, _, p in columns)
    block = body + zlib.crc32(body).to_bytes(4, "little")
    decoded = decode_block(block)
    assert {name: values.tolist() for name, values in decoded.items()} == {
        "series": [7, 7, 7],
        "time_us": [5, 6, 7],
        "value": [2.5, 2.5, 2.5],
    }
    with pytest.raises(BlockError, match="checksum"):
        decode_block(block[:-1] + b"\x00")
    with pytest.raises(BlockError):
        decode_block(b"")
