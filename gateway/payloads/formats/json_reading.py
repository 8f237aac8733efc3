"""JSON readings: an object with a value, an array of them, or (ndjson) one object a line. Pure.

Members: value (required: a finite number, or true/false as 1/0), ts, quality, battery_level,
signal_strength, seq, location, manufacturer, firmware_version, unit; sensor_id and sensor_type where the
topic does not name the series. Others are ignored. An invalid member of an array costs only itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec

from cloud_sync.model.reading_builder import TimestampError, parse_timestamp
from gateway.payloads.measurement import (
    JSON_ERRORS,
    Fault,
    Measurement,
    PayloadDecodeError,
    apply_scale,
    check_member_count,
    json_error,
)
from gateway.payloads.topics import SeriesName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.payloads.measurement import Decoder, DecodeResult
    from gateway.payloads.rule import PayloadRule

Float32Value = Annotated[float, msgspec.Meta(ge=-3.4e38, le=3.4e38)]
SequenceNumber = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
T = TypeVar("T")


class JsonReading(msgspec.Struct, gc=False):
    """One reading as a device writes it; `value` is finite, as JSON numbers are."""

    value: float | bool
    ts: int | float | str | None = None
    quality: Float32Value | None = None
    battery_level: Float32Value | None = None
    signal_strength: Float32Value | None = None
    seq: SequenceNumber | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


class NamedReading(JsonReading, gc=False):
    """One reading that may name its series."""

    sensor_id: str = ""
    sensor_type: str = ""


decode_reading = msgspec.json.Decoder(JsonReading).decode
_decode_reading_list = msgspec.json.Decoder(list[JsonReading]).decode
_decode_named_reading = msgspec.json.Decoder(NamedReading).decode
_decode_raw_list = msgspec.json.Decoder(list[msgspec.Raw]).decode


def decode_readings(payload: bytes) -> tuple[Sequence[JsonReading], list[Fault]]:
    """Readings of a topic that names their series; times are not parsed here."""
    try:
        return _decode_reading_list(payload), []
    except JSON_ERRORS:
        return _decode_parts(_split_array(payload), decode_reading)


def build_reading_decoder(rule: PayloadRule, levels: Mapping[str, str]) -> Decoder:
    """Decodes `reading` and `ndjson` of a rule, whose sensor_id or sensor_type may come from the payload."""
    conversion = rule.default_conversion
    sensor_id = rule.sensor_id_template.fill(levels)
    sensor_type = rule.sensor_type_template.fill(levels)
    split = _split_lines if rule.format == "ndjson" else _split_array

    def read(part: bytes | msgspec.Raw) -> Measurement:
        r = _decode_named_reading(part)
        names = {"sensor_id": r.sensor_id, "sensor_type": r.sensor_type}
        for needed in (*sensor_id.names, *sensor_type.names):
            if not names[needed]:
                raise PayloadDecodeError(f"no_{needed}", f"{needed}: expected text that names the series")
        try:
            time_us = None if r.ts is None else parse_timestamp(r.ts)
        except TimestampError as fault:
            raise PayloadDecodeError("bad_time", f"ts: {fault}") from None
        return Measurement(
            SeriesName(sensor_id.render(names.__getitem__), sensor_type.render(names.__getitem__)),
            apply_scale(conversion, "value", float(r.value)),
            time_us,
            r.quality,
            r.battery_level,
            r.signal_strength,
            r.seq,
            r.location,
            r.manufacturer,
            r.firmware_version,
            r.unit or conversion.unit,
        )

    def decode(payload: bytes, _now_us: int) -> DecodeResult:
        parts = split(payload)
        check_member_count(len(parts), "readings")
        return _decode_parts(parts, read)

    return decode


def _decode_parts(
    parts: Sequence[bytes | msgspec.Raw], decode: Callable[[bytes | msgspec.Raw], T]
) -> tuple[list[T], list[Fault]]:
    decoded, faults = [], []
    for position, part in enumerate(parts):
        try:
            decoded.append(decode(part))
        except (*JSON_ERRORS, PayloadDecodeError) as fault:
            if isinstance(fault, msgspec.ValidationError):
                error = PayloadDecodeError("bad_reading", str(fault))
            else:
                error = fault if isinstance(fault, PayloadDecodeError) else json_error(fault)
            where = f"member {position}: " if len(parts) > 1 else ""
            faults.append(Fault(error.reason, f"{where}{error}", bytes(part)))
    return decoded, faults


def _split_lines(payload: bytes) -> Sequence[bytes]:
    return [line for line in payload.split(b"\n") if line.strip()]


def _split_array(payload: bytes) -> Sequence[bytes | msgspec.Raw]:
    if payload.lstrip()[:1] != b"[":
        return (payload,)
    try:
        return _decode_raw_list(payload)
    except JSON_ERRORS as fault:
        raise json_error(fault) from None
