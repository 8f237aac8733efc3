"""SenML packs (RFC 8428), JSON or CBOR: base fields resolved, relative times, sums. Pure.

The base name is the device and the name after it is what is measured. Where a record has only the one or
only the other, its whole name is cut: `urn:dev:KIND:ID` names a device, else the last "/" or ":" divides.
A record that names a device alone measures what its unit says (`Cel`: temperature).

A bad record costs itself; a bad base field costs the rest of the pack, which depends on it. A sum (`s`) is a
series of its own, NAME_sum.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cloud_sync.records import Flag
from gateway.ingress.formats import cbor
from gateway.ingress.formats.measurement import MEMBERS_MAX, Fault, Measurement, NotDecodable
from gateway.ingress.formats.plans import PlanBook, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.plans import Plan
    from gateway.ingress.formats.rule import Rule

VERSION: Final = 10
RELATIVE_BELOW_S: Final = 1 << 28
"""Times below are relative to now (section 4.5.3)."""

_LABELS: Final[Mapping[int, str]] = {
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
_TEXTS: Final = ("bn", "bu", "n", "u")
_NUMBERS: Final = ("bt", "bv", "bs", "bver", "v", "s", "t", "ut")
_BASE: Final = ("bn", "bt", "bu", "bv", "bs", "bver")
_VALUES: Final = frozenset({"v", "vs", "vb", "vd", "s"})
_QUANTITIES: Final[Mapping[str, str]] = {
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
_DEVICE = re.compile(r"(urn:dev:[^:]+:[^:]+)(?::(.+))?")
_ENDS: Final = ":/.-_"
_pack = msgspec.json.Decoder(list[Any])
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, cbor.NotCbor)
_CBOR_ARRAY, _CBOR_TAG = 4, 6


def decoder(rule: Rule, levels: Mapping[str, str]) -> Callable[[bytes, int], Decoded]:
    """What decodes the payloads of one topic, whose named levels are given."""
    book = PlanBook(rule, levels)

    def decode(payload: bytes, now_us: int) -> Decoded:
        is_cbor = bool(payload) and payload[0] >> 5 in (_CBOR_ARRAY, _CBOR_TAG)
        try:
            records = cbor.decode(payload) if is_cbor else _pack.decode(payload)
        except _UNREADABLE as fault:
            return (), [Fault("not_senml", str(fault) or type(fault).__name__, payload)]
        if not isinstance(records, list):
            return (), [Fault("not_senml", "expected an array of records", payload)]
        if len(records) > MEMBERS_MAX:
            what = f"{len(records)} records; at most {MEMBERS_MAX} are taken"
            return (), [Fault("too_many_members", what, payload)]
        return _Pack(book, now_us).read(records, payload)

    return decode


class _Pack:
    """One pack on its way through: what the base fields are, and what came of the records."""

    def __init__(self, book: PlanBook, now_us: int) -> None:
        self._book = book
        self._now_us = now_us
        self._base: dict[str, Any] = {}
        self._out: list[Measurement] = []
        self._faults: list[Fault] = []

    def read(self, records: list[Any], payload: bytes) -> Decoded:
        """Every record."""
        for position, record in enumerate(records):
            told = _labelled(record) if type(record) is dict else None
            try:
                if told is None:
                    raise _bad(f"expected an object, found {type(record).__name__}")
                self._rebase(told)
            except NotDecodable as fault:
                where = f"record {position}: {fault}"
                if told is None:
                    self._faults.append(Fault(fault.reason, where, _part(record)))
                    continue
                rest = [{**self._base, **told}, *map(_labelled, records[position + 1 :])]
                what = f"{where}; the records from here on depend on it"
                self._faults.append(Fault(fault.reason, what, _part_of_pack(rest)))
                break
            try:
                self._record(told)
            except NotDecodable as fault:
                part = _part_of_pack([{**self._base, **told}])
                self._faults.append(Fault(fault.reason, f"record {position}: {fault}", part))
        if not self._out and not self._faults:
            what = "no record makes a reading: only texts, data, or nothing but base fields"
            self._faults.append(Fault("no_measurement", what, payload))
        return self._out, self._faults

    def _rebase(self, told: dict[str, Any]) -> None:
        for key in _BASE:
            if key in told:
                _check(key, told[key])
                if key == "bver" and told[key] > VERSION:
                    raise _bad(f"bver: version {told[key]} is newer than {VERSION}")
                self._base[key] = told[key]

    def _record(self, told: dict[str, Any]) -> None:
        _check_record(told)
        if not told.keys() & _VALUES:
            if not told.keys() & {"n", "u", "t", "ut"}:
                return  # base fields and nothing else
            if not self._base.keys() & {"bv", "bs"}:
                raise _bad("expected one of v, vs, vb, vd or s")
        base = self._base
        unit = told.get("u", base.get("bu"))
        device, member = _divided(base.get("bn", ""), told.get("n", ""), unit or "")
        if not device:
            raise NotDecodable("no_sensor_id", "n: there is no name, nor a base name")
        known = {"base": device}
        plans = self._book.only or self._book.of(tuple(known[name] for name in self._book.names))
        time_us, flags = self._time(told)
        for path, value in _values(told, member, base):
            plan: Plan | None = plans.known(path) or plans.of(path)
            number = None if plan is None else number_of(plan, path, value)
            if plan is not None and number is not None:
                if not math.isfinite(number):
                    raise NotDecodable("bad_member", f"{path}: {number!r} is no value")
                self._out.append(Measurement(plan.name, number, time_us, unit=plan.unit or unit, flags=flags))

    def _time(self, told: dict[str, Any]) -> tuple[int | None, int]:
        at = self._base.get("bt", 0) + told.get("t", 0)
        if not at:
            return None, 0
        try:
            at_us = at * 1_000_000 if isinstance(at, int) else round(at * 1e6)
        except OverflowError:
            raise NotDecodable("bad_time", f"t: {at!r} lies outside what can be stored") from None
        if at >= RELATIVE_BELOW_S:
            return at_us, 0
        return self._now_us + at_us, int(Flag.TIME_ASSIGNED)


def _values(told: dict[str, Any], member: str, base: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a record measures: (member, value)."""
    found: list[tuple[str, Any]] = []
    if "v" in told or ("bv" in base and not told.keys() & {"vs", "vb", "vd", "s"}):
        value = told.get("v", 0) + base["bv"] if "bv" in base else told["v"]
        found.append((member, value))
    if "vb" in told:
        if not isinstance(told["vb"], bool):
            raise _bad("vb: expected true or false")
        found.append((member, told["vb"]))
    if "vs" in told:
        if not isinstance(told["vs"], str):
            raise _bad("vs: expected text")
        found.append((member, told["vs"]))
    if "s" in told or ("bs" in base and not found and "vd" not in told):
        found.append((f"{member}_sum", told.get("s", 0) + base.get("bs", 0)))
    return found


