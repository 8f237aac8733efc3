"""Line protocol as readings: what `line_protocol` writes, and lines of the same shape by others. Pure.

The measurement is the sensor_type; the tag `sensor_id` and the field `value` (a number or a boolean) are
needed. Tags that are attributes of a series, and the fields quality, battery_level, signal_strength, seq and
flags, are taken over; others are skipped. Source: the InfluxDB line protocol reference.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from cloud_sync.gathered import BadReading, Reading
from cloud_sync.records import ATTRIBUTE_NAMES, Series

if TYPE_CHECKING:
    from collections.abc import Mapping

PRECISIONS: Mapping[str, tuple[int, int]] = {
    "ns": (1, 1000),
    "us": (1, 1),
    "ms": (1000, 1),
    "s": (1_000_000, 1),
}
"""Unit of the timestamps, as (times, divided by) to microseconds."""

_TRUE, _FALSE = (
    frozenset({"t", "T", "true", "True", "TRUE"}),
    frozenset({"f", "F", "false", "False", "FALSE"}),
)
_SPACE = re.compile(r"(?<!\\) ")
_COMMA = re.compile(r"(?<!\\),")
_EQUALS = re.compile(r"(?<!\\)=")
_ESCAPED = re.compile(r"\\([,= ])")
_FIELD = re.compile(r'((?:\\.|[^=,\\])+)=("(?:\\.|[^"\\])*"|[^,"]*)(?:,|$)')
_INTEGER = re.compile(r"[+-]?\d{1,19}[iu]")
_FLOAT_FIELDS = ("quality", "battery_level", "signal_strength")
_KEYS_REMEMBERED = 100_000


class LineReader:
    """Reads lines of one precision; remembers the keys it has seen."""

    def __init__(self, precision: str = "ns") -> None:
        self._times, self._divided = PRECISIONS[precision]
        self._keys: dict[str, Series] = {}

    def read(self, line: str) -> Reading | None:
        """The reading of a line; None for an empty line or a comment.

        Raises:
            BadReading: with the reason.
        """
        line = line.strip(" \r\n")
        if not line or line.startswith("#"):
            return None
        key, fields, time = parts_of(line)
        series = self._keys.get(key)
        if series is None:
            if len(self._keys) >= _KEYS_REMEMBERED:
                self._keys.clear()
            series = self._keys[key] = _series(key)
        found = fields_of(fields)
        if "value" not in found:
            raise BadReading("no_value")
        try:
            time_us = None if time is None else int(time) * self._times // self._divided
        except ValueError:
            raise BadReading("bad_time") from None
        return Reading(
            series,
            time_us,
            number_of(found["value"], "bad_value"),
            **{name: number_of(found[name], f"bad_{name}") for name in _FLOAT_FIELDS if name in found},
            seq=whole_of(found["seq"], "bad_seq") if "seq" in found else None,
            flags=whole_of(found["flags"], "bad_flags") if "flags" in found else 0,
        )


def parts_of(line: str) -> tuple[str, str, str | None]:
    """Key, fields and time of a line, each as it stands there.

    Raises:
        BadReading: not_line_protocol.
    """
    if "\\" not in line and '"' not in line:
        words = line.split(" ")
    else:
        key, *rest = _SPACE.split(line, maxsplit=1)
        fields, _, time = rest[0].rpartition(" ") if rest else ("", "", "")
        if not fields or not time.lstrip("+-").isdigit():
            fields, time = (rest[0] if rest else ""), ""
        words = [key, fields] + ([time] if time else [])
    if len(words) not in (2, 3) or not words[1]:
        raise BadReading("not_line_protocol")
    return words[0], words[1], words[2] if len(words) > 2 else None  # noqa: PLR2004 - key, fields, time


def key_of(key: str) -> tuple[str, dict[str, str]]:
    """Measurement and tags of a key.

    Raises:
        BadReading: not_line_protocol.
    """
    measurement, *tags = _COMMA.split(key) if "\\" in key else key.split(",")
    pairs = {}
    for tag in tags:
        name, *value = _EQUALS.split(tag, maxsplit=1)
        if not value:
            raise BadReading("not_line_protocol")
        pairs[_unescaped(name)] = _unescaped(value[0])
    return _unescaped(measurement), pairs


def _series(key: str) -> Series:
    measurement, pairs = key_of(key)
    if "sensor_id" not in pairs:
        raise BadReading("no_sensor_id")
    attributes = tuple((name, pairs[name]) for name in sorted(ATTRIBUTE_NAMES) if pairs.get(name))
    return Series(pairs["sensor_id"], measurement, attributes)


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def fields_of(text: str) -> dict[str, str]:
    """The fields of a line by name, their values as they stand there.

    Raises:
        BadReading: not_line_protocol.
    """
    if "\\" not in text and '"' not in text:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if all(name and separator and value for name, separator, value in pairs):
            return {name: value for name, _, value in pairs}
        raise BadReading("not_line_protocol")
    found, at = {}, 0
    while at < len(text):
        match = _FIELD.match(text, at)
        if match is None or not match[2]:
            raise BadReading("not_line_protocol")
        found[_unescaped(match[1])] = match[2]
        at = match.end()
    return found


def number_of(text: str, reason: str) -> float:
    """The number of a field's value; booleans are 1 and 0.

    Raises:
        BadReading: with `reason`.
    """
    if text in _TRUE or text in _FALSE:
        return float(text in _TRUE)
    if "_" in text:
        raise BadReading(reason)
    try:
        number = float(text[:-1] if _INTEGER.fullmatch(text) else text)
    except ValueError:
        raise BadReading(reason) from None
    if not math.isfinite(number):
        raise BadReading(reason)
    return number


def whole_of(text: str, reason: str) -> int:
    """The whole number of a field's value.

    Raises:
        BadReading: with `reason`.
    """
    number = number_of(text, reason)
    if _INTEGER.fullmatch(text):
        return int(text[:-1])
    if not number.is_integer():
        raise BadReading(reason)
    return int(number)
