"""`tidegate status`: the status document in human units, from a running gateway or a stopped one's spool."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from rich.console import Console
from rich.table import Table

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.operate.human import bytes_text, count_text, seconds_text
from gateway.operate.offline import status_of_stopped
from gateway.operate.own_endpoint import own_client, own_url
from gateway.operate.status import Status
from gateway.spool.errors import SpoolError

app = typer.Typer(add_completion=False)
_TIMEOUT_S = 5.0


@app.command()
def status(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The gateway's TOML file.")] = None,
    url: Annotated[
        str | None, typer.Option(help="A running gateway's endpoint, e.g. http://127.0.0.1:8421.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the document as JSON.")] = False,  # noqa: FBT002 - typer's way to say a flag
) -> None:
    """Show what comes in, what is kept and what is still to deliver.

    A gateway that is not running is read from its spool, and said to be stopped.
    """
    if config is None and url is None:
        fail("name the gateway: --config FILE, or --url http://127.0.0.1:8421")
    document = _asked(url) if url is not None else None
    if document is None and config is not None:
        document = _from_config(config)
    if document is None:
        fail(f"{url}: no gateway answers there")
    if as_json:
        typer.echo(msgspec.json.encode(document))
    else:
        _show(document)


def _asked(url: str) -> Status | None:
    with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
        return _from_url(url, client)


def _from_url(url: str, client: httpx.Client) -> Status | None:
    try:
        answer = client.get(f"{url.rstrip('/')}/status")
        return msgspec.json.decode(answer.content, type=Status)
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError):
        return None


def _from_config(config: Path) -> Status:
    try:
        given = settings.load(config)
    except SettingsFault as fault:
        fail(str(fault))
    if given.status.enabled:
        with own_client(_TIMEOUT_S) as client:
            document = _from_url(own_url(given.status), client)
        if document is not None and document.gateway_id == given.gateway_id:
            return document
    try:
        return status_of_stopped(given)
    except SpoolError as fault:
        fail(str(fault))


def _show(document: Status) -> None:
    console = Console()
    state = f"up {seconds_text(document.uptime_s)}" if document.running else "not running; as of its spool"
    console.print(f"gateway [bold]{document.gateway_id}[/bold] {document.version}, {state}", highlight=False)
    ingress, spool = document.ingress, document.spool
    if document.running:
        console.print(
            f"in      "
            f"{count_text(ingress.readings_per_s)} readings/s from {ingress.connections} connections, "
            f"{count_text(ingress.acknowledged)} of {count_text(ingress.publishes)} publishes acknowledged; "
            f"{count_text(ingress.quarantined)} quarantined since start",
            highlight=False,
        )
    if ingress.holding_reason:
        console.print(f"[red]holding: acknowledgements are withheld: {ingress.holding_reason}[/red]")
    room = "" if spool.room_days is None else f", about {seconds_text(spool.room_days * 86400)} of room left"
    console.print(
        f"spool   {count_text(spool.readings_ever)} readings ever, {bytes_text(spool.size_bytes)} on disk, "
        f"{bytes_text(spool.free_bytes)} free{room}",
        highlight=False,
    )
    if document.processing is not None:
        rolled = document.processing
        behind = (
            f", {count_text(rolled.lag_commits)} commits and {seconds_text(rolled.lag_s)} behind"
            if rolled.lag_s > 1
            else ""
        )
        console.print(
            f"rolled  {count_text(rolled.rollups)} rollups since start, {count_text(rolled.revisions)} of "
            f"them revisions; {count_text(rolled.windows_open)} windows open{behind}",
            highlight=False,
        )
        if rolled.last_error:
            console.print(f"[red]processing waits: {rolled.last_error}[/red]", highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in (
        "destination",
        "state",
        "backlog",
        "size",
        "oldest",
        "time to drain",
        "delivered",
        "last receipt",
    ):
        table.add_column(heading, justify="left" if heading in ("destination", "state") else "right")
    for d in document.destinations:
        table.add_row(
            f"{d.name} ({d.kind})",
            d.state,
            count_text(d.backlog_readings),
            bytes_text(d.backlog_bytes),
            "-" if d.backlog_oldest_s is None else seconds_text(d.backlog_oldest_s),
            "-" if d.drain_s is None else seconds_text(d.drain_s),
            count_text(d.delivered),
            "-"
            if d.last_receipt_at_us is None
            else f"{seconds_text(time.time() - d.last_receipt_at_us / 1e6)} ago",
        )
    console.print(table)
    for d in document.destinations:
        if d.last_error:
            console.print(f"[yellow]{d.name}: {d.last_error}[/yellow]", highlight=False)
