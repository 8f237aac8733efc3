"""`tidegate doctor --config FILE`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from cloud_sync.settings_file import SettingsFault
from gateway.commands.failures import fail
from gateway.commands.spool_options import EXIT_FOUND, JsonOption, print_json
from gateway.operate.doctor import Finding, Level
from gateway.operate.doctor.examination import examine
from gateway.operate.terminal import shown

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    config: Annotated[Path, typer.Option("--config", "-c", help="The gateway's TOML file.")],
    *,
    offline: Annotated[
        bool, typer.Option("--offline", help="Ask no name server, destination or broker.")
    ] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show what is well, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Look for what is wrong, and say what to do: clock, disk, flash, permissions, ports, names,
    certificates, each destination (reachable, accepted, version), each broker. Changes nothing.

    Run it as root or as the service's user, while the gateway runs or is stopped.

    Exit codes: 0 when there is no fault (warnings are none), 1 when there is one, 2 when the settings cannot
    be read.
    """
    try:
        found = asyncio.run(examine(config, online=not offline))
    except SettingsFault as fault:
        fail(str(fault))
    worst = {level: [f for f in found if f.level is level] for level in Level}
    if as_json:
        print_json(
            {"faults": len(worst[Level.FAULT]), "warnings": len(worst[Level.WARNING]), "findings": found}
        )
    else:
        _show([*worst[Level.FAULT], *worst[Level.WARNING], *(worst[Level.OK] if everything else [])])
        counts = [f"{len(worst[level])} {word}" for level, word in _WORDS.items()]
        typer.echo(", ".join(counts))
    raise typer.Exit(EXIT_FOUND if worst[Level.FAULT] else 0)


_WORDS = {Level.FAULT: "faults", Level.WARNING: "warnings", Level.OK: "checks without any"}


_COLOURS = {Level.FAULT: "red", Level.WARNING: "yellow", Level.OK: "green"}


def _show(found: list[Finding]) -> None:
    for finding in found:
        level = typer.style(f"{finding.level:8}", fg=_COLOURS[finding.level])
        subject = f" {shown(finding.subject)}" if finding.subject else ""
        typer.echo(f"{level} {finding.check}{subject}: {shown(finding.what)}")
        if finding.advice:
            typer.echo(f"         -> {shown(finding.advice)}")
