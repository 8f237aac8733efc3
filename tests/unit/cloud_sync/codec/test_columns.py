"""The columnar codec: bits in, the same bits out; damage is FormatError and bounded in memory."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pcodec import ChunkConfig, standalone

from cloud_sync.codec import columns
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import Readings
from tests.support.wire_examples import from_rows, readings

FLOAT32 = st.one_of(
    st.floats(width=32), st.integers(-40_000, 40_000).map(float), st.just(float("nan")), st.just(-32768.0)
)


@st.composite
def any_readings(draw):
    rows = draw(st.integers(1, 60))
    series = np.sort(draw(hnp.arrays(np.int32, rows, elements=st.integers(0, 5))))
    one = draw(st.booleans())

    def column(dtype: Any, elements: Any) -> Any:
        return draw(hnp.arrays(dtype, rows, elements=elements, fill=elements if one else st.nothing()))

    return Readings(
        series,
        column(np.int64, st.integers(-(2**63), 2**63 - 1)),
        column(np.float64, st.floats(allow_nan=False)),
        column(np.float32, FLOAT32),
        column(np.float32, FLOAT32),
        column(np.float32, FLOAT32),
        column(np.int64, st.integers(-(2**63), 2**63 - 1)),
        column(np.int32, st.integers(-(2**31), 2**31 - 1)),
    )


def same_bits(one: Readings, other: Readings) -> bool:
    """Equal bit for bit, except that any NaN of a float32 column is as good as another."""
    for name, dtype in Readings.columns.items():
        a, b = getattr(one, name), getattr(other, name)
        if dtype == np.float32:
            absent = np.isnan(a)
            if not (np.array_equal(absent, np.isnan(b)) and np.array_equal(a[~absent], b[~absent])):
                return False
        elif a.tobytes() != b.tobytes():
            return False
    return True


@given(any_readings(), st.sampled_from([columns.FAST_LEVEL, columns.FINAL_LEVEL]))
@settings(max_examples=150, deadline=None)
def test_columns_come_out_as_they_went_in(sent, level):
    block = columns.encode(sent, level=level)

    assert same_bits(columns.decode(block), sent)
    assert columns.time_range_us(block) == (int(sent.time_us.min()), int(sent.time_us.max()))


@pytest.mark.parametrize("value", [-32768.0, -32767.0, 32767.0, 32768.0, 0.5, -0.0, 3.4e38, float("inf")])
def test_values_at_the_edge_of_the_small_encoding_are_exact(value):
    sent = readings(40)
    sent.quality[3] = value

    received = columns.decode(columns.encode(sent))

    assert received.quality[3] == np.float32(value)
    assert same_bits(received, sent)


def reseal(block: bytearray) -> bytes:
    block[-4:] = struct.pack("<I", zlib.crc32(block[:-4]))
    return bytes(block)


def entry_of(block: bytes | bytearray, column: int) -> tuple[int, int, int]:
    """Offset of a column's directory entry, offset of its payload, bytes of it."""
    at = 25 + 6 * block[24]
    for position in range(block[24]):
        entry = 25 + 6 * position
        size = struct.unpack_from("<I", block, entry + 2)[0]
        if block[entry] == column:
            return entry, at, size
        at += size
    raise AssertionError


def test_an_unknown_column_is_skipped_and_a_missing_one_is_refused():
    sent = from_rows((0, 1, 1.5), (0, 2, 2.5))
    block = bytearray(columns.encode(sent))
    extended = block[:24] + bytes([9]) + block[25:-4] + b"later" + bytes(4)
    directory_end = 25 + 6 * 8
    extended[directory_end:directory_end] = struct.pack("<BBI", 200, 77, 5)
    assert same_bits(columns.decode(reseal(extended)), sent)

    entry, _, _ = entry_of(block, 3)
    block[entry] = 201
    with pytest.raises(FormatError, match="value is missing"):
        columns.decode(reseal(block))


def test_a_payload_that_holds_more_than_it_should_is_not_inflated():
    sent = readings(50, 2)
    block = columns.encode(sent)
    entry, at, size = entry_of(block, 3)
    bomb = standalone.simple_compress(np.zeros(16_000_000), ChunkConfig(compression_level=0))
    assert len(bomb) < 200_000
    changed = bytearray(block[:at] + bomb + block[at + size :])
    struct.pack_into("<BI", changed, entry + 1, 2, len(bomb))

    with pytest.raises(FormatError) as refused:
        columns.decode(reseal(changed))
    assert refused.value.reason == "malformed"


@pytest.mark.parametrize("rows", [0, 49, 51, 4_000_001, 2**32 - 1])
def test_a_wrong_number_of_rows_is_refused(rows):
    block = bytearray(columns.encode(readings(50, 2)))
    struct.pack_into("<I", block, 4, rows)
    with pytest.raises(FormatError) as refused:
        columns.decode(reseal(block))
    assert refused.value.reason in {"malformed", "too_large"}


def test_every_known_fault_has_its_reason():
    block = columns.encode(readings(50, 2))
    faults = {
        "truncated": block[:20],
        "bad_magic": b"XX" + block[2:],
        "unsupported_version": block[:2] + b"\x02" + block[3:],
        "bad_checksum": block[:-1] + bytes([block[-1] ^ 1]),
        "malformed": reseal(bytearray(block[:3] + b"\x03" + block[4:])),
    }
    for reason, data in faults.items():
        with pytest.raises(FormatError) as refused:
            columns.decode(data)
        assert refused.value.reason == reason


@given(st.randoms(use_true_random=False))
@settings(max_examples=400, deadline=None)
def test_damage_behind_a_right_checksum_is_a_format_error_or_columns_of_the_right_size(random):
    block = bytearray(columns.encode(readings(60, 7)))
    for _ in range(random.randrange(1, 5)):
        block[random.randrange(len(block) - 4)] = random.randrange(256)
    if random.random() < 0.3:
        del block[random.randrange(25, len(block)) :]
        block += bytes(4)
    try:
        decoded = columns.decode(reseal(block), max_rows=1000)
    except FormatError:
        return
    assert {len(getattr(decoded, name)) for name in Readings.columns} == {decoded.rows}
