"""The decoders of payloads against independent encoders, and against bytes that nobody wrote on purpose."""

from __future__ import annotations

import json
import math
import random
import struct
import time
import tracemalloc

import cbor2
import line_protocol_parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.payloads.decoder_registry import decode_payload
from gateway.payloads.formats.cbor import CborDecodeError, decode_cbor
from gateway.payloads.rule import FieldConversion, PayloadRule

NOW_US = 1_790_000_000_000_000

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20)
)
items = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.text(max_size=8) | st.integers(-20, 20), inner, max_size=5)
    ),
    max_leaves=20,
)


@given(items)
def test_cbor_of_an_independent_encoder_is_read_as_it_was_meant(item):
    assert decode_cbor(cbor2.dumps(item)) == item
    assert decode_cbor(cbor2.dumps(item, canonical=True)) == item


@given(st.binary(max_size=60))
def test_any_bytes_are_plain_values_or_a_fault(data):
    try:
        item = decode_cbor(data)
    except CborDecodeError:
        return
    assert_plain(item)


def assert_plain(item):
    assert item is None or type(item) in (bool, int, float, str, bytes, list, dict)
    if isinstance(item, list):
        for inner in item:
            assert_plain(inner)
    if isinstance(item, dict):
        for key, value in item.items():
            assert type(key) in (str, int)
            assert_plain(value)


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x0001, 0x8000, 0x3C01, 0x7BFF])
def test_half_floats_are_read_to_the_bit(bits):
    data = b"\xf9" + bits.to_bytes(2)
    (expected,) = struct.unpack(">e", data[1:])
    assert str(decode_cbor(data)) == str(expected)  # the sign of zero too
    assert decode_cbor(data) == expected


@pytest.mark.parametrize(
    ("data", "number"),
    [("c48221196ab3", 273.15), ("c5822003", 1.5), ("c249010000000000000000", 2**64), ("c340", -1)],
)
def test_fractions_and_big_numbers_are_numbers(data, number):
    assert decode_cbor(bytes.fromhex(data)) == number


@pytest.mark.parametrize(
    ("data", "item"),
    [
        ("f7", None),  # undefined
        ("c06a323032362d31322d3031", "2026-12-01"),  # a date, as its text
        ("81d81c81d81d00", [[0]]),  # shared references are not resolved, so nothing is cyclic
        ("d90100826361616ad81900", ["aaj", 0]),  # nor are text references
        ("d823622829", "()"),  # nor regular expressions compiled
        ("d901028101", [1]),  # nor sets made
        ("d81e820102", [1, 2]),
    ],
)
def test_tags_that_are_not_numbers_leave_what_they_hold(data, item):
    assert decode_cbor(bytes.fromhex(data)) == item


def colliding_pairs(count):
    """Arrays of two integers that all have one hash (xxHash is not keyed)."""
    mask, p1, p2, p5 = (1 << 64) - 1, 11400714785074694791, 14029467366897019727, 2870177450012600261
    found: list[tuple[int, int]] = []
    first = 0
    while len(found) < count:
        first += 1
        acc = (p5 + first * p2) & mask
        acc = ((acc << 31 | acc >> 33) & mask) * p1 & mask
        second = (-acc * pow(p2, -1, 1 << 64)) & mask
        if second < (1 << 61) - 1:
            found.append((first, second))
    return found


def test_keys_whose_hashes_collide_take_no_quadratic_time():
    pairs = colliding_pairs(3_000)
    assert len({hash(pair) for pair in pairs}) == 1
    data = b"\xbf" + b"".join(cbor2.dumps(pair) + b"\x00" for pair in pairs) + b"\xff"
    with pytest.raises(CborDecodeError, match="map key"):
        decode_cbor(data)
    big = b"\xbf" + b"".join(cbor2.dumps(2**70 + i) + b"\x00" for i in range(9)) + b"\xff"
    with pytest.raises(CborDecodeError, match="map key"):
        decode_cbor(big)


@pytest.mark.parametrize(
    "data",
    [
        b"\x81" * 100_000,
        b"\x9f" * 100_000,
        b"\xa1\x00" * 100_000,
        b"\xc0" * 100_000 + b"\x01",
        b"\xd8\x1c" * 100_000 + b"\x01",
        b"\x9b" + b"\xff" * 8,
        b"\xbb\x00\x00\x00\x7f" + b"\xff" * 4,
        b"\x5b\x00\x00\x00\x0f" + b"\xff" * 4,
        b"\x7b\x7f" + b"\xff" * 7,
        b"\x9a\x00\x10\x00\x00" + b"\x9a\x00\x10\x00\x00" * 30,
        b"\xc2\x5a\x00\x0f\x42\x40" + b"\xff" * 1_000_000,
        b"\xc4\x82\x1a\x7f\xff\xff\xff\x01",
        b"\xc5\x82\x1a\x7f\xff\xff\xff\x01",
        b"\xa1\xf9\x3c\x00\x01",
        b"\xa1\xf5\x01",
        b"\xa1\xf6\x01",
        b"\xa2\x01\x01\x01\x01",
        b"\xe0",
        b"\x1f\xff",
        b"\xbf\x01\xff",
    ],
)
def test_hostile_cbor_is_refused_before_it_costs_time_or_memory(data):
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(CborDecodeError):
        decode_cbor(data)
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 3 * len(data) + 100_000
    tracemalloc.stop()


names = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters='"\\,= #'), min_size=1, max_size=8
)
numbers = (
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False)
    | st.integers(-(2**62), 2**62)
    | st.booleans()
)


