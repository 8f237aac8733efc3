"""Readings exported as they stream by: Parquet, CSV or JSON lines, in the columns of the view `sensor_data`.

A file is written under a temporary name beside its own and renamed once it is whole and fsynced, so a name
without `.part` is never half an export. The form follows from the end of the name. Texts of a series are
made once a series; numbers are written the shortest way that reads back as the same number.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from cloud_sync.model.records import SEQ_ABSENT, Flag
from cloud_sync.runtime.files import fsync_folder
from gateway.humanize import escape_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from cloud_sync.model.records import Readings, Series
    from gateway.spool.series_catalog import SeriesCatalog

    WriteReadings = Callable[[Readings, SeriesCatalog], None]

EXPORT_COLUMNS = (
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


def series_texts(series: Series) -> tuple[str | None, ...]:
    """The values of `SERIES_COLUMNS` for a series; None where it has none."""
    attributes = dict(series.attributes)
    return (series.sensor_id, series.sensor_type, *(attributes.get(name) for name in SERIES_COLUMNS[2:]))


def format_csv_header() -> str:
    """The first line of a CSV file."""
    return ",".join(EXPORT_COLUMNS) + "\r\n"


def format_csv(readings: Readings, catalog: SeriesCatalog, *, printable: bool = False) -> str:
    """Lines of CSV (RFC 4180), absent values empty; `printable` escapes what a terminal would obey."""
    out = io.StringIO()
    prepare = escape_text if printable else str
    csv.writer(out).writerows(
        _format_rows(readings, catalog, lambda text: "" if text is None else prepare(text), "")
    )
    return out.getvalue()


def format_json_lines(readings: Readings, catalog: SeriesCatalog) -> str:
    """One JSON object a line, ASCII only, absent values null."""
    keys = [f'"{name}": ' for name in EXPORT_COLUMNS]
    lines = []
    for row in _format_rows(readings, catalog, json.dumps, "null"):
        cells = [f'{keys[0]}"{row[0]}"', *(key + cell for key, cell in zip(keys[1:], row[1:], strict=True))]
        lines.append("{" + ", ".join(cells) + "}\n")
    return "".join(lines)


def format_table_rows(readings: Readings, catalog: SeriesCatalog) -> Iterator[list[str]]:
    """Rows for a terminal: texts escaped, flags by name, bits that this release does not know as a number."""
    for row in _format_rows(readings, catalog, lambda text: escape_text(text or "", 40), ""):
        flags = int(row[-1])
        names = [(flag.name or "").lower() for flag in Flag if flags & flag]
        unknown = flags & ~sum(Flag)
        row[-1] = ",".join([*names, *([str(unknown)] if unknown else [])])
        yield row


def _format_rows(
    readings: Readings, catalog: SeriesCatalog, format_text: Callable[[str | None], str], absent: str
) -> Iterator[list[str]]:
    numbers, index = np.unique(readings.series, return_inverse=True)
    texts = [[format_text(text) for text in series_texts(catalog[int(number)])] for number in numbers]
    positions = index.tolist()
    cells = {
        name: [column[i] for i in positions]
        for name, column in zip(SERIES_COLUMNS, zip(*texts, strict=True), strict=True)
    }
    times = readings.time_us.astype("datetime64[us]")
    cells["time"] = [f"{text}Z" for text in np.datetime_as_string(times).tolist()]
    cells["value"] = [repr(value) for value in readings.value.tolist()]
    for name in ("quality", "battery_level", "signal_strength"):
        cells[name] = _format_float32(getattr(readings, name), absent)
    cells["seq"] = [absent if seq == SEQ_ABSENT else str(seq) for seq in readings.seq.tolist()]
    cells["flags"] = [str(flags) for flags in readings.flags.tolist()]
    return (list(row) for row in zip(*(cells[name] for name in EXPORT_COLUMNS), strict=True))


def _format_float32(column: NDArray[np.float32], absent: str) -> list[str]:
    """Single-precision numbers as short text, each distinct one formatted once."""
    distinct, index = np.unique(column, return_inverse=True)
    texts = [absent if np.isnan(number) else str(number) for number in distinct]
    return [texts[i] for i in index.tolist()]


FILE_ENDINGS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_GZIP_LEVEL = 6


class ExportError(Exception):
    """The export cannot be written; the message says why and what to do."""


def _text_writer(
    stream: Any, format_text: Callable[[Readings, SeriesCatalog], str], header: str
) -> WriteReadings:
    """Writes readings as lines of text into a binary stream."""
    stream.write(header.encode())

    def write(readings: Readings, catalog: SeriesCatalog) -> None:
        stream.write(format_text(readings, catalog).encode("utf-8", "backslashreplace"))

    return write


class ParquetWriter:
    """Parquet with zstd: one row group a run, times in microseconds UTC, absent values null."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # noqa: ICN001, PLC0415 - an optional package, needed only here
            import pyarrow.parquet  # noqa: PLC0415 - as above
        except ModuleNotFoundError:
            raise ExportError(
                "Parquet needs pyarrow, which is not installed: install tidegate[sim], or export to .csv"
            ) from None
        self._arrow = pyarrow
        types = dict.fromkeys(SERIES_COLUMNS, pyarrow.string()) | {
            "time": pyarrow.timestamp("us", "UTC"),
            "value": pyarrow.float64(),
            "quality": pyarrow.float32(),
            "battery_level": pyarrow.float32(),
            "signal_strength": pyarrow.float32(),
            "seq": pyarrow.int64(),
            "flags": pyarrow.int32(),
        }
        self._schema = pyarrow.schema([(name, types[name]) for name in EXPORT_COLUMNS])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, readings: Readings, catalog: SeriesCatalog) -> None:
        """Add readings as a row group."""
        arrow = self._arrow
        numbers, index = np.unique(readings.series, return_inverse=True)
        texts = [series_texts(catalog[int(number)]) for number in numbers]
        arrays = {
            name: arrow.array([_to_valid_utf8(text[place]) for text in texts], arrow.string()).take(
                arrow.array(index)
            )
            for place, name in enumerate(SERIES_COLUMNS)
        }
        arrays["time"] = arrow.array(readings.time_us.astype("datetime64[us]")).cast(
            self._schema.field("time").type
        )
        arrays["value"] = arrow.array(readings.value)
        for name in ("quality", "battery_level", "signal_strength"):
            column = getattr(readings, name)
            arrays[name] = arrow.array(column, mask=np.isnan(column))
        arrays["seq"] = arrow.array(readings.seq, mask=readings.seq == SEQ_ABSENT)
        arrays["flags"] = arrow.array(readings.flags)
        self._writer.write_table(arrow.table([arrays[name] for name in EXPORT_COLUMNS], schema=self._schema))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()


