"""`tidegate config init | check | show | explain | diff`."""

from __future__ import annotations

import difflib
import re
import socket
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands import config_apply
from gateway.commands.exit_errors import fail
from gateway.commands.options import (
    JsonOption,
    console,
    load_settings_or_exit,
    parse_settings_or_exit,
    print_json,
    table,
)
from gateway.humanize import escape_text
from gateway.settings.config_changes import DEFAULT_SOURCE, diff_settings, flatten_settings, resolve_config
from gateway.settings.gateway_settings import ENV_PREFIX, GatewaySettings, load_settings
from gateway.settings.reference import ConfigKey, format_toml_value, list_keys, render_config_file
from gateway.status.active_config import ActiveConfigDocument, mask_settings
from gateway.web.client import GatewayClientError, local_gateway_client

_UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9._-]+")
EXIT_DIFFERENT = 1


class Site(Enum):
    """What the gateway is used for."""

    BARN = "barn"
    BROKER = "broker"
    CLOUD = "cloud"
    STICK = "stick"
    TRIAL = "trial"


_PURPOSES = {
    Site.BARN: "devices publish to the gateway over TLS, with passwords; readings go to a region",
    Site.BROKER: "the gateway subscribes to an existing MQTT 5 broker; readings go to a region",
    Site.CLOUD: "devices publish to the gateway over TLS, with passwords; readings go to an InfluxDB",
    Site.STICK: "devices publish to the gateway over TLS, with passwords; readings go to a USB stick",
    Site.TRIAL: "this machine only, without passwords; readings go to files beside the spool",
}
_REGION_URL, _CLOUD_URL = "https://region.example:8420", "https://influx.example:8086"
_EXAMPLE_URLS = {Site.BARN: _REGION_URL, Site.BROKER: _REGION_URL, Site.CLOUD: _CLOUD_URL}


