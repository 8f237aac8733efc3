"""Readings as rows of text, in the columns of the region's view `sensor_data`. Pure.

Texts of a series are made once a series, not once a reading; numbers are written the shortest way that reads
back as the same number.
"""

from __future__ import annotations

import csv
import io
import json
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cloud_sync.records import SEQ_ABSENT, Flag
from gateway.operate.terminal import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from cloud_sync.records import Readings, Series

COLUMNS = (
    "time",
    "sensor_id",
    "sensor_type",
    "value",
    "unit",
    "quality",
    "battery_level",
    "signal_strength",
    "location",
    "manufacturer",
    "firmware_version",
    "seq",
    "flags",
)
SERIES_COLUMNS = ("sensor_id", "sensor_type", "unit", "location", "manufacturer", "firmware_version")
_PLACES = [COLUMNS.index(name) for name in SERIES_COLUMNS]


class Names(Protocol):
    """Whoever knows the series of a number."""

    def __getitem__(self, number: int) -> Series:
        """The series."""
        ...


def series_texts(series: Series) -> tuple[str | None, ...]:
    """What a series puts into `SERIES_COLUMNS`; None where it says nothing."""
    attributes = dict(series.attributes)
    return (series.sensor_id, series.sensor_type, *(attributes.get(name) for name in SERIES_COLUMNS[2:]))


def csv_header() -> str:
    """The first line of a CSV file."""
    return ",".join(COLUMNS) + "\r\n"


def csv_text(readings: Readings, names: Names, *, printable: bool = False) -> str:
    """Lines of CSV (RFC 4180), absent values empty; `printable` escapes what a terminal would obey."""
    out = io.StringIO()
    prepare = shown if printable else str
    csv.writer(out).writerows(_rows(readings, names, lambda text: "" if text is None else prepare(text), ""))
    return out.getvalue()


def json_text(readings: Readings, names: Names) -> str:
    """One JSON object a line, ASCII only, absent values null."""
    keys = [f'"{name}": ' for name in COLUMNS]
    lines = []
    for row in _rows(readings, names, json.dumps, "null"):
        cells = [f'{keys[0]}"{row[0]}"', *(key + cell for key, cell in zip(keys[1:], row[1:], strict=True))]
        lines.append("{" + ", ".join(cells) + "}\n")
    return "".join(lines)


def table_rows(readings: Readings, names: Names) -> Iterator[list[str]]:
    """Rows for a person: texts escaped, flags by their names."""
    for row in _rows(readings, names, lambda text: "" if text is None else shown(text, 40), ""):
        row[-1] = flag_names(int(row[-1]))
        yield row


def flag_names(flags: int) -> str:
    """Flags as words; bits this release does not know as their number."""
    known = [(flag.name or "").lower() for flag in Flag if flags & flag]
    rest = flags & ~sum(Flag)
    return ",".join([*known, *([str(rest)] if rest else [])])


def _rows(
    readings: Readings, names: Names, text_of: Callable[[str | None], str], absent: str
) -> Iterator[list[str]]:
    cells: list[list[str]] = [[] for _ in COLUMNS]
    numbers, index = np.unique(readings.series, return_inverse=True)
    texts = [[text_of(text) for text in series_texts(names[int(number)])] for number in numbers]
    positions = index.tolist()
    for place, column in zip(_PLACES, zip(*texts, strict=True), strict=True):
        cells[place] = [column[i] for i in positions]
    times = readings.time_us.astype("datetime64[us]")
    cells[0] = [f"{text}Z" for text in np.datetime_as_string(times).tolist()]
    cells[COLUMNS.index("value")] = [repr(value) for value in readings.value.tolist()]
    for name in ("quality", "battery_level", "signal_strength"):
        cells[COLUMNS.index(name)] = _singles(getattr(readings, name), absent)
    cells[COLUMNS.index("seq")] = [absent if seq == SEQ_ABSENT else str(seq) for seq in readings.seq.tolist()]
    cells[COLUMNS.index("flags")] = [str(flags) for flags in readings.flags.tolist()]
    return (list(row) for row in zip(*cells, strict=True))


def _singles(column: NDArray[np.float32], absent: str) -> list[str]:
    """Single-precision numbers as short text, each distinct one formatted once."""
    distinct, index = np.unique(column, return_inverse=True)
    texts = [absent if np.isnan(number) else str(number) for number in distinct]
    return [texts[i] for i in index.tolist()]
