"""`tidegate token`: who may look at the status page from another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloud_sync.ingest import tokens
from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.commands.spool_options import EXIT_FOUND, JsonOption, print_json

app = typer.Typer(add_completion=False, no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Who it is for: a person, a Prometheus.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The gateway's TOML file, which names status.tokens_file."),
]
FileOption = Annotated[
    Path | None, typer.Option("--tokens-file", help="The file itself, instead of --config.")
]


@app.callback()
def token() -> None:
    """Tokens for the status page and /metrics from another machine: add, list, remove.

    Only hashes are stored. With a token one can look, and change nothing.
    """


@app.command()
def add(
    name: NameArgument,
    config: ConfigOption = None,
    tokens_file: FileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Make one more token and print it. It cannot be shown again."""
    path = _file(config, tokens_file)
    try:
        made = tokens.add(path, name, "view")
    except tokens.TokensFault as fault:
        fail(str(fault))
    if as_json:
        print_json({"name": name, "tokens_file": str(path), "token": made})
    else:
        typer.echo(made)


@app.command("list")
def list_tokens(
    config: ConfigOption = None,
    tokens_file: FileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Print who has a token; a name that has two is there twice."""
    path = _file(config, tokens_file)
    try:
        names = [entry.name for entry in tokens.read(path)]
    except tokens.TokensFault as fault:
        fail(str(fault))
    if as_json:
        print_json({"tokens_file": str(path), "names": names})
    else:
        for name in names:
            typer.echo(name)


@app.command()
def remove(name: NameArgument, config: ConfigOption = None, tokens_file: FileOption = None) -> None:
    """Take every token of a name away."""
    path = _file(config, tokens_file)
    try:
        gone = tokens.revoke(path, name)
    except tokens.TokensFault as fault:
        fail(str(fault))
    if not gone:
        typer.echo(f"tidegate: {path}: {name} has no token", err=True)
        raise typer.Exit(EXIT_FOUND)


def _file(config: Path | None, tokens_file: Path | None) -> Path:
    if tokens_file is not None:
        return tokens_file
    if config is None:
        fail("name the gateway's configuration (--config FILE), or the file (--tokens-file FILE)")
    try:
        named = settings.read(config).status.tokens_file
    except SettingsFault as fault:
        fail(str(fault))
    if named is None:
        fail(f'{config}: status.tokens_file is not set; add tokens_file = "status.tokens" under [status]')
    return named
