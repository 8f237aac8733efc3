"""Parquet from the file destination: anyone can read it, each batch is durable, the other end loads it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow.parquet
import pytest

from cloud_sync.destinations import parquet
from cloud_sync.destinations.file import FileDestination, FileOptions
from cloud_sync.ingest import file_import
from cloud_sync.timescale.sink import TimescaleSink
from tests.contract.test_timescaledb_sink import expected_rows, stored_rows
from tests.integration.test_ingest_load import NAMES, sent, summed

if TYPE_CHECKING:
    from pathlib import Path


def parquet_in(folder: Path, **options) -> FileDestination:
    return FileDestination("stick", folder, FileOptions(form="parquet", min_free_bytes=0, **options))


async def written(folder: Path, *commits: int, final: bool = True) -> None:
    destination = parquet_in(folder)
    for commit in commits:
        await destination.send(destination.encode(sent(commit)))
    if final:
        await destination.rotate()
    await destination.aclose()


@pytest.fixture
async def sink(postgres_dsn):
    sink = TimescaleSink(postgres_dsn)
    yield sink
    await sink.aclose()


async def load(sink: TimescaleSink, folder: Path) -> file_import.ImportSums:
    return await file_import.import_files(sink, file_import.find_import_files(folder), lambda _words: None)


async def test_every_column_is_in_the_file_and_comes_back_as_it_was(postgres_dsn, sink, tmp_path):
    await written(tmp_path, 1, 2, 3)
    (file,) = tmp_path.glob("*.parquet")
    table = pyarrow.parquet.read_table(file)
    assert table.num_rows == 900
    assert set(table["sensor_id"].to_pylist()) == set(NAMES)
    assert set(table["unit"].to_pylist()) == {"°C"}
    assert str(table.schema.field("time").type) == "timestamp[us, tz=UTC]"
    (entry,) = map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())
    assert (entry["file"], entry["rows"], entry["ranges"]) == (file.name, 900, [[1, 3]])
    assert list(tmp_path.glob("*.open.*")) == []
    assert summed(await load(sink, tmp_path)) == (1, 0, 0, 900, 0, 0, 0)
    assert set(await stored_rows(postgres_dsn)) == set().union(*(expected_rows(sent(n)) for n in (1, 2, 3)))
    assert summed(await load(sink, tmp_path)) == (0, 1, 0, 0, 0, 0, 0)


async def test_a_batch_is_held_before_the_file_is_final_and_loaded_from_it(sink, tmp_path):
    await written(tmp_path, 1, 2, final=False)
    (open_file,) = tmp_path.glob("*.open.batches")
    with open_file.open("ab") as file:
        file.write(b"TGWB torn")
    assert summed(await load(sink, tmp_path)) == (1, 0, 0, 600, 0, 0, 0)
    again = parquet_in(tmp_path)
    assert (await again.send(again.encode(sent(2)))).applied_before
    assert not (await again.send(again.encode(sent(3)))).applied_before
    await again.rotate()
    await again.aclose()
    assert summed(await load(sink, tmp_path)) == (1, 0, 0, 300, 600, 0, 0)


@pytest.mark.parametrize("renamed", [False, True])
async def test_a_stop_while_the_file_becomes_final_is_gone_over_again(tmp_path, monkeypatch, renamed):
    convert = parquet.convert

    def stopped(source, ends, target):
        if renamed:
            convert(source, ends, target)
        else:
            target.with_name(target.name + ".new").write_bytes(b"half")
        raise OSError(5, "stopped here")

    monkeypatch.setattr(parquet, "convert", stopped)
    destination = parquet_in(tmp_path)
    await destination.send(destination.encode(sent(1)))
    with pytest.raises(Exception, match="stopped here"):
        await destination.rotate()
    await destination.aclose()
    monkeypatch.undo()
    await written(tmp_path, 2)
    files = sorted(tmp_path.glob("*.parquet"))
    assert [pyarrow.parquet.read_table(file).num_rows for file in files] == [300, 300]
    listed = [json.loads(line)["file"] for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert listed == [file.name for file in files]


async def test_a_batch_that_cannot_be_read_any_more_is_declared_missing(tmp_path):
    await written(tmp_path, 1, 2, final=False)
    (open_file,) = tmp_path.glob("*.open.batches")
    data = bytearray(open_file.read_bytes())
    data[60] ^= 1
    open_file.write_bytes(data)
    await written(tmp_path, 3)
    missing, final = map(json.loads, (tmp_path / "manifest.jsonl").read_text().splitlines())
    assert (missing["missing"][-5:], missing["ranges"], missing["rows"]) == (".open", [[1, 1]], 300)
    assert (final["ranges"], final["rows"]) == ([[2, 3]], 600)


async def test_what_is_no_parquet_or_lacks_a_column_is_left_and_told(sink, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    pyarrow.parquet.write_table(pyarrow.table({"time": [1], "value": [2.0]}), tmp_path / "b.parquet")
    assert summed(await load(sink, tmp_path)) == (0, 0, 2, 0, 0, 0, 0)