def init(
    file: Annotated[Path, typer.Argument(help="The file to write; - is stdout.")] = Path("gateway.toml"),
    *,
    site: Annotated[
        Site,
        typer.Option(
            help="What the gateway is used for. barn: local devices, delivery to a region. broker: reads an "
            "existing broker. cloud: delivery to an InfluxDB. stick: delivery to files on a USB stick. "
            "trial: this machine only."
        ),
    ] = Site.BARN,
    gateway_id: Annotated[
        str | None, typer.Option(help="Its name upstream; by default the host name.")
    ] = None,
    spool: Annotated[Path | None, typer.Option(help="The spool's file.")] = None,
    url: Annotated[str | None, typer.Option(help="The destination's URL.")] = None,
    broker: Annotated[str | None, typer.Option(help="With --site broker: the broker's URL.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a configuration that lists every key with default and description; the site's keys are set.

    On a terminal it prompts for values that no option gives; otherwise it uses examples. It then lists what
    is still missing, such as a token.

    Exit codes: 0, or 2 when the file exists already or a value cannot be used.
    """
    to_stdout = str(file) == "-"
    if not to_stdout and file.exists() and not force:
        fail(f"{file} exists already; choose another name, or overwrite it with --force")
    prompts = not to_stdout and sys.stdin.isatty() and sys.stdout.isatty()

    def choose(option: str | None, question: str, example: str, *, needed: bool = True) -> str:
        if option is not None:
            return option
        return str(typer.prompt(question, default=example)) if prompts and needed else example

    hostname = _UNSAFE_CHARACTERS.sub("-", socket.gethostname()).strip("-._")[:128] or "gateway-1"
    example_url, example_broker = _EXAMPLE_URLS.get(site, ""), "mqtts://broker.example:8883"
    chosen = _site_tables(
        site,
        choose(gateway_id, "The gateway's name upstream", hostname),
        spool or Path("spool.db" if site is Site.TRIAL else "/var/lib/tidegate/spool.db"),
        choose(url, "The destination's URL", example_url, needed=site in _EXAMPLE_URLS),
        choose(broker, "The broker's URL", example_broker, needed=site is Site.BROKER),
    )
    head = f"Configuration of a gateway: {_PURPOSES[site]}.\n{_HEAD.format(file=file.name)}"
    text = render_config_file(GatewaySettings, chosen, head)
    if to_stdout:
        typer.echo(text, nl=False)
        return
    _write_config(file, text, force=force)
    try:
        load_settings(file)
    except InvalidSettingsError as fault:
        typer.echo(f"{file}: written. Still needed before a gateway can start with it:")
        for entry in fault.faults:
            typer.echo(f"  {entry.key}: {entry.what}")
        return
    typer.echo(f"{file}: written. Start the gateway: tidegate gateway --config {file}")


_HEAD = """
Lines that begin with "#" and a key show that key with its default, or with an example if it has none;
remove the "#" to change it. Check the file before starting a gateway with it:

    tidegate config check {file}

Paths are relative to the folder of this file. An environment variable overrides a key:
TIDEGATE_GATEWAY_INGRESS__LISTEN__PORT=1884 overrides ingress.listen.port."""


def _site_tables(site: Site, gateway_id: str, spool: Path, url: str, broker: str) -> dict[str, Any]:
    tls_listener = {
        "host": "0.0.0.0",  # noqa: S104 - devices connect from elsewhere, with TLS and passwords
        "port": 8883,
        "tls_cert_file": "server.pem",
        "tls_key_file": "server.key",
        "passwords_file": "/var/lib/tidegate/passwords",
    }
    region = {"name": "regional", "kind": "ingest", "url": url, "token_file": "secrets/regional.token"}
    cloud = {"name": "cloud", "kind": "influxdb", "url": url, "token_file": "secrets/cloud.token"}
    cloud |= {"org": "farm", "bucket": "sensors"}
    stick = {"name": "stick", "kind": "file", "directory": "/media/stick/readings", "create": False}
    files = {"name": "files", "kind": "file", "directory": str(spool.parent / "readings"), "compress": False}
    subscription = {
        "url": broker,
        "filters": ["sensors/#"],
        "username": gateway_id,
        "password_file": "secrets/broker.password",
    }
    ingress, destination = {
        Site.BARN: ({"listen": tls_listener}, region),
        Site.BROKER: ({"subscribe": [subscription]}, region),
        Site.CLOUD: ({"listen": tls_listener}, cloud),
        Site.STICK: ({"listen": tls_listener}, stick),
        Site.TRIAL: ({}, files),
    }[site]
    return {
        "gateway_id": gateway_id,
        "spool": {"path": str(spool)},
        "ingress": ingress,
        "destinations": [destination],
    }


def _write_config(file: Path, text: str, *, force: bool) -> None:
    try:
        with file.open("w" if force else "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        fail(f"{file} exists already; choose another name, or overwrite it with --force")
    except OSError as fault:
        fail(f"{file}: {fault.strerror or fault}")


app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command()(init)
app.command()(config_apply.apply)
_BRACKETS = re.compile(r"\[[^\]]*\]|\{[^}]*\}")
_FileArgument = Annotated[Path | None, typer.Argument(help="The gateway's TOML file.")]
_ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="The same as FILE.")]


@app.callback()
def config() -> None:
    """Write, check, explain, compare and apply configurations."""


@app.command()
def check(file: _FileArgument = None, config: _ConfigOption = None) -> None:
    """Report every error at once, each with its file and key.

    Exit codes: 0, or 2 when there is an error.
    """
    path = _config_path(file, config, "check")
    settings = load_settings_or_exit(path)
    names = ", ".join(f"{d.name} ({d.kind})" for d in settings.destinations) or "none"
    typer.echo(f"{path}: ok. gateway {settings.gateway_id}, destinations: {names}")


@app.command()
def show(
    file: _FileArgument = None,
    config: _ConfigOption = None,
    *,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only keys that differ from their default.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the value of every key and where it comes from: file, environment or default.

    Secrets are masked. Files that settings name are not read; `check` does that.

    Exit codes: 0, or 2 when the configuration has errors.
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
        str | None, typer.Argument(help="A key such as spool.path or destinations.url; all keys if omitted.")
    ] = None,
    *,
    as_json: JsonOption = False,
) -> None:
    """Describe a key: type, unit, default, allowed values, an example, and whether a change needs a restart.

    The name of a table lists its keys. A last part such as `port` finds every key of that name.

    Exit codes: 0, or 2 when there is no such key.
    """
    keys = list_keys(GatewaySettings)
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
        rows = table("key", "kind", "type", "default", "description")
        for entry in found:
            default = "" if entry.is_table else _format_value(entry.default)
            default = "(required)" if entry.required else default
            rows.add_row(entry.path, " ".join(entry.kinds), entry.type, default, entry.description)
        console().print(rows)


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="The present configuration.")],
    new: Annotated[
        Path | None, typer.Argument(help="The new one; if omitted, OLD is compared with the running gateway.")
    ] = None,
    *,
    running: Annotated[bool, typer.Option("--running", help="Compare OLD with the running gateway.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what differs, key by key, and whether a reload is enough or a restart is needed.

    Compared with the running gateway, the change is from its active values to those of the file.

    Exit codes: 0 no difference, 1 differences, 2 a configuration has errors.
    """
    if running and new is not None:
        fail("--running takes one file: it is compared with the running gateway's configuration")
    settings = parse_settings_or_exit(old)
    if new is None:
        before, after = _fetch_running_values(settings), mask_settings(settings)
    else:
        before, after = flatten_settings(settings), flatten_settings(parse_settings_or_exit(new))
    found = diff_settings(before, after)
    restarts = sum(bool(change.restart) for change in found)
    needs = "restart" if restarts else "reload" if found else "nothing"
    if as_json:
        print_json({"changes": [change._asdict() for change in found], "needs": needs})
    else:
        for change in found:
            typer.echo(escape_text(str(change)))
        typer.echo(
            {
                "nothing": "no difference",
                "reload": "a reload is enough: systemctl reload, or SIGHUP to the gateway",
                "restart": f"{restarts} of {len(found)} changes need a restart; a reload is refused",
            }[needs]
        )
    raise typer.Exit(EXIT_DIFFERENT if found else 0)


def _fetch_running_values(settings: GatewaySettings) -> dict[str, Any]:
    client = local_gateway_client(settings.status)
    if client is None:
        fail("the running gateway cannot be queried: [status] is not enabled")
    try:
        return client.get("/config", ActiveConfigDocument).values
    except GatewayClientError as error:
        fail(f"no gateway answers with its active configuration: {error}")


def _config_path(file: Path | None, config: Path | None, command: str) -> Path:
    path = file or config
    if path is None:
        fail(f"name the configuration file: tidegate config {command} FILE")
    return path


def _find_keys(keys: list[ConfigKey], text: str) -> list[ConfigKey]:
    """The key of that path, else the keys of that table, else the keys with that last part."""
    name = _strip_brackets(text)
    exact = [key for key in keys if _strip_brackets(key.path) == name]
    if exact and not exact[0].is_table:
        return exact
    inside = [key for key in keys if _strip_brackets(key.path).startswith(f"{name}.")]
    return exact + inside if exact or inside else [key for key in keys if key.name == name]


def _strip_brackets(path: str) -> str:
    return _BRACKETS.sub("", path)


def _explanation(key: ConfigKey) -> str:
    allowed = f", {key.allowed}" if key.allowed else ""
    unit = f", in {key.unit}" if key.unit else ""
    default = "no default" if key.default is None else f"default {_format_value(key.default)}"
    header = f"[[{key.table.removesuffix('[]')}]]" if key.table.endswith("[]") else f"[{key.table}]"
    lines = [
        f"{key.path}" + (f" (kind {', '.join(key.kinds)})" if key.kinds else ""),
        f"  {key.description}",
        f"  {key.type}{allowed}{unit}; {'required' if key.required else default}",
        "  example:",
        *([f"    {header}"] if key.table else []),
        f"    {key.name} = {format_toml_value(key.example)}",
        f"  a change needs a {f'restart: {key.restart}' if key.restart else 'reload'}",
    ]
    if variable := _environment_variable(key.path):
        lines.append(f"  environment: {variable}")
    return "\n".join(lines)


def _key_document(key: ConfigKey) -> dict[str, Any]:
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
        "change": "restart" if key.restart else "reload",
        "environment": _environment_variable(key.path),
    }


def _environment_variable(path: str) -> str | None:
    return None if "[]" in path else ENV_PREFIX + path.replace(".", "__").upper()


def _format_value(value: Any) -> str:
    return "" if value is None else escape_text(format_toml_value(value))
