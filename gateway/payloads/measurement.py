"""What a payload decodes to: measurements and faults, and how a rule maps each field to a series. Pure.

`FieldMap` caches the mapping of every field path per device. Payloads compressed with gzip or zstd are
decompressed here, within a size limit, before any format sees them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fnmatch import translate
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from cloud_sync.codec.plain_readings import DecompressedSizeError, DecompressionError, decompress
from gateway.payloads.topics import SeriesName

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.payloads.rule import FieldConversion, PayloadRule
    from gateway.payloads.topics import NameTemplate

FAULTS_MAX: Final = 100
"""Faults of one payload that are kept one by one; the rest is only counted."""
MEMBERS_MAX: Final = 100_000
"""Readings, records or metrics that one payload may have."""
FLOAT32_MAX: Final = 3.4e38
SEQ_MAX: Final = (1 << 63) - 1
JSON_ERRORS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding JSON may raise."""


class Measurement(msgspec.Struct, gc=False):
    """One reading with its series; `flags` are those of `Flag` that only the format can know."""

    name: SeriesName
    value: float
    time_us: int | None = None
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None
    flags: int = 0


class Fault(msgspec.Struct):
    """What is no reading, for the quarantine; `part` is its own bytes, which can be decoded again alone."""

    reason: str
    detail: str
    part: bytes


class PayloadDecodeError(ValueError):
    """A payload, a record or a reading that cannot be read or stored; `reason` is machine-readable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def fault(self, part: bytes) -> Fault:
        """It as a fault of `part`."""
        return Fault(self.reason, str(self), part)


def limit_faults(faults: list[Fault], payload: bytes) -> list[Fault]:
    """At most `FAULTS_MAX` faults: one payload must not push everything else out of the quarantine."""
    if len(faults) <= FAULTS_MAX:
        return faults
    left = len(faults) - FAULTS_MAX + 1
    last = Fault(
        faults[-1].reason, f"{left} more faults in one payload, the last: {faults[-1].detail}", payload
    )
    return [*faults[: FAULTS_MAX - 1], last]


DecodeResult = tuple[Sequence[Measurement], list[Fault]]
Decoder = Callable[[bytes, int], DecodeResult]
"""Decodes a payload received at a time in microseconds; PayloadDecodeError becomes a fault of all of it."""


JsonObject = dict[str, Any]


def decode_json(payload: bytes | str) -> Any:
    """Raises PayloadDecodeError instead of `JSON_ERRORS`."""
    try:
        return _json_decoder.decode(payload)
    except JSON_ERRORS as fault:
        raise json_error(fault) from None


def json_error(fault: Exception) -> PayloadDecodeError:
    """One of `JSON_ERRORS` as an error of the payload."""
    return PayloadDecodeError("not_json", str(fault) or type(fault).__name__)


def check_member_count(count: int, kind: str) -> None:
    """Raises PayloadDecodeError when a payload has more than `MEMBERS_MAX` members."""
    if count > MEMBERS_MAX:
        raise PayloadDecodeError("too_many_members", f"{count} {kind}; at most {MEMBERS_MAX} are allowed")


_json_decoder = msgspec.json.Decoder()
_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COMPRESSION_MAGIC: Final = frozenset({_GZIP_MAGIC, _ZSTD_MAGIC[:2]})
"""The first two bytes of payloads that may be compressed; no format begins like this."""


def decompress_payload(payload: bytes, max_bytes: int) -> bytes:
    """The payload before compression, or as it is when it is not compressed."""
    if payload[:2] == _GZIP_MAGIC:
        encoding = "gzip"
    elif payload[:4] == _ZSTD_MAGIC:
        encoding = "zstd"
    else:
        return payload
    try:
        expanded = decompress(payload, encoding, max_bytes=max_bytes)
    except DecompressionError as fault:
        raise PayloadDecodeError("bad_compression", str(fault).replace("body", "payload")) from None
    except DecompressedSizeError:
        what = f"more than {max_bytes} bytes when it is decompressed (max_payload_bytes)"
        raise PayloadDecodeError("too_large", what) from None
    if expanded[:2] in COMPRESSION_MAGIC:
        raise PayloadDecodeError("bad_compression", "compressed twice")
    return expanded


_CACHED_FIELDS_MAX: Final = 10_000
_CACHED_DEVICES_MAX: Final = 10_000
_SHOWN_MAX_CHARACTERS: Final = 64
_NUMBER_PATTERN = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class FieldMapping(NamedTuple):
    """What one field becomes; `is_explicit` when the rule names it, so that it must be a number."""

    name: SeriesName
    conversion: FieldConversion
    unit: str | None
    values: Mapping[str, float]
    is_identity: bool
    is_explicit: bool


class FieldSelection:
    """Which field paths a rule includes, and their conversions."""

    def __init__(self, rule: PayloadRule) -> None:
        self._default = rule.default_conversion
        self._exact = {path: c for path, c in rule.members.items() if "*" not in path}
        self._patterns = [(_build_path_matcher(path), c) for path, c in rule.members.items() if "*" in path]
        self._include = [_build_path_matcher(path) for path in rule.include]
        self._exclude = [_build_path_matcher(path) for path in rule.exclude]
        self._explicit = {path for path in rule.include if "*" not in path} | set(self._exact)
        self._companions = {*rule.companions.values(), rule.time} - self._explicit

    def find_conversion(self, path: str) -> tuple[FieldConversion, bool] | None:
        """The conversion of a field and whether the rule names the field; None when it is left out."""
        if path in self._companions or any(matches(path) for matches in self._exclude):
            return None
        conversion = self._exact.get(path)
        if conversion is None:
            conversion = next((c for matches, c in self._patterns if matches(path)), None)
        if conversion is None:
            if self._include and not any(matches(path) for matches in self._include):
                return None
            conversion = self._default
        return conversion, path in self._explicit


class DeviceFields(dict[str, FieldMapping | None]):
    """The mappings of one device's fields by path, made at their first use; None: the field is left out."""

    def __init__(
        self, selection: FieldSelection, rule: PayloadRule, sensor_id: str, sensor_type: NameTemplate
    ) -> None:
        super().__init__()
        self._selection = selection
        self._default = rule.default_conversion
        self._sensor_id = sensor_id
        self._sensor_type = sensor_type

    def __missing__(self, path: str) -> FieldMapping | None:
        if len(self) >= _CACHED_FIELDS_MAX:
            self.clear()
        mapping = self[path] = self._build_mapping(path)
        return mapping

    def _build_mapping(self, path: str) -> FieldMapping | None:
        selected = self._selection.find_conversion(path)
        if selected is None:
            return None
        conversion, is_explicit = selected
        sensor_type = self._sensor_type.render(lambda _: conversion.name or path)
        return FieldMapping(
            SeriesName(self._sensor_id, sensor_type),
            conversion,
            conversion.unit or self._default.unit,
            conversion.values or self._default.values,
            conversion.scale == 1.0 and conversion.offset == 0.0,
            is_explicit,
        )


