"""Checks of the machine: clock, disk, flash, file permissions, folders and certificates."""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.auth.tls import TlsFileError, build_server_context
from gateway.doctor import Finding, fault, ok, warning
from gateway.humanize import format_bytes, format_duration
from gateway.processing.clock import CLOCK_TOLERANCE_US, is_before_release
from gateway.settings.destinations import FileDestination
from gateway.settings.gateway_settings import list_files
from gateway.settings.schema import FileRole
from gateway.status.certificates import check_certificate_files
from gateway.status.samplers import find_whole_disk

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.settings.gateway_settings import GatewaySettings, SpoolSettings

_LOW_SPACE_SHARE: Final = 0.05
_LOW_INODES_SHARE: Final = 0.02
_FAST_COMMITS_MS: Final = 50
_EMMC_WEAR: Final = {1: "below 80 %", 2: "80 % of the reserve is used", 3: "90 % of the reserve is used"}
_NETWORK_FILE_SYSTEMS: Final = frozenset(
    ["nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "fuse.sshfs", "ceph", "glusterfs", "afs"]
)
_VOLATILE_FILE_SYSTEMS: Final = ("tmpfs", "ramfs", "overlay")
_FRAGILE_FILE_SYSTEMS: Final = ("vfat", "exfat", "msdos", "fuseblk", "ntfs", "ntfs3")


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount point with its file system and device, and whether it is writable."""

    point: str
    kind: str
    device: str
    writable: bool


def check_clock(now_s: float, *, synchronised: bool | None, newest_s: float | None) -> list[Finding]:
    """Whether the clock can be right. `newest_s` is the time of the spool's newest commit."""
    advice = "set up NTP (systemctl enable --now systemd-timesyncd), or a battery for the clock"
    if is_before_release(round(now_s * 1e6)):
        what = "the clock shows a time before this release was built; TLS will fail"
        return [fault("clock", "", what, advice)]
    if newest_s is not None and newest_s > now_s + CLOCK_TOLERANCE_US / 1e6:
        behind = f"the clock is {format_duration(newest_s - now_s)} behind the newest commit of the spool"
        return [fault("clock", "", behind, advice)]
    if synchronised is False:
        return [warning("clock", "", "the clock is not synchronised", advice)]
    known = "is synchronised" if synchronised else "looks right; whether it is synchronised is unknown"
    return [ok("clock", "", f"the clock {known}")]


def check_disk(spool: SpoolSettings, mountinfo: str) -> list[Finding]:
    """Whether the spool's disk has space and keeps what is fsynced. `mountinfo`: see proc(5)."""
    folder = nearest_existing_folder(spool.path.parent)
    mount = find_mount(folder, mountinfo)
    subject, findings = str(folder), []
    if mount is not None:
        findings += _check_file_system(mount, subject)
        if not mount.writable:
            what = f"{mount.point} is mounted read-only, as the kernel does with a failing disk"
            findings.append(fault("disk", subject, what, "see dmesg, check the disk, remount it"))
    usage, nodes = shutil.disk_usage(folder), os.statvfs(folder)
    free = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} are free"
    room = "free some space, or give the spool its own disk"
    if usage.free < spool.min_free_bytes:
        what = f"{free}, less than spool.min_free_bytes: acknowledgements are withheld"
        findings.append(fault("disk", subject, what, room))
    elif usage.free < max(2 * spool.min_free_bytes, _LOW_SPACE_SHARE * usage.total):
        findings.append(warning("disk", subject, f"{free}", room))
    elif nodes.f_files and nodes.f_favail < _LOW_INODES_SHARE * nodes.f_files:
        findings.append(warning("disk", subject, "it has almost no free inodes", "delete small files"))
    else:
        findings.append(ok("disk", subject, free))
    if spool.max_bytes is not None and spool.max_bytes > usage.total - spool.min_free_bytes:
        what = f"spool.max_bytes is {format_bytes(spool.max_bytes)}, more than the disk can hold"
        findings.append(warning("disk", subject, what, "lower spool.max_bytes to what the disk can hold"))
    return findings


def _check_file_system(mount: Mount, subject: str) -> list[Finding]:
    if mount.kind in _NETWORK_FILE_SYSTEMS:
        what = f"{mount.point} is a network file system ({mount.kind}): SQLite can lose or damage the spool"
        return [fault("disk", subject, what, "put spool.path on a local disk")]
    if mount.kind in _VOLATILE_FILE_SYSTEMS:
        what = f"{mount.point} is {mount.kind}: acknowledged readings may be lost at a restart"
        return [warning("disk", subject, what, "put spool.path on a disk, or a volume of the container")]
    if mount.kind in _FRAGILE_FILE_SYSTEMS:
        what = f"{mount.point} is {mount.kind}, which a power cut can damage"
        return [warning("disk", subject, what, "use ext4, xfs, btrfs or f2fs")]
    return []


def find_mount(path: Path, mountinfo: str) -> Mount | None:
    """The mount that a path is on, from the text of /proc/self/mountinfo; None when it is not listed."""
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


