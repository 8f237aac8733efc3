"""`tidegate device` and `tidegate token`: passwords of devices and tokens of HTTP clients."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloud_sync.http import tokens
from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.auth import device_passwords
from gateway.commands.exit_errors import fail
from gateway.commands.options import EXIT_FOUND, JsonOption, print_json
from gateway.settings import gateway_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

device_app = typer.Typer(add_completion=False, no_args_is_help=True)

DeviceNameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The device's name: its user name and sensor_id.")
]
PasswordsConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", help="The gateway's TOML file, which names ingress.listen.passwords_file."
    ),
]
PasswordsFileOption = Annotated[
    Path | None, typer.Option("--passwords-file", help="The file itself, instead of --config.")
]
PasswordStdinOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from the first line of standard input.")
]


@device_app.callback()
def device() -> None:
    """Devices that connect with a password: add, list, remove, check.

    A device publishes under its own name (sensor_id NAME or NAME:part) unless publish_as says otherwise.
    """


@device_app.command("add")
def add_device(  # noqa: PLR0917 - typer reads the parameters as options
    name: DeviceNameArgument,
    config: PasswordsConfigOption = None,
    passwords_file: PasswordsFileOption = None,
    password_stdin: PasswordStdinOption = False,  # noqa: FBT002 - typer's way to say a flag
    replace: Annotated[bool, typer.Option(help="Give a device that is there a new password.")] = False,  # noqa: FBT002 - the same
    as_json: JsonOption = False,  # noqa: FBT002 - the same
) -> None:
    """Add a device and print its password, generated unless it is given. It cannot be shown again."""
    path = _passwords_file(config, passwords_file)
    given = _read_password() if password_stdin else None
    with _exit_on_credentials_error():
        password = device_passwords.add_device(path, name, given, replace=replace)
    if as_json:
        print_json({"name": name, "passwords_file": str(path), "password": None if given else password})
    elif given is None:
        typer.echo(password)


@device_app.command("token")
def manage_ingress_token(
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
    path = _ingress_tokens_file(config, tokens_file)
    known = next((s for s in tokens.SCOPES if s == scope), None)
    if known is None:
        fail(f"--scope: {scope!r}; expected one of {', '.join(tokens.SCOPES)}")
    try:
        if not revoke:
            typer.echo(tokens.add_token(path, name, known))
        elif not tokens.revoke_tokens(path, name):
            typer.echo(f"tidegate: {name} has no token in {path}", err=True)
            raise typer.Exit(EXIT_FOUND)
    except tokens.TokenFileError as fault:
        fail(str(fault))


@device_app.command("list")
def list_devices(
    config: PasswordsConfigOption = None,
    passwords_file: PasswordsFileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Print the names of all devices, in the order of the file."""
    path = _passwords_file(config, passwords_file)
    with _exit_on_credentials_error():
        names = list(device_passwords.read_password_file(path))
    if as_json:
        print_json({"passwords_file": str(path), "devices": names})
    else:
        for name in names:
            typer.echo(name)


