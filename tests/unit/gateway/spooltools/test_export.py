from __future__ import annotations

import csv
import gzip
import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet
import pytest

from cloud_sync.model.records import Flag, Readings, Series
from gateway.humanize import escape_bytes, escape_text, parse_time_us
from gateway.spool import segment_reader
from gateway.spool.database import open_spool_read_only
from gateway.spooltools import reading_export
from gateway.spooltools.reading_export import ExportError, find_file_ending, open_file_writer
from gateway.spooltools.reading_selection import (
    ReadingFilter,
    ReadSummary,
    SelectedSeries,
    group_into_runs,
    read_selected,
)
from tests.support.open_spool import NOW_US, open_spool

_HOSTILE = 'tank\x1b[2J\u202e"1",\r\n2'


def rows(first: int, count: int):
    return [(f"s{i % 3}", i, float(i)) for i in range(first, first + count)]


def taken(path, selection: ReadingFilter = ReadingFilter(), *, newest_first: bool = False):  # noqa: B008 - an immutable value
    """(sensor_id, time_us, value) of what is selected, and what was found."""
    found = ReadSummary()
    with open_spool_read_only(path) as connection:
        names = SelectedSeries(connection, selection)
        parts = list(read_selected(connection, path, selection, names, found, newest_first=newest_first))
        return [row for part in parts for row in tuples(part, names)], found


def tuples(part: Readings, names):
    columns = part.series.tolist(), part.time_us.tolist(), part.value.tolist()
    return [(names.catalog[s].sensor_id, t, v) for s, t, v in zip(*columns, strict=True)]


@pytest.fixture
async def full_row(tmp_path):
    """A spool of two readings: one that says everything, one that says nothing."""
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        full = spool.catalog.assign_number(
            Series(
                _HOSTILE, "temperature", (("firmware_version", "1.2"), ("location", "bärn"), ("unit", "°C"))
            )
        )
        bare = spool.catalog.assign_number(Series("bare", "t"))
        readings = Readings(
            np.array([full, bare], np.int32),
            np.array([NOW_US + 1, -1], np.int64),
            np.array([0.1, -5e-324]),
            np.array([97.3, np.nan], np.float32),
            np.array([0.1, np.nan], np.float32),
            np.array([-71, np.nan], np.float32),
            np.array([(1 << 63) - 1, -1], np.int64),
            np.array([Flag.LATE | Flag.SPIKE, 0], np.int32),
        )
        await spool.appender.append(readings, [], now_us=NOW_US)
    return path


def exported(path, out):
    with open_spool_read_only(path) as connection:
        names = SelectedSeries(connection, ReadingFilter())
        with open_file_writer(out) as write:
            for part in group_into_runs(
                read_selected(connection, path, ReadingFilter(), names, ReadSummary())
            ):
                write(part, names.catalog)
    return out


