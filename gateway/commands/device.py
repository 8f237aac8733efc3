"""`tidegate device`: who may connect with a password. Changes take effect in a running gateway at once."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloud_sync.ingest import tokens
from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.commands.spool_options import EXIT_FOUND, JsonOption, print_json
from gateway.ingress import credentials

if TYPE_CHECKING:
    from collections.abc import Iterator

app = typer.Typer(add_completion=False, no_args_is_help=True)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The device's name: its user name and sensor_id.")
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="The gateway's TOML file, which names ingress.listen.passwords_file."
    ),
]
FileOption = Annotated[
    Path | None, typer.Option("--passwords-file", help="The file itself, instead of --config.")
]
StdinOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]


@app.callback()
def device() -> None:
    """Devices that connect with a password: add, list, remove, check.

    A device publishes under its own name (sensor_id NAME or NAME:part) unless publish_as says otherwise.
    """


@app.command()
def add(  # noqa: PLR0917 - typer reads the parameters as options
    name: NameArgument,
    config: ConfigOption = None,
    passwords_file: FileOption = None,
    password_stdin: StdinOption = False,  # noqa: FBT002 - typer's way to say a flag
    replace: Annotated[bool, typer.Option(help="Give a device that is there a new password.")] = False,  # noqa: FBT002 - the same
    as_json: JsonOption = False,  # noqa: FBT002 - the same
) -> None:
    """Add a device and print its password, generated unless it is given. It cannot be shown again."""
    path = _file(config, passwords_file)
    given = _from_stdin() if password_stdin else None
    with _told():
        password = credentials.add(path, name, given, replace=replace)
    if as_json:
        print_json({"name": name, "passwords_file": str(path), "password": None if given else password})
    elif given is None:
        typer.echo(password)


@app.command()
def token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A gateway's gateway_id, or a client's name.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The gateway's TOML file, which names ingress.http.tokens_file."),
    ] = None,
    tokens_file: Annotated[
        Path | None, typer.Option("--tokens-file", help="The file itself, instead of --config.")
    ] = None,
    scope: Annotated[
        str,
        typer.Option(
            help="batches: the gateway NAME delivers here. readings: a client sends readings under its name. "
            "view: someone reads what every gateway has delivered."
        ),
    ] = "batches",
    revoke: Annotated[bool, typer.Option("--revoke", help="Take away every token of NAME instead.")] = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Give a gateway or client a token for the HTTP ingress, and print it. It cannot be shown again."""
    path = _tokens_file(config, tokens_file)
    known = next((s for s in tokens.SCOPES if s == scope), None)
    if known is None:
        fail(f"--scope: {scope!r}; expected one of {', '.join(tokens.SCOPES)}")
    try:
        if not revoke:
            typer.echo(tokens.add(path, name, known))
        elif not tokens.revoke(path, name):
            typer.echo(f"tidegate: {name} has no token in {path}", err=True)
            raise typer.Exit(EXIT_FOUND)
    except tokens.TokensFault as fault:
        fail(str(fault))


@app.command("list")
def list_devices(
    config: ConfigOption = None,
    passwords_file: FileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Print the names of all devices, in the order of the file."""
    path = _file(config, passwords_file)
    with _told():
        names = list(credentials.read(path))
    if as_json:
        print_json({"passwords_file": str(path), "devices": names})
    else:
        for name in names:
            typer.echo(name)


@app.command()
def remove(
    name: NameArgument,
    config: ConfigOption = None,
    passwords_file: FileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Remove a device. A running gateway ends its connection; what it has sent stays. Exit 1: not there."""
    path = _file(config, passwords_file)
    with _told():
        removed = credentials.remove(path, name)
    if as_json:
        print_json({"name": name, "passwords_file": str(path), "removed": removed})
    elif not removed:
        typer.echo(f"tidegate: {name} is not in {path}", err=True)
    if not removed:
        raise typer.Exit(EXIT_FOUND)


@app.command()
def check(
    name: NameArgument,
    config: ConfigOption = None,
    passwords_file: FileOption = None,
    password_stdin: StdinOption = False,  # noqa: FBT002 - typer's way to say a flag
    as_json: JsonOption = False,  # noqa: FBT002 - the same
) -> None:
    """Say whether a device is there, and with --password-stdin whether that is its password. Exit 1: no."""
    path = _file(config, passwords_file)
    with _told():
        stored = credentials.read(path).get(name)
    right = None
    if stored is not None and password_stdin:
        right = credentials.matches(stored, _from_stdin().encode())
    if as_json:
        print_json(
            {"name": name, "passwords_file": str(path), "known": stored is not None, "password_right": right}
        )
    elif stored is None:
        typer.echo(f"{name}: not in {path}")
    else:
        typer.echo(
            f"{name}: {'known' if right is None else 'the password is right' if right else 'wrong password'}"
        )
    if stored is None or right is False:
        raise typer.Exit(EXIT_FOUND)


def _file(config: Path | None, passwords_file: Path | None) -> Path:
    if (config is None) == (passwords_file is None):
        fail(
            "name the password file: --config FILE or --passwords-file FILE"
            + (", not both" if config else "")
        )
    if passwords_file is not None:
        return passwords_file
    assert config is not None
    try:
        path = settings.read(config).ingress.listen.passwords_file
    except SettingsFault as fault:
        fail(str(fault))
    if path is None:
        fail(f'{config}: give ingress.listen.passwords_file first, such as passwords_file = "passwords"')
    return path


def _tokens_file(config: Path | None, tokens_file: Path | None) -> Path:
    if (config is None) == (tokens_file is None):
        fail(
            "name the file of tokens: --config FILE or --tokens-file FILE" + (", not both" if config else "")
        )
    if tokens_file is not None:
        return tokens_file
    assert config is not None
    try:
        path = settings.read(config).ingress.http.tokens_file
    except SettingsFault as fault:
        fail(str(fault))
    if path is None:
        fail(f'{config}: give ingress.http.tokens_file first, such as tokens_file = "http-tokens"')
    return path


def _from_stdin() -> str:
    line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape").rstrip("\r\n")
    if not line or any("\ud800" <= character <= "\udfff" for character in line):
        fail("--password-stdin: expected the password on the first line of standard input, in UTF-8")
    return line


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell faults that a person can mend, without a traceback."""
    try:
        yield
    except credentials.CredentialsFault as fault:
        fail(str(fault))
