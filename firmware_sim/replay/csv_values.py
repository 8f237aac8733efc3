"""Reading recordings as CSV: times and numbers in cells, and Parquet and line protocol as CSV lines.

Times become integer microseconds since 1970 UTC; without a zone they are UTC; digits below a microsecond are
cut, never rounded. Parquet keeps its columns. A line of line protocol becomes one row for each of its
numbers: the row of `value` has the measurement as its sensor type, any other field the type
MEASUREMENT_FIELD. The sensor is the tag sensor_id, or else all tags but the attributes together.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import math
import re
import zlib
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES, MEASURES
from firmware_sim.verify.stored_files import parse_line_key, split_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


TIME_FORMATS = ("auto", "iso", "s", "ms", "us", "ns")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "-", "--", "?", "#n/a"})

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_US_PER = {"s": Decimal(1_000_000), "ms": Decimal(1000), "us": Decimal(1), "ns": Decimal("0.001")}
_SMALLEST_AUTO = Decimal(100_000_000)  # 1973 in seconds: anything less is more likely something else
_AUTO_BELOW = {"s": 10**11, "ms": 10**14, "us": 10**17, "ns": 10**20}
_LARGEST_US = 253_402_300_800_000_000  # the year 10000
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_CLOCK_PATTERN = r"(?:[ T]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?)?"
_ZONE_PATTERN = r"\s*(Z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?"
_CALENDAR = re.compile(
    r"(?:(\d{4})([-/.])(\d{1,2})\2(\d{1,2})|(\d{1,2})\.(\d{1,2})\.(\d{4}))" + _CLOCK_PATTERN + _ZONE_PATTERN,
    re.IGNORECASE,
)


class CellError(ValueError):
    """A cell that cannot be parsed: its text and what was expected."""


def parse_time_us(text: str, time_format: str) -> tuple[int, bool]:
    """A time as microseconds since 1970 UTC, and whether digits below a microsecond were cut.

    `time_format` is one of `TIME_FORMATS`, or a strptime format (it contains a %).
    """
    text = text.strip()
    if not text:
        raise CellError("no time")
    if "%" in time_format:
        try:
            return _datetime_to_us(_assume_utc(datetime.strptime(text, time_format))), False  # noqa: DTZ007 - without a zone it is UTC
        except ValueError:
            raise CellError(f"time {text!r} does not follow {time_format!r}") from None
    if time_format == "iso":
        return _parse_calendar(text)
    if time_format in _US_PER:
        return _epoch_to_us(text, time_format)
    return _epoch_to_us(text) if _NUMBER.fullmatch(text) else _parse_calendar(text)


def parse_number(text: str, decimal: str) -> float:
    """A finite number; true and false count as 1 and 0."""
    text = text.strip()
    plain = text.replace(",", ".") if decimal == "," else text
    if _NUMBER.fullmatch(plain):
        number = float(plain)
        if math.isfinite(number):
            return number
        raise CellError(f"{text!r} is too large for a float64")
    lower = text.lower()
    if lower in {"true", "false"}:
        return float(lower == "true")
    raise CellError(f"{text!r} is not a number")


def is_missing(text: str) -> bool:
    """Whether a cell stands for no value."""
    return text.strip().lower() in MISSING


def _epoch_to_us(text: str, unit: str | None = None) -> tuple[int, bool]:
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("NaN")
    if not number.is_finite():
        raise CellError(f"time {text!r} is not a number")
    if unit is None:
        size = abs(number)
        if size < _SMALLEST_AUTO:
            raise CellError(f"time {text!r} is too small for a time since 1970; use --time-format")
        unit = next((u for u, limit in _AUTO_BELOW.items() if size < limit), "ns")
    exact = number * _US_PER[unit]
    if abs(exact) >= _LARGEST_US:
        raise CellError(f"time {text!r} is after the year 9999")
    whole = math.floor(exact)
    return whole, whole != exact


def _parse_calendar(text: str) -> tuple[int, bool]:
    match = _CALENDAR.fullmatch(text)
    if not match:
        return _parse_iso_basic(text)
    year, _, month, day, last_day, last_month, last_year, *clock, fraction, zone = match.groups()
    parts = (year or last_year, month or last_month, day or last_day, *(part or 0 for part in clock))
    y, m, d, hour, minute, second = map(int, parts)
    try:
        moment = datetime(y, m, d, hour, minute, second, tzinfo=UTC)
    except ValueError as fault:
        raise CellError(f"time {text!r}: {fault}") from None
    digits = fraction or ""
    micros = _datetime_to_us(moment) + int((digits + "000000")[:6]) - _zone_offset_us(zone)
    return micros, bool(digits[6:].strip("0"))


def _parse_iso_basic(text: str) -> tuple[int, bool]:
    """The rarer forms of ISO 8601: 20240131T120000Z, 2024-W05-3."""
    try:
        return _datetime_to_us(_assume_utc(datetime.fromisoformat(text))), False
    except ValueError:
        raise CellError(
            f"time {text!r} is neither ISO 8601 nor a number; use --time-format, for example '%d/%m/%Y %H:%M'"
        ) from None


def _assume_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _datetime_to_us(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _zone_offset_us(zone: str | None) -> int:
    if not zone or zone[0] not in "+-":
        return 0
    digits = zone[1:].replace(":", "")
    minutes = int(digits[:2]) * 60 + int(digits[2:] or 0)
    return (-1 if zone[0] == "-" else 1) * minutes * 60_000_000


_LINE_SUFFIXES = (".lp", ".lp.gz", ".line", ".line.gz")
_BATCH_ROWS = 10_000
_LINE_HEADER = ("time", "sensor_id", "sensor_type", "value", *MEASURES, *ATTRIBUTES)
_FIELD_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)[iu]?")
_BOOLEANS = {"t": "1", "T": "1", "true": "1", "True": "1", "f": "0", "F": "0", "false": "0", "False": "0"}


def is_line_protocol(path: Path) -> bool:
    """Whether a file is line protocol, by its name."""
    return path.name.endswith(_LINE_SUFFIXES)


def is_converted(path: Path) -> bool:
    """Whether a file is read as CSV that this module writes."""
    return path.suffix == ".parquet" or is_line_protocol(path)


@contextmanager
def open_recording(path: Path, encoding: str) -> Iterator[Iterator[str]]:
    """The lines of a file, plain or gzipped; Parquet and line protocol as CSV. Errors become a SimError."""
    try:
        codecs.lookup(encoding)
    except LookupError as fault:
        raise SimError(f"--encoding {encoding}: {fault}") from fault
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        if path.suffix == ".parquet":
            yield _parquet_lines(path)
        elif is_line_protocol(path):
            with opener(path, "rt", encoding="utf-8", errors="replace", newline="\n") as file:
                yield _protocol_lines(file)
        else:
            with opener(path, "rt", encoding=encoding, newline="") as file:
                yield file
    except UnicodeDecodeError as fault:
        byte = fault.object[fault.start]
        raise SimError(f"{path}: byte {byte:#x} is not {fault.encoding}; try --encoding latin-1") from fault
    except (OSError, EOFError, zlib.error) as fault:
        raise SimError(f"{path}: {getattr(fault, 'strerror', None) or fault}") from fault


def _format_csv_line(cells: Iterable[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _parquet_lines(path: Path) -> Iterator[str]:
    import pyarrow.parquet  # noqa: PLC0415 - slow to import, and needed for this only

    def column_cells(column: pyarrow.Array) -> list[object]:
        if pyarrow.types.is_timestamp(column.type):
            column = column.cast(pyarrow.timestamp("us", tz=column.type.tz), safe=False)
        return [_format_cell(value) for value in column.to_pylist()]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield _format_csv_line(file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH_ROWS):
                yield from map(_format_csv_line, zip(*map(column_cells, batch.columns), strict=True))
    except pyarrow.ArrowException as fault:
        raise SimError(f"{path}: {fault}") from fault


def _format_cell(value: object) -> object:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, datetime):
        return _assume_utc(value).astimezone(UTC).isoformat()
    return value.isoformat() if isinstance(value, date) else value


def _protocol_lines(lines: Iterable[str]) -> Iterator[str]:
    yield _format_csv_line(_LINE_HEADER)
    for line in lines:
        stripped = line.strip("\r\n")
        if stripped and not stripped.startswith("#"):
            yield from map(_format_csv_line, _line_to_rows(stripped))


def _line_to_rows(line: str) -> list[list[str]]:
    """The rows of one line; one that cannot be parsed has a wrong time, so that it is reported."""
    try:
        key, texts, stamp = split_line(line)
        int(stamp)
    except ValueError:
        return [[line[:80], *[""] * (len(_LINE_HEADER) - 1)]]
    measurement, tags = parse_line_key(key)
    fields = {}
    for name, text in texts.items():
        number = _FIELD_NUMBER.fullmatch(text)
        if number or text in _BOOLEANS:
            fields[name] = number[1] if number else _BOOLEANS[text]
    others = [text for name, text in sorted(tags.items()) if name not in ATTRIBUTES]
    sensor = tags.get("sensor_id") or "_".join(others) or measurement
    attributes = [tags.get(name, "") for name in ATTRIBUTES]
    if "value" in fields:
        measures = [fields.get(name, "") for name in MEASURES]
        return [[stamp, sensor, measurement, fields["value"], *measures, *attributes]]
    return [
        [stamp, sensor, f"{measurement}_{name}", number, *[""] * len(MEASURES), *attributes]
        for name, number in fields.items()
    ]
