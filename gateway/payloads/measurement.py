"""What a payload decodes to: measurements and faults, and how a rule maps each field to a series. Pure.

`FieldMap` caches the mapping of every field path per device. Payloads compressed with gzip or zstd are
decompressed here, within a size limit, before any format sees them.
"""

from __future__ import annotations

import math
import re
from fnmatch import translate
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from cloud_sync.codec.plain_readings import DecompressedSizeError, DecompressionError, decompress
from gateway.payloads.topics import SeriesName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.payloads.rule import FieldConversion, PayloadRule
    from gateway.payloads.topics import NameTemplate

FAULTS_MAX: Final = 100
"""Faults of one payload that are told one by one; the rest is told as a number."""
MEMBERS_MAX: Final = 100_000
"""Readings, records or metrics that one payload may have."""


class Measurement(msgspec.Struct, gc=False):
    """One reading with the series it belongs to; `time_us` is absent when the device told none.

    `flags` are bits of `cloud_sync.model.records.Flag` that only the shape can know.
    """

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
    """A payload, or a member of one, that is no reading.

    Attributes:
        reason: machine-readable, such as `bad_member`.
        detail: which member, and what was expected, for a person.
        part: its own bytes, in the payload's shape, so that they can be decoded again by themselves.
    """

    reason: str
    detail: str
    part: bytes


class PayloadDecodeError(ValueError):
    """Nothing of a payload (or of one of its records) can be read."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason

    def fault(self, part: bytes) -> Fault:
        """The same as a fault of `part`."""
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


DecodeResult = tuple["Sequence[Measurement]", list[Fault]]
"""What a decoder returns."""


_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COMPRESSION_MAGIC: Final = frozenset({_GZIP_MAGIC, _ZSTD_MAGIC[:2]})
"""The first two bytes of what may be compressed; no shape begins like this."""


class PayloadDecompressionError(ValueError):
    """A compressed payload that is damaged or too large; `reason` is machine-readable."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def decompress_payload(payload: bytes, max_bytes: int) -> bytes:
    """The payload as it was before it was compressed, or the same when it was not.

    Raises:
        CannotExpand: no more than `max_bytes` were kept.
    """
    if payload[:2] == _GZIP_MAGIC:
        encoding = "gzip"
    elif payload[:4] == _ZSTD_MAGIC:
        encoding = "zstd"
    else:
        return payload
    try:
        return decompress(payload, encoding, max_bytes=max_bytes)
    except DecompressionError as fault:
        raise PayloadDecompressionError("bad_compression", str(fault).replace("body", "payload")) from None
    except DecompressedSizeError:
        what = f"more than {max_bytes} bytes when it is decompressed (max_payload_bytes)"
        raise PayloadDecompressionError("too_large", what) from None


_CACHED_FIELDS_MAX: Final = 10_000
_CACHED_DEVICES_MAX: Final = 10_000
_SHOWN_MAX_CHARACTERS: Final = 64
_NUMBER_PATTERN = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class FieldMapping(NamedTuple):
    """What one member becomes; `is_named` when the rule speaks of it by its own name."""

    name: SeriesName
    member: FieldConversion
    unit: str | None
    values: Mapping[str, float]
    is_identity: bool
    is_explicit: bool


class FieldSelection:
    """Which paths a rule takes, and as what."""

    def __init__(self, rule: PayloadRule) -> None:
        self._otherwise = rule.default_conversion
        self._exact = {path: m for path, m in rule.members.items() if not _has_wildcard(path)}
        self._members = [
            (_build_path_matcher(path), m) for path, m in rule.members.items() if _has_wildcard(path)
        ]
        self._include = [_build_path_matcher(path) for path in rule.include]
        self._exclude = [_build_path_matcher(path) for path in rule.exclude]
        self._named = {path for path in rule.include if not _has_wildcard(path)} | set(self._exact)
        self._beside = {*rule.companions.values(), rule.time} - self._named

    def of(self, path: str) -> tuple[FieldConversion, bool] | None:
        """What the member at `path` is to become, and whether it is named; None when it is left out."""
        if path in self._beside or any(pattern(path) for pattern in self._exclude):
            return None
        found = self._exact.get(path) or next((m for pattern, m in self._members if pattern(path)), None)
        if found is None:
            if self._include and not any(pattern(path) for pattern in self._include):
                return None
            found = self._otherwise
        return found, path in self._named


