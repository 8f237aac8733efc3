"""`tidegate config check | show | explain | diff | init | apply`."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import msgspec
import typer

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands import config_apply, config_init
from gateway.commands.failures import fail
from gateway.commands.spool_options import JsonOption, console, print_json, table
from gateway.operate.own_endpoint import own_client, own_url
from gateway.operate.terminal import shown
from gateway.settings.changes import changes, restart_reason
from gateway.settings.effective import DEFAULT, effective, flat, masked
from gateway.settings.keys import Key, keys_of, toml_text

if TYPE_CHECKING:
    from collections.abc import Mapping

app = typer.Typer(add_completion=False, no_args_is_help=True)
app.command()(config_init.init)
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
    path = _named(file, config, "check")
    try:
        given = settings.load(path)
    except SettingsFault as fault:
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
    path = _named(file, config, "show")
    try:
        values = [v for v in effective(path) if not changed or v.source != DEFAULT]
    except SettingsFault as fault:
        fail(str(fault))
    if as_json:
        print_json([value._asdict() for value in values])
        return
    rows = table("key", "value", "from")
    for value in values:
        rows.add_row(shown(value.key), _said(value.value), shown(value.source))
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
    keys = keys_of(settings.GatewaySettings)
    found = keys if key is None else _matching(keys, key)
    if not found:
        paths = sorted({_plainly(k.path) for k in keys})
        close = difflib.get_close_matches(_plainly(key or ""), paths, n=3, cutoff=0.5)
        fail(
            f"there is no key {shown(key or '')}" + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    if as_json:
        print_json([_document(entry) for entry in found])
    elif len({entry.path for entry in found}) == 1:
        for entry in found:
            typer.echo(_explained(entry))
    else:
        rows = table("key", "of", "type", "default", "what it is")
        for entry in found:
            default = "(required)" if entry.required else "" if entry.is_table else _said(entry.default)
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
        given = settings.read(old)
        was, becomes = flat(given), flat(settings.read(new)) if new is not None else {}
    except SettingsFault as fault:
        fail(str(fault))
    if new is None:
        was, becomes = running_values(given), _masked(was)
    found = changes(was, becomes)
    restart = [change for change in found if change.restart]
    if as_json:
        print_json({"changes": [c._asdict() for c in found], "needs": _needs(len(found), len(restart))})
    else:
        for change in found:
            typer.echo(shown(str(change)))
        typer.echo(
            {
                "nothing": "nothing differs",
                "reload": "a reload suffices: systemctl reload, or SIGHUP to the gateway",
                "restart": f"a restart is needed for {len(restart)} of {len(found)}; a reload is refused",
            }[_needs(len(found), len(restart))]
        )
    raise typer.Exit(EXIT_DIFFERENT if found else 0)


def running_values(given: settings.GatewaySettings) -> dict[str, Any]:
    """What the gateway that serves this configuration's status endpoint has in force, masked."""
    if not given.status.enabled:
        fail("the running gateway cannot be asked: [status] is not enabled")
    url = f"{own_url(given.status)}/config"
    try:
        with own_client(_TIMEOUT_S) as client:
            answer = client.get(url).raise_for_status()
        values: dict[str, Any] = msgspec.json.decode(answer.content, type=dict[str, Any])["values"]
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError, KeyError) as fault:
        fail(f"no gateway says at {url} what it has in force: {fault}")
    return values


def _masked(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: masked(key, value) for key, value in values.items()}


def _needs(changed: int, restarts: int) -> str:
    return "restart" if restarts else "reload" if changed else "nothing"


def _named(file: Path | None, config: Path | None, command: str) -> Path:
    path = file or config
    if path is None:
        fail(f"name the configuration: tidegate config {command} FILE")
    return path


def _matching(keys: list[Key], asked: str) -> list[Key]:
    """The key that is asked for, else what is in the table of that name, else keys whose last part it is."""
    name = _plainly(asked)
    exact = [key for key in keys if _plainly(key.path) == name]
    if exact and not exact[0].is_table:
        return exact
    inside = [key for key in keys if _plainly(key.path).startswith(f"{name}.")]
    return exact + inside if exact or inside else [key for key in keys if key.name == name]


def _plainly(path: str) -> str:
    """A path without brackets and what is in them."""
    return _BRACKETS.sub("", path)


def _explained(key: Key) -> str:
    allowed = f", {key.allowed}" if key.allowed else ""
    unit = f", in {key.unit}" if key.unit else ""
    default = (
        "required"
        if key.required
        else f"default {_said(key.default)}"
        if key.default is not None
        else "no default"
    )
    reason = restart_reason(key.path)
    header = f"[[{key.table.removesuffix('[]')}]]" if key.table.endswith("[]") else f"[{key.table}]"
    lines = [
        f"{key.path}" + (f" (kind {', '.join(key.kinds)})" if key.kinds else ""),
        f"  {key.description}",
        f"  {key.type}{allowed}{unit}; {default}",
        "  example:",
        *([f"    {header}"] if key.table else []),
        f"    {key.name} = {toml_text(key.example)}",
        f"  a change takes a {'restart: ' + reason if reason else 'reload'}",
    ]
    if "[]" not in key.path:
        lines.append(f"  environment: {_variable(key.path)}")
    return "\n".join(lines)


def _document(key: Key) -> dict[str, Any]:
    reason = restart_reason(key.path)
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
        "environment": None if "[]" in key.path else _variable(key.path),
    }


def _variable(path: str) -> str:
    return settings.ENV_PREFIX + path.replace(".", "__").upper()


def _said(value: Any) -> str:
    return "" if value is None else shown(toml_text(value))