@given(names, st.dictionaries(names, numbers, min_size=1, max_size=5), st.integers(0, 2**62))
def test_lines_are_read_as_an_independent_parser_reads_them(measurement, fields, time_ns):
    def written(value):
        if isinstance(value, bool):
            return str(value).lower()
        return f"{value}i" if isinstance(value, int) else repr(value)

    body = ",".join(f"{name}={written(value)}" for name, value in fields.items())
    line = f"{measurement},host=h {body} {time_ns}"
    theirs = line_protocol_parser.parse_line(line)
    rule = PayloadRule("#", "line_protocol", sensor_id="{host}")
    found, faults = decode_payload(line.encode(), "x", rule, now_us=NOW_US)
    assert faults == []
    if "value" in fields:
        return
    mine = {m.name.sensor_type: m.value for m in found}
    assert mine == {f"{theirs['measurement']}.{k}": float(v) for k, v in theirs["fields"].items()}
    assert {m.time_us for m in found} == {theirs["time"] // 1000}


@given(st.dictionaries(st.text(min_size=1, max_size=10), st.floats(allow_nan=False, allow_infinity=False)))
def test_members_arrive_as_the_very_same_numbers(members):
    rule = PayloadRule("#", "fields", sensor_id="m1")
    found, _ = decode_payload(json.dumps(members).encode(), "x", rule, now_us=NOW_US)
    assert {m.name.sensor_type: m.value for m in found} == members


@given(
    st.lists(
        st.fixed_dictionaries(
            {"n": st.sampled_from("abc"), "v": st.floats(-1e9, 1e9), "t": st.integers(0, 10**6)}
        ),
        min_size=1,
        max_size=10,
    ),
    st.integers(2**29, 2**32),
)
def test_a_pack_with_base_fields_means_what_its_resolved_form_means(records, base_s):
    based = [{"bn": "m:", "bt": base_s, **records[0]}, *records[1:]]
    resolved = [{"n": f"m:{r['n']}", "v": r["v"], "t": base_s + r["t"]} for r in records]
    rule = PayloadRule("#", "senml")
    assert decode_payload(json.dumps(based).encode(), "x", rule, now_us=1) == decode_payload(
        json.dumps(resolved).encode(), "x", rule, now_us=1
    )


RULES = {
    "reading": PayloadRule("#", "reading", sensor_id="a", sensor_type="b"),
    "ndjson": PayloadRule("#", "ndjson", sensor_id="a", sensor_type="b"),
    "fields": PayloadRule("#", "fields", sensor_id="a", time="at", companions={"seq": "n", "location": "l"}),
    "named fields": PayloadRule("#", "fields", sensor_id="{d}", sensor_type="{k}", include=("v",)),
    "number": PayloadRule("#", "number", sensor_id="a", sensor_type="b", values={"ON": 1}),
    "csv": PayloadRule("#", "csv", sensor_id="a", columns=("at", "v", "w"), time="at"),
    "senml": PayloadRule("#", "senml", members={"v": FieldConversion(scale=1e200)}),
    "line_protocol": PayloadRule("#", "line_protocol", sensor_id="a"),
}
SEEDS = (
    b'[{"value": 1.5, "ts": 1700000000, "quality": 5, "seq": 3}]',
    b'{"v": 1.5, "at": "2023-11-14T22:13:20Z", "n": 4, "d": "a", "k": "t", "x": {"y": [1, true, null]}}',
    b"2023-11-14T22:13:20Z,1.5,2\n",
    b'[{"bn":"m:","bt":1.276020076001e+09,"bu":"A","n":"v","v":120.1},{"n":"w","t":-5,"s":1}]',
    cbor2.dumps([{-2: "m:", -3: 1700000000, 0: "v", 2: 1.5}, {0: "w", 4: True}]),
    b'w,host=a t=1.5,n=4i,b=t,s="x\\"y" 1700000000000000000\nv value=1,quality=5,seq=3i',
)


def accounted_for(shape, payload):
    found, faults = decode_payload(payload, "x", RULES[shape], now_us=NOW_US)
    for m in found:
        assert math.isfinite(m.value)
        assert m.time_us is None or isinstance(m.time_us, int)
        assert isinstance(m.name.sensor_id, str)
    for fault in faults:
        assert fault.reason
        assert fault.detail
        assert isinstance(fault.part, bytes)
    return bool(found or faults)


@pytest.mark.parametrize("shape", RULES)
@settings(max_examples=150)
@given(payload=st.binary(max_size=200))
def test_no_bytes_make_a_decoder_raise(shape, payload):
    accounted_for(shape, payload)


@pytest.mark.parametrize("shape", RULES)
def test_no_mutation_of_a_good_payload_makes_a_decoder_raise(shape):
    chance = random.Random(shape)
    for _ in range(1_500):
        payload = bytearray(chance.choice(SEEDS))
        for _ in range(chance.randrange(1, 6)):
            at = chance.randrange(len(payload))
            match chance.randrange(4):
                case 0:
                    payload[at] = chance.randrange(256)
                case 1:
                    del payload[at : at + chance.randrange(1, 5)]
                case 2:
                    payload[at:at] = payload[at : at + chance.randrange(1, 20)]
                case _:
                    payload[at:at] = chance.choice((b"1e999", b"NaN", b"\xff", b'"', b"{", b"[", b"9" * 50))
            payload = payload or bytearray(b" ")
        accounted_for(shape, bytes(payload))
