"""`tidegate device` and `tidegate token`: passwords of devices and tokens of HTTP clients."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cloud_sync.http import tokens
from gateway.auth import device_passwords
from gateway.commands.exit_errors import fail
from gateway.commands.options import EXIT_FOUND, JsonOption, parse_settings_or_exit, print_json

device_app = typer.Typer(add_completion=False, no_args_is_help=True)
token_app = typer.Typer(add_completion=False, no_args_is_help=True)

DeviceNameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Its user name and sensor_id.")]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="The gateway's file, which names it.")
]
PasswordsFileOption = Annotated[
    Path | None, typer.Option("--passwords-file", help="The password file, without --config.")
]
TokensFileOption = Annotated[
    Path | None, typer.Option("--tokens-file", help="The token file, without --config.")
]
PasswordStdinOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]


@device_app.callback()
def device() -> None:
    """Passwords of devices: add, list, remove, check. Tokens of HTTP clients: token.

    A device publishes under its own name (sensor_id NAME or NAME:part) unless publish_as says otherwise.
    """


@device_app.command("add")
def add_device(
    name: DeviceNameArgument,
    *,
    config: ConfigOption = None,
    passwords_file: PasswordsFileOption = None,
    password_stdin: PasswordStdinOption = False,
    replace: Annotated[bool, typer.Option(help="Give an existing device a new password.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add a device and print its password, generated unless it is given. It cannot be shown again."""
    path = _find_file("ingress.listen.passwords_file", config, passwords_file)
    chosen = _read_password() if password_stdin else None
    with _exit_on_error():
        password = device_passwords.add_device(path, name, chosen, replace=replace)
    if as_json:
        print_json({"name": name, "passwords_file": str(path), "password": None if chosen else password})
    elif chosen is None:
        typer.echo(password)


@device_app.command("token")
def manage_ingress_token(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A gateway's gateway_id, or a client's name.")],
    *,
    config: ConfigOption = None,
    tokens_file: TokensFileOption = None,
    scope: Annotated[
        str,
        typer.Option(
            help="batches: the gateway NAME delivers here. readings: a client sends readings under its name. "
            "view: someone reads what every gateway has delivered."
        ),
    ] = "batches",
    revoke: Annotated[bool, typer.Option("--revoke", help="Revoke every token of NAME instead.")] = False,
) -> None:
    """Give a gateway or client a token for the HTTP ingress, and print it. It cannot be shown again."""
    path = _find_file("ingress.http.tokens_file", config, tokens_file)
    known = next((s for s in tokens.SCOPES if s == scope), None)
    if known is None:
        fail(f"--scope: {scope!r}; expected one of {', '.join(tokens.SCOPES)}")
    if revoke:
        _revoke_tokens(path, name)
        return
    with _exit_on_error():
        typer.echo(tokens.add_token(path, name, known))


@device_app.command("list")
def list_devices(
    *, config: ConfigOption = None, passwords_file: PasswordsFileOption = None, as_json: JsonOption = False
) -> None:
    """Print the names of all devices, in the order of the file."""
    path = _find_file("ingress.listen.passwords_file", config, passwords_file)
    with _exit_on_error():
        names = list(device_passwords.read_password_file(path))
    _print_names({"passwords_file": str(path), "devices": names}, names, as_json=as_json)


