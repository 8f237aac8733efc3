r"""Line protocol is read back as rows, also where it is torn."""

import gzip

import numpy as np
import pytest

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import GroundTruthWriter, Publish, Reading, SeriesState, load_ground_truth
from firmware_sim.verify.comparison import compare_readings
from firmware_sim.verify.stored_files import parse_line_key, read_line_files

HALL = SeriesState("s 1", "air,temp", ("deg=C", "hall 3", None, "1.0"))
KEY = r"air\,temp,firmware_version=1.0,location=hall\ 3,sensor_id=s\ 1,unit=deg\=C"
LINE = f"{KEY} value=21.5,quality=98.5,seq=7i 1767225600000001000"


@pytest.fixture
def truth(tmp_path):
    with GroundTruthWriter(tmp_path / "truth", "a", {}) as writer:
        reading = Reading(1_767_225_600_000_001, 21.5, quality=98.5, seq=7)
        writer.append(writer.number_state(HALL), reading)
        writer.settle(Publish("t", b"", 0, 1), 0)
    return load_ground_truth(tmp_path / "truth")


def verify(folder, truth, precision="ns"):
    stored = read_line_files(folder, truth, precision=precision, on_rows=lambda _: None)
    return compare_readings(truth, stored), stored


def test_escaped_names_are_read():
    assert parse_line_key(KEY) == (
        "air,temp",
        {"firmware_version": "1.0", "location": "hall 3", "sensor_id": "s 1", "unit": "deg=C"},
    )


def test_a_line_is_found_value_for_value(tmp_path, truth):
    (tmp_path / "x.lp").write_text(LINE + "\n")
    found, stored = verify(tmp_path, truth)
    assert found.clean
    assert found.matched == 1
    assert np.isnan(stored.rows["battery_level"]).all()


def test_other_series_are_foreign_and_unreadable_lines_are_said(tmp_path, truth):
    (tmp_path / "x.lp").write_text(f"{LINE}\ncpu,host=a value=1 1767225600000001000\nnonsense\n")
    found, stored = verify(tmp_path, truth)
    assert (found.foreign, found.matched) == (1, 1)
    assert stored.notes == ["1 lines could not be read"]


def test_microseconds_are_read_as_such(tmp_path, truth):
    (tmp_path / "x.lp").write_text(LINE.removesuffix("000") + "\n")
    assert verify(tmp_path, truth, "us")[0].matched == 1


def test_a_changed_tag_is_an_altered_reading(tmp_path, truth):
    (tmp_path / "x.lp").write_text(LINE.replace("1.0,", "1.1,") + "\n")
    found, _ = verify(tmp_path, truth)
    assert found.altered == 1
    assert "attributes" in found.examples["altered"][0]


@pytest.mark.parametrize("cut", [1, 9, 30])
def test_a_torn_gzip_member_ends_the_file_and_not_the_comparison(tmp_path, truth, cut):
    whole = gzip.compress(f"{LINE}\n".encode())
    (tmp_path / "x.lp.gz").write_bytes(whole + whole[:-cut])
    found, stored = verify(tmp_path, truth)
    assert found.clean
    assert found.matched == 1
    assert "cut short" in stored.notes[0]


def test_a_folder_without_files_is_refused(tmp_path, truth):
    with pytest.raises(SimError, match="no line protocol files"):
        verify(tmp_path / "truth", truth)
