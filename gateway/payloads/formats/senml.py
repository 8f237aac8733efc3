"""SenML packs (RFC 8428), JSON or CBOR: base fields, relative times and sums resolved. Pure.

The base name is the device, the name after it the quantity. A record with only one of them has its name
split: `urn:dev:KIND:ID` is a device, otherwise the last "/" or ":" divides; a device alone is named by its
unit (`Cel`: temperature). An invalid record costs only itself, an invalid base field the rest of the pack.
A sum (`s`) is a series of its own, NAME_sum.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloud_sync.model.records import Flag
from gateway.payloads.formats.cbor import CborDecodeError, decode_cbor, looks_like_cbor
from gateway.payloads.measurement import (
    JSON_ERRORS,
    Fault,
    FieldMap,
    Measurement,
    PayloadDecodeError,
    check_member_count,
    convert_field_value,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.payloads.measurement import Decoder, DecodeResult, JsonObject
    from gateway.payloads.rule import PayloadRule

SENML_VERSION: Final = 10
RELATIVE_BELOW_S: Final = 1 << 28
"""Times below are relative to now (section 4.5.3)."""

_CBOR_LABELS: Final[Mapping[int, str]] = {
    **dict(enumerate(("n", "u", "v", "vs", "vb", "s", "t", "ut", "vd"))),
    **dict(enumerate(("bs", "bv", "bu", "bt", "bn", "bver"), start=-6)),
}
_TEXT_LABELS: Final = ("bn", "bu", "n", "u")
_NUMBER_LABELS: Final = ("bt", "bv", "bs", "bver", "v", "s", "t")
_BASE_LABELS: Final = ("bn", "bt", "bu", "bv", "bs", "bver")
_VALUE_LABELS: Final = frozenset({"v", "vs", "vb", "vd", "s"})
_QUANTITY_BY_UNIT: Final[Mapping[str, str]] = {
    "Cel": "temperature",
    "K": "temperature",
    "%RH": "humidity",
    "Pa": "pressure",
    "V": "voltage",
    "A": "current",
    "W": "power",
    "J": "energy",
    "lx": "illuminance",
    "m": "length",
    "m/s": "velocity",
    "kg": "mass",
    "l": "volume",
    "m3": "volume",
    "Hz": "frequency",
    "dBm": "power_level",
    "%EL": "battery_level",
    "lat": "latitude",
    "lon": "longitude",
    "beat/min": "heart_rate",
}
_DEVICE_URN = re.compile(r"(urn:dev:[^:]+:[^:]+)(?::(.+))?")
_NAME_SEPARATORS: Final = ":/.-_"
_pack_decoder = msgspec.json.Decoder(list[Any])


def build_senml_decoder(rule: PayloadRule, levels: Mapping[str, str]) -> Decoder:
    """Decodes packs on a topic with these named levels."""
    fields = FieldMap(rule, levels)

    def decode(payload: bytes, now_us: int) -> DecodeResult:
        try:
            records = decode_cbor(payload) if looks_like_cbor(payload) else _pack_decoder.decode(payload)
        except (*JSON_ERRORS, CborDecodeError) as fault:
            raise PayloadDecodeError("not_senml", str(fault) or type(fault).__name__) from None
        if not isinstance(records, list):
            raise PayloadDecodeError("not_senml", "expected an array of records")
        check_member_count(len(records), "records")
        return _PackReader(fields, now_us).read(records, payload)

    return decode


class _PackReader:
    """Reads one pack: base fields apply to the records that follow."""

    def __init__(self, fields: FieldMap, now_us: int) -> None:
        self._fields = fields
        self._now_us = now_us
        self._base: JsonObject = {}
        self._out: list[Measurement] = []
        self._faults: list[Fault] = []

    def read(self, records: list[object], payload: bytes) -> DecodeResult:
        """An invalid record costs only itself, an invalid base field the rest of the pack."""
        for position, raw in enumerate(records):
            if not isinstance(raw, dict):
                what = f"record {position}: expected an object, found {type(raw).__name__}"
                self._faults.append(Fault("bad_record", what, _encode_pack([raw])))
                continue
            record = _with_json_labels(raw)
            try:
                self._apply_base(record)
            except PayloadDecodeError as fault:
                others = (_with_json_labels(r) if isinstance(r, dict) else r for r in records[position + 1 :])
                rest = [{**self._base, **record}, *others]
                what = f"record {position}: {fault}; the records from here on depend on it"
                self._faults.append(Fault(fault.reason, what, _encode_pack(rest)))
                break
            try:
                self._read_record(record)
            except PayloadDecodeError as fault:
                part = _encode_pack([{**self._base, **record}])
                self._faults.append(Fault(fault.reason, f"record {position}: {fault}", part))
        if not self._out and not self._faults:
            what = "no record makes a reading: only texts, data, or nothing but base fields"
            self._faults.append(Fault("no_measurement", what, payload))
        return self._out, self._faults

    def _apply_base(self, record: JsonObject) -> None:
        for key in _BASE_LABELS:
            if key in record:
                _check_label(key, record[key])
                if key == "bver" and record[key] > SENML_VERSION:
                    raise _bad_record_error(f"bver: version {record[key]} is newer than {SENML_VERSION}")
                self._base[key] = record[key]

    def _read_record(self, record: JsonObject) -> None:
        for key, value in record.items():
            _check_label(key, value)
        if not record.keys() & _VALUE_LABELS:
            if not record.keys() & {"n", "u", "t", "ut"}:
                return  # base fields and nothing else
            if not self._base.keys() & {"bv", "bs"}:
                raise _bad_record_error("expected one of v, vs, vb, vd or s")
        base = self._base
        unit = record.get("u", base.get("bu"))
        device, member = _split_name(base.get("bn", ""), record.get("n", ""), unit or "")
        if not device:
            raise PayloadDecodeError("no_sensor_id", "n: there is no name, nor a base name")
        fields = self._fields.find_device({"base": device}.__getitem__)
        time_us, flags = self._read_time(record)
        for path, value in _record_values(record, member, base):
            mapping = fields[path]
            number = None if mapping is None else convert_field_value(mapping, path, value)
            if mapping is not None and number is not None:
                unit = mapping.unit or unit
                self._out.append(Measurement(mapping.name, number, time_us, unit=unit, flags=flags))

    def _read_time(self, record: JsonObject) -> tuple[int | None, int]:
        at_s = self._base.get("bt", 0) + record.get("t", 0)
        if not at_s:
            return None, 0
        try:
            at_us = at_s * 1_000_000 if isinstance(at_s, int) else round(at_s * 1e6)
        except OverflowError:
            raise PayloadDecodeError("bad_time", f"t: {at_s!r} lies outside what can be stored") from None
        if at_s >= RELATIVE_BELOW_S:
            return at_us, 0
        return self._now_us + at_us, int(Flag.TIME_ASSIGNED)


def _record_values(record: JsonObject, member: str, base: JsonObject) -> list[tuple[str, object]]:
    """(member, value) of each value in a record."""
    values: list[tuple[str, object]] = []
    if "v" in record or ("bv" in base and not record.keys() & {"vs", "vb", "vd", "s"}):
        value = record.get("v", 0) + base["bv"] if "bv" in base else record["v"]
        values.append((member, value))
    if "vb" in record:
        if not isinstance(record["vb"], bool):
            raise _bad_record_error("vb: expected true or false")
        values.append((member, record["vb"]))
    if "vs" in record:
        if not isinstance(record["vs"], str):
            raise _bad_record_error("vs: expected text")
        values.append((member, record["vs"]))
    if "s" in record or ("bs" in base and not values and "vd" not in record):
        values.append((f"{member}_sum", record.get("s", 0) + base.get("bs", 0)))
    return values


@lru_cache(maxsize=10_000)
def _split_name(base: str, name: str, unit: str) -> tuple[str, str]:
    """Device and quantity of a base name and a name."""
    if base and name:
        return base.rstrip(_NAME_SEPARATORS) or base, name.lstrip(_NAME_SEPARATORS) or name
    whole = base or name
    urn = _DEVICE_URN.fullmatch(whole)
    if urn is not None:
        device, member = urn[1], urn[2] or ""
    else:
        cut = max(whole.rfind("/"), whole.rfind(":"))
        device, member = (whole[:cut], whole[cut + 1 :]) if cut > 0 else (whole, "")
    return device, member or _QUANTITY_BY_UNIT.get(unit, "value")


def _check_label(key: str, value: object) -> None:
    if key[-1:] == "_":
        raise _bad_record_error(f"{key}: must be understood, and is not")
    if key in _TEXT_LABELS:
        if not isinstance(value, str):
            raise _bad_record_error(f"{key}: expected text, found {type(value).__name__}")
    elif key in _NUMBER_LABELS and (
        not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= sys.float_info.max
    ):
        shown = f", found {value!r:.40}" if isinstance(value, (int, float, str)) else ""
        raise _bad_record_error(f"{key}: expected a number{shown}")


def _bad_record_error(detail: str) -> PayloadDecodeError:
    return PayloadDecodeError("bad_record", detail)


def _with_json_labels(record: JsonObject | dict[int, object]) -> JsonObject:
    """A record with the labels of CBOR written as in JSON."""
    return {
        _CBOR_LABELS.get(key, str(key)) if isinstance(key, int) else key: value
        for key, value in record.items()
    }


def _encode_pack(records: list[object]) -> bytes:
    try:
        return msgspec.json.encode(records)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return repr(records).encode(errors="backslashreplace")
