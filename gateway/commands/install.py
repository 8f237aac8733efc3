"""`tidegate install` and `tidegate uninstall`: the program, units and configuration of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated

import typer

from gateway.commands.exit_errors import fail
from gateway.commands.options import add_command
from gateway.setup.installation import (
    DEFAULT_PREFIX,
    InstallRequest,
    Layout,
    Role,
    SetupError,
    Step,
    check_prerequisites,
    find_wheel_version,
    plan_install,
    plan_uninstall,
)

install_app = typer.Typer(add_completion=False)

RootOption = Annotated[Path, typer.Option(help="Install into the image below this folder, not this machine.")]
PrefixOption = Annotated[Path, typer.Option(help="Folder of the program's releases.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Print the steps without running them.")]


@dataclass(frozen=True, kw_only=True)
class InstallOptions:
    """What `tidegate install` installs, and from where."""

    role: Annotated[Role, typer.Option(help="gateway, ingest (the service of a region) or sim.")] = "gateway"
    instance: Annotated[
        str, typer.Option(help="One of several gateways on this machine, e.g. north: tidegate-gateway@north.")
    ] = ""
    wheels: Annotated[
        Path | None,
        typer.Option(help="Folder with the wheels of tidegate and its dependencies; nothing is downloaded."),
    ] = None
    version: Annotated[str, typer.Option(help="Without --wheels: the release to install.")] = ""
    site: Annotated[str, typer.Option(help="The gateway's purpose; see `tidegate config init`.")] = "trial"
    gateway_id: Annotated[str, typer.Option(help="The gateway's name upstream.")] = ""
    url: Annotated[str, typer.Option(help="The destination's URL.")] = ""
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Use this configuration.")] = None
    token_file: Annotated[Path | None, typer.Option(help="File with the region's token; - is stdin.")] = None
    token_for: Annotated[str, typer.Option(help="ingest: create the first token, for this gateway.")] = ""
    dsn_file: Annotated[Path | None, typer.Option(help="ingest: file with the DSN; - is stdin.")] = None
    python: Annotated[str, typer.Option(help="The interpreter to run on; 3.11 or later.")] = ""
    prefix: PrefixOption = DEFAULT_PREFIX
    root: RootOption = Path("/")
    start: Annotated[bool, typer.Option(help="Enable the service and start it, or restart it.")] = True
    dry_run: DryOption = False


def install(options: InstallOptions) -> None:
    """Install or upgrade this machine: program, units, configuration, first token.

    The new release is complete before it is switched to, and the previous one is kept, as are an existing
    configuration, secrets and spool. Exit codes: 0, or 2 with the reason of the failure.
    """
    if options.instance and options.role != "gateway":
        fail("--instance is for gateways")
    if options.token_for and options.role != "ingest":
        fail("--token-for is for --role ingest; a gateway gets its token by --token-file")
    layout = Layout(options.root.absolute(), options.prefix, options.role, options.instance)
    init = ["--site", options.site]
    init += ["--gateway-id", options.gateway_id] if options.gateway_id else []
    init += ["--url", options.url] if options.url else []
    wheels, version = options.wheels, options.version
    # the interpreter outside of this program's own environment, which may be removed
    base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    system_python = str(base) if base.exists() else shutil.which("python3") or sys.executable
    try:
        if not options.dry_run:
            check_prerequisites(layout, uid=os.geteuid())
        request = InstallRequest(
            version=find_wheel_version(wheels) if wheels else version or installed_version("tidegate"),
            wheels=wheels and wheels.absolute(),
            python=options.python or system_python,
            init=init,
            config=options.config,
            token=_read_secret(options.token_file),
            token_for=options.token_for,
            dsn=_read_secret(options.dsn_file),
            start=options.start,
        )
        run_plan(plan_install(layout, request), dry=options.dry_run)
    except (SetupError, OSError, UnicodeDecodeError) as error:
        fail(str(error))


add_command(install_app, install, InstallOptions)


def run_plan(plan: Iterator[Step], *, dry: bool) -> None:
    """Print each step, and run it unless `dry`."""
    for step in list(plan):
        typer.echo(f"{'would ' if dry else ''}{step.text}")
        if not dry:
            step.run()


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
    purge: Annotated[bool, typer.Option("--purge", help="Also configuration, secrets and spools.")] = False,
    prefix: PrefixOption = DEFAULT_PREFIX,
    root: RootOption = Path("/"),
    dry_run: DryOption = False,
) -> None:
    """Stop and remove every Tidegate service and release; spools and configuration are kept.

    Exit codes: 0, or 2 with the reason of the failure.
    """
    layout = Layout(root.absolute(), prefix)
    try:
        if not dry_run:
            check_prerequisites(layout, uid=os.geteuid())
        run_plan(plan_uninstall(layout, purge=purge), dry=dry_run)
    except (SetupError, OSError) as fault:
        fail(str(fault))
