"""A finished run of the truth record, packed: columns in blocks of a million readings, about a tenth of the
bytes.

Form of RUN.produced.pack: for each block rows u32, then for each field of `PRODUCED` in order: bytes u32 and
a standalone pcodec file of its values. Acknowledgements are merged where one follows the other with the same
reason.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from pcodec import ChunkConfig, standalone

from firmware_sim.errors import SimError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

BLOCK_ROWS = 1_000_000
_U32 = struct.Struct("<I")
_CONFIG = ChunkConfig(compression_level=4)


def pack_records(source: Path, target: Path, dtype: np.dtype[Any]) -> None:
    """Write the records of `source` packed to `target`, durably, and remove `source`."""
    rows = source.stat().st_size // dtype.itemsize
    beside = target.with_suffix(".packing")
    with beside.open("wb") as out:
        for first in range(0, rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows - first)
            block = np.fromfile(source, dtype, count, offset=first * dtype.itemsize)
            out.write(_U32.pack(count))
            for name in dtype.names or ():
                packed = standalone.simple_compress(block[name].copy(), _CONFIG)
                out.write(_U32.pack(len(packed)) + packed)
        out.flush()
        os.fsync(out.fileno())
    beside.replace(target)
    source.unlink()


def unpack_records(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The records of a packed file.

    Raises:
        SimError: it is cut short or damaged.
    """
    parts = []
    with path.open("rb") as file:
        while head := file.read(_U32.size):
            try:
                block = np.empty(_U32.unpack(head)[0], dtype)
                for name in dtype.names or ():
                    packed = file.read(_U32.unpack(file.read(_U32.size))[0])
                    block[name] = standalone.simple_decompress(packed)
            except (struct.error, ValueError, RuntimeError, TypeError) as fault:
                raise SimError(f"{path}: it is cut short or damaged: {fault}") from fault
            parts.append(block)
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def merge_acks(acks: NDArray[Any]) -> NDArray[Any]:
    """Acknowledgements in the order of their readings, those that follow each other as one; the last time
    stays.
    """
    if not len(acks):
        return acks
    ordered = acks[np.argsort(acks["first_row"], kind="stable")]
    ends = ordered["first_row"] + ordered["rows"]
    follows = (ordered["first_row"][1:] == ends[:-1]) & (
        ordered["reason_code"][1:] == ordered["reason_code"][:-1]
    )
    starts = np.flatnonzero(np.concatenate(([True], ~follows)))
    lasts = np.append(starts[1:], len(ordered)) - 1
    merged = ordered[starts]
    merged["rows"] = ends[lasts] - merged["first_row"]
    merged["at_us"] = np.maximum.reduceat(ordered["at_us"], starts)
    return merged
