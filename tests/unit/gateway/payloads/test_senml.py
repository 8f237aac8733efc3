"""SenML packs: the examples of RFC 8428, both encodings, and what bad records cost."""

from __future__ import annotations

import json

import cbor2
import pytest

from cloud_sync.model.records import Flag
from gateway.payloads.decoder_registry import decode_payload
from gateway.payloads.rule import FieldConversion, PayloadRule

NOW_US = 1_790_000_000_000_000
RULE = PayloadRule("#", "senml")


def taken(payload, rule=RULE):
    """(sensor_id, sensor_type, value, seconds, unit) of each reading; no faults."""
    found, faults = decode_payload(payload, "senml", rule, now_us=NOW_US)
    assert [(f.reason, f.detail) for f in faults] == []
    return [(*m.name, m.value, None if m.time_us is None else m.time_us / 1e6, m.unit) for m in found]


# RFC 8428, section 5.1


def test_5_1_1_a_single_datapoint():
    assert taken(b'[{"n":"urn:dev:ow:10e2073a01080063","u":"Cel","v":23.1}]') == [
        ("urn:dev:ow:10e2073a01080063", "temperature", 23.1, None, "Cel")
    ]


MULTIPLE = [
    {
        "bn": "urn:dev:ow:10e2073a0108006:",
        "bt": 1.276020076001e09,
        "bu": "A",
        "bver": 5,
        "n": "voltage",
        "u": "V",
        "v": 120.1,
    },
    {"n": "current", "t": -5, "v": 1.2},
    {"n": "current", "t": -4, "v": 1.3},
    {"n": "current", "t": -3, "v": 1.4},
    {"n": "current", "t": -2, "v": 1.5},
    {"n": "current", "t": -1, "v": 1.6},
    {"n": "current", "v": 1.7},
]


def test_5_1_2_multiple_datapoints_with_a_base_name_a_base_time_and_a_base_unit():
    device = "urn:dev:ow:10e2073a0108006"
    expected = [(device, "voltage", 120.1, 1276020076.001, "V")]
    expected += [(device, "current", 1.2 + i / 10, 1276020071.001 + i, "A") for i in range(6)]
    assert taken(json.dumps(MULTIPLE).encode()) == [
        (*row[:2], pytest.approx(row[2]), row[3], row[4]) for row in expected
    ]


def test_5_1_2_relative_times_count_from_now_and_say_that_they_are_assigned():
    pack = [
        {"n": "urn:dev:ow:10e2073a01080063", "u": "Cel", "t": -10, "v": 23.5},
        {"n": "urn:dev:ow:10e2073a01080063", "u": "Cel", "t": 0, "v": 23.6},
    ]
    early, now = decode_payload(json.dumps(pack).encode(), "senml", RULE, now_us=NOW_US)[0]
    assert (early.time_us, early.flags) == (NOW_US - 10_000_000, Flag.TIME_ASSIGNED)
    assert (now.time_us, now.flags) == (None, 0)


@pytest.mark.parametrize(("at_s", "is_relative"), [(2**28 - 1, True), (2**28, False), (-1, True)])
def test_times_are_relative_below_2_to_the_28(at_s, is_relative):
    (m,), _ = decode_payload(b'[{"n":"a","v":1,"t":%d}]' % at_s, "senml", RULE, now_us=NOW_US)
    assert m.time_us == at_s * 1_000_000 + NOW_US * is_relative
    assert bool(m.flags & Flag.TIME_ASSIGNED) is is_relative


def test_5_1_3_multiple_measurements_with_positions():
    pack = [
        {
            "bn": "urn:dev:ow:10e2073a01080063",
            "bt": 1.320067464e09,
            "bu": "%RH",
            "v": 20,
        },
        {"u": "lon", "v": 24.30621},
        {"u": "lat", "v": 60.07965},
        {"t": 60, "v": 20.3},
        {"u": "%EL", "t": 150, "v": 98},
    ]
    device = "urn:dev:ow:10e2073a01080063"
    assert taken(json.dumps(pack).encode()) == [
        (device, "humidity", 20.0, 1320067464, "%RH"),
        (device, "longitude", 24.30621, 1320067464, "lon"),
        (device, "latitude", 60.07965, 1320067464, "lat"),
        (device, "humidity", 20.3, 1320067524, "%RH"),
        (device, "battery_level", 98.0, 1320067614, "%EL"),
    ]