@device_app.command("remove")
def remove_device(
    name: DeviceNameArgument,
    *,
    config: ConfigOption = None,
    passwords_file: PasswordsFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove a device. A running gateway closes its connection; its readings stay. Exit 1: no such device."""
    path = _find_file("ingress.listen.passwords_file", config, passwords_file)
    with _exit_on_error():
        removed = device_passwords.remove_device(path, name)
    if as_json:
        print_json({"name": name, "passwords_file": str(path), "removed": removed})
    elif not removed:
        typer.echo(f"tidegate: {name} is not in {path}", err=True)
    if not removed:
        raise typer.Exit(EXIT_FOUND)


@device_app.command("check")
def check_device(
    name: DeviceNameArgument,
    *,
    config: ConfigOption = None,
    passwords_file: PasswordsFileOption = None,
    password_stdin: PasswordStdinOption = False,
    as_json: JsonOption = False,
) -> None:
    """Whether a device exists, and with --password-stdin whether that is its password. Exit 1: no."""
    path = _find_file("ingress.listen.passwords_file", config, passwords_file)
    with _exit_on_error():
        stored = device_passwords.read_password_file(path).get(name)
    right = None
    if stored is not None and password_stdin:
        right = device_passwords.verify_password(stored, _read_password().encode())
    if as_json:
        print_json(
            {"name": name, "passwords_file": str(path), "known": stored is not None, "password_right": right}
        )
    elif stored is None:
        typer.echo(f"{name}: not in {path}")
    else:
        verdict = {None: "known", True: "the password is right", False: "wrong password"}[right]
        typer.echo(f"{name}: {verdict}")
    if stored is None or right is False:
        raise typer.Exit(EXIT_FOUND)


@token_app.callback()
def token() -> None:
    """Tokens for the status page and /metrics from another machine: add, list, remove.

    Only hashes are stored. A token permits viewing, and no changes.
    """


TokenNameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A person, or a Prometheus.")]


@token_app.command("add")
def add_token(
    name: TokenNameArgument,
    *,
    config: ConfigOption = None,
    tokens_file: TokensFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create a token and print it. It cannot be shown again."""
    path = _find_file("status.tokens_file", config, tokens_file)
    with _exit_on_error():
        created = tokens.add_token(path, name, "view")
    if as_json:
        print_json({"name": name, "tokens_file": str(path), "token": created})
    else:
        typer.echo(created)


@token_app.command("list")
def list_tokens(
    *, config: ConfigOption = None, tokens_file: TokensFileOption = None, as_json: JsonOption = False
) -> None:
    """Print who has a token; a name with two tokens is printed twice."""
    path = _find_file("status.tokens_file", config, tokens_file)
    with _exit_on_error():
        names = [entry.name for entry in tokens.read_tokens(path)]
    _print_names({"tokens_file": str(path), "names": names}, names, as_json=as_json)


@token_app.command("remove")
def remove_token(
    name: TokenNameArgument, *, config: ConfigOption = None, tokens_file: TokensFileOption = None
) -> None:
    """Revoke every token of a name. Exit 1: it has none."""
    _revoke_tokens(_find_file("status.tokens_file", config, tokens_file), name)


def _find_file(key: str, config: Path | None, file: Path | None) -> Path:
    """The file that an option names, or that the configuration names with `key`."""
    name = key.rpartition(".")[2]
    if file is not None and (config is None or key == "status.tokens_file"):
        return file
    if config is None or file is not None:
        either = f"--config FILE or --{name.replace('_', '-')} FILE"
        fail(f"name the file: {either}" + (", not both" if config else ""))
    settings = parse_settings_or_exit(config)
    path = {
        "ingress.listen.passwords_file": settings.ingress.listen.passwords_file,
        "ingress.http.tokens_file": settings.ingress.http.tokens_file,
        "status.tokens_file": settings.status.tokens_file,
    }[key]
    if path is None:
        fail(f'{config}: {key} is not set; add for instance {name} = "{name.removesuffix("_file")}"')
    return path


def _revoke_tokens(path: Path, name: str) -> None:
    with _exit_on_error():
        revoked = tokens.revoke_tokens(path, name)
    if not revoked:
        typer.echo(f"tidegate: {path}: {name} has no token", err=True)
        raise typer.Exit(EXIT_FOUND)


def _print_names(document: object, names: list[str], *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        for name in names:
            typer.echo(name)


def _read_password() -> str:
    line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape").rstrip("\r\n")
    if not line or any("\ud800" <= character <= "\udfff" for character in line):
        fail("--password-stdin: expected the password on the first line of standard input, in UTF-8")
    return line


@contextmanager
def _exit_on_error() -> Iterator[None]:
    try:
        yield
    except (device_passwords.PasswordFileError, tokens.TokenFileError) as error:
        fail(str(error))
