"""What the gateway costs the flash under its spool: bytes written, amplification, years left.

Written bytes are the kernel's own counts: `write_bytes` of /proc/self/io for this process (what it caused
to be sent to a disk), and the sectors of /sys/dev/block/.../stat for the whole disk the spool is on, which
everything else on the machine shares. What the flash's own controller writes beyond that nobody can see.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import NamedTuple

import msgspec

_SECTOR_BYTES = 512  # of the stat file, whatever the disk's own are (Documentation/block/stat.rst)
_SECTORS_WRITTEN = 6
_DAY_S = 86_400.0
_EVERY_S = 60.0
_KEPT = round(_DAY_S / _EVERY_S) + 1
_SHORTEST_S = 10.0


class WearStatus(msgspec.Struct):
    """Bytes written over the last day, or since start; None where the kernel does not say.

    Attributes:
        observed_s: the time it was watched for, at most a day; a shorter time is scaled to a day.
        written_bytes_per_day: by this gateway.
        disk_written_bytes_per_day: by everything, to the disk the spool is on.
        amplification: bytes written by this gateway for each byte of readings as they were encoded.
        endurance_bytes: what may still be written, as configured.
        years_left: until then, at the disk's present rate (the gateway's own, where the disk's is not known).
        written_bytes, disk_written_bytes: since the process, and the machine, started.
    """

    disk: str | None
    observed_s: float
    written_bytes_per_day: float | None
    disk_written_bytes_per_day: float | None
    amplification: float | None
    endurance_bytes: float | None
    years_left: float | None
    written_bytes: int | None = None
    disk_written_bytes: int | None = None


class Written(NamedTuple):
    """Cumulative counts at one moment of the monotonic clock."""

    at_s: float
    by_process: int | None
    by_machine: int | None
    encoded: int


class Wear:
    """Keeps a sample a minute for a day. `note` as often as you like; `status` for whoever wants to know."""

    def __init__(self, folder: Path, endurance_tb: float | None) -> None:
        self._disk = disk_of(folder)
        self._endurance_bytes = None if endurance_tb is None else endurance_tb * 1e12
        self._samples: deque[Written] = deque(maxlen=_KEPT)

    def look(self, encoded_bytes: int, now_s: float) -> Written:
        """The counts as of now; `encoded_bytes` of readings were appended since start."""
        machine = None if self._disk is None else written_to(self._disk)
        return Written(now_s, written_by_process(), machine, encoded_bytes)

    def note(self, written: Written) -> None:
        """Keep a sample, unless the last is less than a minute old."""
        if not self._samples or written.at_s - self._samples[-1].at_s >= _EVERY_S:
            self._samples.append(written)

    def status(self, now: Written) -> WearStatus:
        """What was written between the oldest sample and now."""
        then = self._samples[0] if self._samples else now
        name = None if self._disk is None else self._disk.name
        return wear_between(then, now, disk=name, endurance_bytes=self._endurance_bytes)


def wear_between(
    then: Written, now: Written, *, disk: str | None = None, endurance_bytes: float | None = None
) -> WearStatus:
    """Two samples compared. Too short a time says nothing."""
    observed_s = now.at_s - then.at_s
    process = _difference(then.by_process, now.by_process)
    machine = _difference(then.by_machine, now.by_machine)
    encoded = now.encoded - then.encoded
    enough = observed_s >= _SHORTEST_S
    per_day = [n * _DAY_S / observed_s if n is not None and enough else None for n in (process, machine)]
    wearing = next((rate for rate in reversed(per_day) if rate is not None), None)
    years_left = None
    if endurance_bytes is not None and wearing:
        years_left = endurance_bytes / (wearing * 365.25)
    return WearStatus(
        disk=disk,
        observed_s=observed_s,
        written_bytes_per_day=per_day[0],
        disk_written_bytes_per_day=per_day[1],
        amplification=process / encoded if process is not None and encoded > 0 and enough else None,
        endurance_bytes=endurance_bytes,
        years_left=years_left,
        written_bytes=now.by_process,
        disk_written_bytes=now.by_machine,
    )


def written_by_process() -> int | None:
    """Bytes this process has caused to be written to a disk. Source: proc_pid_io(5)."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("write_bytes:")), None)


def written_to(disk: Path) -> int | None:
    """Bytes written to a disk, a folder of /sys/block, since the machine started."""
    try:
        return int((disk / "stat").read_text(encoding="ascii").split()[_SECTORS_WRITTEN]) * _SECTOR_BYTES
    except (OSError, IndexError, ValueError):
        return None


def disk_of(folder: Path, system: Path = Path("/sys/dev/block")) -> Path | None:
    """The folder in /sys of the whole disk that a folder is on; None for memory, network and layered ones."""
    try:
        device = folder.stat().st_dev
        found = (system / f"{os.major(device)}:{os.minor(device)}").resolve(strict=True)
    except OSError:
        return None
    return found.parent if (found / "partition").exists() else found


def _difference(then: int | None, now: int | None) -> int | None:
    return None if then is None or now is None else max(0, now - then)
