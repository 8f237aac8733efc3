"""The columnar codec: records of one class to a checksummed block of bytes and back. Pure.

A block is what one spool segment stores and what a wire batch carries. Form (little-endian):

    offset  size
    0       2     magic "TC"
    2       1     version, 1
    3       1     record class
    4       4     rows, u32
    8       8     smallest time_us, i64
    16      8     largest time_us, i64
    24      1     number of columns, n
    25      6n    directory: column id u8, encoding u8, payload bytes u32
    ...           payloads in directory order
    end-4   4     CRC-32 of everything before it

Encodings of a column:

    0 CONSTANT   one value in the column's type
    1 PLAIN      rows values in the column's type
    2 PCO        a standalone pcodec file of rows values in the column's type
    3 SMALL      for float32: a standalone pcodec file of rows int16 values, -32768 for NaN
    4 RUNS       for series: runs u32, then the distinct values and the run lengths, each as
                 encoding u8, payload bytes u32, payload (int32)
    5 TEXTS      for texts: a zstd frame of a msgpack array of rows strings

Column ids count from 1 within a class, in the order of its fields. Rows are in the canonical order of the
class; of readings that is series, then time, so series is always runs and times rise within each.
A column whose id is unknown is skipped; a known column that is missing is refused.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zstandard
from pcodec import ChunkConfig, standalone

from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import (
    MAX_TEXT_BYTES,
    Alerts,
    Declarations,
    Readings,
    RecordClass,
    Records,
    Rollups,
    is_storable_text,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cloud_sync.model.records import Column

VERSION = 1
MAGIC = b"TC"
MAX_ROWS = 4_000_000

_HEAD = struct.Struct("<2sBBIqqB")
_ENTRY = struct.Struct("<BBI")
_SUB = struct.Struct("<BI")
_CRC = struct.Struct("<I")
_COUNT = struct.Struct("<I")

_CONSTANT, _PLAIN, _PCO, _SMALL, _RUNS, _TEXTS = range(6)
_PLAIN_BELOW_ROWS = 12
_SMALL_NULL = -32768
_SMALL_MAX = 32767
_RUN_TYPE = np.dtype(np.int32)
_decode_text_list = msgspec.msgpack.Decoder(list[str]).decode
RECORD_TYPES: dict[RecordClass, type[Records]] = {
    kind.record_class: kind for kind in (Alerts, Declarations, Rollups, Readings)
}

FAST_LEVEL = 4
"""pcodec level for what a group commit writes: speed first, it will be merged."""
FINAL_LEVEL = 8
"""pcodec level for compacted segments and wire batches."""


def encode(records: Records, *, level: int = FINAL_LEVEL) -> bytes:
    """Encode at least one record, already in canonical order, as a block."""
    rows = records.rows
    assert 0 < rows <= MAX_ROWS
    config = ChunkConfig(compression_level=level)
    directory, payloads = bytearray(), []
    for number, (name, dtype) in enumerate(records.columns.items(), start=1):
        column = getattr(records, name)
        if dtype.hasobject:
            encoding = _TEXTS
            payload = zstandard.compress(msgspec.msgpack.encode(column.tolist()), 9)
        elif name == "series":
            encoding, payload = _encode_runs(column, config)
        else:
            encoding, payload = _encode_numbers(column, config)
        directory += _ENTRY.pack(number, encoding, len(payload))
        payloads.append(payload)
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        records.record_class,
        rows,
        int(records.time_us.min()),
        int(records.time_us.max()),
        len(records.columns),
    )
    return append_crc(b"".join((head, directory, *payloads)))


def decode(block: bytes | memoryview, *, max_rows: int = MAX_ROWS) -> Readings:
    """Decode a block of readings. Memory is bounded by `max_rows`, whatever the bytes claim."""
    return Readings(*decode_columns(block, tuple(Readings.columns), max_rows=max_rows))


def decode_records(
    block: bytes | memoryview, record_class: RecordClass, *, max_rows: int = MAX_ROWS
) -> Records:
    """Decode a block of `record_class`, as `decode` does."""
    records = RECORD_TYPES[record_class]
    return records(*decode_columns(block, tuple(records.columns), record_class, max_rows=max_rows))


def decode_columns(
    block: bytes | memoryview,
    names: Sequence[str],
    record_class: RecordClass = RecordClass.READING,
    *,
    max_rows: int = MAX_ROWS,
) -> list[Column]:
    """Only the columns `names` of a block, in that order; only FormatError, whatever the bytes."""
    block = memoryview(block)
    _, _, number_of_class, rows, _, _, count = unpack_head(block, _HEAD, MAGIC, VERSION, "column block")
    check_crc(block, "column block")
    if number_of_class != record_class:
        expected = record_class.name.lower()
        raise FormatError("malformed", f"a block of record class {number_of_class}, not of {expected}")
    if not 0 < rows <= max_rows:
        raise FormatError("too_large", f"a block of {rows} rows; at most {max_rows} are accepted")
    payloads = _payloads(block, count)
    types = RECORD_TYPES[record_class].columns
    numbers = {name: number for number, name in enumerate(types, start=1)}
    columns: list[Column] = []
    for name in names:
        if numbers[name] not in payloads:
            raise FormatError("malformed", f"the column {name} is missing")
        encoding, payload = payloads[numbers[name]]
        if types[name].hasobject:
            columns.append(_decode_text_column(encoding, payload, rows))
        elif name == "series":
            columns.append(_decode_runs(encoding, payload, rows))
        else:
            columns.append(_decode_numbers(encoding, payload, types[name], rows))
    return columns


def unpack_head(
    data: memoryview, head: struct.Struct, magic: bytes, version: int, what: str
) -> tuple[Any, ...]:
    """The fields of a head that begins with magic and version; FormatError when they are not these."""
    if len(data) < head.size + _CRC.size:
        raise FormatError("truncated", f"a {what} of {len(data)} bytes is too short")
    fields = head.unpack_from(data)
    if fields[0] != magic:
        raise FormatError("bad_magic", f"not a {what}")
    if fields[1] != version:
        raise FormatError("unsupported_version", f"{what} version {fields[1]}; this release reads {version}")
    return fields


def check_crc(data: memoryview, what: str) -> None:
    """FormatError unless the last four bytes are the CRC-32 of those before."""
    if zlib.crc32(data[: -_CRC.size]) != _CRC.unpack_from(data, len(data) - _CRC.size)[0]:
        raise FormatError("bad_checksum", f"the checksum of the {what} does not match its bytes")


def append_crc(body: bytes) -> bytes:
    """`body` with its CRC-32."""
    return body + _CRC.pack(zlib.crc32(body))


def time_range_us(block: bytes | memoryview) -> tuple[int, int]:
    """Smallest and largest time of a block, read from its head without decoding it."""
    head = _HEAD.unpack_from(block)
    return head[4], head[5]


def _payloads(block: memoryview, count: int) -> dict[int, tuple[int, memoryview]]:
    """Column id to (encoding, payload), each payload checked to lie inside the block."""
    at = _HEAD.size + count * _ENTRY.size
    end = len(block) - _CRC.size
    if at > end:
        raise FormatError("truncated", "the directory reaches past the block")
    found = {}
    for position in range(count):
        number, encoding, size = _ENTRY.unpack_from(block, _HEAD.size + position * _ENTRY.size)
        if at + size > end:
            raise FormatError("truncated", "a column reaches past the block")
        found[number] = (encoding, block[at : at + size])
        at += size
    if at != end:
        raise FormatError("malformed", f"{end - at} bytes belong to no column")
    return found


def _encode_numbers(column: Column, config: ChunkConfig) -> tuple[int, bytes]:
    bits = column.view(f"u{column.itemsize}")
    if (bits == bits[0]).all():
        return _CONSTANT, column[:1].tobytes()
    if column.dtype == np.float32:
        small = _as_small(column)
        if small is not None:
            return _SMALL, standalone.simple_compress(small, config)
    if len(column) < _PLAIN_BELOW_ROWS:
        return _PLAIN, column.tobytes()
    return _PCO, standalone.simple_compress(np.ascontiguousarray(column), config)


def _as_small(column: NDArray[np.float32]) -> NDArray[np.int16] | None:
    """The column as int16 when nothing is lost by it, else None."""
    absent = np.isnan(column)
    filled = np.where(absent, np.float32(0), column)
    if (np.abs(filled) > _SMALL_MAX).any() or (np.rint(filled) != filled).any():
        return None
    small = filled.astype(np.int16)
    small[absent] = _SMALL_NULL
    return small


def _encode_runs(column: NDArray[np.int32], config: ChunkConfig) -> tuple[int, bytes]:
    starts = np.flatnonzero(np.diff(column, prepend=column[0] - 1))
    lengths = np.diff(starts, append=len(column)).astype(_RUN_TYPE)
    parts = [_COUNT.pack(len(starts))]
    for array in (column[starts], lengths):
        encoding, payload = _encode_numbers(array, config)
        parts += (_SUB.pack(encoding, len(payload)), payload)
    return _RUNS, b"".join(parts)


def _decode_text_column(encoding: int, payload: memoryview, rows: int) -> NDArray[np.object_]:
    if encoding != _TEXTS:
        raise FormatError("malformed", f"encoding {encoding} is none of texts")
    most = rows * (MAX_TEXT_BYTES + 5) + 5
    try:
        if not 0 <= zstandard.frame_content_size(payload) <= most:
            raise FormatError("too_large", f"a column of {rows} texts may have {most} bytes")
        texts = _decode_text_list(zstandard.ZstdDecompressor().decompress(payload, max_output_size=most))
    except (zstandard.ZstdError, msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise FormatError("malformed", f"a column of texts cannot be read: {fault}") from fault
    if len(texts) != rows:
        raise FormatError("malformed", f"a column of {len(texts)} texts for {rows} rows")
    if not all(map(is_storable_text, texts)):
        raise FormatError("malformed", "a text is too long or holds a NUL")
    column = np.empty(rows, np.object_)
    column[:] = texts
    return column


def _decode_numbers(encoding: int, payload: memoryview, dtype: np.dtype[np.generic], rows: int) -> Column:
    if encoding == _CONSTANT and len(payload) == dtype.itemsize:
        return np.full(rows, np.frombuffer(payload, dtype)[0], dtype)
    if encoding == _PLAIN and len(payload) == rows * dtype.itemsize:
        return np.frombuffer(payload, dtype).copy()
    if encoding == _PCO:
        return _decompress_pco(payload, dtype, rows)
    if encoding == _SMALL and dtype == np.float32:
        small = _decompress_pco(payload, np.dtype(np.int16), rows)
        column = small.astype(np.float32)
        column[small == _SMALL_NULL] = np.nan
        return column
    raise FormatError(
        "malformed", f"encoding {encoding} with {len(payload)} bytes does not fit {dtype} x {rows}"
    )


def _decode_runs(encoding: int, payload: memoryview, rows: int) -> NDArray[np.int32]:
    if encoding != _RUNS or len(payload) < _COUNT.size:
        raise FormatError("malformed", "the series column is not in runs")
    runs = _COUNT.unpack_from(payload)[0]
    if not 0 < runs <= rows:
        raise FormatError("malformed", f"{runs} runs of series for {rows} rows")
    at, arrays = _COUNT.size, []
    for _ in range(2):
        if at + _SUB.size > len(payload):
            raise FormatError("truncated", "the series column is cut short")
        sub_encoding, size = _SUB.unpack_from(payload, at)
        at += _SUB.size
        if at + size > len(payload):
            raise FormatError("truncated", "the series column is cut short")
        arrays.append(_decode_numbers(sub_encoding, payload[at : at + size], _RUN_TYPE, runs))
        at += size
    values, lengths = arrays
    if (lengths <= 0).any() or int(lengths.sum(dtype=np.int64)) != rows:
        raise FormatError("malformed", "the runs of series do not add up to the rows")
    return np.repeat(values, lengths)


def _decompress_pco(payload: memoryview, dtype: np.dtype[np.generic], rows: int) -> Column:
    """Decompress into an array of the expected size: pcodec alone would trust the size in the payload."""
    column = np.empty(rows, dtype)
    try:
        progress = standalone.simple_decompress_into(bytes(payload), column)
    except (RuntimeError, TypeError) as fault:
        raise FormatError("malformed", f"a column cannot be decompressed: {fault}") from fault
    if progress.n_processed != rows or not progress.finished:
        raise FormatError("malformed", f"a column holds {progress.n_processed} or more values, not {rows}")
    return column