@device_app.command("remove")
def remove_device(
    name: DeviceNameArgument,
    config: PasswordsConfigOption = None,
    passwords_file: PasswordsFileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Remove a device. A running gateway ends its connection; what it has sent stays. Exit 1: not there."""
    path = _passwords_file(config, passwords_file)
    with _exit_on_credentials_error():
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
    config: PasswordsConfigOption = None,
    passwords_file: PasswordsFileOption = None,
    password_stdin: PasswordStdinOption = False,  # noqa: FBT002 - typer's way to say a flag
    as_json: JsonOption = False,  # noqa: FBT002 - the same
) -> None:
    """Say whether a device is there, and with --password-stdin whether that is its password. Exit 1: no."""
    path = _passwords_file(config, passwords_file)
    with _exit_on_credentials_error():
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
        typer.echo(
            f"{name}: {'known' if right is None else 'the password is right' if right else 'wrong password'}"
        )
    if stored is None or right is False:
        raise typer.Exit(EXIT_FOUND)


def _passwords_file(config: Path | None, passwords_file: Path | None) -> Path:
    if (config is None) == (passwords_file is None):
        fail(
            "name the password file: --config FILE or --passwords-file FILE"
            + (", not both" if config else "")
        )
    if passwords_file is not None:
        return passwords_file
    assert config is not None
    try:
        path = gateway_settings.parse_settings_file(config).ingress.listen.passwords_file
    except InvalidSettingsError as fault:
        fail(str(fault))
    if path is None:
        fail(f'{config}: give ingress.listen.passwords_file first, such as passwords_file = "passwords"')
    return path


def _ingress_tokens_file(config: Path | None, tokens_file: Path | None) -> Path:
    if (config is None) == (tokens_file is None):
        fail(
            "name the file of tokens: --config FILE or --tokens-file FILE" + (", not both" if config else "")
        )
    if tokens_file is not None:
        return tokens_file
    assert config is not None
    try:
        path = gateway_settings.parse_settings_file(config).ingress.http.tokens_file
    except InvalidSettingsError as fault:
        fail(str(fault))
    if path is None:
        fail(f'{config}: give ingress.http.tokens_file first, such as tokens_file = "http-tokens"')
    return path


def _read_password() -> str:
    line = sys.stdin.buffer.readline().decode("utf-8", "surrogateescape").rstrip("\r\n")
    if not line or any("\ud800" <= character <= "\udfff" for character in line):
        fail("--password-stdin: expected the password on the first line of standard input, in UTF-8")
    return line


@contextlib.contextmanager
def _exit_on_credentials_error() -> Iterator[None]:
    """Tell faults that a person can mend, without a traceback."""
    try:
        yield
    except device_passwords.PasswordFileError as fault:
        fail(str(fault))


token_app = typer.Typer(add_completion=False, no_args_is_help=True)

TokenNameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Who it is for: a person, a Prometheus.")
]
TokensConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="The gateway's TOML file, which names status.tokens_file."),
]
TokensFileOption = Annotated[
    Path | None, typer.Option("--tokens-file", help="The file itself, instead of --config.")
]


@token_app.callback()
def token() -> None:
    """Tokens for the status page and /metrics from another machine: add, list, remove.

    Only hashes are stored. With a token one can look, and change nothing.
    """


@token_app.command("add")
def add_token(
    name: TokenNameArgument,
    config: TokensConfigOption = None,
    tokens_file: TokensFileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Make one more token and print it. It cannot be shown again."""
    path = _status_tokens_file(config, tokens_file)
    try:
        made = tokens.add_token(path, name, "view")
    except tokens.TokenFileError as fault:
        fail(str(fault))
    if as_json:
        print_json({"name": name, "tokens_file": str(path), "token": made})
    else:
        typer.echo(made)


@token_app.command("list")
def list_tokens(
    config: TokensConfigOption = None,
    tokens_file: TokensFileOption = None,
    as_json: JsonOption = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Print who has a token; a name that has two is there twice."""
    path = _status_tokens_file(config, tokens_file)
    try:
        names = [entry.name for entry in tokens.read_tokens(path)]
    except tokens.TokenFileError as fault:
        fail(str(fault))
    if as_json:
        print_json({"tokens_file": str(path), "names": names})
    else:
        for name in names:
            typer.echo(name)


@token_app.command("remove")
def remove_token(
    name: TokenNameArgument, config: TokensConfigOption = None, tokens_file: TokensFileOption = None
) -> None:
    """Take every token of a name away."""
    path = _status_tokens_file(config, tokens_file)
    try:
        gone = tokens.revoke_tokens(path, name)
    except tokens.TokenFileError as fault:
        fail(str(fault))
    if not gone:
        typer.echo(f"tidegate: {path}: {name} has no token", err=True)
        raise typer.Exit(EXIT_FOUND)


def _status_tokens_file(config: Path | None, tokens_file: Path | None) -> Path:
    if tokens_file is not None:
        return tokens_file
    if config is None:
        fail("name the gateway's configuration (--config FILE), or the file (--tokens-file FILE)")
    try:
        named = gateway_settings.parse_settings_file(config).status.tokens_file
    except InvalidSettingsError as fault:
        fail(str(fault))
    if named is None:
        fail(f'{config}: status.tokens_file is not set; add tokens_file = "status.tokens" under [status]')
    return named
