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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from cloud_sync.codec import line_protocol, wire
from cloud_sync.destinations import EncodedBatch, parquet
from cloud_sync.destinations.output_files import PARQUET, OutputDirectory, OutputFile, file_stem
from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.records import Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud_sync.model.records import Batch

T = TypeVar("T")

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
    """How files are written; without `create` a directory that is not there is waited for.

    A file gets its final name when it has `rotate_bytes`, or with the first batch after `rotate_s`. While
    less than `min_free_bytes` is free, batches wait. `tags` are attributes to write as tags.
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

    ValueError for an option that cannot work, with its name.
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
        """Append one batch and make it durable; of a RetryLaterError nothing counts."""
        before = await self._run(partial(self._append, encoded_batch))
        return Receipt(rows=encoded_batch.rows, stored=encoded_batch.rows, applied_before=before)

    async def rotate(self) -> None:
        """Give every open file its final name now, for a person about to take the files away."""
        await self._run(OutputDirectory.finish_all)

    async def aclose(self) -> None:
        """Close the files; open ones go on at the next start. May be called again."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._writer, self._close_output)
            self._writer.shutdown()

    async def _run(self, work: Callable[[OutputDirectory], T]) -> T:
        if self._closed:
            raise RetryLaterError(f"{self.name}: closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._work_on_output, work)

    def _work_on_output(self, work: Callable[[OutputDirectory], T]) -> T:
        try:
            if self._output_directory is None or not self._output_directory.is_same_directory():
                self._close_output()
                self._output_directory = OutputDirectory.open(self._directory, create=self._options.create)
            return work(self._output_directory)
        except OSError as fault:
            self._close_output()
            if isinstance(fault, BlockingIOError):
                message = f"{self.name}: {self._directory} is in use by another process that writes there"
                raise RetryLaterError(message) from fault
            hint = _HINTS.get(fault.errno or 0)
            message = f"{self.name}: cannot write to {self._directory}: {fault}"
            raise RetryLaterError(f"{message}; {hint}" if hint else message) from fault

    def _append(self, encoded_batch: EncodedBatch, output_directory: OutputDirectory) -> bool:
        """Append unless the directory covers the range already; returns whether it did."""
        if output_directory.covers(encoded_batch.range):
            return True
        data, entry = encoded_batch.bodies
        free, now_s, options = shutil.disk_usage(self._directory).free, self._wall_clock(), self._options
        if free - len(data) < options.min_free_bytes:
            raise OSError(errno.ENOSPC, f"{free} bytes free, {options.min_free_bytes} of them kept free")
        is_due = partial(
            OutputFile.is_due, rotate_bytes=options.rotate_bytes, rotate_s=options.rotate_s, now_s=now_s
        )
        output_file = output_directory.open_file(file_stem(encoded_batch.range), self._suffix)
        if output_file.suffix != self._suffix or is_due(output_file):
            output_directory.finish(output_file)
            output_file = output_directory.open_file(file_stem(encoded_batch.range), self._suffix)
        output_directory.append(output_file, data, {**json.loads(entry), "written_s": now_s})
        if is_due(output_file):
            output_directory.finish(output_file)
        return False

    def _close_output(self) -> None:
        """After an error, memory and disk may differ: the next batch opens the directory again."""
        output_directory, self._output_directory = self._output_directory, None
        if output_directory is not None:
            output_directory.close()
