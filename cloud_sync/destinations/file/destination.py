"""Line protocol or Parquet files in a directory: for sites whose data leaves on a USB stick.

A batch becomes one gzip member (or plain lines) that is appended to the open file of its gateway, spool
epoch and class (`output_files`). A batch whose commits the directory already holds is not written again. For
Parquet the open file holds wire batches, and becomes Parquet when it gets its final name.

Timestamps of line protocol are in nanoseconds, what every reader of it assumes.
"""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cloud_sync.codec import line_protocol, wire
from cloud_sync.destinations import EncodedBatch
from cloud_sync.destinations.file import parquet
from cloud_sync.destinations.file.output_files import PARQUET, OutputDirectory, file_stem
from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.records import Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud_sync.model.records import Batch

_GZIP_LEVEL = 6
_GZIP_WINDOW = 31  # zlib: the largest window, in a gzip member without a time
_LINES_PER_CHUNK = 2_000
_NO_LIMIT = 1 << 40
_HINTS = {
    errno.ENOSPC: "make room or take files away",
    errno.EDQUOT: "make room or take files away",
    errno.EROFS: "the file system is read-only; is the stick damaged or write-protected?",
    errno.EACCES: "let the gateway's user write there",
    errno.EPERM: "let the gateway's user write there",
    errno.ENOENT: "plug in the stick, or create the directory",
    errno.EIO: "the disk or stick may be failing",
}


@dataclass(frozen=True, slots=True)
class FileOptions:
    """How files are written.

    Attributes:
        compress: gzip, or plain text; Parquet is always compressed.
        create: create the directory; otherwise wait until it exists.
        rotate_bytes: a file of this size gets its final name.
        rotate_s: so does one whose first batch is this old, when the next batch comes.
        min_free_bytes: room left on the file system for others; below it batches wait.
        tags: attributes of a series to write as tags.
    """

    form: Literal["line_protocol", "parquet"] = "line_protocol"
    compress: bool = True
    create: bool = True
    rotate_bytes: int = 64 << 20
    rotate_s: float = 3600.0
    min_free_bytes: int = 64 << 20
    tags: Sequence[str] = line_protocol.DEFAULT_TAGS


class FileDestination:
    """A directory that batches are written to, whole and once each; opened with the first batch.

    Raises:
        ValueError: an option that cannot work, with its name.
    """

    def __init__(
        self,
        name: str,
        directory: str | Path,
        options: FileOptions = FileOptions(),
        *,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if options.form not in ("line_protocol", "parquet"):
            raise ValueError(f"form: {options.form!r}; expected line_protocol or parquet")
        if options.form == "parquet" and not parquet.is_available():
            raise ValueError("form: parquet needs pyarrow; install tidegate[parquet]")
        self.name = name
        self._directory = Path(directory)
        self._suffix = PARQUET if options.form == "parquet" else ".lp.gz" if options.compress else ".lp"
        self._options = options
        self._tags = line_protocol.validate_tags(options.tags)
        self._wall_clock = wall_clock
        self._output_directory: OutputDirectory | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"files-{name}")
        self._closed = False

    def encode(self, batch: Batch) -> EncodedBatch:
        """Two bodies: what is appended to the file, and the batch's index entry. Pure."""
        data = wire.encode(batch) if self._suffix == PARQUET else self._as_lines(batch)
        entry = {
            "first": batch.range.first_commit,
            "last": batch.range.last_commit,
            "rows": batch.rows,
            "min_time_us": int(batch.readings.time_us.min()),
            "max_time_us": int(batch.readings.time_us.max()),
        }
        return EncodedBatch(batch.range, batch.rows, (data, json.dumps(entry).encode()))

    def _as_lines(self, batch: Batch) -> bytes:
        lines = line_protocol.iter_lines(batch, tags=self._tags)
        texts = line_protocol.split_into_bodies(lines, max_lines=_LINES_PER_CHUNK, max_bytes=_NO_LIMIT)
        if not self._suffix.endswith(".gz"):
            return b"".join(texts)
        gzipped = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW)
        return b"".join((*map(gzipped.compress, texts), gzipped.flush()))

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        """Append one batch and make it durable.

        Raises:
            RetryLaterError: no room, no permission, or no directory; nothing of the batch counts.
        """
        if self._closed:
            raise RetryLaterError(f"{self.name}: closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._write, encoded_batch)

    async def rotate(self) -> None:
        """Give every open file its final name now, for a person about to take the files away."""
        if self._closed:
            raise RetryLaterError(f"{self.name}: closed")
        await asyncio.get_running_loop().run_in_executor(self._writer, self._rotate)

    async def aclose(self) -> None:
        """Close the files; open ones go on at the next start. May be called again."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._writer, self._close_output)
            self._writer.shutdown()

    def _write(self, encoded_batch: EncodedBatch) -> Receipt:
        try:
            before = self._write_once(encoded_batch)
        except OSError as fault:
            raise self._retry_error(fault) from fault
        return Receipt(rows=encoded_batch.rows, stored=encoded_batch.rows, applied_before=before)

    def _write_once(self, encoded_batch: EncodedBatch) -> bool:
        """Append unless the directory covers the range already; returns whether it did."""
        output_directory = self._open_output()
        if output_directory.covers(encoded_batch.range):
            return True
        data, entry = encoded_batch.bodies
        free = shutil.disk_usage(self._directory).free
        if free - len(data) < self._options.min_free_bytes:
            raise OSError(
                errno.ENOSPC, f"{free} bytes free, {self._options.min_free_bytes} of them kept for others"
            )
        now_s, options = self._wall_clock(), self._options
        output_file = output_directory.open_file(file_stem(encoded_batch.range), self._suffix)
        if output_file.suffix != self._suffix or output_file.is_due(
            options.rotate_bytes, options.rotate_s, now_s
        ):
            output_directory.finish(output_file)
            output_file = output_directory.open_file(file_stem(encoded_batch.range), self._suffix)
        output_directory.append(output_file, data, {**json.loads(entry), "written_s": now_s})
        if output_file.is_due(options.rotate_bytes, options.rotate_s, now_s):
            output_directory.finish(output_file)
        return False

    def _rotate(self) -> None:
        try:
            output_directory = self._open_output()
            for output_file in list(output_directory.open_files.values()):
                output_directory.finish(output_file)
        except OSError as fault:
            raise self._retry_error(fault) from fault

    def _open_output(self) -> OutputDirectory:
        if self._output_directory is None or not self._output_directory.is_same_directory():
            self._close_output()
            self._output_directory = OutputDirectory.open(self._directory, create=self._options.create)
        return self._output_directory

    def _close_output(self) -> None:
        """After an error, memory and disk may differ: the next batch opens the directory again."""
        output_directory, self._output_directory = self._output_directory, None
        if output_directory is not None:
            output_directory.close()

    def _retry_error(self, fault: OSError) -> RetryLaterError:
        self._close_output()
        if isinstance(fault, BlockingIOError):
            return RetryLaterError(
                f"{self.name}: {self._directory} is in use by another process that writes there"
            )
        hint = _HINTS.get(fault.errno or 0)
        words = f"{self.name}: cannot write to {self._directory}: {fault}"
        return RetryLaterError(f"{words}; {hint}" if hint else words)
