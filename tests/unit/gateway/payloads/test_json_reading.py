from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.payloads.decoder_registry import RuleSet, SingleSeriesDecoder
from gateway.payloads.topics import TopicTemplate


def decode_readings(payload: bytes):
    """What a topic without a rule makes of a payload."""
    decoder = RuleSet(TopicTemplate("sensors/{sensor_id}/{sensor_type}")).decoder_for("sensors/a/t")
    assert isinstance(decoder, SingleSeriesDecoder)
    return decoder.decode(payload, 0)


def values(payload: bytes) -> list[float]:
    readings, faults = decode_readings(payload)
    assert faults == []
    return [r.value for r in readings]


def test_an_object_is_one_reading_and_an_array_is_many():
    assert values(b'{"value": 1.5}') == [1.5]
    assert values(b' [{"value": 1}, {"value": true}, {"value": false}]') == [1, True, False]
    assert values(b"[]") == []


def test_members_that_are_not_known_are_skipped():
    assert values(b'{"value": 1, "colour": {"deep": [1, 2]}, "value2": "x"}') == [1]


@pytest.mark.parametrize(
    ("payload", "reason", "words"),
    [
        (b"", "not_json", "truncated"),
        (b"hello", "not_json", "malformed"),
        (b'{"value": 1', "not_json", "truncated"),
        (b'{"value": NaN}', "not_json", "malformed"),
        (b'{"value": "1"}', "bad_reading", r"\$.value"),
        (b'{"value": null}', "bad_reading", r"\$.value"),
        (b'{"temperature": 1}', "bad_reading", "value"),
        (b'{"value": 1, "ts": {}}', "bad_reading", r"\$.ts"),
        (b'{"value": 1, "quality": "good"}', "bad_reading", r"\$.quality"),
        (b"1.5", "bad_reading", "object"),
        (b'{"value": 1, "location": "\xff"}', "not_json", "utf-8"),
        (b"[" * 100_000, "not_json", ""),
    ],
)
def test_a_bad_payload_is_a_fault_that_says_which_member(payload, reason, words):
    readings, faults = decode_readings(payload)
    assert list(readings) == []
    assert [f.reason for f in faults] == [reason]
    assert words.replace("\\", "").lower() in faults[0].detail.lower()


def test_a_bad_member_of_an_array_costs_only_itself():
    readings, faults = decode_readings(b'[{"value": 1}, {"value": "x"}, {"value": 3}, 7]')
    assert [r.value for r in readings] == [1, 3]
    assert [(f.reason, f.part) for f in faults] == [("bad_reading", b'{"value": "x"}'), ("bad_reading", b"7")]
    assert faults[0].detail.startswith("member 1:")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_value_arrives_as_the_very_same_number(value):
    assert values(json.dumps({"value": value}).encode()) == [value]


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise(payload):
    readings, faults = decode_readings(payload)
    assert list(readings) or faults or payload.strip() == b"[]"
