"""SenML packs (RFC 8428), JSON or CBOR: base fields, relative times and sums resolved. Pure.

The base name is the device, the name after it the quantity. A record with only one of them has its name
split: `urn:dev:KIND:ID` is a device, otherwise the last "/" or ":" divides; a device alone is named by its
unit (`Cel`: temperature). An invalid record costs only itself, an invalid base field the rest of the pack.
A sum (`s`) is a series of its own, NAME_sum.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloud_sync.model.records import Flag
from gateway.payloads.formats import cbor
from gateway.payloads.measurement import (
    MEMBERS_MAX,
    Fault,
    FieldMap,
    Measurement,
    PayloadDecodeError,
    convert_field_value,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.payloads.measurement import DecodeResult, FieldMapping
    from gateway.payloads.rule import PayloadRule

SENML_VERSION: Final = 10
RELATIVE_BELOW_S: Final = 1 << 28
"""Times below are relative to now (section 4.5.3)."""

_CBOR_LABELS: Final[Mapping[int, str]] = {
    -1: "bver",
    -2: "bn",
    -3: "bt",
    -4: "bu",
    -5: "bv",
    -6: "bs",
    0: "n",
    1: "u",
    2: "v",
    3: "vs",
    4: "vb",
    5: "s",
    6: "t",
    7: "ut",
    8: "vd",
}
_TEXT_LABELS: Final = ("bn", "bu", "n", "u")
_NUMBER_LABELS: Final = ("bt", "bv", "bs", "bver", "v", "s", "t", "ut")
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
_PACK_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, cbor.CborDecodeError)
_CBOR_ARRAY, _CBOR_TAG = 4, 6


def build_senml_decoder(rule: PayloadRule, levels: Mapping[str, str]) -> Callable[[bytes, int], DecodeResult]:
    """What decodes the payloads of one topic, whose named levels are given."""
    book = FieldMap(rule, levels)

    def decode(payload: bytes, now_us: int) -> DecodeResult:
        is_cbor = bool(payload) and payload[0] >> 5 in (_CBOR_ARRAY, _CBOR_TAG)
        try:
            records = cbor.decode_cbor(payload) if is_cbor else _pack_decoder.decode(payload)
        except _PACK_ERRORS as fault:
            return (), [Fault("not_senml", str(fault) or type(fault).__name__, payload)]
        if not isinstance(records, list):
            return (), [Fault("not_senml", "expected an array of records", payload)]
        if len(records) > MEMBERS_MAX:
            what = f"{len(records)} records; at most {MEMBERS_MAX} are taken"
            return (), [Fault("too_many_members", what, payload)]
        return _PackReader(book, now_us).read(records, payload)

    return decode


class _PackReader:
    """One pack on its way through: what the base fields are, and what came of the records."""

    def __init__(self, book: FieldMap, now_us: int) -> None:
        self._book = book
        self._now_us = now_us
        self._base: dict[str, Any] = {}
        self._out: list[Measurement] = []
        self._faults: list[Fault] = []

    def read(self, records: list[Any], payload: bytes) -> DecodeResult:
        """Every record."""
        for position, record in enumerate(records):
            told = _with_json_labels(record) if type(record) is dict else None
            try:
                if told is None:
                    raise _bad_record_error(f"expected an object, found {type(record).__name__}")
                self._apply_base(told)
            except PayloadDecodeError as fault:
                where = f"record {position}: {fault}"
                if told is None:
                    self._faults.append(Fault(fault.reason, where, _encode_record(record)))
                    continue
                rest = [{**self._base, **told}, *map(_with_json_labels, records[position + 1 :])]
                what = f"{where}; the records from here on depend on it"
                self._faults.append(Fault(fault.reason, what, _encode_pack(rest)))
                break
            try:
                self._record(told)
            except PayloadDecodeError as fault:
                part = _encode_pack([{**self._base, **told}])
                self._faults.append(Fault(fault.reason, f"record {position}: {fault}", part))
        if not self._out and not self._faults:
            what = "no record makes a reading: only texts, data, or nothing but base fields"
            self._faults.append(Fault("no_measurement", what, payload))
        return self._out, self._faults

    def _apply_base(self, told: dict[str, Any]) -> None:
        for key in _BASE_LABELS:
            if key in told:
                _check_label(key, told[key])
                if key == "bver" and told[key] > SENML_VERSION:
                    raise _bad_record_error(f"bver: version {told[key]} is newer than {SENML_VERSION}")
                self._base[key] = told[key]

    def _record(self, told: dict[str, Any]) -> None:
        _check_record(told)
        if not told.keys() & _VALUE_LABELS:
            if not told.keys() & {"n", "u", "t", "ut"}:
                return  # base fields and nothing else
            if not self._base.keys() & {"bv", "bs"}:
                raise _bad_record_error("expected one of v, vs, vb, vd or s")
        base = self._base
        unit = told.get("u", base.get("bu"))
        device, member = _split_name(base.get("bn", ""), told.get("n", ""), unit or "")
        if not device:
            raise PayloadDecodeError("no_sensor_id", "n: there is no name, nor a base name")
        known = {"base": device}
        plans = self._book.only or self._book.of(tuple(known[name] for name in self._book.names))
        time_us, flags = self._time(told)
        for path, value in _record_values(told, member, base):
            plan: FieldMapping | None = plans.known(path) or plans.of(path)
            number = None if plan is None else convert_field_value(plan, path, value)
            if plan is not None and number is not None:
                if not math.isfinite(number):
                    raise PayloadDecodeError("bad_member", f"{path}: {number!r} is no value")
                self._out.append(Measurement(plan.name, number, time_us, unit=plan.unit or unit, flags=flags))

    def _time(self, told: dict[str, Any]) -> tuple[int | None, int]:
        at = self._base.get("bt", 0) + told.get("t", 0)
        if not at:
            return None, 0
        try:
            at_us = at * 1_000_000 if isinstance(at, int) else round(at * 1e6)
        except OverflowError:
            raise PayloadDecodeError("bad_time", f"t: {at!r} lies outside what can be stored") from None
        if at >= RELATIVE_BELOW_S:
            return at_us, 0
        return self._now_us + at_us, int(Flag.TIME_ASSIGNED)


def _record_values(told: dict[str, Any], member: str, base: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a record measures: (member, value)."""
    found: list[tuple[str, Any]] = []
    if "v" in told or ("bv" in base and not told.keys() & {"vs", "vb", "vd", "s"}):
        value = told.get("v", 0) + base["bv"] if "bv" in base else told["v"]
        found.append((member, value))
    if "vb" in told:
        if not isinstance(told["vb"], bool):
            raise _bad_record_error("vb: expected true or false")
        found.append((member, told["vb"]))
    if "vs" in told:
        if not isinstance(told["vs"], str):
            raise _bad_record_error("vs: expected text")
        found.append((member, told["vs"]))
    if "s" in told or ("bs" in base and not found and "vd" not in told):
        found.append((f"{member}_sum", told.get("s", 0) + base.get("bs", 0)))
    return found


