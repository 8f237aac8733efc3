"""Each payload shape: what good payloads become, and what every kind of bad one costs."""

from __future__ import annotations

import gzip
import math

import msgspec
import pytest

from cloud_sync.model.records import Flag
from gateway.payloads.decoder_registry import decode_payload
from gateway.payloads.measurement import FAULTS_MAX
from gateway.payloads.rule import FieldConversion, PayloadRule

NOW_US = 1_790_000_000_000_000


def measured(rule, payload, topic="plant/m1"):
    """Readings as (sensor_id, sensor_type, value, time_us); no faults."""
    found, faults = decode_payload(payload, topic, rule, now_us=NOW_US)
    assert [(f.reason, f.detail) for f in faults] == []
    return [(*m.name, m.value, m.time_us) for m in found]


def both(rule, payload, topic="plant/m1"):
    """Readings as (sensor_type, value), and faults as (reason, detail)."""
    found, faults = decode_payload(payload, topic, rule, now_us=NOW_US)
    return [(m.name.sensor_type, m.value) for m in found], [(f.reason, f.detail) for f in faults]


FIELDS = PayloadRule("plant/{sensor_id}", "fields")


# fields


def test_every_number_and_boolean_of_an_object_is_a_reading_by_its_dotted_path():
    payload = b'{"t": 21.5, "door": {"open": true, "who": "x"}, "phases": [{"w": 1}, {"w": 2}], "n": null}'
    assert measured(FIELDS, payload) == [
        ("m1", "t", 21.5, None),
        ("m1", "door.open", 1.0, None),
        ("m1", "phases.0.w", 1.0, None),
        ("m1", "phases.1.w", 2.0, None),
    ]


def test_members_are_renamed_scaled_mapped_left_out_and_given_units():
    rule = PayloadRule(
        "plant/{sensor_id}",
        "fields",
        include=("t10", "door*", "text"),
        exclude=("door.count",),
        members={
            "t10": FieldConversion(name="temperature", unit="degC", scale=0.1, offset=-1),
            "door.state": FieldConversion(values={"open": 1, "closed": 0}),
        },
        unit="1",
    )
    payload = b'{"t10": 215, "door": {"state": "open", "count": 7}, "text": "4.5", "other": 1}'
    found, faults = decode_payload(payload, "plant/m1", rule, now_us=NOW_US)
    assert faults == []
    assert [(m.name.sensor_type, m.value, m.unit) for m in found] == [
        ("temperature", pytest.approx(20.5), "degC"),
        ("door.state", 1.0, "1"),
        ("text", 4.5, "1"),
    ]


def test_companions_go_with_every_reading_and_are_none_themselves():
    rule = PayloadRule(
        "plant/{sensor_id}",
        "fields",
        companions={
            "quality": "q",
            "battery_level": "sys.bat",
            "signal_strength": "rssi",
            "seq": "n",
            "firmware_version": "fw",
        },
    )
    payload = b'{"t": 1, "q": 90, "sys": {"bat": 55.5}, "rssi": -70, "n": 8, "fw": 3}'
    (m,) = decode_payload(payload, "plant/m1", rule, now_us=NOW_US)[0]
    assert (m.quality, m.battery_level, m.signal_strength, m.seq, m.firmware_version) == (
        90,
        55.5,
        -70,
        8,
        "3",
    )


@pytest.mark.parametrize(
    ("unit", "zone", "said", "expected_us"),
    [
        ("auto", None, b"1700000000", 1_700_000_000_000_000),
        ("auto", None, b'"2023-11-14T22:13:20Z"', 1_700_000_000_000_000),
        ("auto", None, b'"1700000000"', 1_700_000_000_000_000),
        ("ms", None, b"1700000000000", 1_700_000_000_000_000),
        ("ms", None, b"5", 5_000),
        ("s", None, b"1700000000.25", 1_700_000_000_250_000),
        ("us", None, b"7", 7),
        ("ns", None, b"7999", 7),
        ("auto", "Europe/Berlin", b'"2023-11-14T23:13:20"', 1_700_000_000_000_000),
        ("s", None, b"null", None),
    ],
)
def test_times_are_read_in_the_unit_and_zone_that_the_rule_says(unit, zone, said, expected_us):
    from zoneinfo import ZoneInfo  # noqa: PLC0415 - of this test only

    rule = PayloadRule(
        "plant/{sensor_id}",
        "fields",
        time="at",
        time_unit=unit,
        time_zone=None if zone is None else ZoneInfo(zone),
    )
    assert measured(rule, b'{"t": 1, "at": %s}' % said) == [("m1", "t", 1.0, expected_us)]


