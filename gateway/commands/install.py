"""`tidegate install` and `tidegate uninstall`: the program, units and configuration of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gateway.commands.exit_errors import fail
from gateway.setup.installation import (
    DEFAULT_PREFIX,
    InstallRequest,
    Layout,
    Role,
    check_prerequisites,
    find_wheel_version,
    plan_install,
    plan_uninstall,
)
from gateway.setup.steps import SetupError, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

install_app = typer.Typer(add_completion=False)

RootOption = Annotated[
    Path,
    typer.Option(help="Set up an image below this folder instead of this machine."),
]
PrefixOption = Annotated[Path, typer.Option(help="Where the program goes.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")]


@install_app.command()
def install(
    *,
    role: Annotated[Role, typer.Option(help="What is set up; ingest is the region's side.")] = "gateway",
    instance: Annotated[
        str, typer.Option(help="One of several gateways on this machine, e.g. north: tidegate-gateway@north.")
    ] = "",
    wheels: Annotated[
        Path | None,
        typer.Option(help="Folder with the wheel of tidegate and of all it needs: nothing is downloaded."),
    ] = None,
    version: Annotated[str, typer.Option(help="Release to install without --wheels.")] = "",
    site: Annotated[str, typer.Option(help="What the gateway is for; see `tidegate config init`.")] = "trial",
    gateway_id: Annotated[str, typer.Option(help="The gateway's name upstream.")] = "",
    url: Annotated[str, typer.Option(help="Where readings go.")] = "",
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Take this configuration.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that the region gave this gateway; - is stdin.")
    ] = None,
    token_for: Annotated[str, typer.Option(help="ingest: make the first token, for this gateway.")] = "",
    dsn_file: Annotated[Path | None, typer.Option(help="ingest: the database's URL; - is stdin.")] = None,
    python: Annotated[str, typer.Option(help="The interpreter to run on; 3.11 or later.")] = "",
    prefix: PrefixOption = DEFAULT_PREFIX,
    root: RootOption = Path("/"),
    start: Annotated[bool, typer.Option(help="Enable the service and start it, or restart it.")] = True,
    dry_run: DryOption = False,
) -> None:
    """Set this machine up, or bring it to another release: program, units, configuration, first token.

    The new release is complete before anything leads to it, and the one before stays. So do a configuration,
    secrets and a spool that are there. Exit codes: 0, or 2 with what was in the way.
    """
    if instance and role != "gateway":
        fail("--instance is for gateways")
    if token_for and role != "ingest":
        fail("--token-for is for --role ingest: the region gives tokens, a gateway takes one (--token-file)")
    layout = Layout(root.absolute(), prefix, role, instance)
    init = ["--site", site]
    init += ["--gateway-id", gateway_id] if gateway_id else []
    init += ["--url", url] if url else []
    try:
        if not dry_run:
            check_prerequisites(layout, uid=os.geteuid())
        wanted = InstallRequest(
            version=find_wheel_version(wheels) if wheels else version or installed_version("tidegate"),
            wheels=wheels and wheels.absolute(),
            python=python or _system_python(),
            init=init,
            config=config,
            token=_read_secret(token_file),
            token_for=token_for,
            dsn=_read_secret(dsn_file),
            start=start,
        )
        run_plan(plan_install(layout, wanted), dry=dry_run)
    except (SetupError, OSError) as fault:
        fail(str(fault))


def run_plan(plan: Iterator[Step], *, dry: bool) -> None:
    """Say each step, and do it unless it is only to be shown."""
    for step in list(plan):
        typer.echo(f"{'would ' if dry else ''}{step.says}")
        if not dry:
            step.do()


def _system_python() -> str:
    """The interpreter that stays when this program's own environment is removed."""
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    return str(base) if base.exists() else shutil.which("python3") or sys.executable


def _read_secret(path: Path | None) -> str:
    if path is None:
        return ""
    text = sys.stdin.readline() if str(path) == "-" else path.read_text(encoding="utf-8")
    secret = text.partition("\n")[0].strip()
    if not secret:
        raise SetupError(f"{path}: expected the secret on the first line")
    return secret


uninstall_app = typer.Typer(add_completion=False)


@uninstall_app.command()
def uninstall(
    *,
    purge: Annotated[
        bool, typer.Option("--purge", help="Remove configuration, secrets and spools as well.")
    ] = False,
    prefix: PrefixOption = DEFAULT_PREFIX,
    root: RootOption = Path("/"),
    dry_run: DryOption = False,
) -> None:
    """Stop every service of ours and remove it, with all releases. Spools and configuration stay.

    Exit codes: 0, or 2 with what was in the way.
    """
    layout = Layout(root.absolute(), prefix)
    try:
        if not dry_run:
            check_prerequisites(layout, uid=os.geteuid())
        run_plan(plan_uninstall(layout, purge=purge), dry=dry_run)
    except (SetupError, OSError) as fault:
        fail(str(fault))
