"""Checks of the machine: clock, disk, flash, file permissions, folders and certificates."""

from __future__ import annotations

import ctypes
import os
import shutil
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.auth.tls import TlsFileError, build_server_context
from gateway.doctor import Finding, fault, ok, warning
from gateway.humanize import format_bytes, format_duration
from gateway.settings.destinations import (
    FileDestination,
    HttpDestination,
    InfluxDestination,
    IngestDestination,
)
from gateway.status.certificates import check_certificate_files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gateway.settings.gateway_settings import GatewaySettings, SpoolSettings

EARLIEST_PLAUSIBLE_S: Final = 1_767_225_600
"""2026-01-01: no clock that is right says less."""
_CLOCK_TOLERANCE_S: Final = 300
_UNSYNCHRONISED: Final = 5  # TIME_ERROR of adjtimex(2)
_TIMEX_BYTES: Final = 512
_LOW_SPACE_SHARE: Final = 0.05
_LOW_INODES_SHARE: Final = 0.02
_FAST_COMMITS_MS: Final = 50
_EMMC_WEAR: Final = {1: "below 80 %", 2: "80 % of the reserve is used", 3: "90 % of the reserve is used"}
_NETWORK_FILE_SYSTEMS: Final = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "fuse.sshfs",
    "ceph",
    "glusterfs",
    "afs",
)
_VOLATILE_FILE_SYSTEMS: Final = ("tmpfs", "ramfs", "overlay")
_FRAGILE_FILE_SYSTEMS: Final = ("vfat", "exfat", "msdos", "fuseblk", "ntfs", "ntfs3")


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
    if now_s < EARLIEST_PLAUSIBLE_S:
        return [
            fault("clock", "", "the clock is years behind: TLS fails, and readings get wrong times", advice)
        ]
    if newest_s is not None and newest_s > now_s + _CLOCK_TOLERANCE_S:
        behind = f"the clock is {format_duration(newest_s - now_s)} behind the newest commit of the spool"
        return [fault("clock", "", behind, advice)]
    if synchronised is False:
        return [warning("clock", "", "the clock is not synchronised", advice)]
    known = "is synchronised" if synchronised else "can be right; nobody says whether it is synchronised"
    return [ok("clock", "", f"the clock {known}")]


def is_clock_synchronised() -> bool | None:
    """Whether the kernel holds the clock to be synchronised (adjtimex(2)); None when it does not say."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _UNSYNCHRONISED


def check_disk(spool: SpoolSettings, mountinfo: str) -> list[Finding]:
    """Whether the spool's disk has room and is one that keeps what it is told. `mountinfo`: see proc(5)."""
    folder = nearest_existing_folder(spool.path.parent)
    mount = find_mount(folder, mountinfo)
    subject, findings = str(folder), []
    if mount is not None:
        findings += _check_file_system(mount, subject)
        if not mount.writable:
            what = f"{mount.point} is mounted read-only: a failing disk is remounted so"
            findings.append(fault("disk", subject, what, "look into dmesg, check the disk, mount it again"))
    usage, nodes = shutil.disk_usage(folder), os.statvfs(folder)
    free = f"{format_bytes(usage.free)} of {format_bytes(usage.total)} are free"
    room = "make room, or give the spool a disk of its own"
    if usage.free < spool.min_free_bytes:
        what = f"{free}, less than spool.min_free_bytes: acknowledgements are withheld"
        findings.append(fault("disk", subject, what, room))
    elif usage.free < max(2 * spool.min_free_bytes, _LOW_SPACE_SHARE * usage.total):
        findings.append(warning("disk", subject, f"{free}", room))
    elif nodes.f_files and nodes.f_favail < _LOW_INODES_SHARE * nodes.f_files:
        findings.append(warning("disk", subject, "it has hardly any inodes left", "delete small files"))
    else:
        findings.append(ok("disk", subject, free))
    if spool.max_bytes is not None and spool.max_bytes > usage.total - spool.min_free_bytes:
        what = f"spool.max_bytes is {format_bytes(spool.max_bytes)}, more than the disk can hold"
        findings.append(warning("disk", subject, what, "the disk is the limit; lower it to a real one"))
    return findings


