"""Checks of the machine: clock, disk, flash."""

from __future__ import annotations

import ctypes
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.operate.doctor.finding import Finding, fault, ok, warning
from gateway.operate.human import bytes_text, seconds_text

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.settings import Spool

RELEASED_S: Final = 1_767_225_600
"""2026-01-01: no clock that is right says less."""
_AHEAD_S: Final = 300
_UNSYNCHRONISED: Final = 5  # TIME_ERROR of adjtimex(2)
_TIMEX_BYTES: Final = 512
_TIGHT_SHARE: Final = 0.05
_TIGHT_INODES: Final = 0.02
_FAST_COMMITS_MS: Final = 50
_WORN: Final = {1: "below 80 %", 2: "80 % of the reserve is used", 3: "90 % of the reserve is used"}
_NETWORK: Final = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs", "afs")
_VOLATILE: Final = ("tmpfs", "ramfs", "overlay")
_UNSAFE: Final = ("vfat", "exfat", "msdos", "fuseblk", "ntfs", "ntfs3")


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a path is kept: its mount point, file system and device, and whether it can be written."""

    point: str
    kind: str
    device: str
    writable: bool


def check_clock(now_s: float, *, synchronised: bool | None, newest_s: float | None) -> list[Finding]:
    """Whether the time can be right.

    Args:
        now_s: what the clock says, seconds since 1970.
        synchronised: what the kernel says of it; None for not known.
        newest_s: when the newest commit of the spool was made, None for none.
    """
    advice = "set up NTP (systemctl enable --now systemd-timesyncd), or a battery for the clock"
    if now_s < RELEASED_S:
        return [
            fault("clock", "", "the clock is years behind: TLS fails, and readings get wrong times", advice)
        ]
    if newest_s is not None and newest_s > now_s + _AHEAD_S:
        behind = f"the clock is {seconds_text(newest_s - now_s)} behind the newest commit of the spool"
        return [fault("clock", "", behind, advice)]
    if synchronised is False:
        return [warning("clock", "", "the clock is not synchronised", advice)]
    known = "is synchronised" if synchronised else "can be right; nobody says whether it is synchronised"
    return [ok("clock", "", f"the clock {known}")]


def synchronised() -> bool | None:
    """Whether the kernel holds the clock to be synchronised (adjtimex(2)); None when it does not say."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _UNSYNCHRONISED


def check_disk(spool: Spool, mountinfo: str) -> list[Finding]:
    """Whether the spool's disk has room and is one that keeps what it is told. `mountinfo`: see proc(5)."""
    folder = existing(spool.path.parent)
    mount = mount_of(folder, mountinfo)
    subject, findings = str(folder), []
    if mount is not None:
        findings += _of_kind(mount, subject)
        if not mount.writable:
            what = f"{mount.point} is mounted read-only: a failing disk is remounted so"
            findings.append(fault("disk", subject, what, "look into dmesg, check the disk, mount it again"))
    usage, nodes = shutil.disk_usage(folder), os.statvfs(folder)
    free = f"{bytes_text(usage.free)} of {bytes_text(usage.total)} are free"
    room = "make room, or give the spool a disk of its own"
    if usage.free < spool.min_free_bytes:
        what = f"{free}, less than spool.min_free_bytes: acknowledgements are withheld"
        findings.append(fault("disk", subject, what, room))
    elif usage.free < max(2 * spool.min_free_bytes, _TIGHT_SHARE * usage.total):
        findings.append(warning("disk", subject, f"{free}", room))
    elif nodes.f_files and nodes.f_favail < _TIGHT_INODES * nodes.f_files:
        findings.append(warning("disk", subject, "it has hardly any inodes left", "delete small files"))
    else:
        findings.append(ok("disk", subject, free))
    if spool.max_bytes is not None and spool.max_bytes > usage.total - spool.min_free_bytes:
        what = f"spool.max_bytes is {bytes_text(spool.max_bytes)}, more than the disk can hold"
        findings.append(warning("disk", subject, what, "the disk is the limit; lower it to a real one"))
    return findings


def _of_kind(mount: Mount, subject: str) -> list[Finding]:
    if mount.kind in _NETWORK:
        what = f"{mount.point} is a network file system ({mount.kind}): SQLite can lose or damage the spool"
        return [fault("disk", subject, what, "put spool.path on a local disk")]
    if mount.kind in _VOLATILE:
        what = f"{mount.point} is {mount.kind}: what is acknowledged may be gone after a restart"
        return [warning("disk", subject, what, "put spool.path on a disk, or a volume of the container")]
    if mount.kind in _UNSAFE:
        what = f"{mount.point} is {mount.kind}, which a power cut can damage"
        return [warning("disk", subject, what, "use ext4, xfs, btrfs or f2fs")]
    return []


def mount_of(path: Path, mountinfo: str) -> Mount | None:
    """The mount that a path is on, of a text like /proc/self/mountinfo; None when it does not say."""
    best: Mount | None = None
    for line in mountinfo.splitlines():
        before, found, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if not found or len(left) < 6 or len(right) < 2:  # noqa: PLR2004 - fields of proc(5)
            continue
        point = left[4].encode().decode("unicode_escape")
        inside = point == "/" or str(path) == point or str(path).startswith(f"{point}/")
        if inside and (best is None or len(point) >= len(best.point)):
            best = Mount(point, right[0], left[2], "ro" not in left[5].split(","))
    return best


def check_flash(spool: Spool, mountinfo: str, sys: Path) -> list[Finding]:
    """How worn the memory under the spool is, where it says so. `sys` is /sys."""
    folder = existing(spool.path.parent)
    mount = mount_of(folder, mountinfo)
    disk = None if mount is None else _disk_of(sys / "dev" / "block" / mount.device)
    if disk is None or not disk.name.startswith("mmcblk"):
        return []
    subject, device, findings = f"/dev/{disk.name}", disk / "device", []
    estimates = [int(text, 16) for text in _text(device / "life_time").split()]
    used = max(estimates, default=0)
    if used > 10:  # noqa: PLR2004 - steps of 10 %, JESD84-B51 section 7.4.41
        what = "has exceeded its estimated life"
        findings.append(fault("flash", subject, what, "copy the spool to a new disk before this one fails"))
    elif used > 7:  # noqa: PLR2004 - the same
        what = f"has used {10 * (used - 1)} to {10 * used} % of its estimated life"
        findings.append(warning("flash", subject, what, "plan a new disk; raise spool.commit_interval_ms"))
    elif used:
        findings.append(ok("flash", subject, f"at most {10 * used} % of its estimated life are used"))
    spare = int(_text(device / "pre_eol_info") or "0", 16)
    if spare > 1:
        findings.append(fault("flash", subject, _WORN.get(spare, "is worn out"), "replace it"))
    if _text(device / "type") == "SD" and spool.commit_interval_ms < _FAST_COMMITS_MS:
        what = f"an SD card, with a commit every {spool.commit_interval_ms:g} ms"
        advice = (
            "cards wear out by many small writes: set spool.commit_interval_ms to 200 or more, or use an SSD"
        )
        findings.append(warning("flash", subject, what, advice))
    return findings


def _disk_of(device: Path) -> Path | None:
    """The whole disk of a block device of sysfs, which may be a partition."""
    try:
        real = device.resolve(strict=True)
    except OSError:
        return None
    return real.parent if (real / "partition").exists() else real


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.resolve()
