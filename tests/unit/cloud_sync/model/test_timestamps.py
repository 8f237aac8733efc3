from __future__ import annotations

import pytest

from cloud_sync.model.reading_builder import TimestampError, parse_timestamp


@pytest.mark.parametrize(
    ("ts", "expected_us"),
    [
        (1_700_000_000, 1_700_000_000_000_000),
        (1_700_000_000_123, 1_700_000_000_123_000),
        (1_700_000_000_123_456, 1_700_000_000_123_456),
        (1_700_000_000_123_456_789, 1_700_000_000_123_456),
        (0, 0),
        (-1, -1_000_000),
        (1_700_000_000.25, 1_700_000_000_250_000),
        (1_700_000_000_123.5, 1_700_000_000_123_500),
        (1.7e9, 1_700_000_000_000_000),
        ("1970-01-01T00:00:00Z", 0),
        ("2026-05-01T12:00:00.123456+02:00", 1_777_629_600_123_456),
        ("2026-05-01T10:00:00.123456789Z", 1_777_629_600_123_456),
        ("1969-12-31T23:59:59.999999Z", -1),
    ],
)
def test_an_instant_is_read_in_the_unit_its_size_tells(ts, expected_us):
    assert parse_timestamp(ts) == expected_us


@pytest.mark.parametrize(
    ("ts", "words"),
    [
        ("2026-05-01T12:00:00", "offset"),
        ("yesterday", "RFC 3339"),
        ("", "RFC 3339"),
        (float("nan"), "no time"),
        (float("inf"), "no time"),
        (10**30, "1677..2262"),
        ("9999-01-01T00:00:00Z", "1677..2262"),
    ],
)
def test_what_names_no_instant_is_refused_with_the_reason(ts, words):
    with pytest.raises(TimestampError, match=words):
        parse_timestamp(ts)
