"""Guesses a payload's format and the role of its members. Pure."""

from __future__ import annotations

import csv
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from cloud_sync.codec.line_protocol import parse_fields, parse_number, split_line
from cloud_sync.model.reading_builder import InvalidReadingError, TimestampError, parse_timestamp_in_unit
from gateway.payloads.formats.cbor import CborDecodeError, decode_cbor, looks_like_cbor
from gateway.payloads.measurement import PayloadDecodeError, decode_json, decompress_payload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gateway.payloads.measurement import JsonObject
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
    **dict.fromkeys(("on", "open", "online", "true", "yes"), 1),
    **dict.fromkeys(("off", "closed", "close", "offline", "false", "no"), 0),
}
_PLAUSIBLE_RANGE_US: Final = (946_684_800_000_000, 4_102_444_800_000_000)  # the years 2000 to 2100
_SENML_NAME_KEYS: Final = frozenset({"bn", "n", -2, 0})
_SENML_VALUE_KEYS: Final = frozenset({"v", "vb", "vs", "vd", "s", 2, 3, 4, 5})
_COMPANION_RANGES: Final = {
    "signal_strength": (-150, -1e-9),  # dBm
    "seq": (0, float("inf")),
    "quality": (0, 100),
    "battery_level": (0, 100),
}
_LINES_EXAMINED_MAX: Final = 50
_DECOMPRESSED_MAX_BYTES: Final = 1 << 20
_CSV_SEPARATORS: Final = ",;\t|"


class PayloadGuess(NamedTuple):
    """A format with the payload's objects (`records`) or its first line (`cells` of csv)."""

    format: PayloadFormat
    records: Sequence[JsonObject] = ()
    cells: Sequence[str] = ()
    separator: str = ","


def guess_format(payload: bytes) -> PayloadGuess | None:
    """The format a payload looks like, if any."""
    try:
        payload = decompress_payload(payload, _DECOMPRESSED_MAX_BYTES)
        if looks_like_cbor(payload):
            pack = decode_cbor(payload)
            is_senml = isinstance(pack, list) and all(map(_is_senml_record, pack))
            return PayloadGuess("senml") if is_senml else None
        text = payload.decode().strip()
    except (PayloadDecodeError, CborDecodeError, UnicodeDecodeError):
        return None
    try:
        return _guess_json(decode_json(text))
    except PayloadDecodeError:
        return _guess_lines(text)


def _guess_json(decoded: object) -> PayloadGuess | None:
    if isinstance(decoded, (int, float)):
        return PayloadGuess("number")
    members = decoded if isinstance(decoded, list) else [decoded]
    records = [member for member in members if isinstance(member, dict)]
    if not records or len(records) < len(members):
        return None
    if isinstance(decoded, list) and all(map(_is_senml_record, records)):
        return PayloadGuess("senml")
    if all(isinstance(record.get("value"), (int, float)) for record in records):
        return PayloadGuess("reading", records)
    return PayloadGuess("fields", records) if any(map(_has_number, records)) else None


def _guess_lines(text: str) -> PayloadGuess | None:
    if not text:
        return None
    if _is_number_text(text) or text.lower() in _WORD_VALUES:
        return PayloadGuess("number")
    lines = [line for line in text.splitlines() if line.strip()][:_LINES_EXAMINED_MAX]
    if all(map(_is_line_protocol, lines)):
        return PayloadGuess("line_protocol")
    try:
        records = [decode_json(line) for line in lines]
    except PayloadDecodeError:
        return _guess_csv(lines)
    if all(isinstance(r, dict) and isinstance(r.get("value"), (int, float)) for r in records):
        return PayloadGuess("ndjson", records)
    return None


def _guess_csv(lines: Sequence[str]) -> PayloadGuess | None:
    for separator in _CSV_SEPARATORS:
        rows = list(csv.reader(lines, delimiter=separator))
        widths = {len(row) for row in rows}
        if len(widths) == 1 and widths != {1} and any(map(_is_number_text, rows[-1])):
            return PayloadGuess("csv", cells=rows[0], separator=separator)
    return None


def _is_senml_record(record: object) -> bool:
    return (
        isinstance(record, dict)
        and not _SENML_NAME_KEYS.isdisjoint(record)
        and not _SENML_VALUE_KEYS.isdisjoint(record)
    )


def _is_line_protocol(line: str) -> bool:
    try:
        _, fields, _ = split_line(line.strip())
        texts = parse_fields(fields).values()
        return any(not text.startswith('"') and parse_number(text, "none") is not None for text in texts)
    except InvalidReadingError:
        return False


def _is_number_text(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not set(text.lower()) & set("_naif")


def _has_number(record: JsonObject) -> bool:
    return any(
        isinstance(value, (int, float)) or (isinstance(value, dict) and _has_number(value))
        for value in record.values()
    )


def find_time_member(records: Sequence[JsonObject]) -> str | None:
    """The member that all records have and that holds a plausible time."""
    return _find_member(records, _TIME_MEMBERS, _is_time)


def find_companion_members(records: Sequence[JsonObject]) -> dict[str, str]:
    """Members that qualify readings rather than being readings."""
    found = {
        companion: _find_member(records, names, partial(_is_plausible_companion, companion))
        for companion, names in _COMPANION_MEMBERS.items()
    }
    return {companion: key for companion, key in found.items() if key is not None}


def find_device_member(records: Sequence[JsonObject]) -> str | None:
    """The member that names the device."""
    return _find_member(records, _DEVICE_MEMBERS, lambda value: isinstance(value, str) and value != "")


def map_words_to_values(texts: Iterable[str]) -> dict[str, float]:
    """Numbers for words such as ON and closed."""
    return {text: _WORD_VALUES[text.lower()] for text in sorted(set(texts)) if text.lower() in _WORD_VALUES}


def _find_member(
    records: Sequence[JsonObject], names: Sequence[str], is_plausible: Callable[[object], bool]
) -> str | None:
    """The first member with one of these names that all records have, with plausible values."""
    keys = (key for name in names for record in records[:1] for key in record if key.lower() == name)
    return next((k for k in keys if all(k in record and is_plausible(record[k]) for record in records)), None)


def _is_time(value: object) -> bool:
    try:
        at_us = parse_timestamp_in_unit(value, "auto")
    except TimestampError:
        return False
    return _PLAUSIBLE_RANGE_US[0] <= at_us < _PLAUSIBLE_RANGE_US[1]


def _is_plausible_companion(companion: str, value: object) -> bool:
    if companion == "firmware_version":
        return isinstance(value, (str, int, float))
    allowed = int if companion == "seq" else (int, float)
    lowest, highest = _COMPANION_RANGES[companion]
    return not isinstance(value, bool) and isinstance(value, allowed) and lowest <= value <= highest
