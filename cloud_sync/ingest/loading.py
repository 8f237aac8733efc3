"""Taking in the files of a file destination: piece by piece, each once, going on where it stopped."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.database.loaded import FileMemory, Loaded, loaded
from cloud_sync.database.storing import Source
from cloud_sync.gathered import BadReading, Gathering
from cloud_sync.ingest.volumes import Damaged, Volume
from cloud_sync.line_protocol_reader import LineReader
from cloud_sync.records import Readings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cloud_sync.destinations.timescaledb import TimescaleSink
    from cloud_sync.records import Series

PIECE_LINES = 50_000


@dataclass(slots=True)
class Sums:
    """What became of the files of one folder.

    Attributes:
        known: files that had been loaded before.
        damaged: files that are not what their manifest says, or could not be read.
    """

    files: int = 0
    known: int = 0
    damaged: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    rejected: int = 0

    def words(self) -> str:
        """One line for a person."""
        return (
            f"{self.files} files loaded, {self.known} known before; {self.stored} readings stored, "
            f"{self.duplicates} duplicates, {self.conflicts} conflicts, {self.rejected} lines rejected"
        )


async def load(sink: TimescaleSink, files: Sequence[Volume], told: Callable[[str], None]) -> Sums:
    """Take in files one after the other; a damaged one is told and left.

    Raises:
        DeliveryError: the database is away, or refuses us; what was loaded stays loaded.
    """
    sums = Sums()
    for number, file in enumerate(files, start=1):
        place = f"{number}/{len(files)} {file.path.name}"
        try:
            sha256 = await asyncio.to_thread(file.digest)
            before = await sink.transact(partial(loaded, sha256=sha256))
            if before.complete:
                sums.known += 1
                told(f"{place}: loaded before")
                continue
            after = await _load_one(sink, file, sha256, before, partial(_tell, told, place))
        except (Damaged, OSError) as fault:
            sums.damaged += 1
            told(f"{place}: {fault}")
            continue
        sums.files += 1
        for name in ("stored", "duplicates", "conflicts", "rejected"):
            setattr(sums, name, getattr(sums, name) + getattr(after, name) - getattr(before, name))
    return sums


def _tell(told: Callable[[str], None], place: str, words: str) -> None:
    told(f"{place}: {words}")


async def _load_one(
    sink: TimescaleSink, file: Volume, sha256: bytes, before: Loaded, told: Callable[[str], None]
) -> Loaded:
    """Load what is left of a file, in pieces that are one transaction each."""
    pieces = _columnar_pieces(file, before.lines) if file.is_columnar else _line_pieces(file, before.lines)
    at = before
    while not at.complete:
        piece = await asyncio.to_thread(next, pieces, _END)
        series, readings, taken, rejected, last = piece
        memory = FileMemory(sha256, file.path.name, at, lines=taken, rejected=rejected, complete=last)
        after = await sink.store(series, readings, Source(f"file {file.path.name}"), memory)
        if after.lines != at.lines + taken:
            told("somebody else is loading it")
            return after
        at = after
        told(f"{at.lines} lines, {at.stored} stored")
    return at


class _Piece(NamedTuple):
    """Some readings, how many lines or rows they took, how many of those were none, and if it is the last."""

    series: Sequence[Series]
    readings: Readings
    taken: int
    rejected: int
    last: bool


_END = _Piece((), Readings.none(), 0, 0, last=True)


def _line_pieces(file: Volume, skip: int) -> Iterator[_Piece]:
    lines, reader = islice(file.lines(), skip, None), LineReader("ns")
    while True:
        series, readings, taken, rejected = _piece(lines, reader)
        yield _Piece(series, readings, taken, rejected, last=taken < PIECE_LINES)


def _columnar_pieces(file: Volume, skip: int) -> Iterator[_Piece]:
    """Pieces as they are stored; those that were loaded before are passed over whole."""
    at = 0
    for series, readings, rejected in file.pieces(PIECE_LINES):
        rows = readings.rows + rejected
        at += rows
        if at > skip:
            yield _Piece(series, readings, rows, rejected, last=False)
    yield _END


def _piece(lines: Iterator[bytes], reader: LineReader) -> tuple[Sequence[Series], Readings, int, int]:
    """The next readings, how many lines they took, and how many of those were rejected."""
    gathering, taken, rejected = Gathering(), 0, 0
    for line in islice(lines, PIECE_LINES):
        taken += 1
        try:
            reading = reader.read(line.decode())
            if reading is not None:
                gathering.add(reading)
        except (BadReading, UnicodeDecodeError):
            rejected += 1
    return *gathering.take(), taken, rejected
