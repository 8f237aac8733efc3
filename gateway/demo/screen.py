"""The demo's live table, and plain lines where there is no terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.operate.human import bytes_text, count_text, seconds_text

if TYPE_CHECKING:
    from gateway.operate.status import Status

_LINE_EVERY_S = 2.0


@dataclass(slots=True)
class Numbers:
    """One look at every tier. None: that tier is down."""

    elapsed_s: float = 0.0
    published: int = 0
    acknowledged: int = 0
    gateway: Status | None = None
    region: int = 0
    cloud: int = 0
    happening: str = ""


@dataclass(slots=True)
class Screen:
    """Shows numbers as they change, and every event once, with its time."""

    console: Console = field(default_factory=lambda: Console(highlight=False))
    _live: Live | None = None
    _started: float = field(default_factory=time.monotonic)
    _line_at: float = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, text: str) -> None:
        """Say what has just happened."""
        self.console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/dim]  {text}")

    def show(self, numbers: Numbers) -> None:
        """Show the newest numbers."""
        if self._live is not None:
            self._live.update(Group(Text(numbers.happening, style="bold cyan"), _table(numbers)))
        elif time.monotonic() - self._line_at >= _LINE_EVERY_S:
            self._line_at = time.monotonic()
            self.console.print(_line(numbers), soft_wrap=True)


def _table(numbers: Numbers) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("published", count_text(numbers.published), "by the fleet, over MQTT")
    table.add_row("acknowledged", count_text(numbers.acknowledged), "after the fsync in the gateway's spool")
    status = numbers.gateway
    if status is None:
        table.add_row("spooled", "-", "[red]the gateway is down[/red]")
    else:
        table.add_row("spooled", count_text(status.spool.readings_ever), bytes_text(status.spool.size_bytes))
        for d in status.destinations:
            state = f"[yellow]{d.state}: {d.last_error}[/yellow]" if d.last_error else d.state
            table.add_row(
                f"backlog {d.name}",
                count_text(d.backlog_readings),
                f"{_backlog_text(status, d.name)}, {state}",
            )
    table.add_row("at the region", count_text(numbers.region), "rows in PostgreSQL")
    table.add_row("in the cloud", count_text(numbers.cloud), "points")
    return table


def _line(numbers: Numbers) -> str:
    parts = [f"published {numbers.published}", f"acknowledged {numbers.acknowledged}"]
    if numbers.gateway is None:
        parts.append("gateway down")
    else:
        parts.append(f"spooled {numbers.gateway.spool.readings_ever}")
        parts += [
            f"backlog {d.name} {d.backlog_readings} ({_backlog_text(numbers.gateway, d.name)})"
            for d in numbers.gateway.destinations
        ]
    parts += [f"region {numbers.region}", f"cloud {numbers.cloud}"]
    return f"          {', '.join(parts)}"


def _backlog_text(status: Status, name: str) -> str:
    d = next(d for d in status.destinations if d.name == name)
    oldest = "no backlog" if d.backlog_oldest_s is None else f"oldest {seconds_text(d.backlog_oldest_s)}"
    drain = (
        ""
        if not d.backlog_readings
        else f", drained in {'?' if d.drain_s is None else seconds_text(d.drain_s)}"
    )
    return oldest + drain