def test_an_array_of_records_of_several_devices_is_taken_apart():
    rule = PayloadRule("plant/+", "fields", sensor_id="{dev.id}", sensor_type="{kind}", include=("v",))
    payload = b'[{"dev": {"id": "a"}, "kind": "t", "v": 1}, {"dev": {"id": 7}, "kind": "h", "v": 2}]'
    assert measured(rule, payload) == [("a", "t", 1.0, None), ("7", "h", 2.0, None)]


MAPPED = PayloadRule(
    "plant/{sensor_id}",
    "fields",
    time="at",
    companions={"quality": "q", "seq": "n"},
    members={
        "state": FieldConversion(values={"open": 1, "closed": 0}),
        "t": FieldConversion(),
        "big": FieldConversion(scale=1e300),
    },
)


@pytest.mark.parametrize(
    ("payload", "survivors", "reason", "words"),
    [
        (b"", 0, "not_json", "truncated"),
        (b"\xff{", 0, "not_json", ""),
        (b'{"t": NaN}', 0, "not_json", "malformed"),
        (b'{"t": "\xff"}', 0, "not_json", "utf-8"),
        (b"21.5", 0, "bad_reading", "expected an object, found float"),
        (b"null", 0, "bad_reading", "expected an object"),
        (b'{"s": "x"}', 0, "no_measurement", "under this rule: s"),
        (b"{}", 0, "no_measurement", "no members"),
        (b'{"t": "warm", "h": 1}', 1, "bad_member", "t: expected a number, found 'warm'"),
        (b'{"state": "ajar", "h": 1}', 1, "bad_member", "one of open, closed, found 'ajar'"),
        (b'{"t": 1e400, "h": 1}', 0, "not_json", ""),
        (b'{"t": 1' + b"0" * 400 + b', "h": 1}', 1, "bad_member", "t: expected a number that"),
        (b'{"big": 1e300, "h": 1}', 1, "bad_member", "big: 1e+300 is beyond"),
        (b'{"t": "inf", "h": 1}', 1, "bad_member", "t: expected a number"),
        (b'{"t": "1e999", "h": 1}', 1, "bad_member", "t: expected a number that"),
        (b'{"h": 1, "at": "noon"}', 0, "bad_time", "at: 'noon' is not RFC 3339"),
        (b'{"h": 1, "at": true}', 0, "bad_time", "at: expected a time"),
        (b'{"h": 1, "at": {"x": 1}}', 0, "bad_time", "at: expected a time, found dict"),
        (b'{"h": 1, "at": 1' + b"0" * 40 + b"}", 0, "bad_time", "outside 1677..2262"),
        (b'{"h": 1, "at": "2023-11-14T22:13:20"}', 0, "bad_time", "no offset"),
        (b'{"h": 1, "q": "good"}', 0, "bad_reading", "q: expected a number for quality"),
        (b'{"h": 1, "q": 1e39}', 0, "bad_reading", "q: expected a number for quality"),
        (b'{"h": 1, "n": -1}', 0, "bad_reading", "n: expected a whole number"),
        (b'{"h": 1, "n": 1.5}', 0, "bad_reading", "n: expected a whole number"),
        (b'{"h": 1, "n": 9223372036854775808}', 0, "bad_reading", "n: expected a whole number"),
        (b'{"h": 1, "n": "9"}', 0, "bad_reading", "n: expected a whole number"),
        (b'{"h": 1, "a": ' + b"[" * 40 + b"1" + b"]" * 40 + b"}", 1, "too_deep", "more than 16 deep"),
        (b"[" * 100_000, 0, "not_json", ""),
        (b'{"h": 1, "a": [' + b"1," * 499_999 + b"1]}", 1, "too_many_members", "a: an array of 500000"),
        (b"[" + b"1," * 199_999 + b"1]", 0, "too_many_members", "200000 members"),
        (
            b"{" + b",".join(b'"m%d": 1' % i for i in range(1_001)) + b"}",
            0,
            "too_many_members",
            "1001 members",
        ),
    ],
)
def test_what_is_bad_in_a_record_costs_the_least_that_it_can(payload, survivors, reason, words):
    found, faults = decode_payload(payload, "plant/m1", MAPPED, now_us=NOW_US)
    assert len(found) == survivors
    assert [f.reason for f in faults] == [reason]
    assert words.lower() in faults[0].detail.lower()


