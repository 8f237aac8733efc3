"""The record of the truth is read back as it was written, whatever was cut off its end."""

import json

import numpy as np
import pytest

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import (
    GroundTruthWriter,
    Publish,
    Reading,
    SeriesState,
    find_repeated_readings,
    load_ground_truth,
    pack_run,
)

HALL = SeriesState("s1", "temperature", ("degC", "hall", None, "1.0"))
ROOF = SeriesState("s1", "temperature", ("degC", "roof", None, "1.1"))
WET = SeriesState("s2", "humidity")


def write_run(folder, run, rows, acks=()):
    with GroundTruthWriter(folder, run, {"command": "test"}) as writer:
        for state, time_us, value in rows:
            reading = Reading(time_us, value, battery_level=50.5, signal_strength=-60.0)
            writer.append(writer.number_state(state), reading)
        for first_row, count, reason_code in acks:
            writer.settle(Publish("t", b"", first_row, count), reason_code)


def test_what_was_written_is_read_back(tmp_path):
    write_run(tmp_path, "a", [(HALL, 10, 21.5), (WET, 11, -0.1), (ROOF, 12, 1e-300)], [(0, 1, 0), (2, 1, 0)])
    truth = load_ground_truth(tmp_path)
    assert truth.states == (HALL, WET, ROOF)
    assert truth.names == (("s1", "temperature"), ("s2", "humidity"))
    assert truth.series.tolist() == [0, 1, 0]
    assert truth.produced["value"].tolist() == [21.5, -0.1, 1e-300]
    assert np.isnan(truth.produced["quality"]).all()
    assert truth.acknowledged.tolist() == [True, False, True]


def test_a_refused_publish_is_not_acknowledged(tmp_path):
    write_run(tmp_path, "a", [(HALL, 10, 1.0), (HALL, 11, 2.0)], [(0, 1, 0x97), (1, 1, 0x10)])
    truth = load_ground_truth(tmp_path)
    assert truth.acknowledged.tolist() == [False, True]
    assert truth.refused.tolist() == [True, False]


def test_runs_of_one_folder_are_read_together(tmp_path):
    write_run(tmp_path, "a", [(HALL, 10, 1.0)], [(0, 1, 0)])
    write_run(tmp_path, "b", [(WET, 20, 2.0), (HALL, 21, 3.0)], [(1, 1, 0)])
    truth = load_ground_truth(tmp_path)
    assert truth.series.tolist() == [0, 1, 0]
    assert truth.acknowledged.tolist() == [True, False, True]


def test_what_was_flushed_is_there_when_the_writer_is_killed(tmp_path):
    writer = GroundTruthWriter(tmp_path, "a", {})
    writer.append(writer.number_state(HALL), Reading(10, 1.0, 1, 1, 1, 1))
    writer.flush()
    writer.append(writer.number_state(WET), Reading(11, 2.0, 1, 1, 1, 2))
    truth = load_ground_truth(tmp_path)
    assert truth.produced["time_us"].tolist() == [10]
    writer.close()
    assert load_ground_truth(tmp_path).rows == 2


@pytest.mark.parametrize("cut", [1, 17, 39])
@pytest.mark.parametrize("kind", ["produced.bin", "acks.bin"])
def test_a_torn_last_record_is_ignored(tmp_path, kind, cut):
    write_run(tmp_path, "a", [(HALL, 10, 1.0), (HALL, 11, 2.0)], [(0, 1, 0), (1, 1, 0)])
    path = tmp_path / f"a.{kind}"
    path.write_bytes(path.read_bytes()[: -min(cut, 23 if kind == "acks.bin" else 39)])
    truth = load_ground_truth(tmp_path)
    assert truth.rows == (1 if kind == "produced.bin" else 2)
    assert truth.acknowledged.sum() == 1


def test_a_torn_last_series_line_is_ignored(tmp_path):
    write_run(tmp_path, "a", [(HALL, 10, 1.0)])
    with (tmp_path / "a.series.jsonl").open("ab") as file:
        file.write(b'{"sensor_id": "s')
    assert load_ground_truth(tmp_path).states == (HALL,)


def test_a_record_of_another_form_is_refused_by_name(tmp_path):
    (tmp_path / "a.series.jsonl").write_text(json.dumps({"form": 2}) + "\n")
    with pytest.raises(SimError, match=r"a\.series\.jsonl: a record of form 2; this release reads form 1"):
        load_ground_truth(tmp_path)


def test_an_empty_folder_is_said_to_be_one(tmp_path):
    with pytest.raises(SimError, match="no record there"):
        load_ground_truth(tmp_path)


def test_repeats_of_a_run_are_found_over_series_states(tmp_path):
    rows = [(HALL, 10, 1.0), (WET, 10, 1.0), (ROOF, 10, 2.0), (HALL, 11, 1.0), (HALL, 10, 1.0)]
    write_run(tmp_path, "a", rows)
    count, examples = find_repeated_readings(tmp_path, "a")
    assert count == 2
    assert examples == [(ROOF, 10), (HALL, 10)]


def test_a_packed_run_is_the_same_and_smaller(tmp_path):
    rows = [(HALL if n % 3 else WET, 10**15 + n * 1_000_000, 20 + n % 7 / 10) for n in range(20_000)]
    acks = [(n, 2, 0) for n in range(0, 10_000, 2)] + [(12_000, 5, 0x97), (12_005, 5, 0)]
    write_run(tmp_path, "a", rows, acks)
    before, size = load_ground_truth(tmp_path), sum(p.stat().st_size for p in tmp_path.iterdir())
    pack_run(tmp_path, "a")
    after = load_ground_truth(tmp_path)
    assert after.produced.tobytes() == before.produced.tobytes()
    assert (after.acknowledged == before.acknowledged).all()
    assert (after.refused == before.refused).all()
    assert after.acknowledged.sum() == 10_005
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < size / 8
    assert find_repeated_readings(tmp_path, "a") == (0, [])


def test_a_packed_run_that_is_cut_short_is_named(tmp_path):
    write_run(tmp_path, "a", [(HALL, 10, 1.0)])
    pack_run(tmp_path, "a")
    path = tmp_path / "a.produced.pack"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SimError, match=r"a\.produced\.pack: it is cut short"):
        load_ground_truth(tmp_path)
