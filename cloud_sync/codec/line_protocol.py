r"""Readings as InfluxDB line protocol. Pure.

One reading is one line:

    temperature,location=hall\ 3,sensor_id=t-17,unit=C value=21.5,quality=98.0,seq=17i 1767225600000000000
    measurement tags, sorted by key                     fields                          timestamp

The measurement is the sensor_type. Tags are sensor_id and those attributes of the series that are asked
for and not empty. Fields: `value`, and `quality`, `battery_level`, `signal_strength` as floats where
present (the shortest text of their single precision), `seq` as an integer where present, `flags` as an
integer where not zero.

Commas, spaces and (in tags) equals signs are escaped as the line protocol reference says. What line
protocol cannot carry in a name is replaced by a look-alike, so that no name breaks a line or takes
a neighbour's place: control characters by their Unicode pictures (a newline by U+240A), a backslash that
servers read differently (before a comma, space, equals sign or backslash, or at the end) by U+FF3C,
a number sign at the start of a measurement by U+FF03.

Source: the InfluxDB line protocol reference, "special characters" and "naming restrictions".
"""

from __future__ import annotations

import math
import re
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from cloud_sync.model.reading_builder import UNIT_SCALES, InvalidReadingError, Reading
from cloud_sync.model.records import ATTRIBUTE_NAMES, SEQ_ABSENT, Batch, Series

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from cloud_sync.model.records import Column, Readings

Precision = Literal["ns", "us"]

DEFAULT_TAGS = ("location", "manufacturer", "firmware_version", "unit")
"""Attributes written as tags. `boot_id` is left out: a tag that changes often makes many series."""

FIELD_NAMES = ("value", "quality", "battery_level", "signal_strength", "seq", "flags")

_ROWS_PER_SLICE = 2_000
_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_AMBIGUOUS_BACKSLASH = re.compile(r"\\(?=[\\,= ]|$)")
_MEASUREMENT_SPECIALS = re.compile(r"([, ])")
_TAG_SPECIALS = re.compile(r"([,= ])")


def encode_lines(
    batch: Batch, *, tags: Sequence[str] = DEFAULT_TAGS, precision: Precision = "ns"
) -> list[str]:
    """All lines of `each_line`."""
    return list(iter_lines(batch, tags=tags, precision=precision))


def iter_lines(
    batch: Batch, *, tags: Sequence[str] = DEFAULT_TAGS, precision: Precision = "ns"
) -> Iterator[str]:
    """One line per reading of `batch`, in its order, without line ends; few are in memory at a time."""
    keys = [series_key(series, tags) for series in batch.series]
    scale = 1000 if precision == "ns" else 1
    readings = batch.readings
    for start in range(0, readings.rows, _ROWS_PER_SLICE):
        rows = np.arange(start, min(start + _ROWS_PER_SLICE, readings.rows))
        yield from _encode_rows(readings.select(rows), keys, scale)


def _encode_rows(readings: Readings, keys: Sequence[str], scale: int) -> list[str]:
    fields = (
        _float_fields("quality", readings.quality),
        _float_fields("battery_level", readings.battery_level),
        _float_fields("signal_strength", readings.signal_strength),
        _integer_fields("seq", readings.seq, SEQ_ABSENT),
        _integer_fields("flags", readings.flags, 0),
    )
    return [
        f"{keys[series]} value={value!r}{quality}{battery}{signal}{seq}{flags} {time_us * scale}"
        for series, value, quality, battery, signal, seq, flags, time_us in zip(
            readings.series.tolist(), readings.value.tolist(), *fields, readings.time_us.tolist(), strict=True
        )
    ]


def series_key(series: Series, tags: Sequence[str] = DEFAULT_TAGS) -> str:
    """Measurement and tags of a series: everything before the first unescaped space of its lines."""
    pairs = {"sensor_id": series.sensor_id}
    pairs.update((name, text) for name, text in series.attributes if name in tags and text)
    return ",".join(
        (
            escape_measurement(series.sensor_type),
            *(f"{escape_tag(key)}={escape_tag(pairs[key])}" for key in sorted(pairs)),
        )
    )


def escape_measurement(text: str) -> str:
    """`text` as a measurement name."""
    text = _replace_unsupported(text)
    if text.startswith("#"):
        text = "\uff03" + text[1:]
    return _MEASUREMENT_SPECIALS.sub(r"\\\1", text)


def escape_tag(text: str) -> str:
    """`text` as a tag key or tag value."""
    return _TAG_SPECIALS.sub(r"\\\1", _replace_unsupported(text))


def split_into_bodies(lines: Iterable[str], *, max_lines: int, max_bytes: int) -> Iterator[bytes]:
    """Lines as UTF-8 texts that end in a newline, none longer than both bounds unless one line is."""
    left = iter(lines)
    while some := list(islice(left, max_lines)):
        body = "\n".join((*some, "")).encode("utf-8", "replace")
        while len(body) > max_bytes:
            end = body.rfind(b"\n", 0, max_bytes) + 1 or body.index(b"\n") + 1
            yield body[:end]
            body = body[end:]
        if body:
            yield body


def validate_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """The attributes to write as tags; ValueError for a name that InfluxDB or this form keeps for itself."""
    for name in tags:
        if not name or name.startswith("_") or name in ("time", "sensor_id", *FIELD_NAMES):
            raise ValueError(f"{name!r} cannot be a tag: empty, reserved, or the name of a field")
    return tuple(tags)


