"""The open file of a destination that writes Parquet: wire batches one after the other. Blocking.

Parquet has its index at the end and cannot be appended to durably. So batches are kept as they are until the
file is due; then they become one Parquet file, written under another name, fsynced and renamed.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

from cloud_sync import parquet, wire
from cloud_sync.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from cloud_sync.records import Batch

_HEAD = struct.Struct("<8xII")
_CRC_BYTES = 4


def convert(source: Path, ends: Sequence[int], target: Path) -> list[bool]:
    """Write the batches of `source` as the Parquet file `target`; which of them could be read.

    Args:
        source: the open file.
        ends: where each batch ends in it, bytes.
        target: does not exist yet; is whole and durable on return, and is not there when none could be read.

    Raises:
        OSError: it cannot be written; nothing has changed.
    """
    readable: list[bool] = []

    def batches() -> Iterator[Batch]:
        start = 0
        with source.open("rb") as file:
            for end in ends:
                try:
                    batch = wire.decode(file.read(end - start))
                except FormatError:
                    readable.append(False)
                else:
                    readable.append(True)
                    yield batch
                start = end

    draft = target.with_name(target.name + ".new")
    parquet.write(draft, batches())
    if not any(readable):
        draft.unlink()
        return readable
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.rename(target)
    return readable


def batches_of(path: Path) -> Iterator[Batch]:
    """The whole batches of an open file that was taken away; it may end in one that is cut short."""
    with path.open("rb") as file:
        while True:
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            body = file.read(sum(_HEAD.unpack(head)) + _CRC_BYTES)
            try:
                yield wire.decode(head + body)
            except FormatError:
                return