@lru_cache(maxsize=10_000)
def _split_name(base: str, name: str, unit: str) -> tuple[str, str]:
    """Device and what it measures, of a base name and a name."""
    if base and name:
        return base.rstrip(_NAME_SEPARATORS) or base, name.lstrip(_NAME_SEPARATORS) or name
    whole = base or name
    found = _DEVICE_URN.fullmatch(whole)
    if found is not None:
        device, member = found[1], found[2] or ""
    else:
        cut = max(whole.rfind("/"), whole.rfind(":"))
        device, member = (whole[:cut], whole[cut + 1 :]) if cut > 0 else (whole, "")
    return device, member or _QUANTITY_BY_UNIT.get(unit, "value")


def _check_record(told: dict[str, Any]) -> None:
    for key in told:
        if key[-1:] == "_":
            raise _bad_record_error(f"{key}: must be understood, and is not")
    for key in ("n", "u", "v", "s", "t"):
        if key in told:
            _check_label(key, told[key])


def _check_label(key: str, value: Any) -> None:
    if key in _TEXT_LABELS:
        if not isinstance(value, str):
            raise _bad_record_error(f"{key}: expected text, found {type(value).__name__}")
    elif key in _NUMBER_LABELS and (
        not isinstance(value, (int, float)) or isinstance(value, bool) or not _is_finite(value)
    ):
        shown = f", found {value!r:.40}" if isinstance(value, (int, float, str)) else ""
        raise _bad_record_error(f"{key}: expected a number{shown}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _bad_record_error(detail: str) -> PayloadDecodeError:
    return PayloadDecodeError("bad_record", detail)


def _with_json_labels(record: Any) -> Any:
    """A record with the labels of CBOR written as in JSON."""
    if type(record) is not dict:
        return record
    return {
        _CBOR_LABELS.get(key, str(key)) if type(key) is int else key: value for key, value in record.items()
    }


def _encode_record(record: Any) -> bytes:
    return _encode_pack([record])


def _encode_pack(records: list[Any]) -> bytes:
    """Records as a pack of their own."""
    try:
        return msgspec.json.encode(records)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return repr(records).encode(errors="backslashreplace")
