"""Every check, on one configuration."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_sync.settings_file import SettingsFault
from gateway import settings as given
from gateway.operate.doctor import files, machine, network, upstream
from gateway.operate.doctor.finding import Finding, fault, ok
from gateway.operate.spool_file import opened
from gateway.spool.database import SQL
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings

_PROC, _SYS = Path("/proc"), Path("/sys")


async def examine(config: Path, *, online: bool = True) -> list[Finding]:
    """Everything about the gateway of a configuration, what is well included.

    Args:
        config: its file.
        online: whether to ask name servers, destinations and brokers too.

    Raises:
        SettingsFault: the settings themselves cannot be used; files they name may be of no use.
    """
    settings = given.read(config)
    running = await asyncio.to_thread(network.running_gateway, settings)
    mountinfo = _text(_PROC / "self" / "mountinfo")
    newest_s = _newest_commit_s(settings.spool.path)
    found = [
        *_configuration(config),
        *files.check_configuration(config),
        *files.check_secrets(settings),
        *files.check_folders(settings, as_service=_is_service(settings)),
        *_spool(settings),
        *machine.check_clock(time.time(), synchronised=machine.synchronised(), newest_s=newest_s),
        *machine.check_disk(settings.spool, mountinfo),
        *machine.check_flash(settings.spool, mountinfo, _SYS),
        *network.check_ports(settings, running),
        *files.check_certificates(settings, time.time()),
    ]
    if online:
        found += await network.check_names(settings)
        found += await upstream.check_upstreams(settings)
    return found


def _configuration(config: Path) -> list[Finding]:
    """Faults that a gateway would not start with; those of files have a check of their own besides."""
    try:
        given.load(config)
    except SettingsFault as found:
        advice = "correct it; tidegate config explain tells what a key takes"
        return [fault("configuration", f.key or f.source, f.what, advice) for f in found.faults]
    return [ok("configuration", str(config), "no faults")]


def _spool(settings: GatewaySettings) -> list[Finding]:
    path = settings.spool.path
    if not path.exists():
        return [ok("spool", str(path), "not there yet; the gateway makes it")]
    try:
        with opened(path):
            return [ok("spool", str(path), "can be opened")]
    except SpoolError as reason:
        return [fault("spool", str(path), str(reason), "tidegate spool check tells more")]


def _newest_commit_s(path: Path) -> float | None:
    try:
        with opened(path) as connection, closing(connection.cursor()) as cursor:
            row = cursor.execute(SQL["newest_written"]).fetchone()
    except SpoolError:
        return None
    return None if row is None or row[0] is None else float(row[0]) / 1e6


def _is_service(settings: GatewaySettings) -> bool:
    """Whether this is the user that the gateway runs as, by the owner of the spool; root can all."""
    try:
        return settings.spool.path.stat().st_uid == os.geteuid()
    except OSError:
        return os.geteuid() != 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