def _check_file_system(mount: Mount, subject: str) -> list[Finding]:
    if mount.kind in _NETWORK_FILE_SYSTEMS:
        what = f"{mount.point} is a network file system ({mount.kind}): SQLite can lose or damage the spool"
        return [fault("disk", subject, what, "put spool.path on a local disk")]
    if mount.kind in _VOLATILE_FILE_SYSTEMS:
        what = f"{mount.point} is {mount.kind}: what is acknowledged may be gone after a restart"
        return [warning("disk", subject, what, "put spool.path on a disk, or a volume of the container")]
    if mount.kind in _FRAGILE_FILE_SYSTEMS:
        what = f"{mount.point} is {mount.kind}, which a power cut can damage"
        return [warning("disk", subject, what, "use ext4, xfs, btrfs or f2fs")]
    return []


def find_mount(path: Path, mountinfo: str) -> Mount | None:
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


def check_flash(spool: SpoolSettings, mountinfo: str, sys: Path) -> list[Finding]:
    """How worn the memory under the spool is, where it says so. `sys` is /sys."""
    folder = nearest_existing_folder(spool.path.parent)
    mount = find_mount(folder, mountinfo)
    disk = None if mount is None else _find_disk(sys / "dev" / "block" / mount.device)
    if disk is None or not disk.name.startswith("mmcblk"):
        return []
    subject, device, findings = f"/dev/{disk.name}", disk / "device", []
    estimates = [int(text, 16) for text in _read_attribute(device / "life_time").split()]
    used = max(estimates, default=0)
    if used > 10:  # noqa: PLR2004 - steps of 10 %, JESD84-B51 section 7.4.41
        what = "has exceeded its estimated life"
        findings.append(fault("flash", subject, what, "copy the spool to a new disk before this one fails"))
    elif used > 7:  # noqa: PLR2004 - the same
        what = f"has used {10 * (used - 1)} to {10 * used} % of its estimated life"
        findings.append(warning("flash", subject, what, "plan a new disk; raise spool.commit_interval_ms"))
    elif used:
        findings.append(ok("flash", subject, f"at most {10 * used} % of its estimated life are used"))
    spare = int(_read_attribute(device / "pre_eol_info") or "0", 16)
    if spare > 1:
        findings.append(fault("flash", subject, _EMMC_WEAR.get(spare, "is worn out"), "replace it"))
    if _read_attribute(device / "type") == "SD" and spool.commit_interval_ms < _FAST_COMMITS_MS:
        what = f"an SD card, with a commit every {spool.commit_interval_ms:g} ms"
        advice = (
            "cards wear out by many small writes: set spool.commit_interval_ms to 200 or more, or use an SSD"
        )
        findings.append(warning("flash", subject, what, advice))
    return findings


def _find_disk(device: Path) -> Path | None:
    """The whole disk of a block device of sysfs, which may be a partition."""
    try:
        real = device.resolve(strict=True)
    except OSError:
        return None
    return real.parent if (real / "partition").exists() else real


