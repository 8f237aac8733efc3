"""`tidegate uninstall`: take the program and its units off this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.failures import fail
from gateway.commands.install import DryOption, PrefixOption, RootOption, carry_out
from gateway.setup.installation import plan_uninstall, require
from gateway.setup.layout import PREFIX, Layout
from gateway.setup.steps import SetupFault

app = typer.Typer(add_completion=False)


@app.command()
def uninstall(
    *,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove configuration, secrets and spools as well.")
    ] = False,
    prefix: PrefixOption = PREFIX,
    root: RootOption = Path("/"),
    dry_run: DryOption = False,
) -> None:
    """Stop every service of ours and remove it, with all releases. Spools and configuration stay.

    Exit codes: 0, or 2 with what was in the way.
    """
    layout = Layout(root.absolute(), prefix)
    try:
        if not dry_run:
            require(layout, uid=os.geteuid())
        carry_out(plan_uninstall(layout, purge=purge), dry=dry_run)
    except (SetupFault, OSError) as fault:
        fail(str(fault))
