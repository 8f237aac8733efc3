"""The C heap of the agent: one for all threads, and what is free of it goes back to the system.

Columns come and go by the megabyte. What the C library keeps of them for the next ones would come to tens of
megabytes (mallopt(3)): so large ones are mapped and unmapped each by itself, and free pages between smaller
ones are given back every few seconds (malloc_trim(3)). With a C library other than glibc nothing is done.
"""

from __future__ import annotations

import asyncio
import ctypes
from contextlib import suppress
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_MAPPED_FROM_BYTES: Final = 512 << 10
_KEPT_BYTES: Final = 4 << 20
_SPARE_BYTES: Final = 8 << 20


class _Account(ctypes.Structure):
    """`struct mallinfo2`, glibc 2.33."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def share_one() -> None:
    """Have all threads share one heap, which keeps little: at no cost of speed that was seen."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


async def keep_small(stop: asyncio.Event, every_s: float = 2.0) -> None:
    """Give free pages back to the system until `stop` is set, whenever there are many."""
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Account
        while not stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await stop.wait()
            if library.mallinfo2().fordblks > _SPARE_BYTES:
                await asyncio.get_running_loop().run_in_executor(None, library.malloc_trim, 0)
