"""Records with many measurements: a JSON object such as `{"temperature": 21.5, "door": {"open": true}}`,
an array of them, or (in `csv_line`) a line of columns. Pure.

Every member that is a number or a boolean is a measurement; its dotted path (`door.open`, `phases.0.power`)
is the sensor_type unless the rule calls it something else. Texts count where the rule gives them numbers, or
takes the member by its name and the text is a number. A bad member costs itself, not its neighbours; a bad
time or companion costs the record. Of duplicate members the last counts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, cast

import msgspec

from cloud_sync.instants import BadInstant, instant_in
from gateway.ingress.formats.measurement import MEMBERS_MAX, Fault, Measurement, NotDecodable
from gateway.ingress.formats.plans import PlanBook, Plans, number_of
from gateway.ingress.formats.rule import COMPANIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.rule import Rule

DEPTH_MAX: Final = 16
RECORD_MEMBERS_MAX: Final = 1_000
_ARRAY_MAX: Final = 100
_SINGLE_MAX: Final = 3.4e38
_SEQ_MAX: Final = (1 << 63) - 1
_UNKNOWN: Final = object()
_SHOWN: Final = 64
_Companions = tuple[float | None, float | None, float | None, int | None, str | None, str | None, str | None]
_Beside = tuple[
    int | None, float | None, float | None, float | None, int | None, str | None, str | None, str | None
]
_NONE: _Companions = (None, None, None, None, None, None, None)
_json = msgspec.json.Decoder()
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decoder(rule: Rule, levels: Mapping[str, str]) -> Callable[[bytes, int], Decoded]:
    """What decodes the payloads of one topic, whose named levels are given."""
    reader = RecordReader(rule, levels)

    def decode(payload: bytes, now_us: int) -> Decoded:  # noqa: ARG001 - of every decoder
        try:
            found = _json.decode(payload)
        except _UNREADABLE as fault:
            return (), [Fault("not_json", str(fault) or type(fault).__name__, payload)]
        if type(found) is dict:
            return reader.read_all((found,))
        if type(found) is list:
            if len(found) > MEMBERS_MAX:
                what = f"an array of {len(found)} members; at most {MEMBERS_MAX} are taken"
                return (), [Fault("too_many_members", what, payload)]
            return reader.read_all(found)
        return (), [Fault("bad_reading", f"expected an object, found {type(found).__name__}", payload)]

    return decode


class RecordReader:
    """Makes measurements of records: objects with members, perhaps nested.

    Args:
        rule: of format fields or csv.
        levels: the named levels of the topic.
        text_counts: whether all values are text, as in csv.
        part: a record as bytes of the payload's shape, to be decoded again by itself.
    """

    def __init__(
        self,
        rule: Rule,
        levels: Mapping[str, str],
        *,
        text_counts: bool = False,
        part: Callable[[dict[str, Any]], bytes] = msgspec.json.encode,
    ) -> None:
        self._rule = rule
        self._root = rule.root
        self._book = PlanBook(rule, levels)
        self.text_counts = text_counts
        self._part = part
        self._time = None if rule.time is None else (rule.time, tuple(rule.time.split(".")))
        self._companions = [
            (position, name, path, tuple(path.split(".")))
            for position, name in enumerate(COMPANIONS)
            if (path := rule.companions.get(name)) is not None
        ]
        beside = [p for p in (rule.time, *rule.companions.values(), *self._book.names) if p is not None]
        self._beside = [(path, tuple(path.split("."))) for path in beside]

    def read_all(self, records: Sequence[Any]) -> Decoded:
        """The measurements of records, and the faults."""
        out: list[Measurement] = []
        faults: list[Fault] = []
        many = len(records) > 1
        for position, record in enumerate(records):
            try:
                walk = self._read(record)
                out += walk.out
                faults += walk.faults
            except NotDecodable as fault:
                where = f"member {position}: " if many else ""
                part = self._part(record) if type(record) is dict else msgspec.json.encode(record)
                faults.append(Fault(fault.reason, f"{where}{fault}", part))
        return out, faults

    def _read(self, record: Any) -> _Walk:
        if type(record) is not dict:
            raise NotDecodable("bad_reading", f"expected an object, found {type(record).__name__}")
        plans = self._book.only or self._book.of(tuple(_name(record, name) for name in self._book.names))
        time_us = None if self._time is None else self._time_of(record, *self._time)
        beside = self._companions_of(record) if self._companions else _NONE
        walk = _Walk(self, record, plans, (time_us, *beside))
        inner = _found(record, self._root) if self._root else record
        if type(inner) is dict:
            walk.members(inner, "", 0)
        if not walk.out and not walk.faults and not self._rule.may_be_empty:
            what = ", ".join(list(record)[:8]) or "no members"
            raise NotDecodable("no_measurement", f"no member makes a reading under this rule: {what}")
        return walk

    def fault(self, reason: str, detail: str, record: dict[str, Any], path: str) -> Fault:
        """A fault of one member; its part is the record with that member alone, and what goes with it."""
        part: dict[str, Any] = {}
        for keys in ((*self._root, *path.split(".")), *(keys for _, keys in self._beside)):
            value = _found(record, keys)
            if value is not _UNKNOWN:
                _put(part, keys, value)
        return Fault(reason, detail, self._part(part or record))

    def _time_of(self, record: dict[str, Any], path: str, keys: tuple[str, ...]) -> int | None:
        value = _found(record, keys)
        if value is _UNKNOWN or value is None or (value == "" and self.text_counts):
            return None
        try:
            return instant_in(value, self._rule.time_unit, self._rule.time_zone)
        except BadInstant as fault:
            raise NotDecodable("bad_time", f"{path}: {fault}") from None

    def _companions_of(self, record: dict[str, Any]) -> _Companions:
        found: list[Any] = [None] * len(COMPANIONS)
        for position, name, path, keys in self._companions:
            value = _found(record, keys)
            if value is not _UNKNOWN and value is not None and value != "":
                found[position] = _companion(name, path, value, text_counts=self.text_counts)
        return cast("_Companions", tuple(found))


class _Walk:
    """Through the members of one record, nested ones too."""

    __slots__ = ("beside", "faults", "out", "plans", "reader", "record")

    def __init__(self, reader: RecordReader, record: dict[str, Any], plans: Plans, beside: _Beside) -> None:
        self.reader, self.record, self.plans, self.beside = reader, record, plans, beside
        self.out: list[Measurement] = []
        self.faults: list[Fault] = []

    def members(self, members: Mapping[str, Any], prefix: str, depth: int) -> None:
        """Take the members whose paths begin with `prefix`."""
        if len(members) > RECORD_MEMBERS_MAX:
            what = (
                f"{prefix or 'an object'} has {len(members)} members; at most {RECORD_MEMBERS_MAX} are taken"
            )
            self.faults.append(Fault("too_many_members", what, msgspec.json.encode(self.record)))
            return
        known, text_counts = self.plans.known, self.reader.text_counts
        for key, value in members.items():
            path = prefix + key if prefix else key
            kind = type(value)
            if kind is dict or kind is list:
                self._nested(value, path, depth)
                continue
            plan: Any = known(path, _UNKNOWN)
            if plan is _UNKNOWN:
                plan = self.plans.of(path)
            if plan is None:
                continue
            try:
                number = number_of(plan, path, value, text_counts=text_counts)
            except NotDecodable as fault:
                self._fault(fault.reason, str(fault), path)
                continue
            if number is not None:
                self.out.append(Measurement(plan.name, number, *self.beside, plan.unit))

    def _nested(self, value: dict[str, Any] | list[Any], path: str, depth: int) -> None:
        if depth >= DEPTH_MAX:
            self._fault("too_deep", f"{path[:_SHOWN]}: nested more than {DEPTH_MAX} deep", path)
        elif isinstance(value, dict):
            self.members(value, path + ".", depth + 1)
        elif len(value) <= _ARRAY_MAX:
            self.members({str(i): inner for i, inner in enumerate(value)}, path + ".", depth + 1)
        elif self.plans.of(path) is not None:
            what = f"{path}: an array of {len(value)}; at most {_ARRAY_MAX} are taken as members"
            self._fault("too_many_members", what, path)

    def _fault(self, reason: str, detail: str, path: str) -> None:
        self.faults.append(self.reader.fault(reason, detail, self.record, path))


def _companion(name: str, path: str, value: Any, *, text_counts: bool) -> float | int | str:
    if name in ("location", "manufacturer", "firmware_version"):
        if isinstance(value, (dict, list)):
            raise NotDecodable("bad_reading", f"{path}: expected text for {name}")
        return str(value)
    try:
        number = float(value) if type(value) in (int, float) or text_counts else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if name == "seq":
        whole = int(value) if number.is_integer() else -1
        if not 0 <= whole <= _SEQ_MAX:
            raise NotDecodable("bad_reading", f"{path}: expected a whole number from 0 for seq")
        return whole
    if not abs(number) <= _SINGLE_MAX:
        raise NotDecodable("bad_reading", f"{path}: expected a number for {name}, found {value!r:.64}")
    return number


def _name(record: dict[str, Any], path: str) -> str:
    value = _found(record, tuple(path.split(".")))
    if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
        return str(value)
    raise NotDecodable("no_sensor_id", f"{path}: expected text that names the device or series")


def _found(record: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        if type(record) is dict:
            record = record.get(key, _UNKNOWN)
        elif type(record) is list and key.isdecimal() and int(key) < len(record):
            record = record[int(key)]
        else:
            return _UNKNOWN
    return record


def _put(part: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for key in keys[:-1]:
        part = part.setdefault(key, {})
    part[keys[-1]] = value
