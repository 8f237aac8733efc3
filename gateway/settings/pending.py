"""A configuration on trial: the old one kept beside it, and a marker that says until when to confirm it.

Beside `gateway.toml` are then

    gateway.toml.previous   the configuration before it
    gateway.toml.pending    the marker, JSON: boot id and deadline (seconds of CLOCK_BOOTTIME)

Each file is replaced as a whole and fsynced, the copy first, the marker second, the configuration last:
whenever the power fails, what is in force is either one or the other. A marker of an earlier boot means that
nobody can confirm any more. So no clock has to be right, and these files are all that is needed.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Final

import msgspec

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Marker(msgspec.Struct):
    """Until when, and of which boot. `deadline_s` is seconds of CLOCK_BOOTTIME."""

    boot_id: str
    deadline_s: float


def previous_of(config: Path) -> Path:
    """Where the configuration before this one is kept."""
    return config.with_name(config.name + ".previous")


def marker_of(config: Path) -> Path:
    """Where the marker is while the configuration is on trial."""
    return config.with_name(config.name + ".pending")


def begin(config: Path, text: bytes, *, probe_s: float) -> None:
    """Keep the configuration, mark the new one as on trial for `probe_s`, and put it in its place.

    Raises:
        OSError: a file cannot be written; what is in force is unchanged.
    """
    _replace(previous_of(config), config.read_bytes(), like=config)
    marker = Marker(boot_id(), boot_s() + probe_s)
    _replace(marker_of(config), msgspec.json.encode(marker), like=config)
    _replace(config, text, like=config)


def swap(config: Path, text: bytes) -> None:
    """Keep the configuration and put a new one in its place, without a trial."""
    if config.exists():
        _replace(previous_of(config), config.read_bytes(), like=config)
    _replace(config, text, like=config)


def confirm(config: Path) -> None:
    """The new configuration stays."""
    marker_of(config).unlink(missing_ok=True)
    _sync_folder(config.parent)


def roll_back(config: Path) -> None:
    """Put the configuration before back in its place; can be repeated until it has succeeded.

    Raises:
        OSError: it cannot be written; the marker is still there then.
    """
    _replace(config, previous_of(config).read_bytes(), like=config)
    confirm(config)


def left_s(config: Path) -> float | None:
    """How long the trial goes on, negative when it is over without a confirmation; None without a trial."""
    try:
        marker = msgspec.json.decode(marker_of(config).read_bytes(), type=Marker)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return -1.0
    return marker.deadline_s - boot_s() if marker.boot_id == boot_id() else -1.0


def chosen(config: Path) -> Path:
    """Which file is in force: the configuration, or the one before it when its trial is over unconfirmed."""
    left = left_s(config)
    return previous_of(config) if left is not None and left < 0 and previous_of(config).exists() else config


def boot_s() -> float:
    """Seconds since this boot, sleep included; no clock has to be set for it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """What tells this boot from others; "" where the system does not say."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _replace(path: Path, content: bytes, *, like: Path) -> None:
    """Write a file beside and move it into place, durably; with mode and owner of `like` if that exists."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            with contextlib.suppress(FileNotFoundError):
                status = like.stat()
                os.fchmod(fd, status.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, status.st_uid, status.st_gid)
            left = memoryview(content)
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
