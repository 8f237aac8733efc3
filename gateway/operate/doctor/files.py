"""Checks of files: who may read and write them, and certificates."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from gateway.ingress.tls import TlsFault, context_of
from gateway.operate.doctor.finding import Finding, fault, ok, warning
from gateway.operate.doctor.machine import existing
from gateway.operate.expiry import certificates
from gateway.settings import FileDestination, HttpDestination, InfluxDestination, IngestDestination

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gateway.settings import GatewaySettings


def check_configuration(path: Path) -> list[Finding]:
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
    for key, path in secret_files(settings):
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


def secret_files(settings: GatewaySettings) -> Iterator[tuple[str, Path]]:
    """The keys that name secrets, with the files."""
    named: list[tuple[str, Path | None]] = []
    for place, door in settings.ingress.doors.items():
        named += [
            (f"{place}.tls_key_file", door.tls_key_file),
            (f"{place}.passwords_file", door.passwords_file),
        ]
    if settings.ingress.http.enabled:
        named.append(("ingress.http.tokens_file", settings.ingress.http.tokens_file))
    named += _of_endpoint_and_channels(settings)
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


def _of_endpoint_and_channels(settings: GatewaySettings) -> Iterator[tuple[str, Path | None]]:
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
        if as_service and not os.access(existing(folder), os.W_OK | os.X_OK):
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
    for status in certificates(settings, now_s):
        renew = "renew it: replace the file, the gateway takes it over without a restart"
        words = str(status).partition(f"{status.path}: ")[2]
        make = fault if status.urgent else warning
        what = f"{status.key}: {words}"
        found.append(make("tls", status.path, what, renew) if status.soon else ok("tls", status.path, what))
    served = [door.tls_files for door in settings.ingress.doors.values()]
    for tls_files in (*served, settings.status.tls_files if settings.status.enabled else None):
        if tls_files is not None:
            try:
                context_of(tls_files)
            except TlsFault as reason:
                advice = "put the right file there; PEM, the key without a password"
                found.append(fault("tls", str(reason.path), reason.what, advice))
    return found
