"""`tidegate ingest load`: what the file destination wrote comes in at the other end, once."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import shutil
from typing import TYPE_CHECKING

import asyncpg
import numpy as np
import pytest

from cloud_sync.destinations.file import FileDestination, FileOptions
from cloud_sync.ingest import file_import
from cloud_sync.model.records import Batch, Readings, Receipt, Series
from cloud_sync.timescale.sink import TimescaleSink
from tests.contract.test_timescaledb_sink import expected_rows, stored_rows
from tests.integration.test_ingest_command import run, write_config
from tests.support.wire_examples import START_US, batch, readings

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("hall 3", "a,b=c", 'quote"d', "é\\x", "a=b", "名前")


def sent(commit: int, rows: int = 300) -> Batch:
    """A batch with awkward names, absent values and flags."""
    content = readings(rows, len(NAMES), start_us=START_US + commit * 10**10, seed=commit)
    of = tuple(Series(name, "t y,p=e", (("location", "x y"), ("unit", "°C"))) for name in sorted(NAMES))
    return batch(commit, content=content, of=of)


async def written(folder: Path, batches: list[Batch], *, compress: bool = True, final: int = 10**9) -> None:
    """Files of these batches; the first `final` of them under their final names."""
    destination = FileDestination("stick", folder, FileOptions(compress=compress, min_free_bytes=0))
    for number, each in enumerate(batches):
        if number == final:
            await destination.rotate()
        await destination.send(destination.encode(each))
    if final >= len(batches):
        await destination.rotate()
    await destination.aclose()


@pytest.fixture
async def sink(postgres_dsn):
    sink = TimescaleSink(postgres_dsn)
    yield sink
    await sink.aclose()


async def load(sink: TimescaleSink, folder: Path) -> file_import.ImportSums:
    return await file_import.import_files(sink, file_import.find_import_files(folder), lambda _words: None)


def summed(sums: file_import.ImportSums) -> tuple[int, ...]:
    return (
        sums.files,
        sums.known,
        sums.damaged,
        sums.readings.stored,
        sums.readings.duplicates,
        sums.readings.conflicts,
        sums.readings.rejected,
    )


@pytest.mark.parametrize("compress", [True, False])
async def test_every_column_comes_back_as_it_was(postgres_dsn, sink, tmp_path, compress):
    batches = [sent(n) for n in range(1, 5)]
    await written(tmp_path, batches, compress=compress)

    assert summed(await load(sink, tmp_path)) == (1, 0, 0, 1200, 0, 0, 0)

    assert set(await stored_rows(postgres_dsn)) == set().union(*map(expected_rows, batches))
    assert summed(await load(sink, tmp_path)) == (0, 1, 0, 0, 0, 0, 0)
    (file,) = tmp_path.glob("*-*.lp*")
    file.rename(tmp_path / f"renamed{''.join(file.suffixes)}")
    assert (await load(sink, tmp_path)).known == 1


async def test_an_open_file_is_read_to_its_last_whole_line_and_again_when_it_is_final(sink, tmp_path):
    await written(tmp_path, [sent(n) for n in (1, 2)], final=1)
    (open_file,) = tmp_path.glob("*.open.lp.gz")
    torn = tmp_path / "torn"
    torn.mkdir()
    whole = open_file.read_bytes()
    (torn / open_file.name).write_bytes(whole + gzip.compress(b"x,sensor_id=a value=1 1\n" * 50)[:30])

    assert (await load(sink, torn)).readings.stored >= 300

    assert summed(await load(sink, tmp_path)) == (2, 0, 0, 300, 300, 0, 0)


async def test_what_a_gateway_delivered_by_network_too_is_a_duplicate(sink, tmp_path):
    await sink.apply(sent(1))
    await written(tmp_path, [sent(1), sent(2)])

    assert summed(await load(sink, tmp_path)) == (1, 0, 0, 300, 300, 0, 0)
    assert await sink.apply(sent(2)) == Receipt(300, 0, 300)


async def test_a_file_that_is_not_what_its_manifest_says_is_left_and_told(sink, tmp_path):
    for commit in (1, 2, 3):
        await written(tmp_path, [sent(commit)])
    first, second, _ = sorted(tmp_path.glob("*-0*.lp.gz"))
    first.write_bytes(first.read_bytes()[:-7])
    data = bytearray(second.read_bytes())
    data[100] ^= 1
    second.write_bytes(data)
    told: list[str] = []

    sums = await file_import.import_files(sink, file_import.find_import_files(tmp_path), told.append)

    assert (sums.files, sums.damaged, sums.readings.stored) == (1, 2, 300)
    assert sum("SHA-256 is not the one in manifest.jsonl" in words for words in told) == 2


async def test_lines_that_are_no_readings_are_counted_and_cost_only_themselves(sink, tmp_path):
    lines = b"a,sensor_id=x value=1 1000\nnonsense\n\n# c\nb,sensor_id=x value=1\n\xff\nc value=1 5\n"
    (tmp_path / "foreign.lp").write_bytes(lines + b"d,sensor_id=x value=2 7000\ne,sensor_id=x val")

    assert summed(await load(sink, tmp_path)) == (1, 0, 0, 2, 0, 0, 4)


async def test_an_interrupted_load_goes_on_where_it_stopped(sink, tmp_path, monkeypatch):
    monkeypatch.setattr(file_import, "PIECE_LINES", 250)
    await written(tmp_path, [sent(n) for n in range(1, 5)])
    told: list[str] = []

    def interrupt(words: str) -> None:
        told.append(words)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await file_import.import_files(sink, file_import.find_import_files(tmp_path), interrupt)

    assert told[-1].endswith("750 lines, 750 stored")
    assert summed(await load(sink, tmp_path)) == (1, 0, 0, 450, 0, 0, 0)


async def test_two_loads_at_once_store_everything_once(postgres_dsn, sink, tmp_path, monkeypatch):
    monkeypatch.setattr(file_import, "PIECE_LINES", 200)
    await written(tmp_path, [sent(n) for n in range(1, 5)])
    other = TimescaleSink(postgres_dsn)

    await asyncio.gather(load(sink, tmp_path), load(other, tmp_path))
    await other.aclose()

    assert summed(await load(sink, tmp_path)) == (0, 1, 0, 0, 0, 0, 0)
    assert len(await stored_rows(postgres_dsn)) == 1200
    noted = "SELECT lines, stored, duplicates, complete FROM loaded_file"
    found = await sink.transact(lambda connection: connection.fetch(noted))
    assert [tuple(row) for row in found] == [(1200, 1200, 0, True)]


def test_the_command_loads_and_the_overview_tells_gateways(postgres_dsn, tmp_path):
    config = write_config(tmp_path, postgres_dsn)
    assert run("gateways", "--config", config).stdout == "no gateway has delivered yet\n"
    files = tmp_path / "files"
    asyncio.run(written(files, [sent(1)]))
    loaded = run("load", files, "--config", config)
    assert loaded.returncode == 0
    assert loaded.stdout == (
        "1 files loaded, 0 known before; 300 readings stored, 0 duplicates, 0 conflicts, 0 lines rejected\n"
    )
    assert "1/1 gw-1-" in loaded.stderr
    (file,) = files.glob("*-0*.lp.gz")
    shutil.copy(file, files / "again.lp.gz")
    file.write_bytes(b"")
    damaged = run("load", files, "--config", config, "--quiet")
    assert (damaged.returncode, damaged.stdout.split(";")[0]) == (1, "0 files loaded, 1 known before")
    missing = run("load", tmp_path / "none", "--config", config)
    assert (missing.returncode, "No such file" in missing.stderr) == (1, True)

    asyncio.run(delivered(postgres_dsn))
    shown = run("gateways", "--config", config).stdout
    assert re.fullmatch(
        r"barn-1  last seen \d+ s ago  48 readings\n"
        r"  reading of epoch 0190c1a2: complete through 2; newest 9, 1 gap: 3..8; 1 range in part; "
        r"36 duplicates; 4 refused\n"
        r"  declared: 70 reading rows within 3..4 given up: over the cap, left as rollup 60 s\n"
        r"gw-2  last seen \d+ s ago  12 readings\n  reading of epoch 0190c1a2: complete through 1; .*\n",
        shown,
    )
    one = json.loads(run("gateways", "barn-1", "--config", config, "--json").stdout)
    (gateway,) = one["gateways"]
    (epoch,) = gateway["epochs"]
    assert (epoch["complete_through"], epoch["ranges"]) == (2, [[1, 2], [9, 9]])
    assert (epoch["gaps"], epoch["partial"], epoch["refused"]) == ([[3, 8]], [[5, 6]], 4)
    assert gateway["declared"][0]["survives"] == "rollup 60 s"
    assert run("gateways", "nobody", "--config", config).returncode == 1


async def delivered(dsn: str) -> None:
    sink = TimescaleSink(dsn)
    for commit in (1, 2, 9):
        await sink.apply(batch(commit, gateway_id="barn-1"))
    part = batch(5, 6, gateway_id="barn-1")
    await sink.apply(Batch(part.range._replace(part=2, parts=3), part.series, part.readings, 4))
    await sink.apply(batch(1, gateway_id="gw-2"))
    await sink.aclose()
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "INSERT INTO declared_loss VALUES ('barn-1', $1, 4, 3, 4, 70, 'over the cap', 'rollup 60 s', now())",
        batch().range.epoch,
    )
    await connection.close()


def test_readings_without_rows_are_possible():
    assert Readings.empty().rows == 0
    assert Readings.empty().time_us.dtype == np.int64