@lru_cache(maxsize=10_000)
def _divided(base: str, name: str, unit: str) -> tuple[str, str]:
    """Device and what it measures, of a base name and a name."""
    if base and name:
        return base.rstrip(_ENDS) or base, name.lstrip(_ENDS) or name
    whole = base or name
    found = _DEVICE.fullmatch(whole)
    if found is not None:
        device, member = found[1], found[2] or ""
    else:
        cut = max(whole.rfind("/"), whole.rfind(":"))
        device, member = (whole[:cut], whole[cut + 1 :]) if cut > 0 else (whole, "")
    return device, member or _QUANTITIES.get(unit, "value")


def _check_record(told: dict[str, Any]) -> None:
    for key in told:
        if key[-1:] == "_":
            raise _bad(f"{key}: must be understood, and is not")
    for key in ("n", "u", "v", "s", "t"):
        if key in told:
            _check(key, told[key])


def _check(key: str, value: Any) -> None:
    if key in _TEXTS:
        if not isinstance(value, str):
            raise _bad(f"{key}: expected text, found {type(value).__name__}")
    elif key in _NUMBERS and (
        not isinstance(value, (int, float)) or isinstance(value, bool) or not _is_finite(value)
    ):
        shown = f", found {value!r:.40}" if isinstance(value, (int, float, str)) else ""
        raise _bad(f"{key}: expected a number{shown}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _bad(detail: str) -> NotDecodable:
    return NotDecodable("bad_record", detail)


def _labelled(record: Any) -> Any:
    """A record with the labels of CBOR written as in JSON."""
    if type(record) is not dict:
        return record
    return {_LABELS.get(key, str(key)) if type(key) is int else key: value for key, value in record.items()}


def _part(record: Any) -> bytes:
    return _part_of_pack([record])


def _part_of_pack(records: list[Any]) -> bytes:
    """Records as a pack of their own."""
    try:
        return msgspec.json.encode(records)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return repr(records).encode(errors="backslashreplace")
