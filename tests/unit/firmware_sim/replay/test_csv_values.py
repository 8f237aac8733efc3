"""Cells of recordings are read exactly, or refused with what was expected."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_sim.replay.csv_values import CellError, is_missing, parse_number, parse_time_us

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MOMENT = int((datetime(2026, 1, 31, 12, 30, 5, 123456, tzinfo=UTC) - EPOCH) / timedelta(microseconds=1))
SECOND = MOMENT - 123456


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-01-31T12:30:05.123456Z", MOMENT),
        ("2026-01-31 12:30:05.123456", MOMENT),
        ("2026-01-31T13:30:05.123456+01:00", MOMENT),
        ("2026-01-31T13:30:05,123456+0100", MOMENT),
        ("2026-01-31 05:30:05.123456 -07", MOMENT),
        ("2026-01-31 12:30:05 UTC", SECOND),
        ("2026-01-31 12:30:05.5", SECOND + 500_000),
        ("2026/1/31 12:30:05", SECOND),
        ("31.01.2026 12:30:05", SECOND),
        ("2026-01-31 12:30", SECOND - 5_000_000),
        ("2026-01-31", SECOND - (12 * 3600 + 30 * 60 + 5) * 1_000_000),
        ("20260131T123005Z", SECOND),
        ("1769862605", SECOND),
        ("1769862605.123456", MOMENT),
        ("1.769862605123456e9", MOMENT),
        ("1769862605123", SECOND + 123_000),
        ("1769862605123456", MOMENT),
        ("1769862605123456000", MOMENT),
    ],
)
def test_times_are_recognised(text, expected):
    assert parse_time_us(text, "auto") == (expected, False)


@pytest.mark.parametrize(
    ("text", "time_format"),
    [
        ("2026-01-31T12:30:05.123456789Z", "auto"),
        ("1769862605.1234567", "s"),
        ("1769862605123456999", "ns"),
        ("1769862605123.4569", "ms"),
    ],
)
def test_digits_below_a_microsecond_are_cut_and_that_is_told(text, time_format):
    assert parse_time_us(text, time_format) == (MOMENT, True)


def test_a_time_before_1970_is_cut_downwards():
    assert parse_time_us("-0.0000001", "s") == (-1, True)


@pytest.mark.parametrize(
    ("text", "time_format", "expected"),
    [
        ("5", "s", 5_000_000),
        ("5", "ms", 5_000),
        ("5", "us", 5),
        ("31/01/2026 12:30:05", "%d/%m/%Y %H:%M:%S", SECOND),
        ("31/01/2026 12:30:05 +0100", "%d/%m/%Y %H:%M:%S %z", SECOND - 3_600_000_000),
    ],
)
def test_a_stated_format_is_followed(text, time_format, expected):
    assert parse_time_us(text, time_format) == (expected, False)


@pytest.mark.parametrize(
    ("text", "time_format", "words"),
    [
        ("", "auto", "no time"),
        ("yesterday", "auto", "neither ISO 8601 nor a number"),
        ("31/01/2026 12:30", "auto", "use --time-format"),
        ("17", "auto", "too small"),
        ("2026-02-30", "auto", "day"),
        ("2026-01-31T25:00:00", "auto", "hour"),
        ("inf", "s", "not a number"),
        ("1e30", "s", "after the year 9999"),
        ("2026-01-31", "%d/%m/%Y", "does not follow"),
    ],
)
def test_what_is_no_time_is_refused_in_words(text, time_format, words):
    with pytest.raises(CellError, match=words):
        parse_time_us(text, time_format)


@given(
    st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1)),  # noqa: DTZ001 - the zone is added below
    st.integers(-14 * 60, 14 * 60),
)
def test_every_iso_time_is_exact(moment, offset_min):
    aware = moment.replace(tzinfo=timezone(timedelta(minutes=offset_min)))
    assert parse_time_us(aware.isoformat(), "auto") == ((aware - EPOCH) // timedelta(microseconds=1), False)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_arrives_as_it_was(number):
    assert parse_number(repr(number), ".") == number
    assert parse_number(repr(number).replace(".", ","), ",") == number


@pytest.mark.parametrize("text", ["abc", "1_000", "inf", "0x10", "1e999", "1,5", "12 C", "nan"])
def test_what_is_no_finite_number_is_refused(text):
    with pytest.raises(CellError):
        parse_number(text, ".")


def test_true_and_false_are_one_and_zero():
    assert [parse_number(text, ".") for text in ("true", "False", " TRUE ")] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("text", ["", "  ", "NA", "NaN", "null", "-", "None"])
def test_missing_values_are_known_in_their_usual_spellings(text):
    assert is_missing(text)