def _replace_unsupported(text: str) -> str:
    return _AMBIGUOUS_BACKSLASH.sub("\uff3c", text.translate(_PICTURES))


def _float_fields(name: str, column: NDArray[np.float32]) -> list[str]:
    """`,name=text` of each value, empty for NaN. Such columns repeat: each distinct value is printed once."""
    distinct, where = np.unique(np.ascontiguousarray(column).view(np.uint32), return_inverse=True)
    texts = ["" if np.isnan(value) else f",{name}={value!s}" for value in distinct.view(np.float32)]
    return [texts[index] for index in where.tolist()]


def _integer_fields(name: str, column: Column, absent: int) -> list[str]:
    """`,name=texti` of each value, empty where it is `absent`. Many columns hold one value only."""
    constant = bool((column == column[:1]).all())
    numbers = (column[:1] if constant else column).tolist()
    texts = ["" if number == absent else f",{name}={number}i" for number in numbers]
    return texts * len(column) if constant else texts


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
_MAX_CACHED_KEYS = 100_000


class LineReader:
    """Reads lines of one precision; remembers the keys it has seen."""

    def __init__(self, precision: str = "ns") -> None:
        self._times, self._divided = UNIT_SCALES[precision]
        self._keys: dict[str, Series] = {}

    def read(self, line: str) -> Reading | None:
        """The reading of a line; None for an empty line or a comment; InvalidReadingError has the reason."""
        line = line.strip(" \r\n")
        if not line or line.startswith("#"):
            return None
        key, fields, time = split_line(line)
        series = self._keys.get(key)
        if series is None:
            if len(self._keys) >= _MAX_CACHED_KEYS:
                self._keys.clear()
            series = self._keys[key] = _parse_series(key)
        found = parse_fields(fields)
        if "value" not in found:
            raise InvalidReadingError("no_value")
        try:
            time_us = None if time is None else int(time) * self._times // self._divided
        except ValueError:
            raise InvalidReadingError("bad_time") from None
        return Reading(
            series,
            time_us,
            parse_number(found["value"], "bad_value"),
            **{name: parse_number(found[name], f"bad_{name}") for name in _FLOAT_FIELDS if name in found},
            seq=parse_integer(found["seq"], "bad_seq") if "seq" in found else None,
            flags=parse_integer(found["flags"], "bad_flags") if "flags" in found else 0,
        )


def split_line(line: str) -> tuple[str, str, str | None]:
    """Key, fields and time of a line, each as it stands there."""
    if "\\" not in line and '"' not in line:
        words = line.split(" ")
    else:
        key, *rest = _SPACE.split(line, maxsplit=1)
        fields, _, time = rest[0].rpartition(" ") if rest else ("", "", "")
        if not fields or not time.lstrip("+-").isdigit():
            fields, time = (rest[0] if rest else ""), ""
        words = [key, fields] + ([time] if time else [])
    if len(words) not in (2, 3) or not words[1]:
        raise InvalidReadingError("not_line_protocol")
    return words[0], words[1], words[2] if len(words) > 2 else None  # noqa: PLR2004 - key, fields, time


def parse_series_key(key: str) -> tuple[str, dict[str, str]]:
    """Measurement and tags of a key."""
    measurement, *tags = _COMMA.split(key) if "\\" in key else key.split(",")
    pairs = {}
    for tag in tags:
        name, *value = _EQUALS.split(tag, maxsplit=1)
        if not value:
            raise InvalidReadingError("not_line_protocol")
        pairs[_unescape(name)] = _unescape(value[0])
    return _unescape(measurement), pairs


def _parse_series(key: str) -> Series:
    measurement, pairs = parse_series_key(key)
    if "sensor_id" not in pairs:
        raise InvalidReadingError("no_sensor_id")
    attributes = tuple((name, pairs[name]) for name in sorted(ATTRIBUTE_NAMES) if pairs.get(name))
    return Series(pairs["sensor_id"], measurement, attributes)


def _unescape(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)


def parse_fields(text: str) -> dict[str, str]:
    """The fields of a line by name, their values as they stand there."""
    if "\\" not in text and '"' not in text:
        pairs = [pair.partition("=") for pair in text.split(",")]
        if all(name and separator and value for name, separator, value in pairs):
            return {name: value for name, _, value in pairs}
        raise InvalidReadingError("not_line_protocol")
    found, at = {}, 0
    while at < len(text):
        match = _FIELD.match(text, at)
        if match is None or not match[2]:
            raise InvalidReadingError("not_line_protocol")
        found[_unescape(match[1])] = match[2]
        at = match.end()
    return found


def parse_number(text: str, reason: str) -> float:
    """The number of a field's value; booleans are 1 and 0."""
    if text in _TRUE or text in _FALSE:
        return float(text in _TRUE)
    if "_" in text:
        raise InvalidReadingError(reason)
    try:
        number = float(text[:-1] if _INTEGER.fullmatch(text) else text)
    except ValueError:
        raise InvalidReadingError(reason) from None
    if not math.isfinite(number):
        raise InvalidReadingError(reason)
    return number


def parse_integer(text: str, reason: str) -> int:
    """The whole number of a field's value."""
    number = parse_number(text, reason)
    if _INTEGER.fullmatch(text):
        return int(text[:-1])
    if not number.is_integer():
        raise InvalidReadingError(reason)
    return int(number)
