"""`tidegate status`: what the status page shows, from a running gateway or a stopped one's spool."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, TypeVar

import httpx
import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from cloud_sync.runtime.secret_files import read_secret
from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.commands.exit_errors import fail
from gateway.commands.status_display import render_chart, render_status
from gateway.humanize import escape_text
from gateway.query.series_chart import Chart
from gateway.settings import gateway_settings
from gateway.spool.errors import SpoolError
from gateway.status.collector import build_stopped_status, read_stopped_chart
from gateway.status.document import Status
from gateway.web.client import local_client, local_endpoint_url

app = typer.Typer(add_completion=False)
_TIMEOUT_S = 5.0
_REFRESH_S = 2.0

T = TypeVar("T")


@app.command()
def status(  # noqa: PLR0917 - typer reads the parameters as options
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The gateway's TOML file.")] = None,
    url: Annotated[
        str | None, typer.Option(help="A running gateway's endpoint, e.g. http://127.0.0.1:8421.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="With --url, from another machine: a file whose first line is a token."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the document as JSON.")] = False,  # noqa: FBT002 - typer's way to say a flag
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Go on showing it until Ctrl-C.")] = False,  # noqa: FBT002 - the same
    every: Annotated[float, typer.Option(min=0.2, help="With --watch: seconds between looks.")] = _REFRESH_S,
    series: Annotated[
        str | None, typer.Option(metavar="SENSOR/TYPE", help="Also draw a day of this series.")
    ] = None,
) -> None:
    """Show what comes in, what is still to deliver, what is kept, and what is wrong.

    The same as the status page. A gateway that is not running is read from its spool, and said to be stopped.
    """
    if config is None and url is None:
        fail("name the gateway: --config FILE, or --url http://127.0.0.1:8421")
    if series is not None and not all(series.partition("/")):
        fail(f"--series {series}: expected SENSOR/TYPE, such as stall-1/temperature")
    source = _StatusSource(config, url, token_file, series)
    if watch:
        _watch_status(source, every, as_json=as_json)
        return
    document, chart = source.look()
    if as_json:
        typer.echo(msgspec.json.encode(document))
        return
    console = Console()
    console.print(_render(document, chart, source.series, console.width))


class _StatusSource:
    """Where the document comes from, decided at the first look."""

    def __init__(
        self, config: Path | None, url: str | None, token_file: Path | None, series: str | None
    ) -> None:
        self.series = series
        self._settings = None
        try:
            self._settings = None if config is None else gateway_settings.load_settings(config)
        except InvalidSettingsError as fault:
            fail(str(fault))
        if url is not None:
            headers = {"Authorization": f"Bearer {_read_token(token_file)}"} if token_file is not None else {}
            self._client: httpx.Client | None = httpx.Client(
                timeout=_TIMEOUT_S, trust_env=False, headers=headers
            )
            self._url = url.rstrip("/")
        elif self._settings is not None and self._settings.status.enabled:
            self._client, self._url = local_client(_TIMEOUT_S), local_endpoint_url(self._settings.status)
        else:
            self._client, self._url = None, ""

    def look(self) -> tuple[Status, Chart | None]:
        """The document, and the chart that was asked for if there is one."""
        document = self._asked("/status", Status)
        if document is not None and (
            self._settings is None or document.gateway_id == self._settings.gateway_id
        ):
            if self.series is None:
                return document, None
            sensor_id, _, sensor_type = self.series.partition("/")
            return document, self._asked("/chart", Chart, sensor_id=sensor_id, sensor_type=sensor_type)
        if self._settings is None:
            fail(f"{self._url}: no gateway answers there")
        try:
            document = build_stopped_status(self._settings)
            return document, None if self.series is None else read_stopped_chart(self._settings, self.series)
        except SpoolError as fault:
            fail(str(fault))

    def _asked(self, path: str, kind: type[T], **query: str) -> T | None:
        if self._client is None:
            return None
        try:
            answer = self._client.get(self._url + path, params=query)
            if answer.status_code == httpx.codes.UNAUTHORIZED:
                fail(f"{self._url}: from another machine this takes a token: --token-file FILE")
            return msgspec.json.decode(answer.content, type=kind)
        except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError):
            return None


def _watch_status(source: _StatusSource, every_s: float, *, as_json: bool) -> None:
    """Look again and again: in place on a terminal, one document after another elsewhere."""
    console = Console()
    try:
        if as_json or not console.is_terminal:
            while True:
                document, chart = source.look()
                if as_json:
                    typer.echo(msgspec.json.encode(document))
                else:
                    console.print(_render(document, chart, source.series, console.width))
                time.sleep(every_s)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                document, chart = source.look()
                live.update(_render(document, chart, source.series, console.width), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def _render(document: Status, chart: Chart | None, series: str | None, width: int) -> RenderableType:
    parts = [render_status(document, width)]
    if chart is not None:
        parts.append(render_chart(chart, width))
    elif series is not None:
        parts.append(Text(f"no series is called {escape_text(series, 80)}", "yellow"))
    return Group(*parts)


def _read_token(path: Path) -> str:
    try:
        return read_secret(path)
    except (OSError, UnicodeDecodeError) as fault:
        fail(f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}")
