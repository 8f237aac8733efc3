"""The wire batch: a self-contained `Batch` as bytes, and back. Pure. Specified in docs/wire-format.md.

Form (little-endian):

    offset  size
    0       4     magic "TGWB"
    4       1     version, 1
    5       3     zero
    8       4     header bytes h, u32
    12      4     block bytes b, u32
    16      h     header: zstd frame of a msgpack map
    16+h    b     column block (see columns.py); its series column indexes the header's series
    end-4   4     CRC-32 of everything before it

The header's keys: gateway_id str, epoch 16 bytes, class int, first int, last int, rows int,
series list of [sensor_id, sensor_type, {attribute: text}]; part and parts int where the batch is a part of
its range, refused int where rows were refused and withheld int where rows are not for this destination.
Unknown keys are skipped. A batch without any row, all of them refused or withheld, has no series
and no block. Declarations name no series; the batch of a class that does has at least one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from uuid import UUID

import msgspec
import zstandard

from cloud_sync.codec import columns
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import (
    MAX_TEXT_BYTES,
    Batch,
    BatchRange,
    RecordClass,
    Records,
    Series,
    is_storable_text,
)

VERSION = 1
MAGIC = b"TGWB"
MEDIA_TYPE = "application/vnd.tidegate.batch"

_HEAD = struct.Struct("<4sB3xII")
_CRC_BYTES = 4
MAX_PARTS = 1 << 16
_REFUSED_MAX = 1 << 31


@dataclass(frozen=True, slots=True)
class WireLimits:
    """What a receiver accepts; checked before memory is spent."""

    max_rows: int = 1_000_000
    max_header_bytes: int = 16 << 20


class _Header(msgspec.Struct, omit_defaults=True):
    gateway_id: str
    epoch: bytes
    record_class: int = msgspec.field(name="class")
    first: int = 0
    last: int = 0
    rows: int = 0
    series: list[tuple[str, str, dict[str, str]]] = []
    part: int = 1
    parts: int = 1
    refused: int = 0
    withheld: int = 0


def encode(batch: Batch) -> bytes:
    """Encode a batch in canonical order, of at least one record unless rows of it were left out."""
    assert batch.rows or batch.refused or batch.withheld
    header = _Header(
        gateway_id=batch.range.gateway_id,
        epoch=batch.range.epoch.bytes,
        record_class=batch.range.record_class,
        first=batch.range.first_commit,
        last=batch.range.last_commit,
        rows=batch.rows,
        series=[(s.sensor_id, s.sensor_type, dict(s.attributes)) for s in batch.series],
        part=batch.range.part,
        parts=batch.range.parts,
        refused=batch.refused,
        withheld=batch.withheld,
    )
    packed = zstandard.compress(msgspec.msgpack.encode(header), 9)
    block = columns.encode(batch.records) if batch.rows else b""
    head = _HEAD.pack(MAGIC, VERSION, len(packed), len(block))
    return columns.append_crc(head + packed + block)


def decode(data: bytes, limits: WireLimits = WireLimits()) -> Batch:
    """Decode a batch, bounded by `limits`; FormatError and nothing else, whatever the bytes."""
    view = memoryview(data)
    _, _, header_bytes, block_bytes = columns.unpack_head(view, _HEAD, MAGIC, VERSION, "wire batch")
    header_end = _HEAD.size + header_bytes
    block_end = header_end + block_bytes
    if block_end + _CRC_BYTES != len(view):
        raise FormatError("truncated", "the batch is not as long as its head says")
    columns.check_crc(view, "wire batch")
    header = _decode_header(view[_HEAD.size : header_end], limits.max_header_bytes)
    range_ = _decode_range(header)
    records = _decode_block(header, range_.record_class, view[header_end:block_end], limits)
    series = tuple(_check_series(*entry) for entry in header.series)
    return Batch(range_, series, records, header.refused, header.withheld)


def _decode_block(
    header: _Header, record_class: RecordClass, block: memoryview, limits: WireLimits
) -> Records:
    left_out = (header.refused, header.withheld)
    if not all(0 <= rows < _REFUSED_MAX for rows in left_out):
        raise FormatError("malformed", f"{header.refused} refused and {header.withheld} withheld rows")
    if header.rows == 0 and any(left_out) and not block and not header.series:
        return columns.RECORD_TYPES[record_class].empty()
    records = columns.decode_records(block, record_class, max_rows=limits.max_rows)
    if records.rows != header.rows:
        raise FormatError("malformed", f"the header says {header.rows} rows, the columns hold {records.rows}")
    if not records.has_series:
        if header.series:
            raise FormatError("malformed", "series in a batch whose records name none")
        return records
    if int(records.series.min()) < 0 or int(records.series.max()) >= len(header.series):
        raise FormatError("malformed", "a record names a series that the header does not")
    return records


def _decode_header(packed: memoryview, max_bytes: int) -> _Header:
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= max_bytes:
            raise FormatError("too_large", f"a header of {size} bytes; at most {max_bytes} are accepted")
        raw = zstandard.ZstdDecompressor().decompress(packed, max_output_size=max_bytes)
        return msgspec.msgpack.decode(raw, type=_Header)
    except (zstandard.ZstdError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise FormatError("malformed", f"the header cannot be read: {fault}") from fault


def _decode_range(header: _Header) -> BatchRange:
    try:
        epoch = UUID(bytes=header.epoch)
        record_class = RecordClass(header.record_class)
    except ValueError as fault:
        raise FormatError("malformed", f"the header names no batch: {fault}") from fault
    if not 0 < header.first <= header.last < 1 << 62:
        raise FormatError("malformed", f"{header.first}..{header.last} is no range of commits")
    if not 0 < header.part <= header.parts <= MAX_PARTS:
        raise FormatError("malformed", f"part {header.part} of {header.parts}")
    if not 0 < len(header.gateway_id.encode()) <= MAX_TEXT_BYTES:
        raise FormatError("malformed", "gateway_id is empty or too long")
    return BatchRange(
        header.gateway_id, epoch, record_class, header.first, header.last, header.part, header.parts
    )


def _check_series(sensor_id: str, sensor_type: str, attributes: dict[str, str]) -> Series:
    if not all(map(is_storable_text, (sensor_id, sensor_type, *attributes, *attributes.values()))):
        raise FormatError("malformed", "a series name or attribute is too long or holds a NUL")
    if not sensor_id or not sensor_type:
        raise FormatError("malformed", "a series without sensor_id or sensor_type")
    return Series(sensor_id, sensor_type, tuple(sorted(attributes.items())))
