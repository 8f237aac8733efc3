"""InfluxDB line protocol: `MEASUREMENT[,TAG=TEXT] FIELD=VALUE[,...] [TIME]`, one reading per field. Pure.

The sensor_type is measurement.field (`weather.temperature`), or the measurement alone for the field
`value`; such a line may carry quality, battery_level, signal_strength, seq and flags, as this gateway
writes them. Tags that are series attributes are kept. An invalid field costs only itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from cloud_sync.codec.line_protocol import (
    parse_fields,
    parse_integer,
    parse_number,
    parse_series_key,
    split_line,
)
from cloud_sync.model.reading_builder import UNIT_SCALES, InvalidReadingError
from cloud_sync.model.records import Flag
from gateway.payloads.measurement import (
    FLOAT32_MAX,
    SEQ_MAX,
    DeviceFields,
    Fault,
    FieldMap,
    Measurement,
    PayloadDecodeError,
    check_member_count,
    convert_field_value,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.payloads.measurement import Decoder, DecodeResult
    from gateway.payloads.rule import PayloadRule

_INTEGER_PATTERN = re.compile(r"[+-]?\d{1,30}", re.ASCII)
_CACHED_KEYS_MAX: Final = 10_000
_FIELDS_MAX: Final = 1_000
_FLOAT_COMPANIONS: Final = ("quality", "battery_level", "signal_strength")
_COMPANIONS: Final = (*_FLOAT_COMPANIONS, "seq", "flags")
_DEVICE_FLAGS: Final = int(
    sum(Flag) & ~(Flag.SUPPRESSED | Flag.PROCESSED)
)  # the others are the gateway's own
_NO_COMPANIONS: Final = (None, None, None, None, 0)
_CompanionValues = tuple[float | None, float | None, float | None, int | None, int]


class _SeriesKey(NamedTuple):
    """The part of a line before the first space: measurement and tags."""

    measurement: str
    fields: DeviceFields
    location: str | None
    manufacturer: str | None
    firmware_version: str | None
    unit: str | None


def build_line_protocol_decoder(rule: PayloadRule, levels: Mapping[str, str]) -> Decoder:
    """Decodes lines on a topic with these named levels."""
    reader = _LineReader(rule, levels)

    def decode(payload: bytes, _now_us: int) -> DecodeResult:
        lines = payload.split(b"\n")
        check_member_count(len(lines), "lines")
        out: list[Measurement] = []
        faults: list[Fault] = []
        for number, line in enumerate(lines, start=1):
            try:
                reader.read(line, out, faults)
            except (InvalidReadingError, UnicodeDecodeError, PayloadDecodeError) as fault:
                faults.append(_build_line_fault(fault, number, line))
        return out, faults

    return decode


class _LineReader:
    """Reads lines under one rule; caches series keys."""

    def __init__(self, rule: PayloadRule, levels: Mapping[str, str]) -> None:
        self._fields = FieldMap(rule, levels)
        self._times, self._divided = UNIT_SCALES["ns" if rule.time_unit == "auto" else rule.time_unit]
        self._keys: dict[str, _SeriesKey] = {}

    def read(self, raw: bytes, out: list[Measurement], faults: list[Fault]) -> None:
        """Add the readings of one line; an invalid field costs only itself."""
        line = raw.decode().strip(" \r")
        if not line or line.startswith("#"):
            return
        key_text, fields_text, time_text = split_line(line)
        key = self._keys.get(key_text) or self._parse_key(key_text)
        fields = parse_fields(fields_text)
        if len(fields) > _FIELDS_MAX:
            raise PayloadDecodeError(
                "too_many_members", f"{len(fields)} fields; at most {_FIELDS_MAX} are allowed"
            )
        time_us = None if time_text is None else self._parse_time(time_text)
        before = len(out) + len(faults)
        has_companions = len(fields) > 1 and "value" in fields
        companions = _parse_companions(fields) if has_companions else _NO_COMPANIONS
        for name, text in fields.items():
            if has_companions and name in _COMPANIONS:
                continue
            path = key.measurement if name == "value" else f"{key.measurement}.{name}"
            try:
                measurement = _build_measurement(key, path, text, time_us, companions)
            except PayloadDecodeError as fault:
                part = f"{key_text} {name}={text}" + ("" if time_text is None else f" {time_text}")
                faults.append(fault.fault(part.encode()))
                continue
            if measurement is not None:
                out.append(measurement)
        if len(out) + len(faults) == before:
            raise PayloadDecodeError(
                "no_measurement", f"no field makes a reading under this rule: {fields_text:.64}"
            )

    def _parse_key(self, text: str) -> _SeriesKey:
        measurement, tags = parse_series_key(text)

        def find_tag(name: str) -> str:
            if not tags.get(name):
                raise PayloadDecodeError("no_sensor_id", f"{name}: there is no such tag")
            return tags[name]

        fields = self._fields.find_device(find_tag)
        if len(self._keys) >= _CACHED_KEYS_MAX:
            self._keys.clear()
        attributes = (
            tags.get(name) or None for name in ("location", "manufacturer", "firmware_version", "unit")
        )
        key = self._keys[text] = _SeriesKey(measurement, fields, *attributes)
        return key

    def _parse_time(self, text: str) -> int:
        if _INTEGER_PATTERN.fullmatch(text) is None:
            raise PayloadDecodeError("bad_time", f"expected a whole number at the end, found {text[:64]!r}")
        return int(text) * self._times // self._divided


def _build_measurement(
    key: _SeriesKey, path: str, text: str, time_us: int | None, companions: _CompanionValues
) -> Measurement | None:
    mapping = key.fields[path]
    if mapping is None:
        return None
    value: str | float
    if text.startswith('"'):
        value = text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    else:
        try:
            value = parse_number(text, "bad_member")
        except InvalidReadingError:
            raise PayloadDecodeError(
                "bad_member", f"{path}: expected a number, found {text[:64]!r}"
            ) from None
    number = convert_field_value(mapping, path, value)
    if number is None:
        return None
    quality, battery_level, signal_strength, seq, flags = companions
    return Measurement(
        mapping.name,
        number,
        time_us,
        quality,
        battery_level,
        signal_strength,
        seq,
        key.location,
        key.manufacturer,
        key.firmware_version,
        mapping.unit or key.unit,
        flags,
    )


def _parse_companions(fields: dict[str, str]) -> _CompanionValues:
    numbers = [
        parse_number(fields[name], f"bad_{name}") if name in fields else None for name in _FLOAT_COMPANIONS
    ]
    for name, number in zip(_FLOAT_COMPANIONS, numbers, strict=True):
        if number is not None and abs(number) > FLOAT32_MAX:
            raise InvalidReadingError(f"bad_{name}")
    seq = parse_integer(fields["seq"], "bad_seq") if "seq" in fields else None
    flags = parse_integer(fields["flags"], "bad_flags") if "flags" in fields else 0
    if seq is not None and not 0 <= seq <= SEQ_MAX:
        raise InvalidReadingError("bad_seq")
    return numbers[0], numbers[1], numbers[2], seq, flags & _DEVICE_FLAGS


def _build_line_fault(
    fault: InvalidReadingError | UnicodeDecodeError | PayloadDecodeError, number: int, line: bytes
) -> Fault:
    where = f"line {number}: "
    if isinstance(fault, PayloadDecodeError):
        return Fault(fault.reason, where + str(fault), line)
    if isinstance(fault, UnicodeDecodeError):
        return Fault("not_utf8", where + str(fault), line)
    reason = str(fault)
    if reason == "not_line_protocol":
        what = "expected MEASUREMENT[,TAG=TEXT] FIELD=VALUE[,FIELD=VALUE] [TIME]"
        return Fault(reason, where + what, line)
    return Fault("bad_reading", f"{where}{reason.removeprefix('bad_')}: expected a number", line)
