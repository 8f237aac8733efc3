"""`tidegate config init | check | show | explain | diff`."""

from __future__ import annotations

import difflib
import os
import re
import socket
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import msgspec
import typer

from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands import config_apply
from gateway.commands.exit_errors import fail
from gateway.commands.options import JsonOption, console, print_json, table
from gateway.humanize import escape_text
from gateway.settings import gateway_settings
from gateway.settings.config_changes import (
    DEFAULT_SOURCE,
    diff_settings,
    find_restart_reason,
    flatten_settings,
    redact_value,
    resolve_config,
)
from gateway.settings.schema import ConfigKey, format_toml_value, list_keys, render_config_file
from gateway.web.client import local_client, local_endpoint_url

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
_EXAMPLE_REGION_URL = "https://region.example:8420"
_EXAMPLE_INFLUX_URL = "https://influx.example:8086"
_EXAMPLE_BROKER_URL = "mqtts://broker.example:8883"
_EXAMPLE_STICK_PATH = "/media/stick/readings"
_DEFAULT_SPOOL_PATH = "/var/lib/tidegate/spool.db"


class Site(Enum):
    """What a gateway is there for."""

    BARN = "barn"
    BROKER = "broker"
    CLOUD = "cloud"
    STICK = "stick"
    TRIAL = "trial"


