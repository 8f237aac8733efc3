"""JSON readings: an object with a value, an array of them, or (ndjson) one object a line. Pure.

Members: value (required: a finite number, or true/false as 1/0), ts, quality, battery_level,
signal_strength, seq, location, manufacturer, firmware_version, unit; sensor_id and sensor_type where the
topic does not name the series. Others are ignored. An invalid member of an array costs only itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from cloud_sync.model.reading_builder import TimestampError, parse_timestamp
from gateway.payloads import measurement
from gateway.payloads.measurement import MEMBERS_MAX, Fault, Measurement, PayloadDecodeError, apply_scale
from gateway.payloads.topics import SeriesName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.payloads.measurement import DecodeResult
    from gateway.payloads.rule import PayloadRule

Float32Value = Annotated[float, msgspec.Meta(ge=-3.4e38, le=3.4e38)]
"""A number that fits single precision."""
DECOMPRESSED_MAX_BYTES: Final = 8 << 20
SequenceNumber = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


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


_reading_decoder = msgspec.json.Decoder(JsonReading)
_reading_list_decoder = msgspec.json.Decoder(list[JsonReading])
_raw_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def decode_readings(payload: bytes) -> tuple[Sequence[JsonReading], list[Fault]]:
    """Readings and faults of one payload; times and ranges are not looked at here."""
    try:
        if payload[:1] == b"{":
            return (_reading_decoder.decode(payload),), []
        return (
            _reading_list_decoder.decode(payload)
            if payload.lstrip()[:1] == b"["
            else (_reading_decoder.decode(payload),)
        ), []
    except msgspec.ValidationError as fault:
        if payload.lstrip()[:1] == b"[":
            return _decode_one_by_one(payload)
        return (), [Fault("bad_reading", str(fault), payload)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        if payload[:2] in measurement.COMPRESSION_MAGIC:
            return _decode_compressed(payload)
        return (), [Fault("not_json", str(fault) or type(fault).__name__, payload)]


def _decode_compressed(payload: bytes) -> tuple[Sequence[JsonReading], list[Fault]]:
    try:
        expanded = measurement.decompress_payload(payload, DECOMPRESSED_MAX_BYTES)
    except measurement.PayloadDecompressionError as fault:
        return (), [Fault(fault.reason, str(fault), payload)]
    if expanded[:2] in measurement.COMPRESSION_MAGIC:
        return (), [Fault("bad_compression", "compressed twice, or not what its first bytes say", payload)]
    return decode_readings(expanded)


def _decode_one_by_one(payload: bytes) -> tuple[list[JsonReading], list[Fault]]:
    """The members of an array that has at least one bad one."""
    readings, faults = [], []
    try:
        parts = _raw_list_decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        return [], [Fault("not_json", str(fault) or type(fault).__name__, payload)]
    for position, part in enumerate(parts):
        try:
            readings.append(_reading_decoder.decode(part))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
            faults.append(Fault("bad_reading", f"member {position}: {fault}", bytes(part)))
    return readings, faults


class NamedReading(JsonReading, gc=False):
    """One reading that says whose it is."""

    sensor_id: str = ""
    sensor_type: str = ""


_named_reading_decoder = msgspec.json.Decoder(NamedReading)
_raw_members_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def build_named_reading_decoder(
    rule: PayloadRule, levels: Mapping[str, str]
) -> Callable[[bytes, int], DecodeResult]:
    """What decodes the payloads of one topic, whose named levels are given."""
    reader = _NamedReadingReader(rule, levels)
    split = _split_lines if rule.format == "ndjson" else _split_array

    def decode(payload: bytes, now_us: int) -> DecodeResult:  # noqa: ARG001 - of every decoder
        out: list[Measurement] = []
        faults: list[Fault] = []
        try:
            parts = split(payload)
        except _JSON_ERRORS as fault:
            return (), [Fault("not_json", str(fault) or type(fault).__name__, payload)]
        if len(parts) > MEMBERS_MAX:
            what = f"{len(parts)} members; at most {MEMBERS_MAX} are taken"
            return (), [Fault("too_many_members", what, payload)]
        for position, part in enumerate(parts):
            try:
                out.append(reader.read(part))
            except PayloadDecodeError as fault:
                where = f"member {position}: " if len(parts) > 1 else ""
                faults.append(Fault(fault.reason, f"{where}{fault}", bytes(part)))
        return out, faults

    return decode


class _NamedReadingReader:
    """Reads single readings on one topic."""

    def __init__(self, rule: PayloadRule, levels: Mapping[str, str]) -> None:
        self._otherwise = rule.default_conversion
        self._sensor_id = rule.sensor_id_template.filled(levels)
        self._sensor_type = rule.sensor_type_template.filled(levels)

    def read(self, part: bytes | msgspec.Raw) -> Measurement:
        """The measurement of one reading.

        Raises:
            NotDecodable: it is none.
        """
        try:
            told = _named_reading_decoder.decode(part)
        except msgspec.ValidationError as fault:
            raise PayloadDecodeError("bad_reading", str(fault)) from None
        except _JSON_ERRORS as fault:
            raise PayloadDecodeError("not_json", str(fault) or type(fault).__name__) from None
        known = {"sensor_id": told.sensor_id, "sensor_type": told.sensor_type}
        for needed in (*self._sensor_id.names, *self._sensor_type.names):
            if not known[needed]:
                raise PayloadDecodeError(f"no_{needed}", f"{needed}: expected text that names the series")
        name = SeriesName(
            self._sensor_id.render(known.__getitem__), self._sensor_type.render(known.__getitem__)
        )
        try:
            time_us = None if told.ts is None else parse_timestamp(told.ts)
        except TimestampError as fault:
            raise PayloadDecodeError("bad_time", f"ts: {fault}") from None
        return Measurement(
            name,
            apply_scale(self._otherwise, "value", float(told.value)),
            time_us,
            told.quality,
            told.battery_level,
            told.signal_strength,
            told.seq,
            told.location,
            told.manufacturer,
            told.firmware_version,
            told.unit or self._otherwise.unit,
        )


def _split_lines(payload: bytes) -> Sequence[bytes]:
    return [line for line in payload.split(b"\n") if line.strip()]


def _split_array(payload: bytes) -> Sequence[bytes | msgspec.Raw]:
    return _raw_members_decoder.decode(payload) if payload.lstrip()[:1] == b"[" else (payload,)
