"""Bodies of plain readings: content encoding, then JSON, NDJSON or line protocol. Memory is bounded. Pure.

A JSON reading is an object with `sensor_id`, `sensor_type` and `value` (a finite number, or true/false
as 1/0), and optionally `ts`, `quality`, `battery_level`, `signal_strength`, `seq`, `location`,
`manufacturer`, `firmware_version`, `unit`; other members are ignored. `ts` is read by
`cloud_sync.model.reading_builder`. A bad reading is rejected alone.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
import zstandard

from cloud_sync.codec.line_protocol import LineReader
from cloud_sync.model.reading_builder import (
    ColumnBuilder,
    InvalidReadingError,
    Reading,
    TimestampError,
    TimestampRangeError,
    build_reading,
    parse_timestamp,
    validate_series,
)
from cloud_sync.model.records import Flag, Readings, Series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

CONTENT_ENCODINGS = ("identity", "gzip", "zstd")

_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_ZSTD_WINDOW_MAX = 8 << 20


class DecompressionError(Exception):
    """The body is not what its encoding says."""


class DecompressedSizeError(Exception):
    """The decompressed body is too long."""


def decompress(body: bytes, encoding: str, *, max_bytes: int) -> bytes:
    """The body without one of `CONTENT_ENCODINGS`; a DecompressedSizeError has kept at most `max_bytes`."""
    if encoding == "identity":
        return body
    found = _decompress_gzip(body, max_bytes) if encoding == "gzip" else _decompress_zstd(body, max_bytes)
    if len(found) > max_bytes:
        raise DecompressedSizeError(f"a body may have {max_bytes} bytes when it is decompressed")
    return found


def _decompress_gzip(body: bytes, max_bytes: int) -> bytes:
    """The body, or more than `max_bytes` of it."""
    found = bytearray()
    for piece in iter_gzip([body], max_bytes + 1):
        found += piece
        if len(found) > max_bytes:
            break
    return bytes(found)


def iter_gzip(pieces: Iterable[bytes], max_bytes: int) -> Iterator[bytes]:
    """What the members of a gzip file hold, at most `max_bytes` at a time.

    DecompressionError when it is no gzip, or ends within a member.
    """
    member = zlib.decompressobj(_GZIP_WINDOW)
    begun = False
    for piece in pieces:
        rest = piece
        while rest:
            if member.eof:
                member = zlib.decompressobj(_GZIP_WINDOW)
            begun = True
            try:
                yield member.decompress(rest, max_bytes)
            except zlib.error as fault:
                raise DecompressionError(f"it is no gzip: {fault}") from fault
            rest = member.unused_data if member.eof else member.unconsumed_tail
    if begun and not member.eof:
        raise DecompressionError("it ends within a gzip member")


def _decompress_zstd(body: bytes, max_bytes: int) -> bytes:
    reader = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_MAX).stream_reader(
        body, read_across_frames=True
    )
    try:
        with reader:
            found = reader.read(max_bytes + 1)
    except (zstandard.ZstdError, MemoryError) as fault:
        raise DecompressionError(f"it is no zstd: {fault}") from fault
    if body and not found:
        raise DecompressionError("it ends within a zstd frame, or is empty")
    return found


JSON, NDJSON, LINES = "application/json", "application/x-ndjson", "text/plain"
MEDIA_TYPES = (JSON, NDJSON, "application/ndjson", LINES)

_MAX_ASSIGNED_SERIES = 200_000
_DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class PlainBodyError(Exception):
    """A body that holds no readings at all, or too many; `reason` is not_json or too_many_rows."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class RejectedReading:
    """Part of a body that is no reading; `index` is its position or line, None where `detail` says it."""

    index: int | None
    reason: str
    part: bytes | msgspec.Raw
    detail: str = ""