def test_of_duplicate_members_the_last_counts():
    assert measured(FIELDS, b'{"t": 1, "t": 2}') == [("m1", "t", 2.0, None)]


def test_a_bad_record_costs_its_neighbours_nothing_and_says_where_it_is():
    assert both(MAPPED, b'[{"h": 1}, 7, {"h": 2, "at": "x"}, {"h": 3}]') == (
        [("h", 1.0), ("h", 3.0)],
        [
            ("bad_reading", "member 1: expected an object, found int"),
            ("bad_time", "member 2: at: 'x' is not RFC 3339 (such as 2026-05-01T12:00:00Z)"),
        ],
    )


def test_a_fault_keeps_what_is_needed_to_decode_that_member_by_itself():
    payload = b'{"t": "warm", "h": 1, "at": 1700000000, "q": 50, "x": {"y": [1]}}'
    _, (fault,) = decode_payload(payload, "plant/m1", MAPPED, now_us=NOW_US)
    assert msgspec.json.decode(fault.part) == {"t": "warm", "at": 1700000000, "q": 50}
    repaired = PayloadRule(
        "plant/{sensor_id}", "fields", time="at", members={"t": FieldConversion(values={"warm": 30})}
    )
    assert measured(repaired, fault.part) == [
        ("m1", "t", 30.0, 1_700_000_000_000_000),
        ("m1", "q", 50.0, 1_700_000_000_000_000),
    ]


def test_one_payload_cannot_fill_the_quarantine():
    payload = b"[" + b"7," * 5_000 + b'{"t": 1}]'
    found, faults = decode_payload(payload, "plant/m1", FIELDS, now_us=NOW_US)
    assert len(found) == 1
    assert len(faults) == FAULTS_MAX
    assert faults[-1].detail.startswith("4901 more faults")


# number


@pytest.mark.parametrize(
    ("payload", "value"),
    [(b"21.5", 21.5), (b" -4\r\n", -4), (b"1e3", 1000), (b".5", 0.5), (b"true", 1), (b"ON", 1), (b"off", 0)],
)
def test_a_bare_number_or_a_word_with_a_number_is_a_reading(payload, value):
    rule = PayloadRule("plant/{sensor_id}/{sensor_type}", "number", values={"ON": 1, "off": 0})
    assert measured(rule, payload, "plant/m1/t") == [("m1", "t", value, None)]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "bad_member"),
        (b"warm", "bad_member"),
        (b"nan", "bad_member"),
        (b"Infinity", "bad_member"),
        (b"1_000", "bad_member"),
        (b"0x10", "bad_member"),
        (b"1e999", "bad_member"),
        (b"21,5", "bad_member"),
        (b"21.5 degC", "bad_member"),
        (b"1" * 100_000, "bad_member"),
        (b"[1]", "bad_member"),
        (b"\xff", "not_utf8"),
        (b"\x00", "bad_member"),
        ("٢".encode(), "bad_member"),
    ],
)
def test_what_is_no_number_is_a_fault(payload, reason):
    rule = PayloadRule("plant/{sensor_id}/{sensor_type}", "number")
    _, faults = both(rule, payload, "plant/m1/t")
    assert [r for r, _ in faults] == [reason]
    assert "expected a number" in faults[0][1] or "beyond" in faults[0][1]


# csv


@pytest.mark.parametrize(("text", "seq"), [("7", 7), ("7.0", 7), ("1e3", 1000), (str(2**63 - 1), 2**63 - 1)])
def test_a_sequence_number_may_be_written_as_any_number_that_is_whole(text, seq):
    rule = PayloadRule("#", "csv", sensor_id="a", columns=("t", "n"), companions={"seq": "n"})
    found, faults = decode_payload(f"1,{text}".encode(), "x", rule, now_us=NOW_US)
    assert ([m.seq for m in found], faults) == ([seq], [])


CSV = PayloadRule(
    "plant/{sensor_id}",
    "csv",
    columns=("at", "t", "door", "", "bat"),
    separator=";",
    time="at",
    companions={"battery_level": "bat"},
    values={"open": 1, "closed": 0},
)


