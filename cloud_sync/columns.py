"""The columnar codec: `Readings` to a checksummed block of bytes and back. Pure.

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

Rows are in canonical order (series, then time), so series is always runs and times rise within each.
A column whose id is unknown is skipped; a known column that is missing is refused.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from pcodec import ChunkConfig, standalone

from cloud_sync.errors import FormatError
from cloud_sync.records import DTYPES, Readings, RecordClass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

VERSION = 1
MAGIC = b"TC"
MAX_ROWS = 4_000_000

_HEAD = struct.Struct("<2sBBIqqB")
_ENTRY = struct.Struct("<BBI")
_SUB = struct.Struct("<BI")
_CRC = struct.Struct("<I")

_CONSTANT, _PLAIN, _PCO, _SMALL, _RUNS = range(5)
_PLAIN_BELOW_ROWS = 12
_SMALL_NULL = -32768
_SMALL_MAX = 32767
_IDS = {name: number for number, name in enumerate(DTYPES, start=1)}
_RUN_TYPE = np.dtype(np.int32)

FRESH_LEVEL = 4
"""pcodec level for what a group commit writes: speed first, it will be merged."""
FINAL_LEVEL = 8
"""pcodec level for compacted segments and wire batches."""


def encode(readings: Readings, *, level: int = FINAL_LEVEL) -> bytes:
    """Encode at least one reading, already in canonical order, as a block."""
    rows = readings.rows
    assert 0 < rows <= MAX_ROWS
    config = ChunkConfig(compression_level=level)
    directory, payloads = bytearray(), []
    for name, number in _IDS.items():
        column = getattr(readings, name)
        encoding, payload = _pack_runs(column, config) if name == "series" else _pack(column, config)
        directory += _ENTRY.pack(number, encoding, len(payload))
        payloads.append(payload)
    head = _HEAD.pack(
        MAGIC,
        VERSION,
        RecordClass.READING,
        rows,
        int(readings.time_us.min()),
        int(readings.time_us.max()),
        len(_IDS),
    )
    body = b"".join((head, directory, *payloads))
    return body + _CRC.pack(zlib.crc32(body))


def decode(block: bytes | memoryview, *, max_rows: int = MAX_ROWS) -> Readings:
    """Decode a block. Memory is bounded by `max_rows`, whatever the bytes claim.

    Raises:
        FormatError: with the reason; never anything else, whatever the bytes.
    """
    return Readings(*decode_columns(block, tuple(DTYPES), max_rows=max_rows))


def decode_columns(
    block: bytes | memoryview, names: Sequence[str], *, max_rows: int = MAX_ROWS
) -> list[NDArray[Any]]:
    """Only the columns `names` of a block, each of shape (rows,), in that order; checked as `decode` does.

    Raises:
        FormatError: with the reason.
    """
    block = memoryview(block)
    if len(block) < _HEAD.size + _CRC.size:
        raise FormatError("truncated", f"a block of {len(block)} bytes is too short")
    magic, version, record_class, rows, _, _, count = _HEAD.unpack_from(block)
    if magic != MAGIC:
        raise FormatError("bad_magic", "not a column block")
    if version != VERSION:
        raise FormatError(
            "unsupported_version", f"column block version {version}; this release reads {VERSION}"
        )
    if zlib.crc32(block[: -_CRC.size]) != _CRC.unpack_from(block, len(block) - _CRC.size)[0]:
        raise FormatError("bad_checksum", "the block's checksum does not match its bytes")
    if record_class != RecordClass.READING:
        raise FormatError("malformed", f"record class {record_class} is not known to this release")
    if not 0 < rows <= max_rows:
        raise FormatError("too_large", f"a block of {rows} rows; at most {max_rows} are taken")
    payloads = _payloads(block, count)
    columns: list[NDArray[Any]] = []
    for name in names:
        number = _IDS[name]
        if number not in payloads:
            raise FormatError("malformed", f"the column {name} is missing")
        encoding, payload = payloads[number]
        if name == "series":
            columns.append(_unpack_runs(encoding, payload, rows))
        else:
            columns.append(_unpack(encoding, payload, DTYPES[name], rows))
    return columns


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


def _pack(column: NDArray[Any], config: ChunkConfig) -> tuple[int, bytes]:
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


def _pack_runs(column: NDArray[np.int32], config: ChunkConfig) -> tuple[int, bytes]:
    starts = np.flatnonzero(np.diff(column, prepend=column[0] - 1))
    lengths = np.diff(starts, append=len(column)).astype(_RUN_TYPE)
    parts = [struct.pack("<I", len(starts))]
    for array in (column[starts], lengths):
        encoding, payload = _pack(array, config)
        parts += (_SUB.pack(encoding, len(payload)), payload)
    return _RUNS, b"".join(parts)


def _unpack(encoding: int, payload: memoryview, dtype: np.dtype[Any], rows: int) -> NDArray[Any]:
    if encoding == _CONSTANT and len(payload) == dtype.itemsize:
        return np.full(rows, np.frombuffer(payload, dtype)[0], dtype)
    if encoding == _PLAIN and len(payload) == rows * dtype.itemsize:
        return np.frombuffer(payload, dtype).copy()
    if encoding == _PCO:
        return _inflate(payload, dtype, rows)
    if encoding == _SMALL and dtype == np.float32:
        small = _inflate(payload, np.dtype(np.int16), rows)
        column = small.astype(np.float32)
        column[small == _SMALL_NULL] = np.nan
        return column
    raise FormatError(
        "malformed", f"encoding {encoding} with {len(payload)} bytes does not fit {dtype} x {rows}"
    )


def _unpack_runs(encoding: int, payload: memoryview, rows: int) -> NDArray[np.int32]:
    if encoding != _RUNS or len(payload) < 4:  # noqa: PLR2004 - the size of the u32 that follows
        raise FormatError("malformed", "the series column is not in runs")
    runs = struct.unpack_from("<I", payload)[0]
    if not 0 < runs <= rows:
        raise FormatError("malformed", f"{runs} runs of series for {rows} rows")
    at, arrays = 4, []
    for _ in range(2):
        if at + _SUB.size > len(payload):
            raise FormatError("truncated", "the series column is cut short")
        sub_encoding, size = _SUB.unpack_from(payload, at)
        at += _SUB.size
        if at + size > len(payload):
            raise FormatError("truncated", "the series column is cut short")
        arrays.append(_unpack(sub_encoding, payload[at : at + size], _RUN_TYPE, runs))
        at += size
    values, lengths = arrays
    if (lengths <= 0).any() or int(lengths.sum(dtype=np.int64)) != rows:
        raise FormatError("malformed", "the runs of series do not add up to the rows")
    return np.repeat(values, lengths)


def _inflate(payload: memoryview, dtype: np.dtype[Any], rows: int) -> NDArray[Any]:
    """Decompress into an array of the declared size: pcodec alone would trust the payload's own claim."""
    column = np.empty(rows, dtype)
    try:
        progress = standalone.simple_decompress_into(bytes(payload), column)
    except (RuntimeError, TypeError) as fault:
        raise FormatError("malformed", f"a column cannot be decompressed: {fault}") from fault
    if progress.n_processed != rows or not progress.finished:
        raise FormatError("malformed", f"a column holds {progress.n_processed} or more values, not {rows}")
    return column