class AssignedTimes:
    """Times for readings without one: that of receipt, ascending within each series."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], int] = {}

    def assign_time(self, reading: Reading, now_us: int) -> Reading:
        """The reading with a time and `Flag.TIME_ASSIGNED`, or as it is when it has a time."""
        if reading.time_us is not None:
            return reading
        if len(self._last) > _MAX_ASSIGNED_SERIES:
            self._last.clear()
        name = reading.series[:2]
        at_us = self._last[name] = max(now_us, self._last.get(name, now_us - 1) + 1)
        return reading._replace(time_us=at_us, flags=reading.flags | Flag.TIME_ASSIGNED)


@dataclass(frozen=True, slots=True)
class PlainReadings:
    """The readings of a body, in canonical order, and what was rejected."""

    series: Sequence[Series]
    readings: Readings
    rejected: list[RejectedReading] = field(default_factory=list)


class _JsonReading(msgspec.Struct, gc=False):
    value: float | bool
    sensor_id: str = ""
    sensor_type: str = ""
    ts: int | float | str | None = None
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


_reading_decoder = msgspec.json.Decoder(_JsonReading)
_array_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def parse_readings(
    body: bytes,
    media_type: str,
    *,
    now_us: int,
    max_rows: int,
    precision: str = "ns",
    stamps: AssignedTimes | None = None,
    fault_of: Callable[[Series], str | None] = lambda _: None,
) -> PlainReadings:
    """The readings of a body without content encoding; PlainBodyError when the whole body is rejected.

    `max_rows` counts rejected ones too; readings without a time get `now_us` and `Flag.TIME_ASSIGNED`.
    `fault_of` says why readings of a series are rejected, None for accepted ones.
    """
    builder, rejected, stamps = ColumnBuilder(), [], stamps or AssignedTimes()
    faults: dict[Series, str | None] = {}
    lines = LineReader(precision)
    for index, part in enumerate(_split_json(body) if media_type == JSON else body.split(b"\n")):
        if index >= max_rows:
            raise PlainBodyError("too_many_rows", f"a request may have {max_rows} readings")
        try:
            found = _read_line(bytes(part), lines) if media_type == LINES else _read_json(part)
            if found is None:
                continue
            if found.series not in faults:
                validate_series(found.series)
                faults[found.series] = fault_of(found.series)
            reason = faults[found.series]
            if reason is None:
                builder.add(stamps.assign_time(found, now_us))
        except InvalidReadingError as bad:
            reason = str(bad)
        if reason is not None:
            rejected.append(RejectedReading(index, reason, part))
    return PlainReadings(*builder.build(), rejected)


def _split_json(body: bytes) -> Sequence[bytes | msgspec.Raw]:
    try:
        if body.lstrip()[:1] == b"[":
            return _array_decoder.decode(body)
        msgspec.json.decode(body, type=msgspec.Raw)
    except _DECODE_ERRORS as fault:
        raise PlainBodyError("not_json", f"the body is no JSON: {fault}") from fault
    return (body,)


def _read_json(part: bytes | msgspec.Raw) -> Reading | None:
    """The reading of a JSON text, None for an empty line."""
    if not bytes(part).strip():
        return None
    try:
        decoded = _reading_decoder.decode(part)
    except msgspec.ValidationError as fault:
        raise InvalidReadingError("no_value" if "field `value`" in str(fault) else "bad_reading") from fault
    except _DECODE_ERRORS as fault:
        raise InvalidReadingError("not_json") from fault
    time_us = None if decoded.ts is None else _read_timestamp(decoded.ts)
    return build_reading((decoded.sensor_id, decoded.sensor_type), time_us, float(decoded.value), decoded)


def _read_line(line: bytes, lines: LineReader) -> Reading | None:
    try:
        return lines.read(line.decode())
    except UnicodeDecodeError as fault:
        raise InvalidReadingError("not_utf8") from fault


def _read_timestamp(ts: float | str) -> int:
    try:
        return parse_timestamp(ts)
    except TimestampRangeError:
        raise InvalidReadingError("time_out_of_range") from None
    except TimestampError:
        raise InvalidReadingError("bad_time") from None
