"""Recordings that are no CSV, read as if they were: Parquet and line protocol as lines of CSV with a header.

Parquet keeps its columns. A line of line protocol becomes one row for each of its numbers: the row of
`value` has the measurement as its sensor type, any other field is a sensor type of its own,
MEASUREMENT_FIELD. The sensor is the tag sensor_id, or else all tags but the attributes together.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING, Any, cast

from firmware_sim.errors import SimError
from firmware_sim.lines import parse_key
from firmware_sim.truth import ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import IO

LINE_SUFFIXES = (".lp", ".lp.gz", ".line", ".line.gz")
_BATCH_ROWS = 10_000
_MEASURES = ("quality", "battery_level", "signal_strength", "seq")
_LINE_HEADER = ("time", "sensor_id", "sensor_type", "value", *_MEASURES, *ATTRIBUTES)
_LINE = re.compile(r"((?:\\.|[^ \\])+) (.+?)(?: (-?\d+))?")
_FIELD = re.compile(r'((?:\\.|[^=,\\])+)=("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[iu]?")
_TRUTHS = {"t": "1", "T": "1", "true": "1", "True": "1", "f": "0", "F": "0", "false": "0", "False": "0"}


class ConvertedText(io.TextIOBase):
    """Lines made by a generator, as a file that can be read once more from its beginning."""

    def __init__(self, path: Path, make: Callable[[], Iterator[str]]) -> None:
        super().__init__()
        self.name = str(path)
        self._make = make
        self._lines = make()

    def readline(self, _: int = -1, /) -> str:  # type: ignore[override]  # lines are never cut here
        """The next line with its newline, "" at the end."""
        return next(self._lines, "")

    def seek(self, _offset: int, _whence: int = 0, /) -> int:
        """To the beginning, wherever that is asked for."""
        self._lines = self._make()
        return 0


def is_line_protocol(path: Path) -> bool:
    """Whether a file is, by its name."""
    return path.name.endswith(LINE_SUFFIXES)


def converted(path: Path) -> IO[str] | None:
    """A file as text of CSV; None when it is CSV itself.

    Raises:
        SimError: it cannot be read.
    """
    if path.suffix == ".parquet":
        make = _parquet_lines
    elif is_line_protocol(path):
        make = _protocol_lines
    else:
        return None
    if not path.is_file():
        raise SimError(f"{path}: No such file or directory")
    return cast("IO[str]", ConvertedText(path, lambda: make(path)))


def _csv_line(cells: list[Any] | tuple[Any, ...]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _parquet_lines(path: Path) -> Iterator[str]:
    import pyarrow as pa  # noqa: PLC0415 - slow to import, and needed for this only
    from pyarrow import parquet  # noqa: PLC0415 - as above

    try:
        with parquet.ParquetFile(path) as file:
            yield _csv_line(file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in zip(*(_cells(column) for column in batch.columns), strict=True):
                    yield _csv_line(row)
    except (pa.ArrowException, OSError) as fault:
        raise SimError(f"{path}: {fault}") from fault


def _cells(column: Any) -> list[Any]:
    import pyarrow as pa  # noqa: PLC0415 - as above

    if pa.types.is_timestamp(column.type):
        zone = column.type.tz
        column = column.cast(pa.timestamp("us", tz=zone), safe=False)
    return [_cell(value) for value in column.to_pylist()]


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    if isinstance(value, float):
        return repr(value)
    return value.isoformat() if isinstance(value, date) else value


def _protocol_lines(path: Path) -> Iterator[str]:
    yield _csv_line(_LINE_HEADER)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                stripped = line.strip("\r\n")
                if stripped and not stripped.startswith("#"):
                    yield from map(_csv_line, _rows(stripped))
    except (EOFError, OSError) as fault:
        raise SimError(f"{path}: {fault}") from fault


def _rows(line: str) -> list[list[str]]:
    """The rows of one line; one whose time is no time, for `read_recording` to name, when it cannot be
    read.
    """
    match = _LINE.fullmatch(line)
    if match is None or match[3] is None:
        return [[line[:80], *[""] * (len(_LINE_HEADER) - 1)]]
    measurement, tags = parse_key(match[1])
    fields = {}
    for name, text in _FIELD.findall(match[2]):
        number = _NUMBER.fullmatch(text)
        if number or text in _TRUTHS:
            fields[name.replace("\\", "")] = number[1] if number else _TRUTHS[text]
    others = [text for name, text in sorted(tags.items()) if name not in ATTRIBUTES]
    sensor = tags.get("sensor_id") or "_".join(others) or measurement
    attributes = [tags.get(name, "") for name in ATTRIBUTES]
    if "value" in fields:
        measures = [fields.get(name, "") for name in _MEASURES]
        return [[match[3], sensor, measurement, fields["value"], *measures, *attributes]]
    return [
        [match[3], sensor, f"{measurement}_{name}", number, *[""] * len(_MEASURES), *attributes]
        for name, number in fields.items()
    ]
