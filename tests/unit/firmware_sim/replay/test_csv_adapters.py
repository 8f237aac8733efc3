"""Recordings in Parquet and line protocol are read like CSV; several go out at once, again and again,
moved in time.
"""

import gzip
import json
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from pyarrow import parquet

from firmware_sim.commands.replay import parse_shift
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import load_ground_truth
from firmware_sim.replay.column_map import ColumnOptions, detect_columns
from firmware_sim.replay.player import (
    RecordingCounters,
    TimeExtent,
    find_time_extent,
    merge_recordings,
    read_recording,
)
from tests.unit.firmware_sim.replay.test_recordings import read as read_rows

AT_US = 1_767_225_600_000_000


def read(path, **options):
    counters = RecordingCounters()
    return list(read_recording(path, detect_columns(path, ColumnOptions(**options)), counters)), counters


def test_parquet_is_read_value_for_value(tmp_path):
    path = tmp_path / "plant.parquet"
    table = pa.table(
        {
            "time": pa.array(
                [datetime(2026, 1, 1, tzinfo=UTC), None], pa.timestamp("ns", tz="Europe/Berlin")
            ),
            "sensor_id": ["s1", "s2"],
            "sensor_type": ["temperature", "humidity"],
            "value": [0.1 + 0.2, 5.0],
            "quality": pa.array([97.5, None], pa.float32()),
            "unit": ["degC", None],
        }
    )
    parquet.write_table(table, path)
    readings, counters = read(path)
    (reading,) = readings
    assert (reading.state[:2], reading.reading.time_us, reading.reading.value) == (
        ("s1", "temperature"),
        AT_US,
        0.1 + 0.2,
    )
    assert (reading.reading.quality, reading.state.attributes[0]) == (97.5, "degC")
    assert counters.skipped == 1


def test_wide_parquet_takes_each_column_of_numbers(tmp_path):
    path = tmp_path / "roof.parquet"
    parquet.write_table(pa.table({"ts": [AT_US], "T": [1.5], "state": ["on"], "rh": [40]}), path)
    rows, _ = read_rows(path)
    assert rows == [("roof", "T", AT_US, 1.5), ("roof", "rh", AT_US, 40.0)]


@pytest.mark.parametrize("suffix", [".lp", ".lp.gz"])
def test_line_protocol_is_read_with_its_tags_and_other_fields_as_types_of_their_own(tmp_path, suffix):
    lines = (
        "# a comment\n"
        r"air\ temp,sensor_id=s\ 1,location=hall\ 3,unit=degC "
        "value=21.5,quality=98,seq=7i 1767225600000001999\n"
        'cpu,host=a,zone=b user=1.5,cores=4i,up=true,name="x, y=1 z" 1767225600000002000\n'
        "no time value=1\n"
    )
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(lines.encode()) if suffix.endswith("gz") else lines.encode())
    readings, counters = read(path)
    assert [
        (r.state.sensor_id, r.state.sensor_type, r.reading.time_us, r.reading.value) for r in readings
    ] == [
        ("s 1", "air temp", AT_US + 1, 21.5),
        ("a_b", "cpu_user", AT_US + 2, 1.5),
        ("a_b", "cpu_cores", AT_US + 2, 4.0),
        ("a_b", "cpu_up", AT_US + 2, 1.0),
    ]
    assert (readings[0].reading.seq, readings[0].reading.quality) == (7, 98.0)
    assert readings[0].state.attributes[:2] == ("degC", "hall 3")
    assert (counters.skipped, counters.cut_times) == (1, 1)


def test_a_parquet_file_that_is_none_is_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(SimError, match=r"x\.parquet"):
        read(tmp_path / "x.parquet")
    with pytest.raises(SimError, match="No such file"):
        read(tmp_path / "y.parquet")


def write(tmp_path, name, seconds):
    path = tmp_path / name
    path.write_text("time,value\n" + "".join(f"2026-01-01T00:00:{s:02d},{s}\n" for s in seconds))
    return path, detect_columns(path, ColumnOptions())


def test_files_go_together_by_time_or_in_turn(tmp_path):
    recordings = [write(tmp_path, "a.csv", [0, 10, 20]), write(tmp_path, "b.csv", [5, 6])]

    def order(**how):
        parts = [read_recording(path, mapping, RecordingCounters()) for path, mapping in recordings]
        return [(number, r.reading.value) for number, r in merge_recordings(parts, **how)]

    assert order(by_time=True) == [(0, 0), (1, 5), (1, 6), (0, 10), (0, 20)]
    assert order(by_time=False) == [(0, 0), (1, 5), (0, 10), (1, 6), (0, 20)]
    extent = find_time_extent(recordings)
    assert extent == TimeExtent(AT_US, AT_US + 20_000_000, 5)
    assert extent.period_us == 25_000_000


@pytest.mark.parametrize(
    ("text", "us"), [("", 0), ("7d", 604_800_000_000), ("-90m", -5_400_000_000), ("+1.5", 1_500_000)]
)
def test_a_shift_has_a_sign_and_a_unit(text, us):
    assert parse_shift(text) == us


def test_a_shift_that_is_none_is_refused():
    with pytest.raises(SimError, match="--shift soon"):
        parse_shift("soon")


def test_two_files_in_loops_arrive_shifted_and_whole(mosquitto, tmp_path):
    from tests.support.programs import run  # noqa: PLC0415 - used here only

    for name in ("a", "b"):
        write(tmp_path, f"{name}.csv", [0, 10, 20])
    done = run(
        *("sim", "replay", str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--broker", mosquitto.url),
        *("--truth", str(tmp_path / "t"), "--json", "--quiet", "--loop", "3", "--shift=-1d"),
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["sent"], outcome["acknowledged"], outcome["loops"], outcome["repeated"]) == (18, 18, 3, 0)
    truth = load_ground_truth(tmp_path / "t")
    times = sorted({int(t) for t in truth.produced["time_us"]})
    day_before = AT_US - 86_400_000_000
    assert times == [day_before + loop * 24_000_000 + s * 1_000_000 for loop in range(3) for s in (0, 10, 20)]