def test_csv_lines_are_records_of_their_columns():
    payload = b'at;t;door;x;bat\r\n1700000000; 21.5 ;"open";junk;80\n\n2023-11-14T22:13:21Z;22;;;\n'
    found, faults = decode_payload(payload, "plant/m1", CSV, now_us=NOW_US)
    assert faults == []
    assert [(m.name.sensor_type, m.value, m.time_us, m.battery_level) for m in found] == [
        ("t", 21.5, 1_700_000_000_000_000, 80.0),
        ("door", 1.0, 1_700_000_000_000_000, 80.0),
        ("t", 22.0, 1_700_000_001_000_000, None),
    ]


@pytest.mark.parametrize(
    ("line", "survivors", "reason", "words"),
    [
        (b"1;2;3", 0, "bad_line", "line 1: 3 columns; expected 5: at, t, door, , bat"),
        (b'1;"2;open;;5', 0, "bad_line", "line 1:"),
        (b"1;warm;open;;5", 1, "bad_member", "t: expected a number or one of open, closed, found 'warm'"),
        (b"1;nan;open;;5", 1, "bad_member", "t: expected"),
        (b"noon;1;open;;5", 0, "bad_time", "at: 'noon'"),
        (b"1;1;open;;full", 0, "bad_reading", "bat: expected a number for battery_level"),
        (b"1;;;;5", 0, "no_measurement", "no member"),
    ],
)
def test_a_bad_line_costs_itself(line, survivors, reason, words):
    found, faults = decode_payload(b"1;1;open;;5\n" + line, "plant/m1", CSV, now_us=NOW_US)
    assert len(found) == 2 + survivors
    assert [f.reason for f in faults] == [reason]
    assert words in faults[0].detail


def test_a_csv_fault_is_a_line_of_its_own():
    _, (fault,) = decode_payload(b"5;warm;open;;80", "plant/m1", CSV, now_us=NOW_US)
    assert fault.part == b"5;warm;;;80"


def test_csv_that_is_not_utf8_is_a_fault():
    assert both(CSV, b"1;\xff;;;")[1][0][0] == "not_utf8"


# reading and ndjson with names in the payload


NAMED = PayloadRule("plant/#", "reading")


def test_readings_that_name_their_series_are_taken_one_by_one():
    members = (
        b'{"sensor_id": "a", "sensor_type": "t", "value": 1, "ts": 1700000000, "seq": 4, "unit": "C"}',
        b'{"sensor_id": "b", "sensor_type": "h", "value": true}',
    )
    expected = [("a", "t", 1.0, 1_700_000_000_000_000), ("b", "h", 1.0, None)]
    assert measured(NAMED, b"[%s, %s]" % members) == expected
    assert measured(PayloadRule("plant/#", "ndjson"), b"%s\n\n%s\r\n" % members) == expected


@pytest.mark.parametrize(
    ("member", "reason", "words"),
    [
        (b'{"value": 1, "sensor_type": "t"}', "no_sensor_id", "sensor_id"),
        (b'{"value": 1, "sensor_id": "a"}', "no_sensor_type", "sensor_type"),
        (b'{"value": "1", "sensor_id": "a", "sensor_type": "t"}', "bad_reading", "$.value"),
        (b'{"value": 1, "sensor_id": 4, "sensor_type": "t"}', "bad_reading", "$.sensor_id"),
        (b'{"value": 1, "sensor_id": "a", "sensor_type": "t", "ts": "x"}', "bad_time", "ts: 'x'"),
        (b"7", "bad_reading", "object"),
    ],
)
def test_a_bad_named_reading_costs_itself(member, reason, words):
    good = b'{"value": 1, "sensor_id": "a", "sensor_type": "t"}'
    for rule, payload in (
        (NAMED, b"[%s,%s,%s]" % (good, member, good)),
        (PayloadRule("plant/#", "ndjson"), b"%s\n%s\n%s" % (good, member, good)),
    ):
        found, faults = decode_payload(payload, "plant/m1", rule, now_us=NOW_US)
        assert len(found) == 2
        assert [(f.reason, f.part) for f in faults] == [(reason, member)]
        assert faults[0].detail.startswith("member 1: ")
        assert words in faults[0].detail


# line protocol


LINES = PayloadRule("plant/#", "line_protocol", sensor_id="{host}")


