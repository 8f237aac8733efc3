"""The wire batch: what goes in comes out, and hostile bytes give FormatError and nothing else."""

from __future__ import annotations

import struct
import zlib
from typing import Any
from uuid import UUID

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud_sync.codec import wire
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import Batch, Readings, Records, Series
from tests.support.summary_examples import alerts, declarations, rollups
from tests.support.wire_examples import EPOCH, batch, readings
from tests.support.wire_examples import series as example_series

names = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=40)
entries = st.builds(
    lambda sensor, kind, attributes: Series(sensor, kind, tuple(sorted(attributes.items()))),
    names,
    names,
    st.dictionaries(names, names, max_size=4),
)


def assert_same(one: Batch, other: Batch) -> None:
    assert (one.range, one.series) == (other.range, other.series)
    assert (one.refused, one.withheld) == (other.refused, other.withheld)
    for name, dtype in one.records.columns.items():
        mine, theirs = getattr(one.records, name), getattr(other.records, name)
        same = mine.tolist() == theirs.tolist() if dtype.hasobject else mine.tobytes() == theirs.tobytes()
        assert same, name


def with_header(data: bytes, **changes: Any) -> bytes:
    """The same batch with keys of its header changed, and its checksum right again."""
    size, block = struct.unpack_from("<II", data, 8)
    header = msgspec.msgpack.decode(zstandard.decompress(data[16 : 16 + size])) | changes
    packed = zstandard.compress(msgspec.msgpack.encode(header))
    body = data[:8] + struct.pack("<II", len(packed), block) + packed + data[16 + size : -4]
    return body + struct.pack("<I", zlib.crc32(body))


def of_class(records: Records, named: tuple[Series, ...] = (), withheld: int = 0) -> Batch:
    return Batch(batch().range._replace(record_class=records.record_class), named, records, 0, withheld)


@pytest.mark.parametrize(
    "sent",
    [
        of_class(rollups(), example_series()),
        of_class(alerts(), example_series()),
        of_class(declarations(), withheld=3),
        of_class(rollups().empty(), withheld=7),
    ],
    ids=["rollups", "alerts", "declarations", "nothing but withheld rows"],
)
def test_every_class_survives_the_wire(sent):
    assert_same(wire.decode(wire.encode(sent)), sent)


def test_a_block_of_another_class_than_the_header_says_is_refused():
    data = wire.encode(of_class(rollups(), example_series()))

    with pytest.raises(FormatError, match="a block of record class 3, not of alert"):
        wire.decode(with_header(data, **{"class": 1}))


def test_texts_that_promise_more_than_they_may_are_refused():
    sent = alerts(1)
    sent.detail[0] = "x" * 1025

    with pytest.raises(FormatError, match="too long"):
        wire.decode(wire.encode(of_class(sent, example_series())))


@given(st.lists(entries, min_size=1, max_size=8), st.integers(1, 2**61), st.integers(0, 1000), st.uuids())
@settings(max_examples=60, deadline=None)
def test_a_batch_survives_the_wire(series, first, more, epoch):
    sent = batch(
        first,
        first + more,
        gateway_id="gate/ü",
        epoch=epoch,
        content=readings(3 * len(series), len(series)),
        of=tuple(series),
    )

    assert_same(wire.decode(wire.encode(sent)), sent)


def test_a_header_key_of_a_later_release_is_skipped():
    sent = batch()

    assert_same(wire.decode(with_header(wire.encode(sent), credits=[1, {"a": None}])), sent)


@given(st.integers(1, wire.MAX_PARTS), st.integers(0, 5000), st.data())
@settings(max_examples=60, deadline=None)
def test_a_part_says_which_it_is_and_how_many_rows_were_refused(parts, refused, data):
    whole = batch(3, 9)
    part = data.draw(st.integers(1, parts))
    sent = Batch(whole.range._replace(part=part, parts=parts), whole.series, whole.readings, refused)

    arrived = wire.decode(wire.encode(sent))

    assert_same(arrived, sent)
    assert (arrived.range.part, arrived.range.parts, arrived.refused) == (part, parts, refused)


def test_a_batch_of_which_every_row_was_refused_has_no_block():
    whole = batch(3, 9)
    sent = Batch(whole.range._replace(part=2, parts=2), (), Readings.empty(), 12)

    data = wire.encode(sent)

    assert struct.unpack_from("<I", data, 12) == (0,)
    assert (wire.decode(data).rows, wire.decode(data).refused, wire.decode(data).series) == (0, 12, ())


