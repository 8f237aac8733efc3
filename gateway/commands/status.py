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

from cloud_sync.settings_file import SettingsFault
from gateway import settings
from gateway.commands.failures import fail
from gateway.commands.status_chart import chart_display
from gateway.commands.status_display import display
from gateway.operate.offline import chart_of_stopped, status_of_stopped
from gateway.operate.own_endpoint import own_client, own_url
from gateway.operate.series_chart import Chart
from gateway.operate.status import Status
from gateway.operate.terminal import shown
from gateway.spool.errors import SpoolError

app = typer.Typer(add_completion=False)
_TIMEOUT_S = 5.0
_EVERY_S = 2.0

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
    every: Annotated[float, typer.Option(min=0.2, help="With --watch: seconds between looks.")] = _EVERY_S,
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
    source = _Source(config, url, token_file, series)
    if watch:
        _watch(source, every, as_json=as_json)
        return
    document, chart = source.look()
    if as_json:
        typer.echo(msgspec.json.encode(document))
        return
    console = Console()
    console.print(_shown(document, chart, source.series, console.width))


class _Source:
    """Where the document comes from, decided at the first look."""

    def __init__(
        self, config: Path | None, url: str | None, token_file: Path | None, series: str | None
    ) -> None:
        self.series = series
        self._settings = None
        try:
            self._settings = None if config is None else settings.load(config)
        except SettingsFault as fault:
            fail(str(fault))
        if url is not None:
            headers = {"Authorization": f"Bearer {_secret(token_file)}"} if token_file is not None else {}
            self._client: httpx.Client | None = httpx.Client(
                timeout=_TIMEOUT_S, trust_env=False, headers=headers
            )
            self._url = url.rstrip("/")
        elif self._settings is not None and self._settings.status.enabled:
            self._client, self._url = own_client(_TIMEOUT_S), own_url(self._settings.status)
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
            document = status_of_stopped(self._settings)
            return document, None if self.series is None else chart_of_stopped(self._settings, self.series)
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


def _watch(source: _Source, every_s: float, *, as_json: bool) -> None:
    """Look again and again: in place on a terminal, one document after another elsewhere."""
    console = Console()
    try:
        if as_json or not console.is_terminal:
            while True:
                document, chart = source.look()
                if as_json:
                    typer.echo(msgspec.json.encode(document))
                else:
                    console.print(_shown(document, chart, source.series, console.width))
                time.sleep(every_s)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                document, chart = source.look()
                live.update(_shown(document, chart, source.series, console.width), refresh=True)
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def _shown(document: Status, chart: Chart | None, series: str | None, width: int) -> RenderableType:
    parts = [display(document, width)]
    if chart is not None:
        parts.append(chart_display(chart, width))
    elif series is not None:
        parts.append(Text(f"no series is called {shown(series, 80)}", "yellow"))
    return Group(*parts)


def _secret(path: Path) -> str:
    try:
        return settings.secret_of(path)
    except (OSError, UnicodeDecodeError) as fault:
        fail(f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}")