def test_every_field_of_a_line_is_a_reading_and_value_stands_for_the_measurement():
    payload = (
        b'weather,host=a temp=21.5,wet=t,text="x,y z",n=4i 1700000000000000000\n'
        b"# a comment\n\n"
        b"t,host=b,unit=C value=1u,quality=50,seq=9i,battery_level=3,flags=16i\n"
    )
    found, faults = decode_payload(payload, "plant/m1", LINES, now_us=NOW_US)
    assert faults == []
    assert [(*m.name, m.value, m.time_us) for m in found] == [
        ("a", "weather.temp", 21.5, 1_700_000_000_000_000),
        ("a", "weather.wet", 1.0, 1_700_000_000_000_000),
        ("a", "weather.n", 4.0, 1_700_000_000_000_000),
        ("b", "t", 1.0, None),
    ]
    last = found[-1]
    assert (last.quality, last.seq, last.battery_level, last.unit) == (50, 9, 3, "C")
    assert last.flags == Flag.TIME_ASSIGNED


@pytest.mark.parametrize(
    ("line", "survivors", "reason", "words"),
    [
        (b"w", 0, "not_line_protocol", "line 2: expected MEASUREMENT"),
        (b"w,host=a", 0, "not_line_protocol", "line 2"),
        (b"w,host=a t=", 0, "not_line_protocol", "line 2"),
        (b"w,host t=1", 0, "not_line_protocol", "line 2"),
        (b"w t=1", 0, "no_sensor_id", "host: there is no such tag"),
        (b"w,host=a t=1 noon", 0, "bad_time", "found 'noon'"),
        (b"w,host=a t=1 1.5", 0, "bad_time", "found '1.5'"),
        (b"w,host=a t=oops,h=1", 1, "bad_member", "w.t: expected a number, found 'oops'"),
        (b"w,host=a t=nan,h=1", 1, "bad_member", "w.t"),
        (b"w,host=a t=1e999,h=1", 1, "bad_member", "w.t"),
        (b"w,host=a t=1_0,h=1", 1, "bad_member", "w.t"),
        (b'w,host=a t="x"', 0, "no_measurement", "no field"),
        (b"w,host=a value=1,quality=x", 0, "bad_reading", "quality: expected a number"),
        (b"w,host=a value=1,quality=1e39", 0, "bad_reading", "quality: expected a number"),
        (b"w,host=a value=1,seq=1.5", 0, "bad_reading", "seq: expected a number"),
        (b"w,host=a value=1,seq=-1i", 0, "bad_reading", "seq: expected a number"),
        (b"w,host=\xff t=1", 0, "not_utf8", "line 2"),
        (b"w,host=a " + b",".join(b"f%d=1" % i for i in range(1_001)), 0, "too_many_members", "1001 fields"),
    ],
)
def test_a_bad_line_or_field_costs_itself(line, survivors, reason, words):
    found, faults = decode_payload(b"w,host=a t=1\n" + line, "plant/m1", LINES, now_us=NOW_US)
    assert len(found) == 1 + survivors
    assert [f.reason for f in faults] == [reason]
    assert words in faults[0].detail


def test_a_bad_field_is_kept_as_a_line_of_its_own():
    _, (fault,) = decode_payload(b"w,host=a t=oops,h=1 5", "plant/m1", LINES, now_us=NOW_US)
    assert fault.part == b"w,host=a t=oops 5"


# any shape


@pytest.mark.parametrize("shape", ["reading", "ndjson", "fields", "senml", "line_protocol"])
def test_compressed_payloads_are_expanded_up_to_the_bound(shape):
    rule = PayloadRule("plant/{sensor_id}/{sensor_type}", shape, max_payload_bytes=1_000)
    bomb = gzip.compress(b" " * 100_000)
    assert [r for r, _ in both(rule, bomb, "plant/a/b")[1]] == ["too_large"]
    assert [r for r, _ in both(rule, bomb[:20], "plant/a/b")[1]] == ["bad_compression"]


def test_a_compressed_payload_is_taken_like_a_plain_one():
    assert measured(FIELDS, gzip.compress(b'{"t": 1}')) == [("m1", "t", 1.0, None)]


def test_nothing_is_taken_of_ignored_topics():
    assert decode_payload(b"\xff", "noise/x", PayloadRule("noise/#", "ignore"), now_us=NOW_US) == ((), [])


def test_values_are_the_numbers_that_were_written():
    found = decode_payload(
        b'{"t": 0.1, "u": 1e-320, "v": 9007199254740993}', "plant/m1", FIELDS, now_us=NOW_US
    )[0]
    assert [m.value for m in found] == [0.1, 1e-320, 9007199254740992.0]
    assert all(math.isfinite(m.value) for m in found)
