"""`tidegate status`: what the status page shows, from a running gateway or a stopped one's spool."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import httpx
import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from gateway.commands.exit_errors import fail
from gateway.commands.options import (
    JsonOption,
    exit_on_spool_error,
    load_settings_or_exit,
    read_secret_or_exit,
)
from gateway.commands.status_display import render_chart, render_status
from gateway.humanize import escape_text
from gateway.query.series_chart import Chart, ChartSteps, read_chart
from gateway.spool.database import open_spool_read_only
from gateway.spool.series_catalog import SeriesCatalog, read_all_series
from gateway.status.collector import read_stopped_status
from gateway.status.document import Status
from gateway.web.client import GatewayClient, GatewayClientError, local_gateway_client

if TYPE_CHECKING:
    from gateway.settings.gateway_settings import GatewaySettings

T = TypeVar("T")
app = typer.Typer(add_completion=False)
_REFRESH_S = 2.0
_DAY_US = 86_400_000_000
_CHART_STEPS = 288


@app.command()
def status(
    *,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The gateway's TOML file.")] = None,
    url: Annotated[str | None, typer.Option(help="Its endpoint, such as http://127.0.0.1:8421.")] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="With --url, from another machine: a file whose first line is a token."),
    ] = None,
    as_json: JsonOption = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between refreshes.")] = _REFRESH_S,
    series: Annotated[str | None, typer.Option(metavar="SENSOR/TYPE", help="Also draw its last day.")] = None,
) -> None:
    """Show what comes in, what is still to be delivered, what is stored, and what is wrong.

    The same as the status page. When the gateway is not running, its spool is read instead.
    """
    if config is None and url is None:
        fail("name the gateway: --config FILE, or --url http://127.0.0.1:8421")
    if series is not None and not all(series.partition("/")):
        fail(f"--series {series}: expected SENSOR/TYPE, such as stall-1/temperature")
    settings = None if config is None else load_settings_or_exit(config)
    client = None if settings is None else local_gateway_client(settings.status)
    if url is not None:
        client = GatewayClient(url, token="" if token_file is None else read_secret_or_exit(token_file))
    console = Console()
    if not watch:
        _print_status(console, client, settings, series, as_json=as_json)
        return
    try:
        if as_json or not console.is_terminal:
            while True:
                _print_status(console, client, settings, series, as_json=as_json)
                time.sleep(every)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                document, chart = _read(client, settings, series)
                live.update(_render(document, chart, series, console.width), refresh=True)
                time.sleep(every)
    except KeyboardInterrupt:
        return


def _read(
    client: GatewayClient | None, settings: GatewaySettings | None, series: str | None
) -> tuple[Status, Chart | None]:
    """The document, and the chart of a known series: of the gateway if it answers, else of the spool."""
    chart = None
    sensor_id, _, sensor_type = (series or "").partition("/")
    if client is not None:
        document = _fetch(client, "/status", Status)
        if document and (settings is None or document.gateway_id == settings.gateway_id):
            if series is not None:
                chart = _fetch(client, "/chart", Chart, sensor_id=sensor_id, sensor_type=sensor_type)
            return document, chart
    if settings is None:
        fail(f"{client and client.url}: no gateway answers")
    with exit_on_spool_error():
        if series is not None:
            chart = _read_stopped_chart(settings.spool.path, sensor_id, sensor_type)
        return read_stopped_status(settings), chart


def _fetch(client: GatewayClient, path: str, answer: type[T], **query: str) -> T | None:
    try:
        return client.get(path, answer, **query)
    except GatewayClientError as error:
        if error.status == httpx.codes.UNAUTHORIZED:
            fail(f"{client.url}: a token is required from another machine: --token-file FILE")
        return None


def _read_stopped_chart(path: Path, sensor_id: str, sensor_type: str) -> Chart | None:
    with open_spool_read_only(path) as connection:
        known = SeriesCatalog(rows=read_all_series(connection)).find(sensor_id, sensor_type)
    if known is None:
        return None
    until_us = time.time_ns() // 1000
    steps = ChartSteps(until_us - _DAY_US, until_us, _CHART_STEPS)
    return read_chart(path, known, steps)


def _print_status(
    console: Console,
    client: GatewayClient | None,
    settings: GatewaySettings | None,
    series: str | None,
    *,
    as_json: bool,
) -> None:
    document, chart = _read(client, settings, series)
    if as_json:
        typer.echo(msgspec.json.encode(document))
    else:
        console.print(_render(document, chart, series, console.width))


def _render(document: Status, chart: Chart | None, series: str | None, width: int) -> RenderableType:
    parts = [render_status(document, width)]
    if chart is not None:
        parts.append(render_chart(chart, width))
    elif series is not None:
        parts.append(Text(f"no series is called {escape_text(series, 80)}", "yellow"))
    return Group(*parts)