def test_a_whole_batch_does_not_speak_of_parts():
    data = wire.encode(batch())
    header = zstandard.decompress(data[16 : 16 + struct.unpack_from("<I", data, 8)[0]])
    assert b"part" not in header
    assert b"refused" not in header


@pytest.mark.parametrize(
    "changes",
    [
        {"part": 0},
        {"part": 2},
        {"part": 3, "parts": 2},
        {"parts": 0},
        {"part": 1, "parts": wire.MAX_PARTS + 1},
        {"part": -1, "parts": -1},
        {"refused": -1},
        {"refused": 2**31},
        {"refused": 5, "rows": 0, "series": []},
        {"gateway_id": ""},
        {"gateway_id": "x" * 1025},
        {"gateway_id": 7},
        {"epoch": b"short"},
        {"epoch": str(EPOCH)},
        {"class": 0},
        {"class": 99},
        {"first": 0},
        {"first": 5, "last": 4},
        {"last": 2**62},
        {"rows": 11},
        {"series": []},
        {"series": [["a", "b", {}]]},
        {"series": [["", "b", {}]] * 3},
        {"series": [["a", "", {}]] * 3},
        {"series": [["a\0", "b", {}]] * 3},
        {"series": [["a" * 1025, "b", {}]] * 3},
        {"series": [["a", "b", {"location": "x\0"}]] * 3},
        {"series": [["a", "b", {"location": 5}]] * 3},
        {"series": [["a", "b"]] * 3},
    ],
    ids=str,
)
def test_a_header_that_makes_no_sense_is_malformed(changes):
    with pytest.raises(FormatError) as refused:
        wire.decode(with_header(wire.encode(batch()), **changes))
    assert refused.value.reason == "malformed"


def test_limits_are_the_receivers():
    data = wire.encode(batch(content=readings(100)))

    wire.decode(data, wire.WireLimits(max_rows=100))
    for limits in (wire.WireLimits(max_rows=99), wire.WireLimits(max_header_bytes=20)):
        with pytest.raises(FormatError) as refused:
            wire.decode(data, limits)
        assert refused.value.reason == "too_large"


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_bytes_of_any_kind_are_refused_with_a_reason(data):
    for candidate in (data, wire.MAGIC + data, wire.encode(batch())[:16] + data):
        with pytest.raises(FormatError):
            wire.decode(candidate)


@given(st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_damage_behind_a_right_checksum_gives_a_reason_or_a_batch(random):
    damaged = bytearray(wire.encode(batch(content=readings(60, 5))))
    size, block = struct.unpack_from("<II", damaged, 8)
    start = 16 if random.random() < 0.3 else 16 + size
    for _ in range(random.randrange(1, 4)):
        damaged[random.randrange(start, 16 + size + block)] = random.randrange(256)
    block_end = 16 + size + block
    damaged[block_end - 4 : block_end] = struct.pack("<I", zlib.crc32(damaged[16 + size : block_end - 4]))
    damaged[-4:] = struct.pack("<I", zlib.crc32(damaged[:-4]))

    try:
        decoded = wire.decode(bytes(damaged), wire.WireLimits(max_rows=1000))
    except FormatError:
        return
    assert decoded.rows <= 1000
    assert decoded.readings.series.max() < len(decoded.series)


def test_every_flipped_bit_and_every_cut_is_noticed():
    data = wire.encode(batch())
    for position in range(len(data)):
        if position not in (5, 6, 7):
            flipped = data[:position] + bytes([data[position] ^ 1 << position % 8]) + data[position + 1 :]
            with pytest.raises(FormatError):
                wire.decode(flipped)
        with pytest.raises(FormatError):
            wire.decode(data[:position])


def test_the_epoch_travels_in_network_order():
    epoch = UUID("00112233-4455-6677-8899-aabbccddeeff")
    data = wire.encode(batch(epoch=epoch))
    header = zstandard.decompress(data[16 : 16 + struct.unpack_from("<I", data, 8)[0]])
    assert bytes.fromhex("00112233445566778899aabbccddeeff") in header
    assert wire.decode(data).range.epoch == epoch


def test_a_batch_costs_few_bytes_a_reading():
    rows = 20_000
    content = readings(rows, 20)
    np.round(content.value, 2, out=content.value)
    assert len(wire.encode(batch(content=content))) / rows < 5