def test_5_1_5_texts_data_and_booleans_beside_numbers():
    pack = [
        {"bn": "urn:dev:ow:10e2073a01080063:", "n": "temp", "u": "Cel", "v": 23.1},
        {"n": "label", "vs": "Machine Room"},
        {"n": "open", "vb": False},
        {"n": "nfc-reader", "vd": "aGkgCg"},
    ]
    device = "urn:dev:ow:10e2073a01080063"
    assert taken(json.dumps(pack).encode()) == [
        (device, "temp", 23.1, None, "Cel"),
        (device, "open", 0.0, None, None),
    ]
    named = PayloadRule("#", "senml", members={"label": FieldConversion(values={"Machine Room": 7})})
    assert (device, "label", 7.0, None, None) in taken(json.dumps(pack).encode(), named)


def test_5_1_6_a_collection_of_resources_under_a_base_name_with_a_slash():
    pack = [
        {"bn": "2001:db8::2/", "bt": 1.320078429e09, "n": "temperature", "u": "Cel", "v": 25.2},
        {"n": "humidity", "u": "%RH", "v": 30},
        {"bn": "2001:db8::1/", "n": "temperature", "u": "Cel", "v": 12.3},
        {"n": "humidity", "u": "%RH", "v": 67},
    ]
    assert [row[:3] for row in taken(json.dumps(pack).encode())] == [
        ("2001:db8::2", "temperature", 25.2),
        ("2001:db8::2", "humidity", 30),
        ("2001:db8::1", "temperature", 12.3),
        ("2001:db8::1", "humidity", 67),
    ]


def test_5_1_7_a_setting_without_a_time_is_as_of_now():
    pack = [{"bn": "urn:dev:ow:10e2073a01080063:", "n": "temp", "u": "Cel", "v": 23.1}]
    assert taken(json.dumps(pack).encode())[0][3] is None


def test_section_6_the_cbor_example_byte_for_byte():
    payload = bytes.fromhex(
        "87a721781b75726e3a6465763a6f773a3130653230373361303130383030363a22fb"
        "41d303a15b00106223614120050067766f6c7461676501615602fb405e066666666666"
        "a3006763757272656e74062402fb3ff3333333333333"
        "a3006763757272656e74062302fb3ff4cccccccccccd"
        "a3006763757272656e74062202fb3ff6666666666666"
        "a3006763757272656e74062102f93e00"
        "a3006763757272656e74062002fb3ff999999999999a"
        "a3006763757272656e74060002fb3ffb333333333333"
    )
    assert taken(payload) == taken(json.dumps(MULTIPLE).encode())


LABELS = {"bver": -1, "bn": -2, "bt": -3, "bu": -4, "bv": -5, "bs": -6}
LABELS |= {"n": 0, "u": 1, "v": 2, "vs": 3, "vb": 4, "s": 5, "t": 6, "ut": 7, "vd": 8}


def test_json_and_cbor_of_an_independent_encoder_say_the_same():
    labelled = [{LABELS[key]: value for key, value in record.items()} for record in MULTIPLE]
    as_json = taken(json.dumps(MULTIPLE).encode())
    assert taken(cbor2.dumps(labelled)) == as_json
    assert taken(cbor2.dumps(labelled, canonical=True)) == as_json
    assert taken(cbor2.dumps(cbor2.CBORTag(55799, labelled))) == as_json


# Resolution


def test_base_values_and_sums_are_added_and_a_sum_is_a_series_of_its_own():
    pack = [{"bn": "m:", "bv": 100, "bs": 1000, "n": "e", "v": 1}, {"n": "e", "s": 5}, {"n": "f", "v": -1}]
    assert [row[1:3] for row in taken(json.dumps(pack).encode())] == [
        ("e", 101),
        ("e_sum", 1005),
        ("f", 99),
    ]


def test_names_are_cut_where_a_device_ends():
    pack = [
        {"n": "urn:dev:mac:0024befffe804ff1:light", "v": 1},
        {"n": "house/kitchen/temperature", "v": 2},
        {"n": "alone", "u": "Pa", "v": 3},
        {"n": "odd", "v": 4},
    ]
    assert [row[:2] for row in taken(json.dumps(pack).encode())] == [
        ("urn:dev:mac:0024befffe804ff1", "light"),
        ("house/kitchen", "temperature"),
        ("alone", "pressure"),
        ("odd", "value"),
    ]


