"""Which column of a recorded file means what. Pure but for reading the first rows.

Two layouts: long, where one column holds the value (and perhaps one its type), and wide, where each column of
numbers is a series of its own named after the column. What options leave open is detected from the header and
the first rows.
"""

from __future__ import annotations

import csv
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Annotated

import typer

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES, MEASURES
from firmware_sim.replay.csv_values import (
    TIME_FORMATS,
    CellError,
    is_converted,
    is_line_protocol,
    is_missing,
    open_recording,
    parse_number,
    parse_time_us,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from typer.models import OptionInfo

DELIMITERS = ",;\t|"
SAMPLE_ROWS = 50

_TIME_NAMES = (
    *("time", "timestamp", "ts", "datetime", "date time", "date_time", "_time", "date", "recorded_at"),
    "epoch",
)
_SENSOR_NAMES = (
    *("sensor_id", "sensor", "device_id", "device", "id", "station", "station_id", "node", "node_id"),
    *("moteid", "entity_id", "tag", "site"),
)
_TYPE_NAMES = (
    *("sensor_type", "type", "metric", "parameter", "variable", "channel", "measurement", "quantity"),
    "_field",
)
_VALUE_NAMES = ("value", "val", "reading", "_value")
_SYNONYMS = {
    "quality": ("quality",),
    "battery_level": ("battery_level", "battery"),
    "signal_strength": ("signal_strength", "rssi"),
    "seq": ("seq", "sequence"),
    "unit": ("unit", "units", "uom"),
    "location": ("location", "room"),
    "manufacturer": ("manufacturer",),
    "firmware_version": ("firmware_version", "firmware"),
}


def _column_option(text: str) -> OptionInfo:
    option: OptionInfo = typer.Option(help=text, rich_help_panel="What the columns mean")
    return option


def _format_option(text: str, *names: str, minimum: int | None = None) -> OptionInfo:
    option: OptionInfo = typer.Option(*names, help=text, min=minimum, rich_help_panel="Format of the file")
    return option


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnOptions:
    """Options of the command. What is empty is detected."""

    time_column: Annotated[str, _column_option("Column of the time; two joined by a space as A,B.")] = ""
    time_format: Annotated[
        str,
        _column_option(
            "auto, iso, s, ms, us, ns (since 1970), or a strptime format like '%d/%m/%Y %H:%M'. "
            "A time without a zone is UTC; digits below a microsecond are cut."
        ),
    ] = "auto"
    sensor_column: Annotated[str, _column_option("Column of the sensor id.")] = ""
    sensor_id: Annotated[str, _column_option("One sensor id for all rows. Default: the file's name.")] = ""
    type_column: Annotated[str, _column_option("Column of the sensor type.")] = ""
    sensor_type: Annotated[str, _column_option("One sensor type for all rows.")] = ""
    value_column: Annotated[str, _column_option("Column of the value.")] = ""
    value_columns: Annotated[
        str,
        _column_option(
            "Columns A,B,C, each a sensor type of its own. Default: all columns of numbers, "
            "when there is no column called value."
        ),
    ] = ""
    quality_column: Annotated[str, _column_option("Column of the quality, 0-100.")] = ""
    delimiter: Annotated[str, _format_option("Between fields; 'tab' for a tab. Default: detected.")] = ""
    decimal: Annotated[str, _format_option("Decimal sign. Default: detected.")] = ""
    encoding: Annotated[str, _format_option("Text encoding.")] = "utf-8-sig"
    skip_lines: Annotated[int, _format_option("Lines before the header.", minimum=0)] = 0
    no_header: Annotated[
        bool, _format_option("No header: columns are called 1, 2, 3, ...", "--no-header")
    ] = False


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """Which column (by position) means what; a text in the place of a column is a fixed value.

    `values` are pairs of a column and its sensor_type. `options` have the delimiter and the decimal sign that
    were detected.
    """

    columns: tuple[str, ...]
    time: tuple[int, ...]
    sensor: int | str
    values: tuple[tuple[int, int | str], ...]
    measures: dict[str, int]
    attributes: tuple[int | None, ...]
    options: ColumnOptions

    @property
    def unused(self) -> list[int]:
        """Columns with a name that have no meaning."""
        used = {*self.time, *self.measures.values(), *self.attributes, self.sensor}
        used |= {at for pair in self.values for at in pair}
        return [at for at, name in enumerate(self.columns) if at not in used and name]


def sanitize_topic_level(text: str) -> str:
    """A name that is allowed in a topic: `/`, `+`, `#` and control characters become `_`."""
    return re.sub(r"[/+#\x00-\x1f\x7f-\x9f]", "_", text.strip()) or "_"


def detect_columns(path: Path, options: ColumnOptions) -> ColumnMap:
    """Detect what the columns of a file mean; SimError without a readable file or a required column."""
    options = _check_options(options)
    if is_line_protocol(path):
        options = replace(
            options,
            time_column="time",
            time_format="ns" if options.time_format == "auto" else options.time_format,
            sensor_column="" if options.sensor_id else "sensor_id",
            type_column="" if options.sensor_type else "sensor_type",
            value_column="value",
        )
    if is_converted(path):
        options = replace(options, delimiter=",", decimal=".", skip_lines=0, no_header=False)
    with open_recording(path, options.encoding) as lines:
        _, header = find_header(path, lines, options)
        options = replace(options, delimiter=options.delimiter or max(DELIMITERS, key=header.count))
        (names,) = csv.reader([header], delimiter=options.delimiter)
        sample = []
        with suppress(csv.Error):
            for row in islice(csv.reader(lines, delimiter=options.delimiter), SAMPLE_ROWS):
                sample.append(row)  # noqa: PERF402 - the rows before the error stay
    if options.no_header:
        sample.insert(0, names)
        names = [str(n) for n in range(1, len(names) + 1)]
    columns = tuple(name.strip() for name in names)
    width = len(columns)
    sample = [row + [""] * (width - len(row)) for row in sample if any(cell.strip() for cell in row)]
    options = replace(options, decimal=options.decimal or _detect_decimal(sample, options.delimiter))
    return _ColumnDetector(path, columns, sample, options).detect()


def _check_options(options: ColumnOptions) -> ColumnOptions:
    if options.time_format not in TIME_FORMATS and "%" not in options.time_format:
        known = ", ".join(TIME_FORMATS)
        raise SimError(
            f"--time-format {options.time_format}: expected {known}, or a format like '%d/%m/%Y %H:%M'"
        )
    delimiter = {"tab": "\t", "\\t": "\t"}.get(options.delimiter, options.delimiter)
    if len(delimiter) > 1:
        raise SimError(f"--delimiter {delimiter}: expected one character, or tab")
    if options.decimal not in {"", ".", ","}:
        raise SimError(f"--decimal {options.decimal}: expected . or ,")
    return replace(options, delimiter=delimiter)


def _detect_decimal(sample: list[list[str]], delimiter: str) -> str:
    if delimiter == ",":
        return "."
    cells = [cell.strip() for row in sample for cell in row]
    commas = sum(bool(re.fullmatch(r"[+-]?\d+,\d+", cell)) for cell in cells)
    points = sum(bool(re.fullmatch(r"[+-]?\d+\.\d+", cell)) for cell in cells)
    return "," if commas > points else "."


@dataclass(slots=True)
class _ColumnDetector:
    path: Path
    columns: tuple[str, ...]
    sample: list[list[str]]
    options: ColumnOptions
    used: set[int] = field(default_factory=set)

    def detect(self) -> ColumnMap:
        options = self.options
        time = self._time()
        sensor: int | str | None = sanitize_topic_level(options.sensor_id) if options.sensor_id else None
        if sensor is None:
            sensor = self._named(options.sensor_column, "--sensor-column")
        if sensor is None:
            sensor = self._guess(_SENSOR_NAMES, lambda at: not self._is_row_number(at))
        if sensor is None:
            sensor = sanitize_topic_level(self.path.name.split(".")[0])
        kind = self._named(options.type_column, "--type-column")
        value = self._named(options.value_column, "--value-column")
        wide = self._named_all(options.value_columns, "--value-columns")
        if not wide and value is None:
            value = self._guess(_VALUE_NAMES)
        if not wide and value is not None and kind is None and not options.sensor_type:
            kind = self._guess(_TYPE_NAMES)
        measures = {name: at for name in MEASURES if (at := self._measure(name)) is not None}
        attributes = tuple(self._guess(_SYNONYMS[name]) for name in ATTRIBUTES)
        values: tuple[tuple[int, int | str], ...]
        if value is not None:
            fixed = options.sensor_type or ("value" if options.no_header else self.columns[value])
            values = ((value, sanitize_topic_level(fixed) if kind is None else kind),)
        else:
            if not wide:
                wide = [at for at in range(len(self.columns)) if at not in self.used and self._is_number(at)]
            if not wide:
                raise self._missing("no column holds numbers", "--value-column or --value-columns")
            values = tuple((at, sanitize_topic_level(self.columns[at])) for at in wide)
        return ColumnMap(self.columns, time, sensor, values, measures, attributes, options)

    def _time(self) -> tuple[int, ...]:
        named = self._named_all(self.options.time_column, "--time-column")
        if named:
            return tuple(named)
        lower = [name.lower() for name in self.columns]
        if "date" in lower and "time" in lower and not self._is_time(lower.index("time")):
            pair = (lower.index("date"), lower.index("time"))
            self.used.update(pair)
            return pair
        at = self._guess(_TIME_NAMES, self._is_time)
        if at is None:
            at = next((at for at in range(len(self.columns)) if self._is_time(at)), None)
        if at is None:
            at = self._guess(_TIME_NAMES)
        if at is None:
            raise self._missing("no column holds times", "--time-column")
        self.used.add(at)
        return (at,)

    def _named(self, name: str, option: str) -> int | None:
        """The column that an option names, exactly or except for case; None without a name."""
        if not name:
            return None
        lower = [column.lower() for column in self.columns]
        if name in self.columns:
            at = self.columns.index(name)
        elif name.strip().lower() in lower:
            at = lower.index(name.strip().lower())
        else:
            raise self._missing(f"there is no column {name!r}", option)
        self.used.add(at)
        return at

    def _named_all(self, names: str, option: str) -> list[int]:
        named = [self._named(name, option) for name in names.split(",")]
        return [at for at in named if at is not None]

    def _guess(self, names: Sequence[str], fits: Callable[[int], bool] | None = None) -> int | None:
        lower = [column.lower() for column in self.columns]
        for name in names:
            if name in lower and (at := lower.index(name)) not in self.used and (fits is None or fits(at)):
                self.used.add(at)
                return at
        return None

    def _measure(self, name: str) -> int | None:
        if name == "quality" and self.options.quality_column:
            return self._named(self.options.quality_column, "--quality-column")
        return self._guess(_SYNONYMS[name], self._is_number)

    def _cells(self, at: int) -> list[str]:
        return [row[at] for row in self.sample if not is_missing(row[at])]

    def _is_number(self, at: int) -> bool:
        cells = self._cells(at) if self.columns[at] else []
        return bool(cells) and all(_is_parsable(parse_number, c, self.options.decimal) for c in cells)

    def _is_time(self, at: int) -> bool:
        cells = self._cells(at)
        return bool(cells) and all(_is_parsable(parse_time_us, c, self.options.time_format) for c in cells)

    def _is_row_number(self, at: int) -> bool:
        """Whether a column called id only numbers the rows."""
        cells = self._cells(at)
        return self.columns[at].lower() == "id" and len(cells) > 1 and len(set(cells)) == len(cells)

    def _missing(self, what: str, option: str) -> SimError:
        named = ", ".join(repr(name) for name in self.columns if name)
        return SimError(f"{self.path}: {what}; use {option}. The columns are: {named}")


def _is_parsable(parse: Callable[[str, str], object], cell: str, how: str) -> bool:
    try:
        parse(cell, how)
    except CellError:
        return False
    return True


def summarize_column_map(path: Path, mapping: ColumnMap) -> dict[str, object]:
    """What was detected in a file, by column name, as JSON has it."""

    def name(at: int | str | None) -> str | None:
        return mapping.columns[at] if isinstance(at, int) else None

    def fixed(at: int | str) -> str | None:
        return at if isinstance(at, str) else None

    attributes = dict(zip(ATTRIBUTES, mapping.attributes, strict=True))
    return {
        "file": str(path),
        "delimiter": mapping.options.delimiter,
        "decimal": mapping.options.decimal,
        "time_columns": [mapping.columns[at] for at in mapping.time],
        "time_format": mapping.options.time_format,
        "sensor_column": name(mapping.sensor),
        "sensor_id": fixed(mapping.sensor),
        "values": [
            {"column": name(at), "type_column": name(kind), "sensor_type": fixed(kind)}
            for at, kind in mapping.values
        ],
        "measures": {measure: name(at) for measure, at in mapping.measures.items()},
        "attributes": {attribute: name(at) for attribute, at in attributes.items() if at is not None},
        "unused_columns": [mapping.columns[at] for at in mapping.unused],
    }


def describe_column_map(path: Path, mapping: ColumnMap) -> str:
    """What was detected in a file, as text."""

    def name(at: int | str) -> str:
        return repr(at) if isinstance(at, str) else f"column {mapping.columns[at]!r}"

    options = mapping.options
    fixed = "always " if isinstance(mapping.sensor, str) else ""
    lines = [
        f"{path}:",
        f"  delimiter {options.delimiter!r}, decimal {options.decimal!r}",
        f"  time: {' + '.join(map(name, mapping.time))} as {options.time_format} (without a zone: UTC)",
        f"  sensor_id: {fixed}{name(mapping.sensor)}",
    ]
    lines += [f"  value: {name(at)}, sensor_type {name(kind)}" for at, kind in mapping.values]
    lines += [f"  {measure}: {name(at)}" for measure, at in mapping.measures.items()]
    attributes = zip(ATTRIBUTES, mapping.attributes, strict=True)
    lines += [f"  {attribute}: {name(at)}" for attribute, at in attributes if at is not None]
    unused = [repr(mapping.columns[at]) for at in mapping.unused]
    if unused:
        lines.append(f"  not used: {', '.join(unused)}")
    return "\n".join(lines)


def find_header(path: Path, lines: Iterator[str], options: ColumnOptions) -> tuple[int, str]:
    """Number and text of the first line after `skip_lines` that is neither empty nor a comment."""
    for number, line in enumerate(lines, 1):
        if number > options.skip_lines and line.strip() and not line.startswith("#"):
            return number, line
    raise SimError(f"{path}: the file is empty; expected a CSV file with a header")
