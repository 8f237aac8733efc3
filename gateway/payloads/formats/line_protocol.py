"""InfluxDB line protocol: `MEASUREMENT[,TAG=TEXT] FIELD=VALUE[,...] [TIME]`, one reading per field. Pure.

The sensor_type is measurement.field (`weather.temperature`), or the measurement alone for the field
`value`; such a line may carry quality, battery_level, signal_strength, seq and flags, as this gateway
writes them. Tags that are series attributes are kept. An invalid field costs only itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cloud_sync.codec.line_protocol import (
    PRECISION_SCALES,
    parse_fields,
    parse_integer,
    parse_number,
    parse_series_key,
    split_line,
)
from cloud_sync.model.reading_builder import InvalidReadingError
from cloud_sync.model.records import Flag
from gateway.payloads import measurement as planned
from gateway.payloads.measurement import (
    MEMBERS_MAX,
    DeviceFieldMap,
    Fault,
    FieldMap,
    Measurement,
    PayloadDecodeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.payloads.measurement import DecodeResult
    from gateway.payloads.rule import PayloadRule

_INTEGER_PATTERN = re.compile(r"[+-]?\d{1,30}", re.ASCII)
_CACHED_KEYS_MAX: Final = 10_000
_FIELDS_MAX: Final = 1_000
_FLOAT_COMPANIONS: Final = ("quality", "battery_level", "signal_strength")
_FLOAT32_MAX: Final = 3.4e38
_SEQ_MAX: Final = (1 << 63) - 1
_DEVICE_FLAGS: Final = int(
    sum(Flag) & ~(Flag.SUPPRESSED | Flag.PROCESSED)
)  # which are the gateway's own to set
_NO_COMPANIONS: Final = (None, None, None, None, 0)
_CompanionValues = tuple[float | None, float | None, float | None, int | None, int]


class _SeriesKey(NamedTuple):
    """What the part of a line before the first space says."""

    measurement: str
    plans: DeviceFieldMap
    location: str | None
    manufacturer: str | None
    firmware_version: str | None
    unit: str | None


def build_line_protocol_decoder(
    rule: PayloadRule, levels: Mapping[str, str]
) -> Callable[[bytes, int], DecodeResult]:
    """What decodes the payloads of one topic, whose named levels are given."""
    reader = _LineReader(rule, levels)

    def decode(payload: bytes, now_us: int) -> DecodeResult:  # noqa: ARG001 - of every decoder
        lines = payload.split(b"\n")
        if len(lines) > MEMBERS_MAX:
            what = f"{len(lines)} lines; at most {MEMBERS_MAX} are taken"
            return (), [Fault("too_many_members", what, payload)]
        out: list[Measurement] = []
        faults: list[Fault] = []
        for number, line in enumerate(lines, start=1):
            try:
                reader.read(line, out, faults)
            except (InvalidReadingError, UnicodeDecodeError, PayloadDecodeError) as fault:
                faults.append(_fault_from_error(fault, number, line))
        return out, faults

    return decode


class _LineReader:
    """Reads lines under one rule; remembers the keys it has seen."""

    def __init__(self, rule: PayloadRule, levels: Mapping[str, str]) -> None:
        self._book = FieldMap(rule, levels)
        self._times, self._divided = PRECISION_SCALES["ns" if rule.time_unit == "auto" else rule.time_unit]
        self._keys: dict[str, _SeriesKey] = {}

    def read(self, raw: bytes, out: list[Measurement], faults: list[Fault]) -> None:
        """The readings of one line."""
        line = raw.decode().strip(" \r")
        if not line or line.startswith("#"):
            return
        key_text, fields_text, time_text = split_line(line)
        key = self._keys.get(key_text) or self._learn(key_text)
        fields = parse_fields(fields_text)
        if len(fields) > _FIELDS_MAX:
            raise PayloadDecodeError(
                "too_many_members", f"{len(fields)} fields; at most {_FIELDS_MAX} are taken"
            )
        time_us = None if time_text is None else self._time(time_text)
        before = len(out) + len(faults)
        beside = _parse_companions(fields) if len(fields) > 1 and "value" in fields else _NO_COMPANIONS
        for name, text in fields.items():
            if "value" in fields and (name in _FLOAT_COMPANIONS or name in ("seq", "flags")):
                continue
            path = key.measurement if name == "value" else f"{key.measurement}.{name}"
            try:
                measured = _build_measurement(key, path, text, time_us, beside)
            except PayloadDecodeError as fault:
                part = f"{key_text} {name}={text}" + ("" if time_text is None else f" {time_text}")
                faults.append(fault.fault(part.encode()))
                continue
            if measured is not None:
                out.append(measured)
        if len(out) + len(faults) == before:
            raise PayloadDecodeError(
                "no_measurement", f"no field makes a reading under this rule: {fields_text:.64}"
            )

    def _learn(self, text: str) -> _SeriesKey:
        measurement, tags = parse_series_key(text)
        names = []
        for name in self._book.names:
            if not tags.get(name):
                raise PayloadDecodeError("no_sensor_id", f"{name}: there is no such tag")
            names.append(tags[name])
        if len(self._keys) >= _CACHED_KEYS_MAX:
            self._keys.clear()
        plans = self._book.only or self._book.of(tuple(names))
        attributes = (
            tags.get(name) or None for name in ("location", "manufacturer", "firmware_version", "unit")
        )
        key = self._keys[text] = _SeriesKey(measurement, plans, *attributes)
        return key

    def _time(self, text: str) -> int:
        if _INTEGER_PATTERN.fullmatch(text) is None:
            raise PayloadDecodeError("bad_time", f"expected a whole number at the end, found {text[:64]!r}")
        return int(text) * self._times // self._divided


def _build_measurement(
    key: _SeriesKey, path: str, text: str, time_us: int | None, beside: _CompanionValues
) -> Measurement | None:
    plan = key.plans.known(path) or key.plans.of(path)
    if plan is None:
        return None
    value: Any
    if text.startswith('"'):
        value = text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    else:
        try:
            value = parse_number(text, "bad_member")
        except InvalidReadingError:
            raise PayloadDecodeError(
                "bad_member", f"{path}: expected a number, found {text[:64]!r}"
            ) from None
    number = planned.convert_field_value(plan, path, value)
    if number is None:
        return None
    quality, battery_level, signal_strength, seq, flags = beside
    return Measurement(
        plan.name,
        number,
        time_us,
        quality,
        battery_level,
        signal_strength,
        seq,
        key.location,
        key.manufacturer,
        key.firmware_version,
        plan.unit or key.unit,
        flags,
    )


def _parse_companions(fields: dict[str, str]) -> _CompanionValues:
    numbers = [
        parse_number(fields[name], f"bad_{name}") if name in fields else None for name in _FLOAT_COMPANIONS
    ]
    for name, number in zip(_FLOAT_COMPANIONS, numbers, strict=True):
        if number is not None and abs(number) > _FLOAT32_MAX:
            raise InvalidReadingError(f"bad_{name}")
    seq = parse_integer(fields["seq"], "bad_seq") if "seq" in fields else None
    flags = parse_integer(fields["flags"], "bad_flags") if "flags" in fields else 0
    if seq is not None and not 0 <= seq <= _SEQ_MAX:
        raise InvalidReadingError("bad_seq")
    return numbers[0], numbers[1], numbers[2], seq, flags & _DEVICE_FLAGS


def _fault_from_error(
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
