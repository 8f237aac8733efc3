"""Which payload shape a payload looks like, and what its members seem to be. Pure."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from cloud_sync.gathered import BadReading
from cloud_sync.instants import BadInstant, instant_in
from cloud_sync.line_protocol_reader import fields_of, number_of, parts_of
from gateway.ingress.formats import cbor, compressed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.ingress.formats.rule import Format

_TIMES: Final = ("ts", "time", "timestamp", "at", "date", "datetime", "measured_at", "last_seen", "t")
_DEVICES: Final = ("sensor_id", "device_id", "dev_id", "device", "sensor", "node_id", "node", "deveui", "id")
_COMPANIONS: Final = {
    "quality": ("quality",),
    "battery_level": ("battery_level", "battery", "batt", "bat", "soc"),
    "signal_strength": ("signal_strength", "rssi", "signal"),
    "seq": ("seq", "seq_no", "sequence", "counter", "fcnt", "f_cnt"),
    "firmware_version": ("firmware_version", "firmware", "fw", "fw_version"),
}
_WORDS: Final = {
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
_PLAUSIBLE_US: Final = (946_684_800_000_000, 4_102_444_800_000_000)  # the years 2000 to 2100
_RECORD_VALUES: Final = frozenset({"v", "vb", "vs", "vd", "s", "2", "3", "4", "5"})
_RECORD_KEYS: Final = (
    _RECORD_VALUES | {"bn", "bt", "bu", "bv", "bs", "bver", "n", "u", "t", "ut"} | {*map(str, range(-6, 9))}
)
_LINES_LOOKED_AT: Final = 50
_EXPANDED_MAX_BYTES: Final = 1 << 20
_SEPARATORS: Final = ",;\t|"
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class Guess(NamedTuple):
    """What a payload looks like. `records` are its objects (fields), `cells` its first line (csv)."""

    format: Format
    records: Sequence[dict[str, Any]] = ()
    cells: Sequence[str] = ()
    separator: str = ","


def guess(payload: bytes) -> Guess | None:
    """The shape a payload looks like; None for one that looks like none."""
    if payload[:2] in compressed.BEGINNINGS:
        try:
            payload = compressed.expanded(payload, _EXPANDED_MAX_BYTES)
        except compressed.CannotExpand:
            return None
    if payload[:1] and payload[0] >> 5 in (4, 6):
        try:
            found = cbor.decode(payload)
        except cbor.NotCbor:
            return None
        return Guess("senml") if isinstance(found, list) and all(map(_is_record, found)) else None
    try:
        text = payload.decode().strip()
    except UnicodeDecodeError:
        return None
    try:
        return _guess_json(msgspec.json.decode(text))
    except _UNREADABLE:
        return _guess_text(text)


def _guess_json(found: Any) -> Guess | None:
    if isinstance(found, (int, float)):
        return Guess("number")
    records = found if isinstance(found, list) else [found]
    if not records or not all(isinstance(record, dict) for record in records):
        return None
    if isinstance(found, list) and all(map(_is_record, records)):
        return Guess("senml")
    if all(isinstance(record.get("value"), (int, float)) for record in records):
        return Guess("reading", records)
    return Guess("fields", records) if any(map(_has_number, records)) else None


def _guess_text(text: str) -> Guess | None:
    if not text:
        return None
    if _number(text) or text.lower() in _WORDS:
        return Guess("number")
    lines = [line for line in text.splitlines() if line.strip()][:_LINES_LOOKED_AT]
    if all(map(_is_line_protocol, lines)):
        return Guess("line_protocol")
    try:
        records = [msgspec.json.decode(line) for line in lines]
    except _UNREADABLE:
        return _guess_csv(lines)
    if all(isinstance(r, dict) and isinstance(r.get("value"), (int, float)) for r in records):
        return Guess("ndjson", records)
    return None


def _guess_csv(lines: Sequence[str]) -> Guess | None:
    for separator in _SEPARATORS:
        rows = list(csv.reader(lines, delimiter=separator))
        widths = {len(row) for row in rows}
        if len(widths) != 1 or widths == {1}:
            continue
        if any(_number(cell) for cell in rows[-1]):
            return Guess("csv", cells=rows[0], separator=separator)
    return None


def _is_record(found: Any) -> bool:
    """Whether it looks like a SenML record."""
    if not isinstance(found, dict):
        return False
    keys = set(map(str, found))
    return bool(keys & {"bn", "n", "-2", "0"}) and bool(
        keys & {"v", "vb", "vs", "vd", "s", "2", "3", "4", "5"}
    )


def _is_line_protocol(line: str) -> bool:
    try:
        _, fields, _ = parts_of(line.strip())
        found = fields_of(fields)
        return any(
            not text.startswith('"') and number_of(text, "none") is not None for text in found.values()
        )
    except BadReading:
        return False


def _number(text: str) -> bool:
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


def time_of(records: Iterable[dict[str, Any]]) -> str | None:
    """The member that all records have and that holds a plausible time."""
    listed = list(records)
    for wanted in _TIMES:
        for key in _keys_called(listed, wanted):
            if all(_is_time(record[key]) for record in listed):
                return key
    return None


def companions_of(records: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Members that go with readings rather than being readings."""
    listed, found = list(records), {}
    for companion, names in _COMPANIONS.items():
        for name in names:
            for key in _keys_called(listed, name):
                if companion not in found and all(_suits(companion, record[key]) for record in listed):
                    found[companion] = key
    return found


def device_of(records: Iterable[dict[str, Any]]) -> str | None:
    """The member that names the device."""
    listed = list(records)
    for name in _DEVICES:
        for key in _keys_called(listed, name):
            if all(isinstance(record[key], str) and record[key] for record in listed):
                return key
    return None


def values_of(texts: Iterable[str]) -> dict[str, float]:
    """Numbers for words such as ON and closed."""
    return {text: _WORDS[text.lower()] for text in sorted(set(texts)) if text.lower() in _WORDS}


def _keys_called(records: Sequence[dict[str, Any]], name: str) -> list[str]:
    if not records:
        return []
    return [key for key in records[0] if key.lower() == name and all(key in record for record in records)]


def _is_time(value: Any) -> bool:
    try:
        at = instant_in(value, "auto")
    except BadInstant:
        return False
    return _PLAUSIBLE_US[0] <= at < _PLAUSIBLE_US[1]


def _suits(companion: str, value: Any) -> bool:
    if companion == "firmware_version":
        return isinstance(value, (str, int, float))
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if companion == "signal_strength":
        return -150 <= value < 0  # noqa: PLR2004 - dBm
    if companion == "seq":
        return isinstance(value, int) and value >= 0
    return 0 <= value <= 100  # noqa: PLR2004 - percent
