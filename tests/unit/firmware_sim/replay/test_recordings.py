"""Recordings of many shapes are understood without options, and bad rows are named."""

import gzip
import math

import pytest

from firmware_sim.errors import SimError
from firmware_sim.replay.column_map import ColumnOptions, describe_column_map, detect_columns
from firmware_sim.replay.player import RecordingCounters, read_recording


def read(path, **options):
    mapping = detect_columns(path, ColumnOptions(**options))
    counters = RecordingCounters()
    readings = list(read_recording(path, mapping, counters))
    return [
        (r.state.sensor_id, r.state.sensor_type, r.reading.time_us, r.reading.value) for r in readings
    ], counters


def write(tmp_path, text, name="plant.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def test_long_form_with_known_names(tmp_path):
    path = write(
        tmp_path,
        "timestamp,sensor_id,sensor_type,value\n1769862605,s1,temperature,21.5\n1769862606,s2,hum,4e1\n",
    )
    assert read(path)[0] == [
        ("s1", "temperature", 1_769_862_605_000_000, 21.5),
        ("s2", "hum", 1_769_862_606_000_000, 40.0),
    ]


def test_wide_form_takes_each_column_of_numbers_and_leaves_gaps_out(tmp_path):
    path = write(tmp_path, "time,T (degC),state,rh\n2026-01-01,1.5,on,NA\n2026-01-02,,off,40\n")
    readings, counters = read(path)
    assert [(sensor, kind, value) for sensor, kind, _, value in readings] == [
        ("plant", "T (degC)", 1.5),
        ("plant", "rh", 40.0),
    ]
    assert (counters.rows, counters.readings, counters.empty_cells, counters.skipped) == (2, 2, 2, 0)


def test_bom_semicolons_decimal_commas_crlf_and_trailing_delimiters(tmp_path):
    path = write(
        tmp_path,
        "\ufeffDate Time;p;T;\r\n01.01.2009 00:10:00;996,52;-8,02;\r\n\r\n"
        "01.01.2009 00:20:00;996,57;-8,41;\r\n;;;\r\n",
    )
    readings, counters = read(path)
    assert [value for *_, value in readings] == [996.52, -8.02, 996.57, -8.41]
    assert readings[0][2] == 1_230_768_600_000_000
    assert counters.rows == 2


def test_quoted_cells_with_delimiters_and_newlines_keep_line_numbers_right(tmp_path):
    path = write(tmp_path, 'time,sensor,value\n"2026-01-01","a,\nb",1\n2026-01-02,c,x\n')
    readings, counters = read(path)
    assert readings == [("a,_b", "value", 1_767_225_600_000_000, 1.0)]
    assert counters.reasons == [f"{path}:4: column 'value': 'x' is not a number"]


def test_date_and_time_in_two_columns_are_joined(tmp_path):
    path = write(tmp_path, "Date,Time,value\n2026-01-01,00:00:01,1\n")
    assert read(path)[0][0][2] == 1_767_225_601_000_000
    path = write(tmp_path, "d;t;value\n10/03/2004;18.00.00;1\n")
    readings, _ = read(path, time_column="d,t", time_format="%d/%m/%Y %H.%M.%S")
    assert readings[0][2] == 1_078_941_600_000_000


def test_an_unusual_name_of_the_time_column_is_found_by_its_cells(tmp_path):
    path = write(tmp_path, "id,noted_date,temp\nx1,2026-01-01 00:00,5\nx2,2026-01-01 00:01,6\n")
    assert read(path)[0] == [
        ("plant", "temp", 1_767_225_600_000_000, 5.0),
        ("plant", "temp", 1_767_225_660_000_000, 6.0),
    ]


def test_options_win_over_what_would_be_found(tmp_path):
    path = write(tmp_path, "time,when,sensor,type,value,other\n1,1769862605000,a,b,3,4\n")
    readings, _ = read(path, time_column="WHEN", sensor_id="x/y", sensor_type="t#", value_column="other")
    assert readings == [("x_y", "t_", 1_769_862_605_000_000, 4.0)]
    readings, _ = read(path, time_column="when", value_columns="value,other")
    assert [(kind, value) for _, kind, _, value in readings] == [("value", 3.0), ("other", 4.0)]


def test_measures_and_attributes_are_taken_where_their_columns_are(tmp_path):
    path = write(
        tmp_path, "ts,device,value,quality,battery,rssi,unit,room\n1769862605,a,1,98.5,,-70,degC,hall\n"
    )
    mapping = detect_columns(path, ColumnOptions())
    (reading,) = read_recording(path, mapping, RecordingCounters())
    assert reading.reading.quality == 98.5
    assert math.isnan(reading.reading.battery_level)
    assert reading.reading.signal_strength == -70
    assert reading.state.attributes == ("degC", "hall", None, None)


def test_a_file_without_header_has_numbered_columns(tmp_path):
    path = write(tmp_path, "1769862605,5\n1769862606,6\n")
    readings, counters = read(path, no_header=True)
    assert [(kind, value) for _, kind, _, value in readings] == [("2", 5.0), ("2", 6.0)]
    assert counters.rows == 2


def test_gzip_comments_and_skipped_lines(tmp_path):
    path = tmp_path / "plant.csv.gz"
    path.write_bytes(gzip.compress(b"exported by X\n# a comment\n\ntime,value\n2026-01-01,1\nbad,2\n"))
    readings, counters = read(path, skip_lines=1)
    assert readings == [("plant", "value", 1_767_225_600_000_000, 1.0)]
    assert counters.reasons[0].startswith(f"{path}:6: time 'bad'")


def test_every_bad_row_is_named_with_its_line_and_the_rest_is_read(tmp_path):
    path = write(
        tmp_path,
        "time,value\n2026-01-01,1\n2026-01-02,x\nnever,3\n2026-01-04,4,5\n,6\n2026-01-05\n2026-01-06,7\n",
    )
    readings, counters = read(path)
    assert [value for *_, value in readings] == [1.0, 7.0]
    assert [reason.split(": ", 1)[0].rsplit(":", 1)[1] for reason in counters.reasons] == ["3", "4", "5", "6"]
    assert counters.skipped == 4
    assert counters.empty_cells == 1


def test_an_empty_file_and_a_file_without_times_or_numbers_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(SimError, match="the file is empty"):
        read(write(tmp_path, "\n\n"))
    with pytest.raises(
        SimError, match=r"no column holds times; use --time-column. The columns are: 'a', 'b'"
    ):
        read(write(tmp_path, "a,b\nx,y\n"))
    with pytest.raises(SimError, match="no column holds numbers; use --value-column"):
        read(write(tmp_path, "time,b\n2026-01-01,y\n"))
    with pytest.raises(SimError, match=r"there is no column 'c'; use --value-column"):
        read(write(tmp_path, "time,b\n2026-01-01,1\n"), value_column="c")
    with pytest.raises(SimError, match="No such file"):
        read(tmp_path / "none.csv")


def test_another_encoding_is_asked_for_and_then_read(tmp_path):
    path = write(tmp_path, "time,T \u00b0C\n2026-01-01,1\n", encoding="latin-1")
    with pytest.raises(SimError, match="--encoding latin-1"):
        read(path)
    assert read(path, encoding="latin-1")[0][0][1] == "T \u00b0C"


def test_the_description_names_every_column(tmp_path):
    path = write(tmp_path, "time,sensor,value,comment\n2026-01-01,a,1,x\n")
    text = describe_column_map(path, detect_columns(path, ColumnOptions()))
    assert "time: column 'time'" in text
    assert "sensor_id: column 'sensor'" in text
    assert "not used: 'comment'" in text
