from __future__ import annotations

import math
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from line_protocol_parser import parse_line

from cloud_sync.codec.line_protocol import (
    encode_lines,
    escape_measurement,
    escape_tag,
    series_key,
    split_into_bodies,
    validate_tags,
)
from cloud_sync.model.records import SEQ_ABSENT, Batch, BatchRange, Flag, Readings, RecordClass, Series

RANGE = BatchRange("gw-1", UUID(int=7), RecordClass.READING, 1, 1)

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12) | st.text(
    ",= \\#_\"'\n\t\0a", min_size=1, max_size=8
)
singles = st.just(math.nan) | st.floats(
    width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False
)
rows = st.fixed_dictionaries(
    {
        "series": st.integers(0, 2),
        "time_us": st.integers(-9_000_000_000_000_000, 9_000_000_000_000_000),
        "value": st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
        "quality": singles,
        "battery_level": singles,
        "signal_strength": singles,
        "seq": st.just(SEQ_ABSENT) | st.integers(0, 2**62),
        "flags": st.just(0) | st.integers(1, 1023),
    }
)


def batch_of(series: tuple[Series, ...], content: list[dict[str, Any]]) -> Batch:
    columns = [[row[name] for row in content] for name in rows_of_one()]
    types = (np.int32, np.int64, np.float64, np.float32, np.float32, np.float32, np.int64, np.int32)
    return Batch(RANGE, series, Readings(*(np.array(c, t) for c, t in zip(columns, types, strict=True))))


def rows_of_one(**changes: Any) -> dict[str, Any]:
    return {
        "series": 0,
        "time_us": 1_767_225_600_000_001,
        "value": 21.5,
        "quality": math.nan,
        "battery_level": math.nan,
        "signal_strength": math.nan,
        "seq": SEQ_ABSENT,
        "flags": 0,
    } | changes


def one_line(series=("t-17", "temperature"), *, precision="ns", **changes) -> str:
    (line,) = encode_lines(batch_of((Series(*series),), [rows_of_one(**changes)]), precision=precision)
    return line


def carried(text: str, specials: str) -> str:
    """What a reader sees: the escaped form without its escapes."""
    escaped = escape_tag(text) if "=" in specials else escape_measurement(text)
    for special in specials:
        escaped = escaped.replace("\\" + special, special)
    return escaped


@given(
    st.tuples(*[st.tuples(names, names, st.text(max_size=5)) for _ in range(3)]),
    st.lists(rows, min_size=1, max_size=8),
)
def test_an_independent_parser_reads_back_every_column(identities, content):
    series = tuple(Series(sensor, kind, (("location", place),)) for sensor, kind, place in identities)
    written = encode_lines(batch_of(series, content))
    assert len(written) == len(content)
    for line, row in zip(written, content, strict=True):
        parsed = parse_line(line)
        sensor, kind, place = identities[row["series"]]
        tags = {"sensor_id": carried(sensor, ",= ")}
        if place:
            tags["location"] = carried(place, ",= ")
        assert parsed["measurement"] == carried(kind, ", ")
        assert parsed["tags"] == tags
        assert parsed["time"] == row["time_us"] * 1000
        fields = parsed["fields"]
        assert fields.pop("value") == row["value"]
        assert fields.pop("seq", SEQ_ABSENT) == row["seq"]
        assert fields.pop("flags", 0) == row["flags"]
        for name in ("quality", "battery_level", "signal_strength"):
            value = np.float32(fields.pop(name, math.nan))
            assert value.tobytes() == np.float32(row[name]).tobytes() or (
                math.isnan(value) and math.isnan(row[name])
            )
        assert fields == {}


@given(names, names)
def test_different_ordinary_names_stay_different(one, other):
    plain = str.maketrans("", "", "\\\uff3c")
    one, other = one.translate(plain), other.translate(plain)
    if one != other and not {*one, *other} & {chr(0x2400 + code) for code in range(0x22)}:
        assert escape_tag(one) != escape_tag(other)


@given(names)
def test_a_name_never_breaks_a_line_or_ends_in_a_backslash(name):
    for text in (escape_measurement(name), escape_tag(name)):
        assert "\n" not in text
        assert not text.endswith("\\")
        assert "\\\\" not in text
    assert not escape_measurement(name).startswith("#")


def test_a_line_is_measurement_tags_fields_and_time():
    line = one_line(("t,1 7", "air temperature"), quality=98.0, battery_level=0.1, seq=17, flags=Flag.LATE)
    assert line == (
        "air\\ temperature,sensor_id=t\\,1\\ 7 "
        "value=21.5,quality=98.0,battery_level=0.1,seq=17i,flags=32i 1767225600000001000"
    )