async def test_every_form_holds_the_same_readings_value_for_value(tmp_path, full_row):
    expected = [
        {
            "time": "2026-09-21T14:13:20.000001Z",
            "sensor_id": _HOSTILE,
            "sensor_type": "temperature",
            "value": 0.1,
            "unit": "°C",
            "quality": np.float32(97.3),
            "battery_level": np.float32(0.1),
            "signal_strength": -71,
            "location": "bärn",
            "manufacturer": None,
            "firmware_version": "1.2",
            "seq": (1 << 63) - 1,
            "flags": int(Flag.LATE | Flag.SPIKE),
        },
        dict.fromkeys(reading_export.EXPORT_COLUMNS)
        | {
            "time": "1969-12-31T23:59:59.999999Z",
            "sensor_id": "bare",
            "sensor_type": "t",
            "value": -5e-324,
            "flags": 0,
        },
    ]
    parquet = pyarrow.parquet.read_table(exported(full_row, tmp_path / "o.parquet"))
    assert tuple(parquet.column_names) == reading_export.EXPORT_COLUMNS
    assert [
        row | {"time": row["time"].astimezone(UTC).isoformat().replace("+00:00", "Z")}
        for row in parquet.to_pylist()
    ] == expected
    with gzip.open(exported(full_row, tmp_path / "o.jsonl.gz"), "rt") as lines:
        assert [_single(json.loads(line)) for line in lines] == expected
    with exported(full_row, tmp_path / "o.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [row["sensor_id"] for row in read] == [_HOSTILE, "bare"]
    assert [float(row["value"]) for row in read] == [0.1, -5e-324]
    assert [row["quality"] for row in read] == ["97.3", ""]
    assert [row["seq"] for row in read] == [str((1 << 63) - 1), ""]


def _single(row):
    """JSON has only doubles: what is single in the spool is compared as such."""
    members = ("quality", "battery_level", "signal_strength")
    return row | {name: None if row[name] is None else np.float32(row[name]) for name in members}


async def test_a_table_for_a_person_holds_no_control_character(full_row):
    with open_spool_read_only(full_row) as connection:
        names = SelectedSeries(connection, ReadingFilter())
        (part,) = read_selected(connection, full_row, ReadingFilter(), names, ReadSummary())
        cells = [cell for row in reading_export.format_table_rows(part, names.catalog) for cell in row]
        printable = reading_export.format_csv(part, names.catalog, printable=True)
    assert all(cell.isprintable() for cell in cells)
    assert "late,spike" in cells
    assert "\x1b" not in printable


async def test_times_and_series_are_selected_exactly(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        for start in range(0, 100, 10):
            await spool.append(rows(start, 10))
    got, _ = taken(path, ReadingFilter(since_us=15, until_us=35))
    assert sorted(t for _, t, _ in got) == list(range(15, 35))
    for patterns, sensors in (
        (("s1/t",), {"s1"}),
        (("s1",), {"s1"}),
        (("s[12]/*",), {"s1", "s2"}),
        (("s?", "x"), {"s0", "s1", "s2"}),
        (("s1/other",), set()),
        (("S1",), set()),
    ):
        got, found = taken(path, ReadingFilter(patterns=patterns))
        assert {sensor for sensor, _, _ in got} == sensors
        assert found.rows == len(got)


@pytest.mark.parametrize("newest_first", [False, True])
@pytest.mark.parametrize("pause", range(1, 40, 6))
async def test_each_reading_comes_once_though_compaction_merges_meanwhile(
    tmp_path, monkeypatch, newest_first, pause
):
    monkeypatch.setattr(segment_reader, "_LOG_GROWTH_BYTES", -1)  # a new view after each segment
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        for start in range(0, 200, 5):
            await spool.append(rows(start, 5))
        with open_spool_read_only(path) as connection:
            names = SelectedSeries(connection, ReadingFilter())
            parts = read_selected(
                connection, path, ReadingFilter(), names, ReadSummary(), newest_first=newest_first
            )
            got = [row for _ in range(pause) for row in tuples(next(parts), names)]
            assert await spool.compaction.compact_once(everything=True)
            got += [row for part in parts for row in tuples(part, names)]
    assert sorted(got, key=lambda row: row[1]) == rows(0, 200)


async def test_readings_that_come_in_meanwhile_are_exported_with_their_new_series(tmp_path, monkeypatch):
    monkeypatch.setattr(segment_reader, "_LOG_GROWTH_BYTES", -1)
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        await spool.append(rows(0, 5))
        await spool.append(rows(5, 5))
        with open_spool_read_only(path) as connection:
            names = SelectedSeries(connection, ReadingFilter())
            parts = read_selected(connection, path, ReadingFilter(), names, ReadSummary())
            next(parts)
            await spool.append([("newcomer", 99, 1.0)])
            got = [row for part in parts for row in tuples(part, names)]
    assert ("newcomer", 99, 1.0) in got


async def test_a_damaged_segment_is_left_out_and_named(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        for start in range(0, 30, 10):
            await spool.append(rows(start, 10))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE segment SET block = zeroblob(99) WHERE last_commit = 2")
    got, found = taken(path)
    assert sorted(t for _, t, _ in got) == [*range(10), *range(20, 30)]
    assert found.damaged_rows == 10
    assert found.damaged == ["reading segment 2: not a column block"]


def test_a_file_appears_whole_or_not_at_all_and_replaces_nothing_unasked(tmp_path):
    out = tmp_path / "o.csv"
    with pytest.raises(RuntimeError), open_file_writer(out):
        raise RuntimeError("half way")
    assert list(tmp_path.iterdir()) == []
    out.write_text("precious")
    with pytest.raises(ExportError, match="exists"), open_file_writer(out):
        pass
    assert out.read_text() == "precious"
    with open_file_writer(out, replace=True):
        pass
    assert out.read_text().startswith("time,sensor_id,")
    with pytest.raises(ExportError, match="No such file"), open_file_writer(tmp_path / "missing" / "o.csv"):
        pass


def test_the_form_follows_from_the_names_end():
    assert [find_file_ending(out) for out in ("a.csv", "a.csv.gz", "a.jsonl", "b.parquet", "-", "-.gz")] == [
        *(".csv", ".csv.gz", ".jsonl", ".parquet", ".csv", ".csv.gz")
    ]
    with pytest.raises(ExportError, match=r"ends in .*parquet"):
        find_file_ending("a.xlsx")


def test_moments_are_read_as_people_write_them():
    now = 1_000_000_000_000_000
    assert parse_time_us("now", now_us=now) == now
    assert parse_time_us("6h", now_us=now) == now - 6 * 3600 * 1_000_000
    assert parse_time_us("1.5 min", now_us=now) == now - 90 * 1_000_000
    at = round(datetime(2026, 5, 1, 12, tzinfo=UTC).timestamp() * 1e6)
    for text in ("2026-05-01T12:00", "2026-05-01 12:00:00Z", "2026-05-01T14:00:00+02:00"):
        assert parse_time_us(text, now_us=now) == at
    assert parse_time_us("2026-05-01", now_us=now) == at - 12 * 3600 * 1_000_000
    for text in ("", "yesterday", "6", "6y", "2026-13-01"):
        with pytest.raises(ValueError, match="is not a time"):
            parse_time_us(text, now_us=now)


def test_what_strangers_wrote_is_printable_and_bounded():
    assert escape_text("a\x1b[31mb\n\u202e\ud800°") == r"a\x1b[31mb\n\u202e\ud800°"
    assert escape_bytes(b"ok \xff\x00") == r"ok \xff\x00"
    assert escape_text("abcdef", 4) == "abc…"
    assert len(escape_bytes(b"\x00" * 1000, 20)) == 20