def _read_attribute(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def nearest_existing_folder(folder: Path) -> Path:
    """A folder, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.resolve()


def check_config_permissions(path: Path) -> list[Finding]:
    """Whether others may change the configuration: who can, can do everything."""
    found = []
    for which in (path, path.absolute().parent):
        mode = which.stat().st_mode
        sticky = bool(mode & stat.S_ISVTX)
        if mode & stat.S_IWOTH and not sticky:
            found.append(fault("permissions", str(which), "everybody may change it", f"chmod o-w {which}"))
    return found or [ok("permissions", str(path), "only its owner may change it")]


def check_secrets(settings: GatewaySettings) -> list[Finding]:
    """Whether secrets can be read by the gateway, and by nobody else."""
    found = []
    for key, path in list_secret_files(settings):
        try:
            mode = path.stat().st_mode
            path.open("rb").close()
        except FileNotFoundError:
            what = f"{key} names a file that is not there"
            advice = "write the secret into it; a systemd credential is there only while the service runs"
            found.append(fault("permissions", str(path), what, advice))
        except OSError as reason:
            what = f"{key}: cannot be read: {reason.strerror}"
            found.append(
                fault("permissions", str(path), what, "run the doctor as the service's user, or as root")
            )
        else:
            if mode & stat.S_IROTH:
                found.append(
                    warning("permissions", str(path), "everybody may read it", f"chmod o-rwx {path}")
                )
            elif mode & stat.S_IWGRP:
                found.append(
                    warning("permissions", str(path), "its group may change it", f"chmod g-w {path}")
                )
            else:
                found.append(ok("permissions", str(path), "only its owner and group may read it"))
    return found


def list_secret_files(settings: GatewaySettings) -> Iterator[tuple[str, Path]]:
    """The keys that name secrets, with the files."""
    named: list[tuple[str, Path | None]] = []
    for place, door in settings.ingress.device_listeners.items():
        named += [
            (f"{place}.tls_key_file", door.tls_key_file),
            (f"{place}.passwords_file", door.passwords_file),
        ]
    if settings.ingress.http.enabled:
        named.append(("ingress.http.tokens_file", settings.ingress.http.tokens_file))
    named += _endpoint_and_channel_secrets(settings)
    for subscribe in settings.ingress.subscribe:
        place = f"ingress.subscribe[{subscribe.name or subscribe.url}]"
        named += [
            (f"{place}.password_file", subscribe.password_file),
            (f"{place}.key_file", subscribe.key_file),
        ]
    for destination in settings.destinations:
        place = f"destinations[{destination.name}]"
        if isinstance(destination, IngestDestination | InfluxDestination):
            named.append((f"{place}.token_file", destination.token_file))
        if isinstance(destination, InfluxDestination):
            named.append((f"{place}.password_file", destination.password_file))
        if isinstance(destination, HttpDestination):
            named.append((f"{place}.key_file", destination.key_file))
    return ((key, path) for key, path in named if path is not None)


def _endpoint_and_channel_secrets(settings: GatewaySettings) -> Iterator[tuple[str, Path | None]]:
    if settings.status.enabled:
        yield "status.tls_key_file", settings.status.tls_key_file
        yield "status.tokens_file", settings.status.tokens_file
    for channel in settings.alerts.channel:
        for key in ("url_file", "token_file", "password_file"):
            yield f"alerts.channel[{channel.name}].{key}", getattr(channel, key, None)


def check_folders(settings: GatewaySettings, *, as_service: bool) -> list[Finding]:
    """Whether what is written can be written: the spool, and the folders of file destinations.

    Args:
        settings: which folders.
        as_service: whether this is the user that the gateway runs as; others only see whether they are there.
    """
    found = []
    folders = [
        ("spool.path", settings.spool.path.parent, True),
        *(
            (f"destinations[{d.name}].directory", d.directory, d.create)
            for d in settings.destinations
            if isinstance(d, FileDestination)
        ),
    ]
    for key, folder, made in folders:
        if not folder.exists() and not made:
            advice = "mount the stick, or make the folder; readings wait in the spool until then"
            found.append(fault("folder", str(folder), f"{key}: is not there", advice))
            continue
        if as_service and not os.access(nearest_existing_folder(folder), os.W_OK | os.X_OK):
            advice = "give it to the service's user, or name it in ReadWritePaths= of the unit"
            found.append(fault("folder", str(folder), f"{key}: cannot be written", advice))
            continue
        found.append(
            ok("folder", str(folder), f"{key}: is there" if folder.exists() else f"{key}: will be made")
        )
    return found


def check_certificates(settings: GatewaySettings, now_s: float) -> list[Finding]:
    """Whether certificates fit their keys and how long they last."""
    found = []
    for status in check_certificate_files(settings, now_s):
        renew = "renew it: replace the file, the gateway takes it over without a restart"
        words = str(status).partition(f"{status.path}: ")[2]
        make = fault if status.urgent else warning
        what = f"{status.key}: {words}"
        found.append(make("tls", status.path, what, renew) if status.soon else ok("tls", status.path, what))
    served = [door.tls_files for door in settings.ingress.device_listeners.values()]
    for tls_files in (*served, settings.status.tls_files if settings.status.enabled else None):
        if tls_files is not None:
            try:
                build_server_context(tls_files)
            except TlsFileError as reason:
                advice = "put the right file there; PEM, the key without a password"
                found.append(fault("tls", str(reason.path), reason.what, advice))
    return found
