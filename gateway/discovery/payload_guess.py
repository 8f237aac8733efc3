"""Guesses a payload's format and the role of its members. Pure."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from cloud_sync.codec.line_protocol import parse_fields, parse_number, split_line
from cloud_sync.model.reading_builder import InvalidReadingError, TimestampError, parse_timestamp_in_unit
from gateway.payloads import measurement
from gateway.payloads.formats import cbor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.payloads.rule import PayloadFormat

_TIME_MEMBERS: Final = ("ts", "time", "timestamp", "at", "date", "datetime", "measured_at", "last_seen", "t")
_DEVICE_MEMBERS: Final = (
    "sensor_id",
    "device_id",
    "dev_id",
    "device",
    "sensor",
    "node_id",
    "node",
    "deveui",
    "id",
)
_COMPANION_MEMBERS: Final = {
    "quality": ("quality",),
    "battery_level": ("battery_level", "battery", "batt", "bat", "soc"),
    "signal_strength": ("signal_strength", "rssi", "signal"),
    "seq": ("seq", "seq_no", "sequence", "counter", "fcnt", "f_cnt"),
    "firmware_version": ("firmware_version", "firmware", "fw", "fw_version"),
}
_WORD_VALUES: Final = {
    "on": 1,
    "off": 0,
    "open": 1,
    "closed": 0,
    "close": 0,
    "online": 1,
    "offline": 0,
    "true": 1,
    "false": 0,
    "yes": 1,
    "no": 0,
}
_PLAUSIBLE_RANGE_US: Final = (946_684_800_000_000, 4_102_444_800_000_000)  # the years 2000 to 2100
_SENML_VALUE_LABELS: Final = frozenset({"v", "vb", "vs", "vd", "s", "2", "3", "4", "5"})
_SENML_LABELS: Final = (
    _SENML_VALUE_LABELS
    | {"bn", "bt", "bu", "bv", "bs", "bver", "n", "u", "t", "ut"}
    | {*map(str, range(-6, 9))}
)
_LINES_EXAMINED_MAX: Final = 50
_DECOMPRESSED_MAX_BYTES: Final = 1 << 20
_CSV_SEPARATORS: Final = ",;\t|"
_JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class PayloadGuess(NamedTuple):
    """What a payload looks like. `records` are its objects (fields), `cells` its first line (csv)."""

    format: PayloadFormat
    records: Sequence[dict[str, Any]] = ()
    cells: Sequence[str] = ()
    separator: str = ","


def guess_format(payload: bytes) -> PayloadGuess | None:
    """The shape a payload looks like; None for one that looks like none."""
    if payload[:2] in measurement.COMPRESSION_MAGIC:
        try:
            payload = measurement.decompress_payload(payload, _DECOMPRESSED_MAX_BYTES)
        except measurement.PayloadDecodeError:
            return None
    if payload[:1] and payload[0] >> 5 in (4, 6):
        try:
            found = cbor.decode_cbor(payload)
        except cbor.CborDecodeError:
            return None
        return (
            PayloadGuess("senml") if isinstance(found, list) and all(map(_is_senml_record, found)) else None
        )
    try:
        text = payload.decode().strip()
    except UnicodeDecodeError:
        return None
    try:
        return _guess_json(msgspec.json.decode(text))
    except _JSON_ERRORS:
        return _guess_text(text)


def _guess_json(found: Any) -> PayloadGuess | None:
    if isinstance(found, (int, float)):
        return PayloadGuess("number")
    records = found if isinstance(found, list) else [found]
    if not records or not all(isinstance(record, dict) for record in records):
        return None
    if isinstance(found, list) and all(map(_is_senml_record, records)):
        return PayloadGuess("senml")
    if all(isinstance(record.get("value"), (int, float)) for record in records):
        return PayloadGuess("reading", records)
    return PayloadGuess("fields", records) if any(map(_has_number, records)) else None


def _guess_text(text: str) -> PayloadGuess | None:
    if not text:
        return None
    if _is_number_text(text) or text.lower() in _WORD_VALUES:
        return PayloadGuess("number")
    lines = [line for line in text.splitlines() if line.strip()][:_LINES_EXAMINED_MAX]
    if all(map(_is_line_protocol, lines)):
        return PayloadGuess("line_protocol")
    try:
        records = [msgspec.json.decode(line) for line in lines]
    except _JSON_ERRORS:
        return _guess_csv(lines)
    if all(isinstance(r, dict) and isinstance(r.get("value"), (int, float)) for r in records):
        return PayloadGuess("ndjson", records)
    return None


def _guess_csv(lines: Sequence[str]) -> PayloadGuess | None:
    for separator in _CSV_SEPARATORS:
        rows = list(csv.reader(lines, delimiter=separator))
        widths = {len(row) for row in rows}
        if len(widths) != 1 or widths == {1}:
            continue
        if any(_is_number_text(cell) for cell in rows[-1]):
            return PayloadGuess("csv", cells=rows[0], separator=separator)
    return None


def _is_senml_record(found: Any) -> bool:
    """Whether it looks like a SenML record."""
    if not isinstance(found, dict):
        return False
    keys = set(map(str, found))
    return bool(keys & {"bn", "n", "-2", "0"}) and bool(
        keys & {"v", "vb", "vs", "vd", "s", "2", "3", "4", "5"}
    )


def _is_line_protocol(line: str) -> bool:
    try:
        _, fields, _ = split_line(line.strip())
        found = parse_fields(fields)
        return any(
            not text.startswith('"') and parse_number(text, "none") is not None for text in found.values()
        )
    except InvalidReadingError:
        return False


def _is_number_text(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not set(text.lower()) & set("_naif")


def _has_number(record: dict[str, Any]) -> bool:
    return any(
        isinstance(value, (int, float)) or (isinstance(value, dict) and _has_number(value))
        for value in record.values()
    )


def find_time_member(records: Iterable[dict[str, Any]]) -> str | None:
    """The member that all records have and that holds a plausible time."""
    listed = list(records)
    for wanted in _TIME_MEMBERS:
        for key in _find_keys(listed, wanted):
            if all(_is_time(record[key]) for record in listed):
                return key
    return None


def find_companion_members(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Members that go with readings rather than being readings."""
    listed, found = list(records), {}
    for companion, names in _COMPANION_MEMBERS.items():
        for name in names:
            for key in _find_keys(listed, name):
                if companion not in found and all(
                    _is_plausible_companion(companion, record[key]) for record in listed
                ):
                    found[companion] = key
    return found