def find_file_ending(out: str) -> str:
    """The format that an export's name asks for; `-` and `-.gz` mean CSV on standard output."""
    if out in ("-", "-.gz"):
        return f".csv{out[1:]}"
    for ending in sorted(FILE_ENDINGS, key=len, reverse=True):
        if out.endswith(ending):
            return ending
    raise ExportError(
        f"{out}: name a file that ends in {', '.join(FILE_ENDINGS)}, or - for CSV on standard output"
    )


@contextmanager
def open_file_writer(path: Path, *, replace: bool = False) -> Iterator[WriteReadings]:
    """Adds readings to a file in the format of its name, which appears when the block ends without error."""
    ending = find_file_ending(path.name)
    if path.exists() and not replace:
        raise ExportError(f"{path}: exists; name another file, or replace it with --force")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _open_part_file_writer(part, ending) as write:
            yield write
        part.replace(path)
        fsync_folder(path.absolute().parent)
    except OSError as fault:
        raise ExportError(f"{fault.filename or path}: {fault.strerror or fault}") from fault
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def open_stdout_writer(
    ending: str, format_text: Callable[[Readings, SeriesCatalog], str], header: str = ""
) -> Iterator[WriteReadings]:
    """What adds readings as text to standard output, compressed when `ending` says so."""
    stream: Any = sys.stdout.buffer
    with _compress(stream, ending) as output:
        yield _text_writer(output, format_text, header)
    stream.flush()


@contextmanager
def _compress(stream: Any, ending: str) -> Iterator[Any]:
    """The stream itself, or one that compresses into it when `ending` says so."""
    if ending.endswith(".gz"):
        with gzip.GzipFile("", fileobj=stream, mode="wb", compresslevel=_GZIP_LEVEL) as compressed:
            yield compressed
    else:
        yield stream


@contextmanager
def _open_part_file_writer(part: Path, ending: str) -> Iterator[WriteReadings]:
    if ending == ".parquet":
        with closing(ParquetWriter(part)) as parquet:
            yield parquet.write
    else:
        is_csv = ".csv" in ending
        format_text, header = (format_csv, format_csv_header()) if is_csv else (format_json_lines, "")
        with part.open("wb") as file, _compress(file, ending) as output:
            yield _text_writer(output, format_text, header)
    with part.open("rb") as written:
        os.fsync(written.fileno())


def _to_valid_utf8(text: str | None) -> str | None:
    """Arrow's strings are UTF-8: a lone surrogate becomes its escape."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
