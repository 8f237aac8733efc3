"""A wall clock that can be stepped for one process: a shared object that adds an offset to CLOCK_REALTIME.

It is preloaded into the process and reads the offset, nanoseconds as int64, from a mapped file, so that a
step takes effect at once. It needs a C compiler; without one there are no steps.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static int (*real_clock)(clockid_t, struct timespec *);
static volatile int64_t *offset_ns;

__attribute__((constructor)) static void begin(void) {
    real_clock = dlsym(RTLD_NEXT, "clock_gettime");
    const char *path = getenv("SOAK_CLOCK_FILE");
    int fd = path ? open(path, O_RDONLY) : -1;
    if (fd >= 0) {
        void *page = mmap(0, 8, PROT_READ, MAP_SHARED, fd, 0);
        if (page != MAP_FAILED) offset_ns = page;
    }
}

int clock_gettime(clockid_t clock, struct timespec *at) {
    if (!real_clock) begin();
    int result = real_clock(clock, at);
    if (!result && offset_ns && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t ns = (int64_t)at->tv_sec * 1000000000 + at->tv_nsec + *offset_ns;
        at->tv_sec = ns / 1000000000;
        at->tv_nsec = ns % 1000000000;
    }
    return result;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


class SteppedClock:
    """The offset of one process's wall clock, and the environment that gives it to it."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self._file.write_bytes(bytes(8))
        self._library = folder / "clock.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        self.available = False
        if compiler is not None:
            source = folder / "clock.c"
            source.write_text(_SOURCE)
            command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(self._library), str(source), "-ldl"]
            self.available = subprocess.run(command, capture_output=True, check=False).returncode == 0

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment; empty without a compiler."""
        if not self.available:
            return {}
        return {"LD_PRELOAD": str(self._library), "SOAK_CLOCK_FILE": str(self._file)}

    def step(self, offset_s: float) -> None:
        """Set the clock so many seconds off the true time."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("<q", int(offset_s * 1e9)))