def test_a_topic_that_names_the_device_goes_before_the_base_name():
    rule = PayloadRule("up/{sensor_id}", "senml")
    found, _ = decode_payload(b'[{"bn":"urn:dev:ow:1:","n":"t","v":1}]', "up/m1", rule, now_us=NOW_US)
    assert found[0].name == ("m1", "t")


# What is bad


@pytest.mark.parametrize(
    ("payload", "survivors", "reason", "words"),
    [
        (b"", 0, "not_senml", "truncated"),
        (b"{}", 0, "not_senml", "expected `array`"),
        (b'[{"n":"a","v":NaN}]', 0, "not_senml", "malformed"),
        (b"[" * 100_000, 0, "not_senml", ""),
        (b"\x9f" * 100_000, 0, "not_senml", "nested more than 32"),
        (b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff", 0, "not_senml", "cut short at byte 9"),
        (b"\x81\xa1\x02\xfb\x40", 0, "not_senml", "cut short at byte 5"),
        (b"\x81\xa2\x02\x01\x02\x01", 0, "not_senml", "duplicate map key: 2"),
        (b"\x81\xa1\x00\x62\xff\xff", 0, "not_senml", "'utf-8' codec can't decode"),
        (b"\x81\x01\x01", 0, "not_senml", "more bytes after the end"),
        (b"[" + b"{}," * 100_000 + b"{}]", 0, "too_many_members", "100001 records"),
        (b"[]", 0, "no_measurement", "no record"),
        (b'[{"bn":"a:"}]', 0, "no_measurement", "no record"),
        (b'[{"n":"a","vs":"x"}]', 0, "no_measurement", "only texts"),
        (b'[7,{"n":"a","v":1}]', 1, "bad_record", "record 0: expected an object, found int"),
        (b'[{"v":1},{"n":"a","v":1}]', 1, "no_sensor_id", "record 0: n: there is no name"),
        (b'[{"n":"a","v":"1"},{"n":"a","v":1}]', 1, "bad_record", "v: expected a number, found '1'"),
        (b'[{"n":"a","v":true},{"n":"a","v":1}]', 1, "bad_record", "v: expected a number"),
        (b'[{"n":5,"v":1},{"n":"a","v":1}]', 1, "bad_record", "n: expected text, found int"),
        (b'[{"n":"a"},{"n":"a","v":1}]', 1, "bad_record", "expected one of v, vs, vb, vd or s"),
        (b'[{"n":"a","vb":1},{"n":"a","v":1}]', 1, "bad_record", "vb: expected true or false"),
        (b'[{"n":"a","v":1,"t":"now"},{"n":"a","v":1}]', 1, "bad_record", "t: expected a number"),
        (b'[{"n":"a","v":1,"x_":1},{"n":"a","v":1}]', 1, "bad_record", "x_: must be understood"),
        (b'[{"n":"a","v":1' + b"0" * 400 + b'},{"n":"a","v":1}]', 1, "bad_record", "v: expected a number"),
        (b'[{"n":"a","v":1},{"bt":"x","n":"a","v":1},{"n":"a","v":2}]', 1, "bad_record", "depend on it"),
        (b'[{"bver":11,"n":"a","v":1}]', 0, "bad_record", "version 11 is newer than 10"),
    ],
)
def test_what_is_bad_in_a_pack_costs_the_least_that_it_can(payload, survivors, reason, words):
    found, faults = decode_payload(payload, "senml", RULE, now_us=NOW_US)
    assert len(found) == survivors
    assert [f.reason for f in faults] == [reason]
    assert words.lower() in faults[0].detail.lower()


def test_cbor_numbers_that_are_none_are_faults():
    pack = [{-2: "m:", 0: "a", 2: float("nan")}, {0: "b", 2: float("-inf")}, {0: "c", 2: 2**70}]
    found, faults = decode_payload(cbor2.dumps(pack), "senml", RULE, now_us=NOW_US)
    assert [(m.name.sensor_type, m.value) for m in found] == [("c", float(2**70))]
    assert [f.reason for f in faults] == ["bad_record"] * 2


def test_a_bad_record_is_kept_as_a_pack_of_its_own_that_means_the_same():
    payload = b'[{"bn":"m:","bt":1700000000,"bu":"V","n":"a","v":1},{"n":"b","v":"2","t":5}]'
    _, (fault,) = decode_payload(payload, "senml", RULE, now_us=NOW_US)
    assert taken(fault.part.replace(b'"2"', b"2")) == [("m", "b", 2.0, 1_700_000_005.0, "V")]
