"""Formats mapped by a rule: JSON objects (`fields`), CSV lines (`csv`), a bare value (`number`). Pure.

Every member that is a number or boolean is a measurement, named by its dotted path (`door.open`,
`phases.0.power`) or column unless the rule names it. Text counts where the rule maps it to a number, or
names the member and the text is numeric. An invalid member costs only itself; an invalid time or companion
costs the record, an invalid CSV line the line. A CSV line may be quoted (RFC 4180); one whose first column
is that column's name is a header and is skipped.
"""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING, Final, cast

import msgspec

from cloud_sync.model.reading_builder import TimestampError, parse_timestamp_in_unit
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
    decode_json,
)
from gateway.payloads.rule import COMPANION_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.payloads.measurement import Decoder, DecodeResult, JsonObject
    from gateway.payloads.rule import PayloadRule

DEPTH_MAX: Final = 16
RECORD_MEMBERS_MAX: Final = 1_000
_ARRAY_MAX: Final = 100
_MISSING: Final = object()
_SHOWN_MAX_CHARACTERS: Final = 64
_TEXT_COMPANIONS: Final = ("location", "manufacturer", "firmware_version")
_Number = float | None
_CompanionValues = tuple[_Number, _Number, _Number, int | None, str | None, str | None, str | None]
_TimeAndCompanions = tuple[int | None, *_CompanionValues]
_NO_COMPANIONS: _CompanionValues = (None, None, None, None, None, None, None)


def build_fields_decoder(rule: PayloadRule, levels: Mapping[str, str]) -> Decoder:
    """Decodes JSON objects, or arrays of them, on a topic with these named levels."""
    reader = RecordReader(rule, levels)

    def decode(payload: bytes, _now_us: int) -> DecodeResult:
        decoded = decode_json(payload)
        if isinstance(decoded, list):
            check_member_count(len(decoded), "members of the array")
            return reader.read_records(decoded)
        return reader.read_records((decoded,))

    return decode


class RecordReader:
    """Measurements of records: objects with members, perhaps nested; with `convert_text` all are text.

    `encode_record` writes a record in the payload's format, so that it can be decoded again by itself.
    """

    def __init__(
        self,
        rule: PayloadRule,
        levels: Mapping[str, str],
        *,
        convert_text: bool = False,
        encode_record: Callable[[JsonObject], bytes] = msgspec.json.encode,
    ) -> None:
        self._rule = rule
        self._root = () if rule.root is None else tuple(rule.root.split("."))
        self._fields = FieldMap(rule, levels)
        self.convert_text = convert_text
        self._encode_record = encode_record
        self._time = None if rule.time is None else (rule.time, tuple(rule.time.split(".")))
        self._companions = [
            (position, name, path, tuple(path.split(".")))
            for position, name in enumerate(COMPANION_FIELDS)
            if (path := rule.companions.get(name)) is not None
        ]
        shared = (rule.time, *rule.companions.values(), *self._fields.names)
        self._shared_paths = [tuple(path.split(".")) for path in shared if path is not None]

    def read_records(self, records: Sequence[object]) -> DecodeResult:
        """An invalid record costs only itself."""
        out: list[Measurement] = []
        faults: list[Fault] = []
        many = len(records) > 1
        for position, record in enumerate(records):
            try:
                walk = self._read(record)
                out += walk.out
                faults += walk.faults
            except PayloadDecodeError as fault:
                where = f"member {position}: " if many else ""
                part = self._encode_record(record) if type(record) is dict else msgspec.json.encode(record)
                faults.append(Fault(fault.reason, f"{where}{fault}", part))
        return out, faults

    def _read(self, record: object) -> _RecordWalk:
        if type(record) is not dict:
            raise PayloadDecodeError("bad_reading", f"expected an object, found {type(record).__name__}")

        def find_name(path: str) -> str:
            name = _value_at(record, tuple(path.split(".")))
            if isinstance(name, (str, int)) and not isinstance(name, bool) and name != "":
                return str(name)
            raise PayloadDecodeError("no_sensor_id", f"{path}: expected text that names the device or series")

        fields = self._fields.find_device(find_name)
        time_us = None if self._time is None else self._read_time(record, *self._time)
        companions = self._read_companions(record) if self._companions else _NO_COMPANIONS
        walk = _RecordWalk(self, record, fields, (time_us, *companions))
        inner = _value_at(record, self._root) if self._root else record
        if type(inner) is dict:
            walk.add_members(inner, "", 0)
        if not walk.out and not walk.faults and not self._rule.may_be_empty:
            what = ", ".join(list(record)[:8]) or "no members"
            raise PayloadDecodeError("no_measurement", f"no member makes a reading under this rule: {what}")
        return walk

    def fault(self, reason: str, detail: str, record: JsonObject, path: str) -> Fault:
        """A fault of one member; its part is a record of that member, the time and the companions."""
        part: JsonObject = {}
        for keys in ((*self._root, *path.split(".")), *self._shared_paths):
            value = _value_at(record, keys)
            if value is not _MISSING:
                holder = part
                for key in keys[:-1]:
                    holder = holder.setdefault(key, {})
                holder[keys[-1]] = value
        return Fault(reason, detail, self._encode_record(part or record))

    def _read_time(self, record: JsonObject, path: str, keys: tuple[str, ...]) -> int | None:
        value = _value_at(record, keys)
        if value is _MISSING or value is None or (value == "" and self.convert_text):
            return None
        try:
            return parse_timestamp_in_unit(value, self._rule.time_unit, self._rule.time_zone)
        except TimestampError as fault:
            raise PayloadDecodeError("bad_time", f"{path}: {fault}") from None

    def _read_companions(self, record: JsonObject) -> _CompanionValues:
        values: list[object] = [None] * len(COMPANION_FIELDS)
        for position, name, path, keys in self._companions:
            value = _value_at(record, keys)
            if value is not _MISSING and value is not None and value != "":
                values[position] = _convert_companion(name, path, value, convert_text=self.convert_text)
        return cast("_CompanionValues", tuple(values))