def check_flash(spool: SpoolSettings, mountinfo: str, sys: Path) -> list[Finding]:
    """Wear of the eMMC or SD card under the spool, where the kernel reports it. `sys` is /sys."""
    folder = nearest_existing_folder(spool.path.parent)
    mount = find_mount(folder, mountinfo)
    disk = None if mount is None else find_whole_disk(sys / "dev" / "block" / mount.device)
    if disk is None or not disk.name.startswith("mmcblk"):
        return []
    subject, device, findings = f"/dev/{disk.name}", disk / "device", []
    estimates = [int(text, 16) for text in read_system_file(device / "life_time").split()]
    used = max(estimates, default=0)
    if used > 10:  # noqa: PLR2004 - steps of 10 %, JESD84-B51 section 7.4.41
        what = "has exceeded its estimated lifetime"
        findings.append(fault("flash", subject, what, "copy the spool to a new disk before this one fails"))
    elif used > 7:  # noqa: PLR2004 - the same
        what = f"has used {10 * (used - 1)} to {10 * used} % of its estimated lifetime"
        findings.append(warning("flash", subject, what, "plan a new disk; raise spool.commit_interval_ms"))
    elif used:
        findings.append(ok("flash", subject, f"at most {10 * used} % of its estimated lifetime is used"))
    spare = int(read_system_file(device / "pre_eol_info") or "0", 16)
    if spare > 1:
        findings.append(fault("flash", subject, _EMMC_WEAR.get(spare, "is worn out"), "replace it"))
    if read_system_file(device / "type") == "SD" and spool.commit_interval_ms < _FAST_COMMITS_MS:
        what = f"an SD card, with a commit every {spool.commit_interval_ms:g} ms"
        advice = "many small writes wear it out: set spool.commit_interval_ms to 200 or more, or use an SSD"
        findings.append(warning("flash", subject, what, advice))
    return findings


def read_system_file(path: Path) -> str:
    """The text of a file of /proc or /sys; "" where this machine has none."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def nearest_existing_folder(folder: Path) -> Path:
    """A folder, or the nearest existing one above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.resolve()


def check_config_permissions(path: Path) -> list[Finding]:
    """Whether others may change the configuration, and with it everything the gateway does."""
    found = []
    for which in (path, path.absolute().parent):
        mode = which.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            found.append(fault("permissions", str(which), "everybody may change it", f"chmod o-w {which}"))
    return found or [ok("permissions", str(path), "only its owner may change it")]


def check_secrets(settings: GatewaySettings) -> list[Finding]:
    """Whether secret files can be read by the gateway, and by nobody else."""
    files = list_files(settings, FileRole.SECRET, FileRole.HASHES, FileRole.KEY)
    return [_check_secret(key, path) for key, path in files]


def _check_secret(key: str, path: Path) -> Finding:
    subject = str(path)
    try:
        mode = path.stat().st_mode
        path.open("rb").close()
    except FileNotFoundError:
        what = f"{key} names a file that does not exist"
        advice = "write the secret into it; a systemd credential exists only while the service runs"
        return fault("permissions", subject, what, advice)
    except OSError as error:
        what = f"{key}: cannot be read: {error.strerror}"
        return fault("permissions", subject, what, "run the doctor as the service's user, or as root")
    if mode & stat.S_IROTH:
        return warning("permissions", subject, "everybody may read it", f"chmod o-rwx {path}")
    if mode & stat.S_IWGRP:
        return warning("permissions", subject, "its group may change it", f"chmod g-w {path}")
    return ok("permissions", subject, "only its owner and group may read it")


def check_folders(settings: GatewaySettings, *, as_service: bool) -> list[Finding]:
    """Whether the folders of the spool and of file destinations can be written.

    Unless `as_service` (this is the user that the gateway runs as), only whether they exist.
    """
    found = []
    folders = [("spool.path", settings.spool.path.parent, True)]
    file_destinations = [d for d in settings.destinations if isinstance(d, FileDestination)]
    folders += [(f"destinations[{d.name}].directory", d.directory, d.create) for d in file_destinations]
    for key, folder, is_created in folders:
        if not folder.exists() and not is_created:
            advice = "mount the stick, or create the folder; readings wait in the spool until then"
            found.append(fault("folder", str(folder), f"{key}: does not exist", advice))
            continue
        if as_service and not os.access(nearest_existing_folder(folder), os.W_OK | os.X_OK):
            advice = "make the service's user its owner, or name it in ReadWritePaths= of the unit"
            found.append(fault("folder", str(folder), f"{key}: is not writable", advice))
            continue
        state = "exists" if folder.exists() else "will be created"
        found.append(ok("folder", str(folder), f"{key}: {state}"))
    return found


def check_certificates(settings: GatewaySettings, now_s: float) -> list[Finding]:
    """Whether certificates match their keys and when they expire."""
    found = []
    for status in check_certificate_files(settings, now_s):
        what = f"{status.key}: {status.condition}"
        if not status.soon:
            found.append(ok("tls", status.path, what))
            continue
        report = fault if status.urgent else warning
        advice = "renew it: replace the file; the gateway loads it without a restart"
        found.append(report("tls", status.path, what, advice))
    listeners = [listener.tls_files for listener in settings.ingress.device_listeners.values()]
    for tls_files in (*listeners, settings.status.tls_files if settings.status.enabled else None):
        if tls_files is not None:
            try:
                build_server_context(tls_files)
            except TlsFileError as error:
                advice = "replace the file: PEM, the key without a password"
                found.append(fault("tls", str(error.path), error.what, advice))
    return found