class FieldMap:
    """All field mappings of one topic; `names` are what templates need from the payload, besides `member`."""

    def __init__(self, rule: PayloadRule, levels: Mapping[str, str]) -> None:
        self._rule = rule
        self._selection = FieldSelection(rule)
        self._sensor_id = rule.sensor_id_template.fill(levels)
        self._sensor_type = rule.sensor_type_template.fill(levels)
        needed = dict.fromkeys((*self._sensor_id.names, *self._sensor_type.names))
        self.names = tuple(name for name in needed if name != "member")
        self._devices: dict[tuple[str, ...], DeviceFields] = {}
        self._single: DeviceFields | None = None
        if not self.names:
            self._single = self.find_device(levels.__getitem__)

    def find_device(self, lookup: Callable[[str], str]) -> DeviceFields:
        """The mappings of the device that a payload names: `lookup` finds the text of each of `names`."""
        if self._single is not None:
            return self._single
        texts = tuple(map(lookup, self.names))
        fields = self._devices.get(texts)
        if fields is None:
            if len(self._devices) >= _CACHED_DEVICES_MAX:
                self._devices.clear()
            known = dict(zip(self.names, texts, strict=True))
            sensor_id = self._sensor_id.fill(known).text
            assert sensor_id is not None
            fields = DeviceFields(self._selection, self._rule, sensor_id, self._sensor_type.fill(known))
            self._devices[texts] = fields
        return fields


def convert_field_value(
    mapping: FieldMapping, path: str, value: object, *, convert_text: bool = False
) -> float | None:
    """The finite number a field stands for; None when it is none and need not be one."""
    if isinstance(value, float):
        if mapping.is_identity and -math.inf < value < math.inf:
            return value
        number = value
    elif isinstance(value, bool):
        number = mapping.values.get("true" if value else "false", float(value))
    elif isinstance(value, int):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    elif isinstance(value, str):
        text_number = _convert_text_value(mapping, path, value, convert_text=convert_text)
        if text_number is None:
            return None
        number = text_number
    elif value is None or not mapping.is_explicit:
        return None
    else:
        found = "an array" if isinstance(value, list) else "an object"
        raise PayloadDecodeError("bad_member", f"{path}: expected a number, found {found}")
    if not -math.inf < number < math.inf:
        raise PayloadDecodeError("bad_member", f"{path}: expected a number that 64-bit floats hold")
    return number if mapping.is_identity else apply_scale(mapping.conversion, path, number)


def apply_scale(conversion: FieldConversion, path: str, number: float) -> float:
    """The number after scale and offset; raises PayloadDecodeError when it is not finite then."""
    scaled = number * conversion.scale + conversion.offset
    if not math.isfinite(scaled):
        raise PayloadDecodeError(
            "bad_member", f"{path}: {number!r} is beyond what 64-bit floats hold once it is scaled"
        )
    return scaled


def _convert_text_value(mapping: FieldMapping, path: str, text: str, *, convert_text: bool) -> float | None:
    if text in mapping.values:
        return mapping.values[text]
    if not (convert_text or mapping.is_explicit):
        return None
    if _NUMBER_PATTERN.fullmatch(text):
        return float(text)
    expected = f"a number or one of {', '.join(mapping.values)}" if mapping.values else "a number"
    raise PayloadDecodeError(
        "bad_member", f"{path}: expected {expected}, found {text[:_SHOWN_MAX_CHARACTERS]!r}"
    )


def _build_path_matcher(path: str) -> Callable[[str], object]:
    """Matches paths; * stands for any text, all else for itself."""
    escaped = path.replace("[", "[[]").replace("?", "[?]")
    return partial(re.compile(translate(escaped)).match)
