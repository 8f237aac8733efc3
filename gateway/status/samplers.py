"""Samples taken while the gateway runs: rates and backlogs of the last hour, bytes written to flash in the
last day.

Written bytes are the kernel's counters: `write_bytes` of /proc/self/io for this process, and the sectors
of /sys/dev/block/.../stat for the whole disk that holds the spool. Amplification inside the flash
controller is not visible.
"""

from __future__ import annotations

import os
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gateway.status.document import FlashWearStatus, RateHistoryStatus

RATE_SAMPLE_INTERVAL_S = 20.0
_RATE_SAMPLES_MAX = 181


class RateHistory:
    """Keeps the samples. `now_us` is microseconds since 1970, `now_s` monotonic seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[str, int]]] = deque(maxlen=_RATE_SAMPLES_MAX)
        self._until_us = 0
        self._at_s = float("-inf")

    def is_due(self, now_s: float) -> bool:
        """Whether it is time for the next sample."""
        return now_s - self._at_s >= RATE_SAMPLE_INTERVAL_S

    def add(self, readings_per_s: float, backlog: dict[str, int], *, now_us: int, now_s: float) -> None:
        """After a pause (the machine slept) the samples begin anew."""
        if now_s - self._at_s > 3 * RATE_SAMPLE_INTERVAL_S:
            self._samples.clear()
        self._samples.append((readings_per_s, backlog))
        self._until_us, self._at_s = now_us, now_s

    def status(self) -> RateHistoryStatus:
        """The samples as they are now."""
        names = {name: None for _, backlog in self._samples for name in backlog}
        return RateHistoryStatus(
            step_s=RATE_SAMPLE_INTERVAL_S,
            until_us=self._until_us,
            readings_per_s=[round(rate, 2) for rate, _ in self._samples],
            backlog={name: [backlog.get(name) for _, backlog in self._samples] for name in names},
        )


_SECTOR_BYTES = 512  # of the stat file, whatever the disk's own are (Documentation/block/stat.rst)
_SECTORS_WRITTEN = 6
_DAY_S = 86_400.0
_WEAR_SAMPLE_INTERVAL_S = 60.0
_WEAR_SAMPLES_MAX = round(_DAY_S / _WEAR_SAMPLE_INTERVAL_S) + 1
_MIN_OBSERVED_S = 10.0


class WriteCounters(NamedTuple):
    """Cumulative counts at one moment of the monotonic clock."""

    at_s: float
    process_bytes: int | None
    disk_bytes: int | None
    encoded: int


class FlashWear:
    """Keeps a sample a minute for a day."""

    def __init__(self, folder: Path, endurance_tb: float | None) -> None:
        self._disk = find_disk(folder)
        self._endurance_bytes = None if endurance_tb is None else endurance_tb * 1e12
        self._samples: deque[WriteCounters] = deque(maxlen=_WEAR_SAMPLES_MAX)

    def read(self, encoded_bytes: int, now_s: float) -> WriteCounters:
        """The counters as of now; `encoded_bytes` of readings were appended since start."""
        disk_bytes = None
        if self._disk is not None:
            with suppress(OSError, IndexError, ValueError):
                sectors = (self._disk / "stat").read_text(encoding="ascii").split()[_SECTORS_WRITTEN]
                disk_bytes = int(sectors) * _SECTOR_BYTES
        return WriteCounters(now_s, read_process_written_bytes(), disk_bytes, encoded_bytes)

    def add(self, written: WriteCounters) -> None:
        """Keep a sample, unless the last is less than a minute old."""
        if not self._samples or written.at_s - self._samples[-1].at_s >= _WEAR_SAMPLE_INTERVAL_S:
            self._samples.append(written)

    def status(self, now: WriteCounters) -> FlashWearStatus:
        """What was written between the oldest sample and now."""
        then = self._samples[0] if self._samples else now
        name = None if self._disk is None else self._disk.name
        return compute_flash_wear(then, now, disk=name, endurance_bytes=self._endurance_bytes)


def compute_flash_wear(
    then: WriteCounters, now: WriteCounters, *, disk: str | None = None, endurance_bytes: float | None = None
) -> FlashWearStatus:
    """The difference of two samples, scaled to a day; None where the time between them is too short."""
    observed_s = now.at_s - then.at_s
    process, machine = (
        None if before is None or after is None else max(0, after - before)
        for before, after in ((then.process_bytes, now.process_bytes), (then.disk_bytes, now.disk_bytes))
    )
    encoded = now.encoded - then.encoded
    enough = observed_s >= _MIN_OBSERVED_S
    per_day = [n * _DAY_S / observed_s if n is not None and enough else None for n in (process, machine)]
    wearing = next((rate for rate in reversed(per_day) if rate is not None), None)
    return FlashWearStatus(
        disk=disk,
        observed_s=observed_s,
        written_bytes_per_day=per_day[0],
        disk_written_bytes_per_day=per_day[1],
        amplification=process / encoded if process is not None and encoded > 0 and enough else None,
        endurance_bytes=endurance_bytes,
        years_left=endurance_bytes / (wearing * 365.25) if endurance_bytes is not None and wearing else None,
        written_bytes=now.process_bytes,
        disk_written_bytes=now.disk_bytes,
    )


def read_process_written_bytes() -> int | None:
    """Bytes this process has caused to be written to a disk. Source: proc_pid_io(5)."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)


def find_disk(folder: Path, system: Path = Path("/sys/dev/block")) -> Path | None:
    """The /sys folder of the whole disk that a folder is on; None for memory, network and layered ones."""
    try:
        device = folder.stat().st_dev
    except OSError:
        return None
    return find_whole_disk(system / f"{os.major(device)}:{os.minor(device)}")


def find_whole_disk(device: Path) -> Path | None:
    """The /sys folder of the whole disk of a block device, which may be a partition."""
    try:
        found = device.resolve(strict=True)
    except OSError:
        return None
    return found.parent if (found / "partition").exists() else found
