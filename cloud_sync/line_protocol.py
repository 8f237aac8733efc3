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

import re
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cloud_sync.records import SEQ_ABSENT, Batch, Series

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from cloud_sync.records import Readings

Precision = Literal["ns", "us"]

DEFAULT_TAGS = ("location", "manufacturer", "firmware_version", "unit")
"""Attributes written as tags. `boot_id` is left out: a tag that changes often makes many series."""

FIELD_NAMES = ("value", "quality", "battery_level", "signal_strength", "seq", "flags")

_ROWS_AT_ONCE = 2_000
_PICTURES = {code: 0x2400 + code for code in range(0x20)} | {0x7F: 0x2421}
_AMBIGUOUS_BACKSLASH = re.compile(r"\\(?=[\\,= ]|$)")
_MEASUREMENT_SPECIALS = re.compile(r"([, ])")
_TAG_SPECIALS = re.compile(r"([,= ])")


def lines(batch: Batch, *, tags: Sequence[str] = DEFAULT_TAGS, precision: Precision = "ns") -> list[str]:
    """All lines of `each_line`."""
    return list(each_line(batch, tags=tags, precision=precision))


def each_line(
    batch: Batch, *, tags: Sequence[str] = DEFAULT_TAGS, precision: Precision = "ns"
) -> Iterator[str]:
    """One line per reading of `batch`, in its order, without line ends; few are in memory at a time.

    Args:
        batch: readings in any order.
        tags: the attributes to write as tags, as `check_tags` accepts them.
        precision: unit of the timestamps.
    """
    keys = [series_key(series, tags) for series in batch.series]
    scale = 1000 if precision == "ns" else 1
    readings = batch.readings
    for start in range(0, readings.rows, _ROWS_AT_ONCE):
        rows = np.arange(start, min(start + _ROWS_AT_ONCE, readings.rows))
        yield from _lines_of(readings.take(rows), keys, scale)


def _lines_of(readings: Readings, keys: Sequence[str], scale: int) -> list[str]:
    fields = (
        _floats("quality", readings.quality),
        _floats("battery_level", readings.battery_level),
        _floats("signal_strength", readings.signal_strength),
        _integers("seq", readings.seq, SEQ_ABSENT),
        _integers("flags", readings.flags, 0),
    )
    return [
        f"{keys[series]} value={value!r}{quality}{battery}{signal}{seq}{flags} {time_us * scale}"
        for series, value, quality, battery, signal, seq, flags, time_us in zip(
            readings.series.tolist(),
            readings.value.tolist(),
            *fields,
            readings.time_us.tolist(),
            strict=True,
        )
    ]


def series_key(series: Series, tags: Sequence[str] = DEFAULT_TAGS) -> str:
    """Measurement and tags of a series: everything before the first unescaped space of its lines."""
    pairs = {"sensor_id": series.sensor_id}
    pairs.update((name, text) for name, text in series.attributes if name in tags and text)
    return ",".join(
        (
            measurement(series.sensor_type),
            *(f"{tag_text(key)}={tag_text(pairs[key])}" for key in sorted(pairs)),
        )
    )


def measurement(text: str) -> str:
    """`text` as a measurement name."""
    text = _carriable(text)
    if text.startswith("#"):
        text = "\uff03" + text[1:]
    return _MEASUREMENT_SPECIALS.sub(r"\\\1", text)


def tag_text(text: str) -> str:
    """`text` as a tag key or tag value."""
    return _TAG_SPECIALS.sub(r"\\\1", _carriable(text))


def bodies(lines: Iterable[str], *, max_lines: int, max_bytes: int) -> Iterator[bytes]:
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


def check_tags(tags: Sequence[str]) -> tuple[str, ...]:
    """The attribute names to write as tags.

    Raises:
        ValueError: when one is empty, or a name that InfluxDB or this form keeps for itself.
    """
    for name in tags:
        if not name or name.startswith("_") or name in ("time", "sensor_id", *FIELD_NAMES):
            raise ValueError(f"{name!r} cannot be a tag: empty, reserved, or the name of a field")
    return tuple(tags)


def _carriable(text: str) -> str:
    return _AMBIGUOUS_BACKSLASH.sub("\uff3c", text.translate(_PICTURES))


def _floats(name: str, column: NDArray[np.float32]) -> list[str]:
    """`,name=text` of each value, empty for NaN. Such columns repeat: each distinct value is printed once."""
    distinct, where = np.unique(np.ascontiguousarray(column).view(np.uint32), return_inverse=True)
    texts = ["" if np.isnan(value) else f",{name}={value!s}" for value in distinct.view(np.float32)]
    return [texts[index] for index in where.tolist()]


def _integers(name: str, column: NDArray[Any], absent: int) -> list[str]:
    """`,name=texti` of each value, empty where it is `absent`."""
    if (column == column[:1]).all():
        return [_integer(name, number, absent) for number in column[:1].tolist()] * len(column)
    if (column == absent).any():
        return [_integer(name, number, absent) for number in column.tolist()]
    return [f",{name}={number}i" for number in column.tolist()]


def _integer(name: str, number: int, absent: int) -> str:
    return "" if number == absent else f",{name}={number}i"