class _RecordWalk:
    """Walks through the members of one record, nested ones too."""

    __slots__ = ("faults", "fields", "out", "reader", "record", "shared")

    def __init__(
        self, reader: RecordReader, record: JsonObject, fields: DeviceFields, shared: _TimeAndCompanions
    ) -> None:
        self.reader, self.record, self.fields, self.shared = reader, record, fields, shared
        self.out: list[Measurement] = []
        self.faults: list[Fault] = []

    def add_members(self, members: JsonObject, prefix: str, depth: int) -> None:
        """Read the members whose paths begin with `prefix`."""
        if len(members) > RECORD_MEMBERS_MAX:
            where = prefix or "an object"
            what = f"{where} has {len(members)} members; at most {RECORD_MEMBERS_MAX} are allowed"
            self.faults.append(Fault("too_many_members", what, msgspec.json.encode(self.record)))
            return
        fields, convert_text = self.fields, self.reader.convert_text
        for key, value in members.items():
            path = prefix + key if prefix else key
            kind = type(value)
            if kind is dict or kind is list:
                self._add_nested(value, path, depth)
                continue
            mapping = fields[path]
            if mapping is None:
                continue
            try:
                number = convert_field_value(mapping, path, value, convert_text=convert_text)
            except PayloadDecodeError as fault:
                self._fault(fault.reason, str(fault), path)
                continue
            if number is not None:
                self.out.append(Measurement(mapping.name, number, *self.shared, mapping.unit))

    def _add_nested(self, value: JsonObject | list[object], path: str, depth: int) -> None:
        if depth >= DEPTH_MAX:
            self._fault(
                "too_deep", f"{path[:_SHOWN_MAX_CHARACTERS]}: nested more than {DEPTH_MAX} deep", path
            )
        elif isinstance(value, dict):
            self.add_members(value, path + ".", depth + 1)
        elif len(value) <= _ARRAY_MAX:
            self.add_members({str(i): inner for i, inner in enumerate(value)}, path + ".", depth + 1)
        elif self.fields[path] is not None:
            what = f"{path}: an array of {len(value)}; at most {_ARRAY_MAX} are allowed as members"
            self._fault("too_many_members", what, path)

    def _fault(self, reason: str, detail: str, path: str) -> None:
        self.faults.append(self.reader.fault(reason, detail, self.record, path))


