"""Line protocol or Parquet files in a directory: for sites whose data leaves on a USB stick.

A batch becomes one gzip member (or plain lines) that is appended to the open file of its gateway, spool
epoch and class; `file_volumes` says which files there are and what a power cut leaves of them. A batch
whose commits the directory already holds is not written again. For Parquet the open file holds the batches as
they are, and becomes Parquet when it gets its final name (`kept_batches`).

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
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cloud_sync import line_protocol, parquet, wire
from cloud_sync.destinations import Parcel
from cloud_sync.destinations.file_volumes import PARQUET, Shelf, stem_of
from cloud_sync.errors import RetryLater
from cloud_sync.records import Receipt

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud_sync.records import Batch

_GZIP_LEVEL = 6
_GZIP_WINDOW = 31  # zlib: the largest window, in a gzip member without a time
_LINES_AT_ONCE = 2_000
_WHOLE = 1 << 40
_HINTS = {
    errno.ENOSPC: "make room or take files away",
    errno.EDQUOT: "make room or take files away",
    errno.EROFS: "the file system is read-only; is the stick damaged or write-protected?",
    errno.EACCES: "let the gateway's user write there",
    errno.EPERM: "let the gateway's user write there",
    errno.ENOENT: "plug in the stick, or create the directory",
    errno.EIO: "the disk or stick may be failing",
}


class FileDestination:
    """A directory that batches are written to, whole and once each."""

    def __init__(
        self,
        name: str,
        directory: str | Path,
        *,
        form: Literal["line_protocol", "parquet"] = "line_protocol",
        compress: bool = True,
        create: bool = True,
        rotate_bytes: int = 64 << 20,
        rotate_s: float = 3600.0,
        min_free_bytes: int = 64 << 20,
        tags: Sequence[str] = line_protocol.DEFAULT_TAGS,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Nothing is opened before the first batch.

        Args:
            name: of this destination, for messages.
            directory: where the files go.
            form: what the files hold.
            compress: gzip, or plain text; Parquet is always compressed.
            create: make the directory when it is not there; otherwise wait for it.
            rotate_bytes: a file of this size gets its final name.
            rotate_s: so does one whose first batch is this old, when the next batch comes.
            min_free_bytes: room left on the file system for others; below it batches wait.
            tags: attributes of a series to write as tags.
            wall_clock: seconds since 1970, for the age of a file.

        Raises:
            ValueError: an argument that cannot work, with its name.
        """
        if form not in ("line_protocol", "parquet"):
            raise ValueError(f"form: {form!r}; expected line_protocol or parquet")
        if form == "parquet" and not parquet.is_available():
            raise ValueError("form: parquet needs pyarrow; install tidegate[parquet]")
        self.name = name
        self._directory = Path(directory)
        self._suffix = PARQUET if form == "parquet" else ".lp.gz" if compress else ".lp"
        self._create = create
        self._rotate_bytes = rotate_bytes
        self._rotate_s = rotate_s
        self._min_free_bytes = min_free_bytes
        self._tags = line_protocol.check_tags(tags)
        self._wall_clock = wall_clock
        self._shelf: Shelf | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"files-{name}")
        self._closed = False

    def encode(self, batch: Batch) -> Parcel:
        """Two bodies: what is appended to the file, and the batch's entry for the index. Pure."""
        data = wire.encode(batch) if self._suffix == PARQUET else self._as_lines(batch)
        entry = {
            "first": batch.range.first_commit,
            "last": batch.range.last_commit,
            "rows": batch.rows,
            "min_time_us": int(batch.readings.time_us.min()),
            "max_time_us": int(batch.readings.time_us.max()),
        }
        return Parcel(batch.range, batch.rows, (data, json.dumps(entry).encode()))

    def _as_lines(self, batch: Batch) -> bytes:
        lines = line_protocol.each_line(batch, tags=self._tags)
        texts = line_protocol.bodies(lines, max_lines=_LINES_AT_ONCE, max_bytes=_WHOLE)
        if not self._suffix.endswith(".gz"):
            return b"".join(texts)
        gzipped = zlib.compressobj(_GZIP_LEVEL, wbits=_GZIP_WINDOW)
        return b"".join((*map(gzipped.compress, texts), gzipped.flush()))

    async def send(self, parcel: Parcel) -> Receipt:
        """Append one batch and make it durable.

        Raises:
            RetryLater: no room, no permission, or no directory; nothing of the batch counts.
        """
        if self._closed:
            raise RetryLater(f"{self.name}: closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, self._write, parcel)

    async def rotate(self) -> None:
        """Give every open file its final name now, for a person about to take the files away.

        Raises:
            RetryLater: as `send`.
        """
        if self._closed:
            raise RetryLater(f"{self.name}: closed")
        await asyncio.get_running_loop().run_in_executor(self._writer, self._rotate)

    async def aclose(self) -> None:
        """Close the files; open ones go on at the next start. May be called again."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._writer, self._drop_shelf)
            self._writer.shutdown()

    def _write(self, parcel: Parcel) -> Receipt:
        try:
            before = self._write_once(parcel)
        except OSError as fault:
            raise self._held_up(fault) from fault
        return Receipt(rows=parcel.rows, stored=parcel.rows, applied_before=before)

    def _write_once(self, parcel: Parcel) -> bool:
        """Append unless the directory holds the range already; whether it did."""
        shelf = self._take_shelf()
        if shelf.holds(parcel.range):
            return True
        data, entry = parcel.bodies
        free = shutil.disk_usage(self._directory).free
        if free - len(data) < self._min_free_bytes:
            raise OSError(errno.ENOSPC, f"{free} bytes free, {self._min_free_bytes} of them kept for others")
        now_s = self._wall_clock()
        volume = shelf.volume(stem_of(parcel.range), self._suffix)
        if volume.suffix != self._suffix or volume.is_due(self._rotate_bytes, self._rotate_s, now_s):
            shelf.finish(volume)
            volume = shelf.volume(stem_of(parcel.range), self._suffix)
        shelf.append(volume, data, {**json.loads(entry), "written_s": now_s})
        if volume.is_due(self._rotate_bytes, self._rotate_s, now_s):
            shelf.finish(volume)
        return False

    def _rotate(self) -> None:
        try:
            shelf = self._take_shelf()
            for volume in list(shelf.volumes.values()):
                shelf.finish(volume)
        except OSError as fault:
            raise self._held_up(fault) from fault

    def _take_shelf(self) -> Shelf:
        if self._shelf is None or not self._shelf.is_in_place():
            self._drop_shelf()
            self._shelf = Shelf.open(self._directory, create=self._create)
        return self._shelf

    def _drop_shelf(self) -> None:
        """Forget what is open: after a fault, memory and disk may differ, and the next batch looks anew."""
        shelf, self._shelf = self._shelf, None
        if shelf is not None:
            shelf.close()

    def _held_up(self, fault: OSError) -> RetryLater:
        self._drop_shelf()
        if isinstance(fault, BlockingIOError):
            return RetryLater(
                f"{self.name}: {self._directory} is in use by another process that writes there"
            )
        hint = _HINTS.get(fault.errno or 0)
        words = f"{self.name}: cannot write to {self._directory}: {fault}"
        return RetryLater(f"{words}; {hint}" if hint else words)
