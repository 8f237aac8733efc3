"""`tidegate config init`: a configuration to begin with, for a purpose, with every key and what it is for."""

from __future__ import annotations

import os
import re
import socket
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.settings.written import text_of

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_REGION = "https://region.example:8420"
_INFLUX = "https://influx.example:8086"
_BROKER = "mqtts://broker.example:8883"
_STICK = "/media/stick/readings"
_SPOOL = "/var/lib/tidegate/spool.db"


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
    chosen = _chosen(
        site,
        _answer(asking, gateway_id, "The gateway's name upstream", _hostname()),
        spool or Path("spool.db" if site is Site.TRIAL else _SPOOL),
        _answer(asking and site in _UPSTREAM, url, "Where readings go", _UPSTREAM.get(site, "")),
        _answer(asking and site is Site.BROKER, broker, "The broker to read", _BROKER),
    )
    head = f"A gateway's configuration, for: {_PURPOSES[site]}.\n{_HEAD.format(file=file.name)}"
    text = text_of(settings.GatewaySettings, chosen, head)
    if to_stdout:
        typer.echo(text, nl=False)
        return
    _write(file, text, force=force)
    _tell(file)


_UPSTREAM = {Site.BARN: _REGION, Site.BROKER: _REGION, Site.CLOUD: _INFLUX}
_HEAD = """
Lines that begin with "#" and a key show that key with its default, or with an example where there is none;
take the "#" away to change it. Check the file before a gateway runs with it:

    tidegate config check {file}

Paths are relative to the folder this file is in. Any key can be given by the environment instead:
TIDEGATE_GATEWAY_INGRESS__LISTEN__PORT=1884 overrides ingress.listen.port."""


def _chosen(site: Site, gateway_id: str, spool: Path, url: str, broker: str) -> dict[str, Any]:
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
    stick = {"name": "stick", "kind": "file", "directory": _STICK, "create": False}
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


def _answer(asking: bool, option: str | None, question: str, example: str) -> str:  # noqa: FBT001 - worded at the call
    if option is not None:
        return option
    return str(typer.prompt(question, default=example)) if asking else example


def _hostname() -> str:
    return _UNSAFE.sub("-", socket.gethostname()).strip("-._")[:128] or "gateway-1"


def _write(file: Path, text: str, *, force: bool) -> None:
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if force else os.O_EXCL)
        with os.fdopen(os.open(file, flags, 0o644), "w", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        fail(f"{file} is there already; write elsewhere, or over it with --force")
    except OSError as fault:
        fail(f"{file}: {fault.strerror or fault}")


def _tell(file: Path) -> None:
    """What is still to be done before a gateway can run with it."""
    try:
        settings.load(file)
    except SettingsFault as fault:
        typer.echo(f"{file}: written. Before a gateway runs with it:")
        for entry in fault.faults:
            typer.echo(f"  {entry.key}: {entry.what}")
        return
    typer.echo(f"{file}: written. Run it: tidegate gateway --config {file}")
