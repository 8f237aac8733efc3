"""The directory of a file destination: open files, their indexes, final files, the manifest. Blocking.

Batches of one gateway, spool epoch and class are appended to an open file, which gets its final name
when it is large or old enough. EPOCH is the first 8 hex digits:

    GATEWAY-EPOCH-CLASS.open.lp.gz           being written; may end in a batch that is cut short
    GATEWAY-EPOCH-CLASS.open.index           one JSON line per batch that is wholly in the open file
    GATEWAY-EPOCH-CLASS-FIRST-LAST.lp.gz     final: never changes; holds commits between FIRST and LAST
    GATEWAY-EPOCH-CLASS.open.batches         the same where final files are .parquet (see parquet.py)
    manifest.jsonl                           one JSON line per final file: what it holds, bytes, SHA-256
    .lock                                    held by the process that writes here

Order of writing, so that a power cut leaves whole batches only: data, fsync, index line, fsync. The
index is authoritative: opening truncates the data where the index ends. A final file is named in its index
first, then renamed, then entered in the manifest, then its index is removed; opening goes on from
wherever that stopped. What the index holds and the data does not, because the file was taken away or
damaged, gets a manifest line with `missing` instead of `file`.

Errors are OSError; after one, close the directory and open it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

from cloud_sync.destinations import parquet
from cloud_sync.runtime.files import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cloud_sync.model.records import BatchRange

MANIFEST = "manifest.jsonl"
PARQUET = ".parquet"
SUFFIXES = (".lp", ".lp.gz", PARQUET)
_OPEN_SUFFIX = {PARQUET: ".batches"}

_INDEX = ".open.index"
_STEM_MAX_CHARS = 100

JsonObject = dict[str, Any]
IndexEntry = JsonObject
"""A batch in an index: first, last, rows, min_time_us, max_time_us, written_s, end (in bytes)."""


def file_stem(batch_range: BatchRange) -> str:
    """The part of a file name that identifies gateway, epoch and class."""
    gateway = quote(batch_range.gateway_id, safe=" ")
    if len(gateway) > _STEM_MAX_CHARS:
        digest = hashlib.sha256(gateway.encode()).hexdigest()[:8]
        gateway = f"{gateway[: _STEM_MAX_CHARS - 9]}~{digest}"
    return f"{gateway}-{batch_range.epoch.hex[:8]}-{batch_range.record_class.name.lower()}"


@dataclass
class OutputFile:
    """One open file with its index; both handles are unbuffered and stand at the end."""

    stem: Path
    suffix: str
    data: BinaryIO
    index: BinaryIO
    entries: list[IndexEntry]
    size: int

    def is_due(self, rotate_bytes: int, rotate_s: float, now_s: float) -> bool:
        """Whether the file is large or old enough for its final name."""
        if not self.entries:
            return False
        return self.size >= rotate_bytes or now_s - self.entries[0]["written_s"] >= rotate_s

    def close(self) -> None:
        """Close the file and its index."""
        self.data.close()
        self.index.close()


@dataclass
class OutputDirectory:
    """The directory as it is now, locked by this process.

    `covered`: by stem, the commit ranges that are durable here, inclusive, merged and sorted.
    """

    directory: Path
    lock: BinaryIO
    open_files: dict[str, OutputFile] = field(default_factory=dict)
    covered: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, *, create: bool) -> OutputDirectory:
        """Lock the directory, finish what a stop left half done, and read what is covered.

        BlockingIOError when another process writes here.
        """
        if create:
            directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / ".lock").open("ab", buffering=0)
        output_directory = cls(directory, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            output_directory._recover()
        except BaseException:
            output_directory.close()
            raise
        return output_directory

    def is_same_directory(self) -> bool:
        """Whether the directory is still the one that was opened: a stick may have been swapped."""
        try:
            return os.path.samestat((self.directory / ".lock").stat(), os.fstat(self.lock.fileno()))
        except OSError:
            return False

    def covers(self, batch_range: BatchRange) -> bool:
        """Whether all commits of the range are durable here."""
        first, last = batch_range.first_commit, batch_range.last_commit
        return any(
            low <= first and last <= high for low, high in self.covered.get(file_stem(batch_range), ())
        )

    def append(self, output_file: OutputFile, data: bytes, entry: IndexEntry) -> None:
        """Add one batch to an open file, durably. `entry` lacks only `end`."""
        _write_durably(output_file.data, data)
        output_file.size += len(data)
        entry = {**entry, "end": output_file.size}
        _write_durably(output_file.index, _encode_json_line(entry))
        output_file.entries.append(entry)
        self._add_covered(output_file.stem.name, entry["first"], entry["last"])

    def open_file(self, stem_name: str, suffix: str) -> OutputFile:
        """The open file of a stem, made when there is none."""
        if stem_name not in self.open_files:
            stem = self.directory / stem_name
            entries, _ = _read_index(_index_path(stem))
            data = _open_path(stem, suffix).open("ab", buffering=0)
            try:
                size = entries[-1]["end"] if entries else 0
                data.truncate(size)
                os.fsync(data.fileno())
                index = _rewrite_index(_index_path(stem), entries)
            except BaseException:
                data.close()
                raise
            self.open_files[stem_name] = OutputFile(stem, suffix, data, index, entries, size)
        return self.open_files[stem_name]

    def finish(self, output_file: OutputFile) -> None:
        """Give an open file its final name and enter it in the manifest."""
        if output_file.entries:
            first = min(entry["first"] for entry in output_file.entries)
            last = max(entry["last"] for entry in output_file.entries)
            final = self._free_name(f"{output_file.stem.name}-{first:08d}-{last:08d}", output_file.suffix)
            _write_durably(output_file.index, _encode_json_line({"final": final}))
            self._settle(output_file.stem, output_file.entries, final, listed=False)
        output_file.close()
        del self.open_files[output_file.stem.name]

    def finish_all(self) -> None:
        """Finish every open file."""
        for output_file in list(self.open_files.values()):
            self.finish(output_file)

    def close(self) -> None:
        """Close every file and unlock the directory."""
        for output_file in self.open_files.values():
            output_file.close()
        self.lock.close()

    def _recover(self) -> None:
        listed = set()
        for line in read_json_lines(self.directory / MANIFEST):
            if "file" in line:
                listed.add(line["file"])
                for first, last in line["ranges"]:
                    self._add_covered(line["stem"], first, last)
        for index in sorted(self.directory.glob(f"*{_INDEX}")):
            stem = index.with_name(index.name.removesuffix(_INDEX))
            entries, final = _read_index(index)
            if final is not None:
                self._settle(stem, entries, final, listed=final in listed)
            elif entries:
                self._reopen(stem, entries)
            else:
                for suffix in SUFFIXES:
                    _open_path(stem, suffix).unlink(missing_ok=True)
                index.unlink()

    def _reopen(self, stem: Path, entries: list[IndexEntry]) -> None:
        """Open what a stop left open; declare missing what is in its index and not in its data."""
        sizes = {s: path.stat().st_size for s in SUFFIXES if (path := _open_path(stem, s)).exists()}
        suffix = max(sizes, key=sizes.__getitem__, default=SUFFIXES[0])
        size = sizes.get(suffix, 0)
        present = [entry for entry in entries if entry["end"] <= size]
        if len(present) < len(entries):
            self._declare_missing(stem, entries[len(present) :])
            _rewrite_index(_index_path(stem), present).close()
        for entry in present:
            self._add_covered(stem.name, entry["first"], entry["last"])
        if present:
            self.open_file(stem.name, suffix)

    def _settle(self, stem: Path, entries: list[IndexEntry], final: str, *, listed: bool) -> None:
        """Finish a file from wherever a stop left it: the final name, the manifest line, no index."""
        path = self.directory / final
        suffix = next(s for s in reversed(SUFFIXES) if final.endswith(s))
        current = _open_path(stem, suffix)
        if current.exists() and not path.exists():
            if suffix == PARQUET:
                entries = self._convert(stem, current, entries, path)
            else:
                current.rename(path)
            fsync_folder(self.directory)
        if not listed:
            if path.exists():
                self._append_to_manifest(_manifest_entry(stem.name, path, entries))
            elif entries:
                self._declare_missing(stem, entries)
        for entry in entries:
            self._add_covered(stem.name, entry["first"], entry["last"])
        current.unlink(missing_ok=True)
        _index_path(stem).unlink()

    def _convert(self, stem: Path, current: Path, entries: list[IndexEntry], path: Path) -> list[IndexEntry]:
        """Make the Parquet file of an open one; the batches that are in it, the others declared missing."""
        readable = parquet.convert(current, [entry["end"] for entry in entries], path)
        lost = [entry for entry, good in zip(entries, readable, strict=True) if not good]
        if lost:
            self._declare_missing(stem, lost)
        return [entry for entry, good in zip(entries, readable, strict=True) if good]

    def _declare_missing(self, stem: Path, entries: list[IndexEntry]) -> None:
        self._append_to_manifest({"missing": f"{stem.name}.open", "stem": stem.name, **_summarize(entries)})

    def _append_to_manifest(self, line: JsonObject) -> None:
        with (self.directory / MANIFEST).open("a+b", buffering=0) as manifest:
            if manifest.tell() > 0:
                manifest.seek(-1, os.SEEK_END)
            torn = manifest.read(1) not in (b"", b"\n")
            _write_durably(manifest, b"\n" * torn + _encode_json_line(line))
        fsync_folder(self.directory)

    def _add_covered(self, stem_name: str, first: int, last: int) -> None:
        self.covered[stem_name] = merge_span(self.covered.get(stem_name, []), first, last)

    def _free_name(self, base: str, suffix: str) -> str:
        name, number = f"{base}{suffix}", 1
        while (self.directory / name).exists():
            number += 1
            name = f"{base}-{number}{suffix}"
        return name


def merge_span(spans: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    """Sorted disjoint inclusive spans with one more merged in. Pure."""
    before = [span for span in spans if span[1] < first - 1]
    after = [span for span in spans if span[0] > last + 1]
    touching = [span for span in spans if first - 1 <= span[1] and span[0] <= last + 1]
    low = min([first, *(span[0] for span in touching)])
    high = max([last, *(span[1] for span in touching)])
    return [*before, (low, high), *after]


def _summarize(entries: list[IndexEntry]) -> JsonObject:
    spans: list[tuple[int, int]] = []
    for entry in entries:
        spans = merge_span(spans, entry["first"], entry["last"])
    return {
        "ranges": spans,
        "rows": sum(entry["rows"] for entry in entries),
        "min_time_us": min(entry["min_time_us"] for entry in entries),
        "max_time_us": max(entry["max_time_us"] for entry in entries),
    }


def _manifest_entry(stem_name: str, path: Path, entries: list[IndexEntry]) -> JsonObject:
    with path.open("rb") as data:
        digest = hashlib.file_digest(data, "sha256").hexdigest()
    return {
        "file": path.name,
        "stem": stem_name,
        **_summarize(entries),
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


def _open_path(stem: Path, suffix: str) -> Path:
    return stem.with_name(f"{stem.name}.open{_OPEN_SUFFIX.get(suffix, suffix)}")


def _index_path(stem: Path) -> Path:
    return stem.with_name(stem.name + _INDEX)


def _read_index(path: Path) -> tuple[list[IndexEntry], str | None]:
    """The batches an index holds, and the final name when it is already decided."""
    entries: list[IndexEntry] = []
    for line in read_json_lines(path):
        if "final" in line:
            return entries, line["final"]
        entries.append(line)
    return entries, None


def _rewrite_index(path: Path, entries: list[IndexEntry]) -> BinaryIO:
    """The index with exactly these entries, durable, open for more.

    Even an unchanged one: after a failed fsync pages may read well and never reach the disk.
    """
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb", buffering=0) as index:
        _write_durably(index, b"".join(map(_encode_json_line, entries)))
    fresh.rename(path)
    fsync_folder(path.parent)
    return path.open("ab", buffering=0)


def read_json_lines(path: Path) -> Iterator[JsonObject]:
    """The whole lines of a file that hold a JSON object; a torn last line is no line."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return
    for line in text.split(b"\n")[:-1]:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _encode_json_line(value: JsonObject) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _write_durably(target: BinaryIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]
    os.fsync(target.fileno())
