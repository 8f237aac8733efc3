"""`tidegate doctor`: runs every check on one configuration and prints the findings."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands.exit_errors import fail
from gateway.commands.options import EXIT_FOUND, JsonOption, print_json
from gateway.doctor import Finding, Level, fault, machine, network, ok
from gateway.humanize import escape_text, pluralize
from gateway.processing.clock import read_kernel_sync
from gateway.settings.gateway_settings import GatewaySettings, load_settings, parse_settings_file
from gateway.spool.database import SQL, open_spool_read_only
from gateway.spool.errors import SpoolError

_PROC, _SYS = Path("/proc"), Path("/sys")


async def run_checks(config: Path, *, online: bool = True) -> list[Finding]:
    """The findings of all checks; unless `online`, no name server, destination or broker is contacted."""
    settings = parse_settings_file(config)
    running = await asyncio.to_thread(network.find_running_gateway, settings)
    mountinfo = machine.read_system_file(_PROC / "self" / "mountinfo")
    spool_finding, newest_s = _check_spool(settings.spool.path)
    found = [
        *_check_settings(config),
        *machine.check_config_permissions(config),
        *machine.check_secrets(settings),
        *machine.check_folders(settings, as_service=_is_service(settings)),
        spool_finding,
        *machine.check_clock(time.time(), synchronised=read_kernel_sync(), newest_s=newest_s),
        *machine.check_disk(settings.spool, mountinfo),
        *machine.check_flash(settings.spool, mountinfo, _SYS),
        *network.check_ports(settings, running),
        *machine.check_certificates(settings, time.time()),
    ]
    if online:
        found += await network.check_names(settings)
        found += await network.check_upstreams(settings)
    return found


def _check_settings(config: Path) -> list[Finding]:
    try:
        load_settings(config)
    except InvalidSettingsError as found:
        advice = "correct it; `tidegate config explain KEY` shows what is allowed"
        return [fault("configuration", f.key or f.source, f.what, advice) for f in found.faults]
    return [ok("configuration", str(config), "no faults")]


def _check_spool(path: Path) -> tuple[Finding, float | None]:
    if not path.exists():
        return ok("spool", str(path), "does not exist yet; the gateway creates it"), None
    try:
        with open_spool_read_only(path) as connection, closing(connection.cursor()) as cursor:
            row = cursor.execute(SQL["newest_written"]).fetchone()
    except SpoolError as reason:
        return fault("spool", str(path), str(reason), "run `tidegate spool check`"), None
    newest_s = None if row is None or row[0] is None else float(row[0]) / 1e6
    return ok("spool", str(path), "can be opened"), newest_s


def _is_service(settings: GatewaySettings) -> bool:
    """Whether this is the gateway's user, who owns the spool; without a spool, anybody but root."""
    try:
        return settings.spool.path.stat().st_uid == os.geteuid()
    except OSError:
        return os.geteuid() != 0


app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    config: Annotated[Path, typer.Option("--config", "-c", help="The gateway's TOML file.")],
    *,
    offline: Annotated[bool, typer.Option("--offline", help="Do not use the network.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also show checks without findings.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Find problems, and say what to do: clock, disk, flash, permissions, ports, host names, certificates,
    each destination (reachable, accepted, version), each broker. Changes nothing.

    Run it as root or as the service's user, while the gateway runs or is stopped.

    Exit codes: 0 without faults (warnings are not faults), 1 with faults, 2 when the settings are invalid.
    """
    try:
        found = asyncio.run(run_checks(config, online=not offline))
    except InvalidSettingsError as error:
        fail(str(error))
    by_level = {level: [f for f in found if f.level is level] for level in Level}
    faults, warnings, passed = by_level[Level.FAULT], by_level[Level.WARNING], by_level[Level.OK]
    if as_json:
        print_json({"faults": len(faults), "warnings": len(warnings), "findings": found})
    else:
        for finding in [*faults, *warnings, *(passed if everything else [])]:
            _print_finding(finding)
        counts = pluralize(len(faults), "fault", "faults"), pluralize(len(warnings), "warning", "warnings")
        typer.echo(f"{', '.join(counts)}, {pluralize(len(passed), 'check', 'checks')} passed")
    raise typer.Exit(EXIT_FOUND if faults else 0)


_COLOURS = {Level.FAULT: "red", Level.WARNING: "yellow", Level.OK: "green"}


def _print_finding(finding: Finding) -> None:
    level = typer.style(f"{finding.level:8}", fg=_COLOURS[finding.level])
    subject = f" {escape_text(finding.subject)}" if finding.subject else ""
    typer.echo(f"{level} {finding.check}{subject}: {escape_text(finding.what)}")
    if finding.advice:
        typer.echo(f"         -> {escape_text(finding.advice)}")