@pytest.mark.parametrize(
    ("name", "as_tag"),
    [
        ("a=b", "a\\=b"),
        ("in\\side", "in\\side"),
        ("end\\", "end\uff3c"),
        ("a\\ b", "a\uff3c\\ b"),
        ("a\\\\b", "a\uff3c\\b"),
        ("a\nb\tc", "a\u240ab\u2409c"),
        ('say "hi"', 'say\\ "hi"'),
        ("#1", "#1"),
    ],
)
def test_names_that_need_care(name, as_tag):
    assert escape_tag(name) == as_tag


def test_a_measurement_keeps_equals_signs_and_cannot_look_like_a_comment():
    assert escape_measurement("a=b") == "a=b"
    assert escape_measurement("#1") == "\uff031"
    assert escape_measurement("_hidden") == "_hidden"


def test_half_a_surrogate_pair_does_not_stop_the_batch():
    (body,) = split_into_bodies([one_line(("\ud800", "temperature"))], max_lines=5, max_bytes=1000)
    assert body.startswith(b"temperature,sensor_id=? value")


def test_tags_are_those_asked_for_sorted_and_not_empty():
    series = Series(
        "t", "temperature", (("boot_id", "b"), ("location", "x"), ("manufacturer", ""), ("unit", "C"))
    )
    assert series_key(series) == "temperature,location=x,sensor_id=t,unit=C"
    assert series_key(series, ("boot_id",)) == "temperature,boot_id=b,sensor_id=t"
    assert series_key(series, ()) == "temperature,sensor_id=t"


@pytest.mark.parametrize("name", ["", "time", "sensor_id", "value", "flags", "_x"])
def test_a_name_that_cannot_be_a_tag_is_refused(name):
    with pytest.raises(ValueError, match="cannot be a tag"):
        validate_tags(["location", name])


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.0, "-0.0"), (1e308, "1e+308"), (5e-324, "5e-324"), (0.1, "0.1"), (1e21, "1e+21"), (3.0, "3.0")],
)
def test_values_are_the_shortest_text_that_reads_back(value, text):
    assert f" value={text} " in one_line(value=value)


def test_single_precision_is_printed_as_such_and_keeps_minus_zero():
    line = one_line(quality=np.float32(86.7), signal_strength=-0.0)
    assert ",quality=86.7,signal_strength=-0.0 " in line


@pytest.mark.parametrize(
    ("time_us", "precision", "text"),
    [(0, "ns", "0"), (-1, "ns", "-1000"), (-1, "us", "-1"), (2**62, "ns", str(2**62 * 1000))],
)
def test_times_before_1970_and_beyond_64_bits_of_nanoseconds_are_written(time_us, precision, text):
    assert one_line(time_us=time_us, precision=precision).endswith(f" {text}")


@given(
    st.lists(st.text("ab é", min_size=1, max_size=20), max_size=30),
    st.integers(1, 7),
    st.integers(1, 60),
)
def test_bodies_hold_all_lines_in_order_within_their_bounds(content, max_lines, max_bytes):
    parts = list(split_into_bodies(content, max_lines=max_lines, max_bytes=max_bytes))
    assert b"".join(parts) == "".join(line + "\n" for line in content).encode()
    for part in parts:
        assert part.endswith(b"\n")
        assert part.count(b"\n") <= max_lines
        assert len(part) <= max_bytes or part.count(b"\n") == 1


def test_columns_need_not_be_contiguous():
    content = [rows_of_one(quality=float(n), time_us=n) for n in range(10)]
    batch = batch_of((Series("t", "x"),), content)
    every_other = batch.readings.select(np.arange(10)).select(np.arange(0, 10, 2))
    strided = Readings(*(getattr(batch.readings, name)[::2] for name in rows_of_one()))
    assert encode_lines(Batch(RANGE, batch.series, strided)) == encode_lines(
        Batch(RANGE, batch.series, every_other)
    )


def test_a_long_batch_has_a_line_for_each_of_its_readings_in_order() -> None:
    content = [rows_of_one(time_us=n, seq=n) for n in range(4_500)]
    found = encode_lines(batch_of((Series("t-17", "temperature"),), content), precision="us")
    assert [line.rpartition(" ")[2] for line in found] == [str(n) for n in range(4_500)]
    assert found[4_321] == "temperature,sensor_id=t-17 value=21.5,seq=4321i 4321"
