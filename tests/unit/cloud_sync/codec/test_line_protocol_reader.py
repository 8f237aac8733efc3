"""Reading line protocol: what is written here comes back, what others write is read as they mean it."""

from __future__ import annotations

import math
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from line_protocol_parser import parse_line

from cloud_sync.codec import line_protocol
from cloud_sync.codec.line_protocol import LineReader
from cloud_sync.model.reading_builder import ColumnBuilder, InvalidReadingError, Reading
from cloud_sync.model.records import Batch, BatchRange, Readings, RecordClass, Series

RANGE = BatchRange("gw-1", UUID(int=7), RecordClass.READING, 1, 1)
carried = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters='\\#"'), min_size=1, max_size=12
).filter(lambda text: text == text.strip() and not text.startswith("_"))
# The independent parser does not take subnormal numbers.
single = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
doubles = st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)


@st.composite
def batches(draw):
    names = draw(
        st.lists(st.tuples(carried, carried, carried), min_size=1, max_size=4, unique_by=lambda n: n[:2])
    )
    rows = draw(st.integers(1, 6))
    each = [draw(st.integers(0, len(names) - 1)) for _ in range(rows)]

    def column(values, name):
        return np.array([draw(values) for _ in range(rows)], Readings.columns[name])

    maybe = st.one_of(st.just(math.nan), single)
    readings = Readings(
        np.array(each, np.int32),
        column(st.integers(-(2**53), 2**53), "time_us"),
        column(doubles, "value"),
        column(maybe, "quality"),
        column(maybe, "battery_level"),
        column(maybe, "signal_strength"),
        column(st.integers(-1, 2**63 - 1), "seq"),
        column(st.integers(0, 2**31 - 1), "flags"),
    )
    series = tuple(Series(sensor, kind, (("location", place),)) for sensor, kind, place in names)
    return Batch(RANGE, series, readings.in_order())


def rows_of(series, readings):
    names = [(series[n].sensor_id, series[n].sensor_type, series[n].attributes) for n in readings.series]
    columns = (getattr(readings, name).tolist() for name in list(Readings.columns)[1:])
    return sorted(map(repr, zip(names, *columns, strict=True)))


@given(batches())
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back_exactly(batch):
    reader, builder = LineReader("ns"), ColumnBuilder()
    for line in line_protocol.encode_lines(batch, precision="ns"):
        found = reader.read(line)
        assert found is not None
        builder.add(found)

    assert rows_of(*builder.build()) == rows_of(batch.series, batch.readings)
    assert builder.build()[1].rows == 0


@given(batches())
@settings(max_examples=60, deadline=None)
def test_an_independent_parser_reads_the_same(batch):
    for line in line_protocol.encode_lines(batch, precision="us"):
        theirs = parse_line(line)
        ours = LineReader("us").read(line)
        assert ours is not None
        assert (ours.series.sensor_type, ours.series.sensor_id, ours.time_us, ours.value) == (
            theirs["measurement"],
            theirs["tags"]["sensor_id"],
            theirs["time"],
            theirs["fields"]["value"],
        )


@pytest.mark.parametrize(
    ("line", "value", "time_us"),
    [
        ("t,sensor_id=a value=1i 5000", 1.0, 5),
        ("t,sensor_id=a value=12u 5999", 12.0, 5),
        ("t,sensor_id=a value=-1.5e3", -1500.0, None),
        ("t,sensor_id=a value=TRUE -5000", 1.0, -5),
        ("t,sensor_id=a value=f", 0.0, None),
        ('t,sensor_id=a note="x=1,y 2 \\" 3",value=4 6000', 4.0, 6),
        ('t,sensor_id=a value=4,note="ends with 7000"', 4.0, None),
        ("t\\ x\\,y,sensor_id=a\\ b\\=c value=2 7000", 2.0, 7),
    ],
)
def test_lines_of_others_are_read_as_the_reference_says(line, value, time_us):
    found = LineReader("ns").read(line)

    assert isinstance(found, Reading)
    assert (found.value, found.time_us) == (value, time_us)


@given(st.text(max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_is_a_reading_or_a_reason(text):
    reader, builder, reasons = LineReader("ns"), ColumnBuilder(), []
    for line in (text, f"t,sensor_id=a {text}", f"t,{text} value=1 1", f"t,sensor_id=a value={text} 1"):
        try:
            found = reader.read(line)
            if found is not None:
                builder.add(found)
        except InvalidReadingError as fault:
            reasons.append(str(fault))

    assert all(reasons)