class DeviceFieldMap:
    """The plans of one device under one rule, by path."""

    def __init__(
        self, selection: FieldSelection, rule: PayloadRule, sensor_id: str, sensor_type: NameTemplate
    ) -> None:
        self._selection = selection
        self._otherwise = rule.default_conversion
        self._sensor_id = sensor_id
        self._sensor_type = sensor_type
        self._plans: dict[str, FieldMapping | None] = {}
        self.known = self._plans.get

    def of(self, path: str) -> FieldMapping | None:
        """The plan of a path, None when it is left out."""
        if len(self._plans) >= _CACHED_FIELDS_MAX:
            self._plans.clear()
        plan = self._plans[path] = self._made(path)
        return plan

    def _made(self, path: str) -> FieldMapping | None:
        found = self._selection.of(path)
        if found is None:
            return None
        member, is_explicit = found
        sensor_type = self._sensor_type.render(lambda _: member.name or path)
        return FieldMapping(
            SeriesName(self._sensor_id, sensor_type),
            member,
            member.unit or self._otherwise.unit,
            member.values or self._otherwise.values,
            member.is_identity,
            is_explicit,
        )


class FieldMap:
    """All plans of one topic under one rule: one `Plans` for each device that its payloads speak of.

    `names` are what the templates need of the payload, `member` aside.
    """

    def __init__(self, rule: PayloadRule, levels: Mapping[str, str]) -> None:
        self._rule = rule
        self._selection = FieldSelection(rule)
        self._sensor_id = rule.sensor_id_template.filled(levels)
        self._sensor_type = rule.sensor_type_template.filled(levels)
        needed = dict.fromkeys((*self._sensor_id.names, *self._sensor_type.names))
        self.names = tuple(name for name in needed if name != "member")
        self._device_maps: dict[tuple[str, ...], DeviceFieldMap] = {}
        self.only = None if self.names else self.of(())

    def of(self, texts: tuple[str, ...]) -> DeviceFieldMap:
        """The plans where `names` are these texts."""
        plans = self._device_maps.get(texts)
        if plans is None:
            if len(self._device_maps) >= _CACHED_DEVICES_MAX:
                self._device_maps.clear()
            known = dict(zip(self.names, texts, strict=True))
            sensor_id = self._sensor_id.filled(known).text
            assert sensor_id is not None
            sensor_type = self._sensor_type.filled(known)
            plans = self._device_maps[texts] = DeviceFieldMap(
                self._selection, self._rule, sensor_id, sensor_type
            )
        return plans


def convert_field_value(
    plan: FieldMapping, path: str, value: object, *, convert_text: bool = False
) -> float | None:
    """The number a member stands for; None when it stands for none and nobody said that it must.

    Raises:
        NotDecodable: it should be a number; says what was expected.
    """
    kind = type(value)
    number: float
    if kind is float:
        number = value  # type: ignore[assignment]  # its type is looked at just above
    elif kind is int:
        try:
            number = float(value)  # type: ignore[arg-type]  # the same
        except OverflowError:
            raise PayloadDecodeError(
                "bad_member", f"{path}: a number beyond what 64-bit floats hold"
            ) from None
    elif kind is bool:
        number = plan.values.get("true" if value else "false", float(value))  # type: ignore[arg-type]  # the same
    elif kind is str:
        return _convert_text_value(plan, path, value, convert_text=convert_text)  # type: ignore[arg-type]  # the same
    elif value is None or not plan.is_explicit:
        return None
    else:
        raise PayloadDecodeError("bad_member", f"{path}: expected a number, found {_describe_type(value)}")
    return number if plan.is_identity else apply_scale(plan.member, path, number)


def apply_scale(member: FieldConversion, path: str, number: float) -> float:
    """The number after the member's scale and offset.

    Raises:
        NotDecodable: it is then beyond what can be stored.
    """
    made = number * member.scale + member.offset
    if not math.isfinite(made):
        raise PayloadDecodeError(
            "bad_member", f"{path}: {number!r} is beyond what can be stored once it is scaled"
        )
    return made


def _convert_text_value(plan: FieldMapping, path: str, text: str, *, convert_text: bool) -> float | None:
    number = plan.values.get(text)
    if number is None and (convert_text or plan.is_explicit) and _NUMBER_PATTERN.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise PayloadDecodeError(
                "bad_member", f"{path}: {text[:_SHOWN_MAX_CHARACTERS]!r} is beyond what 64-bit floats hold"
            )
    if number is not None:
        return number if plan.is_identity else apply_scale(plan.member, path, number)
    if not (convert_text or plan.is_explicit):
        return None
    expected = f"a number or one of {', '.join(plan.values)}" if plan.values else "a number"
    raise PayloadDecodeError(
        "bad_member", f"{path}: expected {expected}, found {text[:_SHOWN_MAX_CHARACTERS]!r}"
    )


def _describe_type(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    return "an array" if isinstance(value, list) else type(value).__name__


def _has_wildcard(path: str) -> bool:
    return "*" in path


def _build_path_matcher(path: str) -> Callable[[str], object]:
    """Matches paths; * stands for any text, all else for itself."""
    escaped = path.replace("[", "[[]").replace("?", "[?]")
    return partial(re.compile(translate(escaped)).match)