def _convert_companion(name: str, path: str, value: object, *, convert_text: bool) -> float | int | str:
    if name in _TEXT_COMPANIONS:
        if isinstance(value, (dict, list)):
            raise PayloadDecodeError("bad_reading", f"{path}: expected text for {name}")
        return str(value)
    try:
        is_number = type(value) in (int, float) or (convert_text and isinstance(value, str))
        number = float(cast("str | float", value)) if is_number else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if name == "seq":
        is_exact = isinstance(value, int) or (isinstance(value, str) and value.strip().isdecimal())
        whole = -1
        if number.is_integer():
            whole = int(cast("str | int", value) if is_exact else number)
        if not 0 <= whole <= SEQ_MAX:
            raise PayloadDecodeError("bad_reading", f"{path}: expected a whole number from 0 for seq")
        return whole
    if not abs(number) <= FLOAT32_MAX:
        raise PayloadDecodeError("bad_reading", f"{path}: expected a number for {name}, found {value!r:.64}")
    return number


def _value_at(record: object, keys: tuple[str, ...]) -> object:
    for key in keys:
        if type(record) is dict:
            record = record.get(key, _MISSING)
        elif type(record) is list and key.isdecimal() and int(key) < len(record):
            record = record[int(key)]
        else:
            return _MISSING
    return record


def build_csv_decoder(rule: PayloadRule, levels: Mapping[str, str]) -> Decoder:
    """Decodes lines of CSV on a topic with these named levels."""
    columns = rule.columns

    def encode_line(record: JsonObject) -> bytes:
        out = io.StringIO()
        writer = csv.writer(out, delimiter=rule.separator, lineterminator="")
        writer.writerow([record.get(column, "") for column in columns])
        return out.getvalue().encode()

    reader = RecordReader(rule, levels, convert_text=True, encode_record=encode_line)

    def decode(payload: bytes, _now_us: int) -> DecodeResult:
        try:
            lines = payload.decode().splitlines()
        except UnicodeDecodeError as fault:
            raise PayloadDecodeError("not_utf8", str(fault)) from None
        check_member_count(len(lines), "lines")
        records, faults = [], []
        for position, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                (cells,) = csv.reader([line], delimiter=rule.separator, strict=True)
            except (csv.Error, ValueError) as fault:
                faults.append(Fault("bad_line", f"line {position}: {fault}", line.encode()))
                continue
            if len(cells) != len(columns):
                what = f"line {position}: {len(cells)} columns; expected {len(columns)}: {', '.join(columns)}"
                faults.append(Fault("bad_line", what, line.encode()))
            elif cells[0].strip() != columns[0]:
                pairs = zip(columns, cells, strict=True)
                records.append({name: cell.strip() or None for name, cell in pairs if name})
        measurements, record_faults = reader.read_records(records)
        return measurements, faults + record_faults

    return decode


_BOOLEAN_VALUES = {"true": 1.0, "false": 0.0}


def build_number_decoder(rule: PayloadRule, levels: Mapping[str, str]) -> Decoder:
    """Decodes a bare value on a topic that names its series."""
    mapping = FieldMap(rule, levels).find_device(levels.__getitem__)["value"]
    assert mapping is not None
    mapping = mapping._replace(values={**_BOOLEAN_VALUES, **mapping.values})

    def decode(payload: bytes, _now_us: int) -> DecodeResult:
        try:
            text = payload.decode().strip()
        except UnicodeDecodeError:
            raise PayloadDecodeError("not_utf8", "expected a number as text") from None
        try:
            number = convert_field_value(mapping, "payload", text, convert_text=True)
        except PayloadDecodeError:
            if rule.may_be_empty:
                return (), []
            raise
        assert number is not None
        return (Measurement(mapping.name, number, unit=mapping.unit),), []

    return decode
