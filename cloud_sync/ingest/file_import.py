"""Imports the folder of a file destination (docs/destinations.md): each piece once, resumable.

A file that the manifest lists must match it byte for byte. One that is not listed was open when it was
lines_read away: it is read up to its last complete line or batch.
"""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.codec.line_protocol import LineReader
from cloud_sync.codec.plain_readings import DecompressionError, iter_gzip
from cloud_sync.destinations import parquet
from cloud_sync.destinations.output_files import MANIFEST, read_json_lines
from cloud_sync.model.reading_builder import ColumnBuilder, InvalidReadingError
from cloud_sync.model.records import Readings
from cloud_sync.timescale.ledger import FileIdempotency, ImportProgress, find_import_progress
from cloud_sync.timescale.row_store import ReadingSource

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from cloud_sync.model.records import Series
    from cloud_sync.timescale.sink import TimescaleSink

_COLUMNAR = (".parquet", ".open.batches")
_CHUNK_BYTES = 1 << 18


class DamagedFileError(Exception):
    """A file is not what its manifest says."""


@dataclass(frozen=True, slots=True)
class ImportFile:
    """One file; `sha256` as the manifest has it, None when it does not list the file."""

    path: Path
    sha256: str | None = None

    def digest(self) -> bytes:
        """The SHA-256 of the file as it is; DamagedFileError when the manifest says otherwise."""
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256")
        if self.sha256 is not None and found.hexdigest() != self.sha256:
            size = self.path.stat().st_size
            raise DamagedFileError(
                f"{self.path.name}: {size} bytes whose SHA-256 is not the one in {MANIFEST}"
            )
        return found.digest()

    def pieces(self, max_rows: int) -> Iterator[tuple[Sequence[Series], Readings, int]]:
        """Of a columnar file: series, their readings, and how many rows were none, a piece at a time.

        DamagedFileError when it cannot be understood, or pyarrow is not installed.
        """
        if self.path.name.endswith(_COLUMNAR[1]):
            yield from ((batch.series, batch.readings, 0) for batch in parquet.read_open_file(self.path))
            return
        if not parquet.is_available():
            raise DamagedFileError(f"{self.path.name}: needs pyarrow; install tidegate[parquet]")
        try:
            yield from parquet.read_pieces(self.path, max_rows=max_rows)
        except ValueError as fault:
            raise DamagedFileError(str(fault)) from fault

    def lines(self) -> Iterator[bytes]:
        """Every whole line; DamagedFileError when a listed file ends within a gzip member or a line."""
        rest = b""
        for piece in _read_gzip(self) if self.path.name.endswith(".gz") else _read_chunks(self.path):
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
        if rest and self.sha256 is not None:
            raise DamagedFileError(f"{self.path.name}: ends within a line")


def find_import_files(folder: Path) -> list[ImportFile]:
    """The files of a folder, in the order of their names."""
    listed = {
        entry["file"]: entry.get("sha256") for entry in read_json_lines(folder / MANIFEST) if "file" in entry
    }
    endings = (".lp", ".lp.gz", *_COLUMNAR)
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(endings))
    return [ImportFile(path, listed.get(path.name)) for path in paths]


def _read_chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_CHUNK_BYTES):
            yield piece


def _read_gzip(file: ImportFile) -> Iterator[bytes]:
    """An unlisted file may end within a member: lines are stored once, so part of a batch does no harm."""
    try:
        yield from iter_gzip(_read_chunks(file.path), _CHUNK_BYTES)
    except DecompressionError as fault:
        if file.sha256 is not None:
            raise DamagedFileError(f"{file.path.name}: {fault}") from fault


PIECE_LINES = 50_000


@dataclass(slots=True)
class ImportSums:
    """What became of the files of one folder; `known` were imported before, `damaged` could not be."""

    files: int = 0
    known: int = 0
    damaged: int = 0
    readings: ImportProgress = field(default_factory=ImportProgress)

    def describe(self) -> str:
        """One line for a person."""
        sums = self.readings
        return (
            f"{self.files} files loaded, {self.known} known before; {sums.stored} readings stored, "
            f"{sums.duplicates} duplicates, {sums.conflicts} conflicts, {sums.rejected} lines rejected"
        )


async def import_files(
    sink: TimescaleSink, files: Sequence[ImportFile], report: Callable[[str], None]
) -> ImportSums:
    """Import files one after the other; a damaged one is reported and left out.

    After a DeliveryError of the database, what was imported stays imported.
    """
    sums = ImportSums()
    for number, file in enumerate(files, start=1):
        place = f"{number}/{len(files)} {file.path.name}"
        try:
            sha256 = await asyncio.to_thread(file.digest)
            before = await sink.transact(partial(find_import_progress, sha256=sha256))
            if before.complete:
                sums.known += 1
                report(f"{place}: loaded before")
                continue
            after = await _import_file(sink, file, sha256, before, partial(_report_at, report, place))
        except (DamagedFileError, OSError) as fault:
            sums.damaged += 1
            report(f"{place}: {fault}")
            continue
        sums.files += 1
        sums.readings = sums.readings.add(after, before)
    return sums


def _report_at(report: Callable[[str], None], place: str, text: str) -> None:
    report(f"{place}: {text}")


async def _import_file(
    sink: TimescaleSink,
    file: ImportFile,
    sha256: bytes,
    before: ImportProgress,
    report: Callable[[str], None],
) -> ImportProgress:
    """Import the rest of a file, in pieces that are one transaction each."""
    read_pieces = _columnar_pieces if file.path.name.endswith(_COLUMNAR) else _line_pieces
    pieces = read_pieces(file, before.lines)
    at = before
    while not at.complete:
        series, readings, lines_read, rejected, last = await asyncio.to_thread(next, pieces, _LAST_PIECE)
        idempotency = FileIdempotency(
            sha256, file.path.name, at, lines=lines_read, rejected=rejected, complete=last
        )
        after = await sink.store(series, readings, ReadingSource(f"file {file.path.name}"), idempotency)
        if after.lines != at.lines + lines_read:
            report("another process is loading it")
            return after
        at = after
        report(f"{at.lines} lines, {at.stored} stored")
    return at


class _Piece(NamedTuple):
    """Readings, how many lines or rows they came from, and how many of those were rejected."""

    series: Sequence[Series]
    readings: Readings
    lines_read: int
    rejected: int
    last: bool


_LAST_PIECE = _Piece((), Readings.empty(), 0, 0, last=True)


def _line_pieces(file: ImportFile, skip: int) -> Iterator[_Piece]:
    lines, reader, builder = islice(file.lines(), skip, None), LineReader("ns"), ColumnBuilder()
    while True:
        lines_read = rejected = 0
        for line in islice(lines, PIECE_LINES):
            lines_read += 1
            try:
                reading = reader.read(line.decode())
                if reading is not None:
                    builder.add(reading)
            except (InvalidReadingError, UnicodeDecodeError):
                rejected += 1
        yield _Piece(*builder.build(), lines_read, rejected, last=lines_read < PIECE_LINES)


def _columnar_pieces(file: ImportFile, skip: int) -> Iterator[_Piece]:
    """Pieces as the file stores them; those that were imported before are skipped whole."""
    at = 0
    for series, readings, rejected in file.pieces(PIECE_LINES):
        rows = readings.rows + rejected
        at += rows
        if at > skip:
            yield _Piece(series, readings, rows, rejected, last=False)
    yield _LAST_PIECE
