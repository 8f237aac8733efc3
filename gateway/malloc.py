"""glibc malloc settings of the agent: one arena, large blocks mapped, free pages returned.

Column arrays come and go by the megabyte; without this the allocator would keep tens of megabytes of them.
With a C library other than glibc nothing is done.
"""

from __future__ import annotations

import asyncio
import ctypes
from contextlib import suppress
from typing import Final

from cloud_sync.runtime.waits import sleep_or_stop

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_MMAP_THRESHOLD_BYTES: Final = 512 << 10
_TRIM_THRESHOLD_BYTES: Final = 4 << 20
_MAX_FREE_BYTES: Final = 8 << 20
_FREE_BYTES: Final = 8


class _MallInfo2(ctypes.Structure):
    """`struct mallinfo2`, glibc 2.33: ten sizes; the one at `_FREE_BYTES` is `fordblks`."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def use_one_arena() -> None:
    """Let all threads share one arena that keeps little; no cost of speed was measured."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)


async def trim_periodically(stop: asyncio.Event, every_s: float = 2.0) -> None:
    """Return free pages to the system, when there are many, until `stop` is set."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _MallInfo2
        while not stop.is_set():
            await sleep_or_stop(stop, every_s)
            if library.mallinfo2().sizes[_FREE_BYTES] > _MAX_FREE_BYTES:
                await asyncio.get_running_loop().run_in_executor(None, library.malloc_trim, 0)
