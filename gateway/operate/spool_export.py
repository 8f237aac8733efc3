"""Readings out of a spool into a file: Parquet, CSV or JSON lines, as they stream by.

The file is written under a temporary name beside its own and renamed once it is whole and fsynced, so a name
without `.part` is never half an export. The form follows from the name's end.
"""

from __future__ import annotations

import gzip
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cloud_sync.records import SEQ_ABSENT
from gateway.operate.reading_rows import (
    COLUMNS,
    SERIES_COLUMNS,
    Names,
    csv_header,
    csv_text,
    json_text,
    series_texts,
)

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cloud_sync.records import Readings

ENDINGS = (".parquet", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz")
_GZIP_LEVEL = 6


class ExportFault(Exception):  # noqa: N818 - it says what is wrong with the request or the place
    """The export cannot be written; the message says why and what to do."""


class Writer(Protocol):
    """One open export."""

    def write(self, readings: Readings, names: Names) -> None:
        """Add readings."""
        ...

    def close(self) -> None:
        """Finish the form of the file."""
        ...


class TextWriter:
    """CSV or JSON lines into a binary stream."""

    def __init__(
        self, stream: io.BufferedIOBase | Any, text_of: Callable[[Readings, Names], str], header: str = ""
    ) -> None:
        self._stream = stream
        self._text_of = text_of
        self._stream.write(header.encode())

    def write(self, readings: Readings, names: Names) -> None:
        """Add readings as lines."""
        self._stream.write(self._text_of(readings, names).encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        """Write out what is buffered."""
        self._stream.flush()


class ParquetWriter:
    """Parquet with zstd: one row group a run, times in microseconds UTC, absent values null."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # noqa: ICN001, PLC0415 - an optional package, needed only here
            import pyarrow.parquet  # noqa: PLC0415 - as above
        except ModuleNotFoundError:
            raise ExportFault(
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
        self._schema = pyarrow.schema([(name, types[name]) for name in COLUMNS])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")

    def write(self, readings: Readings, names: Names) -> None:
        """Add readings as a row group."""
        arrow = self._arrow
        numbers, index = np.unique(readings.series, return_inverse=True)
        texts = [series_texts(names[int(number)]) for number in numbers]
        arrays = {
            name: arrow.array([_well_formed(text[place]) for text in texts], arrow.string()).take(
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
        self._writer.write_table(arrow.table([arrays[name] for name in COLUMNS], schema=self._schema))

    def close(self) -> None:
        """Write the footer."""
        self._writer.close()


def ending_of(out: str) -> str:
    """The form an export's name asks for: one of `ENDINGS`; `-` and `-.gz` mean CSV on standard output.

    Raises:
        ExportFault: the name asks for none of them.
    """
    if out in ("-", "-.gz"):
        return f".csv{out[1:]}"
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if out.endswith(ending):
            return ending
    raise ExportFault(
        f"{out}: name a file that ends in {', '.join(ENDINGS)}, or - for CSV on standard output"
    )


@contextmanager
def to_file(path: Path, *, replace: bool = False) -> Iterator[Writer]:
    """A writer of the form that `path` asks for; the file appears when the block ends without an error.

    Raises:
        ExportFault: the file exists, or cannot be written, or its form is not available.
    """
    ending = ending_of(path.name)
    if path.exists() and not replace:
        raise ExportFault(f"{path}: exists; name another file, or replace it with --force")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _written(part, ending) as writer:
            yield writer
        os.replace(part, path)  # noqa: PTH105 - beside os.fsync and os.open
        _fsync_folder(path)
    except OSError as fault:
        raise ExportFault(f"{fault.filename or path}: {fault.strerror or fault}") from fault
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def to_stdout(ending: str, text_of: Callable[[Readings, Names], str], header: str = "") -> Iterator[Writer]:
    """A writer of text on standard output, compressed when `ending` says so."""
    stream: Any = sys.stdout.buffer
    if ending.endswith(".gz"):
        with gzip.GzipFile(fileobj=stream, mode="wb", compresslevel=_GZIP_LEVEL) as packed:
            yield TextWriter(packed, text_of, header)
    else:
        yield TextWriter(stream, text_of, header)
    stream.flush()


@contextmanager
def _written(part: Path, ending: str) -> Iterator[Writer]:
    if ending == ".parquet":
        parquet = ParquetWriter(part)
        try:
            yield parquet
        finally:
            parquet.close()
    else:
        text_of, header = (csv_text, csv_header()) if ".csv" in ending else (json_text, "")
        with part.open("wb") as file:
            if ending.endswith(".gz"):
                with gzip.GzipFile("", fileobj=file, mode="wb", compresslevel=_GZIP_LEVEL) as packed:
                    yield TextWriter(packed, text_of, header)
            else:
                yield TextWriter(file, text_of, header)
    with part.open("rb") as file:
        os.fsync(file.fileno())


def _fsync_folder(path: Path) -> None:
    fd = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _well_formed(text: str | None) -> str | None:
    """Arrow's strings are UTF-8: a lone surrogate becomes its escape."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
