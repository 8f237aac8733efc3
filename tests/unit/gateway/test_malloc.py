"""The C heap gives back what is free of it; tested in a process of its own, for the heap is the process's."""

from __future__ import annotations

import subprocess
import sys

HOLES = """
import asyncio, ctypes
from gateway import malloc

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = (ctypes.c_void_p,)

def resident_mb():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * 4096 / 1e6

async def main():
    malloc.use_one_arena()
    blocks = [library.malloc(100_000) for _ in range(600)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:  # the last one keeps the heap's end where it is
        library.free(block)
    full = resident_mb()
    stop = asyncio.Event()
    keeping = asyncio.create_task(malloc.trim_periodically(stop, every_s=0.01))
    for _ in range(500):
        await asyncio.sleep(0.01)
        if resident_mb() < full - 50:
            break
    stop.set()
    await keeping
    print(full - resident_mb())

asyncio.run(main())
"""


def test_free_pages_between_others_go_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], check=True, capture_output=True, timeout=60)
    assert float(done.stdout) > 50
