"""Files of a file destination: which there are, what their manifest says, and what they hold. Blocking.

The folder is what a file destination wrote (docs/destinations.md), or a copy of a part of it. A file that the
manifest lists must be what it says, byte for byte. A file that is not listed was open when it was taken away:
it is read up to its last whole line, or batch.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cloud_sync import parquet
from cloud_sync.destinations import kept_batches

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cloud_sync.records import Readings, Series

MANIFEST = "manifest.jsonl"
_COLUMNAR = (".parquet", ".open.batches")
_PATTERNS = ("*.lp", "*.lp.gz", *(f"*{ending}" for ending in _COLUMNAR))
_PIECE_BYTES = 1 << 18
_GZIP_WINDOW = 16 + zlib.MAX_WBITS


class Damaged(Exception):  # noqa: N818 - said of the file, not of the program
    """A file is not what its manifest says."""


@dataclass(frozen=True, slots=True)
class Volume:
    """One file; `sha256` as the manifest has it, None when it does not list the file."""

    path: Path
    sha256: str | None = None

    def digest(self) -> bytes:
        """The SHA-256 of the file as it is.

        Raises:
            Damaged: the manifest says otherwise.
            OSError: it cannot be read.
        """
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256")
        if self.sha256 is not None and found.hexdigest() != self.sha256:
            size = self.path.stat().st_size
            raise Damaged(f"{self.path.name}: {size} bytes whose SHA-256 is not the one in {MANIFEST}")
        return found.digest()

    @property
    def is_columnar(self) -> bool:
        """Whether it holds columns rather than lines."""
        return self.path.name.endswith(_COLUMNAR)

    def pieces(self, max_rows: int) -> Iterator[tuple[Sequence[Series], Readings, int]]:
        """Of a columnar file: series, their readings, and how many rows were none, a piece at a time.

        Raises:
            Damaged: it cannot be understood, or pyarrow is not installed.
            OSError: it cannot be read.
        """
        if self.path.name.endswith(_COLUMNAR[1]):
            yield from ((batch.series, batch.readings, 0) for batch in kept_batches.batches_of(self.path))
            return
        if not parquet.is_available():
            raise Damaged(f"{self.path.name}: needs pyarrow; install tidegate[parquet]")
        try:
            yield from parquet.read(self.path, max_rows=max_rows)
        except ValueError as fault:
            raise Damaged(str(fault)) from fault

    def lines(self) -> Iterator[bytes]:
        """Every whole line, without its end.

        Raises:
            Damaged: a listed file ends within a gzip member or a line.
            OSError: it cannot be read.
        """
        rest = b""
        for piece in _gunzipped(self) if self.path.name.endswith(".gz") else _pieces(self.path):
            *whole, rest = (rest + piece).split(b"\n")
            yield from whole
        if rest and self.sha256 is not None:
            raise Damaged(f"{self.path.name}: ends within a line")


def find(folder: Path) -> list[Volume]:
    """The files of a folder, in the order of their names.

    Raises:
        OSError: the folder cannot be read.
    """
    listed = {entry["file"]: entry.get("sha256") for entry in _manifest(folder) if "file" in entry}
    paths = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern)})
    if not paths:
        list(folder.iterdir())  # glob finds nothing in a folder that is not there
    return [Volume(path, listed.get(path.name)) for path in paths]


def _manifest(folder: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of the manifest that hold an object; a torn last line is no line."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return
    for line in text.split(b"\n")[:-1]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            yield piece


def _gunzipped(volume: Volume) -> Iterator[bytes]:
    """What the members of a gzip file hold. An unlisted file may be cut short: its lines are stored once by
    series and time, so having only some of a batch does no harm.
    """
    member = zlib.decompressobj(_GZIP_WINDOW)
    begun = False
    try:
        for piece in _pieces(volume.path):
            compressed = piece
            while compressed:
                if member.eof:
                    member = zlib.decompressobj(_GZIP_WINDOW)
                begun = True
                yield member.decompress(compressed, _PIECE_BYTES)
                compressed = member.unused_data if member.eof else member.unconsumed_tail
    except zlib.error as fault:
        if volume.sha256 is not None:
            raise Damaged(f"{volume.path.name}: is no gzip: {fault}") from fault
        return
    if begun and not member.eof and volume.sha256 is not None:
        raise Damaged(f"{volume.path.name}: ends within a gzip member")