_PURPOSES = {
    Site.BARN: "devices publish to the gateway over TLS, with passwords; readings go to a region",
    Site.BROKER: "the gateway reads an existing MQTT 5 broker; readings go to a region",
    Site.CLOUD: "devices publish to the gateway over TLS, with passwords; readings go to an InfluxDB",
    Site.STICK: "devices publish to the gateway over TLS, with passwords; readings leave on a stick",
    Site.TRIAL: "everything on this machine, nothing asked of anyone; readings go to files beside the spool",
}


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it; - is standard output.")] = Path(
        "gateway.toml"
    ),
    *,
    site: Annotated[
        Site,
        typer.Option(
            help="What the gateway is there for. barn: devices here, a region above. broker: reads an "
            "existing broker. cloud: to an InfluxDB. stick: to files that are carried away. trial: this "
            "machine only."
        ),
    ] = Site.BARN,
    gateway_id: Annotated[
        str | None, typer.Option(help="The gateway's name upstream; this machine's without it.")
    ] = None,
    spool: Annotated[Path | None, typer.Option(help="The spool's file.")] = None,
    url: Annotated[str | None, typer.Option(help="The destination's address.")] = None,
    broker: Annotated[str | None, typer.Option(help="The broker's address (broker).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a configuration with every key, its default and what it is for; what the site needs is in force.

    In a terminal it asks for what no option says; otherwise it takes an example. What is still missing then,
    such as a token, is told.

    Exit codes: 0, or 2 when the file is there already or an answer cannot be used.
    """
    to_stdout = str(file) == "-"
    if not to_stdout and file.exists() and not force:
        fail(f"{file} is there already; write elsewhere, or over it with --force")
    asking = not to_stdout and sys.stdin.isatty() and sys.stdout.isatty()
    chosen = _site_tables(
        site,
        _option_or_prompt(asking, gateway_id, "The gateway's name upstream", _hostname()),
        spool or Path("spool.db" if site is Site.TRIAL else _DEFAULT_SPOOL_PATH),
        _option_or_prompt(
            asking and site in _EXAMPLE_URLS, url, "Where readings go", _EXAMPLE_URLS.get(site, "")
        ),
        _option_or_prompt(asking and site is Site.BROKER, broker, "The broker to read", _EXAMPLE_BROKER_URL),
    )
    head = f"A gateway's configuration, for: {_PURPOSES[site]}.\n{_HEAD.format(file=file.name)}"
    text = render_config_file(gateway_settings.GatewaySettings, chosen, head)
    if to_stdout:
        typer.echo(text, nl=False)
        return
    _write_config(file, text, force=force)
    _print_next_steps(file)


_EXAMPLE_URLS = {
    Site.BARN: _EXAMPLE_REGION_URL,
    Site.BROKER: _EXAMPLE_REGION_URL,
    Site.CLOUD: _EXAMPLE_INFLUX_URL,
}
_HEAD = """
Lines that begin with "#" and a key show that key with its default, or with an example where there is none;
take the "#" away to change it. Check the file before a gateway runs with it:

    tidegate config check {file}

Paths are relative to the folder this file is in. Any key can be given by the environment instead:
TIDEGATE_GATEWAY_INGRESS__LISTEN__PORT=1884 overrides ingress.listen.port."""


def _site_tables(site: Site, gateway_id: str, spool: Path, url: str, broker: str) -> dict[str, Any]:
    """What is in force for a site, as the tables of the file."""
    guarded = {
        "host": "0.0.0.0",  # noqa: S104 - devices are elsewhere; TLS and passwords are asked for
        "port": 8883,
        "tls_cert_file": "server.pem",
        "tls_key_file": "server.key",
        "passwords_file": "/var/lib/tidegate/passwords",
    }
    region = {"name": "regional", "kind": "ingest", "url": url, "token_file": "secrets/regional.token"}
    cloud = {
        "name": "cloud",
        "kind": "influxdb",
        "url": url,
        "org": "farm",
        "bucket": "sensors",
        "token_file": "secrets/cloud.token",
    }
    stick = {"name": "stick", "kind": "file", "directory": _EXAMPLE_STICK_PATH, "create": False}
    files = {"name": "files", "kind": "file", "directory": str(spool.parent / "readings"), "compress": False}
    reading = {
        "url": broker,
        "filters": ["sensors/#"],
        "username": gateway_id,
        "password_file": "secrets/broker.password",
    }
    ingress, destination = {
        Site.BARN: ({"listen": guarded}, region),
        Site.BROKER: ({"subscribe": [reading]}, region),
        Site.CLOUD: ({"listen": guarded}, cloud),
        Site.STICK: ({"listen": guarded}, stick),
        Site.TRIAL: ({}, files),
    }[site]
    return {
        "gateway_id": gateway_id,
        "spool": {"path": str(spool)},
        "ingress": ingress,
        "destinations": [destination],
    }


def _option_or_prompt(asking: bool, option: str | None, question: str, example: str) -> str:  # noqa: FBT001 - worded at the call
    if option is not None:
        return option
    return str(typer.prompt(question, default=example)) if asking else example


def _hostname() -> str:
    return _UNSAFE_CHARACTERS.sub("-", socket.gethostname()).strip("-._")[:128] or "gateway-1"


def _write_config(file: Path, text: str, *, force: bool) -> None:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
        with os.fdopen(os.open(file, flags, 0o644), "w", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        fail(f"{file} is there already; write elsewhere, or over it with --force")
    except OSError as fault:
        fail(f"{file}: {fault.strerror or fault}")


def _print_next_steps(file: Path) -> None:
    """What is still to be done before a gateway can run with it."""
    try:
        gateway_settings.load_settings(file)
    except InvalidSettingsError as fault:
        typer.echo(f"{file}: written. Before a gateway runs with it:")
        for entry in fault.faults:
            typer.echo(f"  {entry.key}: {entry.what}")
        return
    typer.echo(f"{file}: written. Run it: tidegate gateway --config {file}")


app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command()(init)
app.command()(config_apply.apply)

EXIT_DIFFERENT = 1
_TIMEOUT_S = 5.0
_BRACKETS = re.compile(r"\[[^\]]*\]|\{[^}]*\}")
_FileArgument = Annotated[Path | None, typer.Argument(help="The gateway's TOML file.")]
_ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="The same, as an option.")]


@app.callback()
def config() -> None:
    """Write, check, explain and compare configurations, and bring one into force."""


@app.command()
def check(file: _FileArgument = None, config: _ConfigOption = None) -> None:
    """Report every fault at once, each with its file and key.

    Exit codes: 0, or 2 when there is a fault.
    """
    path = _config_path(file, config, "check")
    try:
        given = gateway_settings.load_settings(path)
    except InvalidSettingsError as fault:
        fail(str(fault))
    names = ", ".join(f"{d.name} ({d.kind})" for d in given.destinations) or "none"
    typer.echo(f"{path}: ok. gateway {given.gateway_id}, destinations: {names}")


@app.command()
def show(
    file: _FileArgument = None,
    config: _ConfigOption = None,
    *,
    changed: Annotated[bool, typer.Option("--changed", help="Leave out what is the default.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the value of every key that is in force, and where it was said: file, environment or default.

    Secrets are masked. Files that settings name are not looked at; `check` does that.

    Exit codes: 0, or 2 when the configuration has faults.
    """
    path = _config_path(file, config, "show")
    try:
        values = [v for v in resolve_config(path) if not changed or v.source != DEFAULT_SOURCE]
    except InvalidSettingsError as fault:
        fail(str(fault))
    if as_json:
        print_json([value._asdict() for value in values])
        return
    rows = table("key", "value", "from")
    for value in values:
        rows.add_row(escape_text(value.key), _format_value(value.value), escape_text(value.source))
    console().print(rows)


@app.command()
def explain(
    key: Annotated[
        str | None, typer.Argument(help="A key such as spool.path or destinations.url; none for all.")
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Say what a key is for: type, unit, default, what is allowed, an example, and what a change takes.

    A table's name lists its keys. A last part such as `port` finds every key of that name.

    Exit codes: 0, or 2 when there is no such key.
    """
    keys = list_keys(gateway_settings.GatewaySettings)
    found = keys if key is None else _find_keys(keys, key)
    if not found:
        paths = sorted({_strip_brackets(k.path) for k in keys})
        close = difflib.get_close_matches(_strip_brackets(key or ""), paths, n=3, cutoff=0.5)
        fail(
            f"there is no key {escape_text(key or '')}"
            + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    if as_json:
        print_json([_key_document(entry) for entry in found])
    elif len({entry.path for entry in found}) == 1:
        for entry in found:
            typer.echo(_explanation(entry))
    else:
        rows = table("key", "of", "type", "default", "what it is")
        for entry in found:
            default = (
                "(required)" if entry.required else "" if entry.is_table else _format_value(entry.default)
            )
            rows.add_row(entry.path, " ".join(entry.kinds), entry.type, default, entry.description)
        console().print(rows)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="The configuration now.")],
    new: Annotated[
        Path | None, typer.Argument(help="The one to come; without it OLD is compared with what runs.")
    ] = None,
    *,
    running: Annotated[
        bool, typer.Option("--running", help="Compare OLD with what the running gateway has in force.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what would change, key by key, and whether a reload suffices or a restart is needed.

    Against the running gateway the change is from what it has in force to what the file says now.

    Exit codes: 0 when nothing differs, 1 when something does, 2 when a configuration has faults.
    """
    if running and new is not None:
        fail("name one file with --running: it is compared with what the gateway has in force")
    try:
        given = gateway_settings.parse_settings_file(old)
        was, becomes = (
            flatten_settings(given),
            flatten_settings(gateway_settings.parse_settings_file(new)) if new is not None else {},
        )
    except InvalidSettingsError as fault:
        fail(str(fault))
    if new is None:
        was, becomes = fetch_running_values(given), _mask_values(was)
    found = diff_settings(was, becomes)
    restart = [change for change in found if change.restart]
    if as_json:
        print_json(
            {"changes": [c._asdict() for c in found], "needs": _required_action(len(found), len(restart))}
        )
    else:
        for change in found:
            typer.echo(escape_text(str(change)))
        typer.echo(
            {
                "nothing": "nothing differs",
                "reload": "a reload suffices: systemctl reload, or SIGHUP to the gateway",
                "restart": f"a restart is needed for {len(restart)} of {len(found)}; a reload is refused",
            }[_required_action(len(found), len(restart))]
        )
    raise typer.Exit(EXIT_DIFFERENT if found else 0)


def fetch_running_values(given: gateway_settings.GatewaySettings) -> dict[str, Any]:
    """What the gateway that serves this configuration's status endpoint has in force, masked."""
    if not given.status.enabled:
        fail("the running gateway cannot be asked: [status] is not enabled")
    url = f"{local_endpoint_url(given.status)}/config"
    try:
        with local_client(_TIMEOUT_S) as client:
            answer = client.get(url).raise_for_status()
        values: dict[str, Any] = msgspec.json.decode(answer.content, type=dict[str, Any])["values"]
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, KeyError) as fault:
        fail(f"no gateway says at {url} what it has in force: {fault}")
    return values


def _mask_values(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: redact_value(key, value) for key, value in values.items()}


def _required_action(changed: int, restarts: int) -> str:
    return "restart" if restarts else "reload" if changed else "nothing"


def _config_path(file: Path | None, config: Path | None, command: str) -> Path:
    path = file or config
    if path is None:
        fail(f"name the configuration: tidegate config {command} FILE")
    return path


def _find_keys(keys: list[ConfigKey], asked: str) -> list[ConfigKey]:
    """The key that is asked for, else what is in the table of that name, else keys whose last part it is."""
    name = _strip_brackets(asked)
    exact = [key for key in keys if _strip_brackets(key.path) == name]
    if exact and not exact[0].is_table:
        return exact
    inside = [key for key in keys if _strip_brackets(key.path).startswith(f"{name}.")]
    return exact + inside if exact or inside else [key for key in keys if key.name == name]


def _strip_brackets(path: str) -> str:
    """A path without brackets and what is in them."""
    return _BRACKETS.sub("", path)


def _explanation(key: ConfigKey) -> str:
    allowed = f", {key.allowed}" if key.allowed else ""
    unit = f", in {key.unit}" if key.unit else ""
    default = (
        "required"
        if key.required
        else f"default {_format_value(key.default)}"
        if key.default is not None
        else "no default"
    )
    reason = find_restart_reason(key.path)
    header = f"[[{key.table.removesuffix('[]')}]]" if key.table.endswith("[]") else f"[{key.table}]"
    lines = [
        f"{key.path}" + (f" (kind {', '.join(key.kinds)})" if key.kinds else ""),
        f"  {key.description}",
        f"  {key.type}{allowed}{unit}; {default}",
        "  example:",
        *([f"    {header}"] if key.table else []),
        f"    {key.name} = {format_toml_value(key.example)}",
        f"  a change takes a {'restart: ' + reason if reason else 'reload'}",
    ]
    if "[]" not in key.path:
        lines.append(f"  environment: {_environment_variable(key.path)}")
    return "\n".join(lines)


def _key_document(key: ConfigKey) -> dict[str, Any]:
    reason = find_restart_reason(key.path)
    return {
        "key": key.path,
        "kinds": list(key.kinds),
        "type": key.type,
        "allowed": key.allowed,
        "unit": key.unit,
        "required": key.required,
        "default": key.default,
        "example": key.example,
        "description": key.description,
        "change": "restart" if reason else "reload",
        "environment": None if "[]" in key.path else _environment_variable(key.path),
    }


def _environment_variable(path: str) -> str:
    return gateway_settings.ENV_PREFIX + path.replace(".", "__").upper()


def _format_value(value: Any) -> str:
    return "" if value is None else escape_text(format_toml_value(value))
