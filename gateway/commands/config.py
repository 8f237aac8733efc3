"""`tidegate config check FILE`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def config() -> None:
    """Check a configuration before a gateway runs with it."""


@app.command()
def check(
    file: Annotated[Path | None, typer.Argument(help="The gateway's TOML file.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The same, as an option.")] = None,
) -> None:
    """Report every fault at once, each with its file and key; exit 2 when there is one."""
    path = file or config
    if path is None:
        fail("name the configuration to check: tidegate config check FILE")
    try:
        given = settings.load(path)
    except SettingsFault as fault:
        fail(str(fault))
    names = ", ".join(f"{d.name} ({d.kind})" for d in given.destinations) or "none"
    typer.echo(f"{path}: ok. gateway {given.gateway_id}, destinations: {names}")