def find_device_member(records: Iterable[dict[str, Any]]) -> str | None:
    """The member that names the device."""
    listed = list(records)
    for name in _DEVICE_MEMBERS:
        for key in _find_keys(listed, name):
            if all(isinstance(record[key], str) and record[key] for record in listed):
                return key
    return None


def map_words_to_values(texts: Iterable[str]) -> dict[str, float]:
    """Numbers for words such as ON and closed."""
    return {text: _WORD_VALUES[text.lower()] for text in sorted(set(texts)) if text.lower() in _WORD_VALUES}


def _find_keys(records: Sequence[dict[str, Any]], name: str) -> list[str]:
    if not records:
        return []
    return [key for key in records[0] if key.lower() == name and all(key in record for record in records)]


def _is_time(value: Any) -> bool:
    try:
        at = parse_timestamp_in_unit(value, "auto")
    except TimestampError:
        return False
    return _PLAUSIBLE_RANGE_US[0] <= at < _PLAUSIBLE_RANGE_US[1]


def _is_plausible_companion(companion: str, value: Any) -> bool:
    if companion == "firmware_version":
        return isinstance(value, (str, int, float))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if companion == "signal_strength":
        return -150 <= value < 0  # noqa: PLR2004 - dBm
    if companion == "seq":
        return isinstance(value, int) and value >= 0
    return 0 <= value <= 100  # noqa: PLR2004 - percent
