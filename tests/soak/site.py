"""Everything a soak runs: fleet, gateway, ingest service, PostgreSQL, InfluxDB where there is one, and the
links.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx

from tests.soak.clock import SteppedClock
from tests.soak.link import Link
from tests.support.fixtures_influx import INFLUXD_CONFIG, Influxd
from tests.support.fixtures_postgres import LocalPostgres
from tests.support.free_ports import free_port
from tests.support.programs import ROOT, Program, Site, wait_until

if TYPE_CHECKING:
    from pathlib import Path

DISK = "size=96m"
SCENARIO = """
rate = {rate}
seconds = 0
readings_per_publish = 3
[[groups]]
name = "steady"
devices = 20
types = ["temperature", "humidity", "pressure"]
[[groups]]
name = "shaky"
devices = 6
types = ["vibration", "energy"]
ring_publishes = 2000
faults = [
    {{ kind = "duplicate", probability = 0.02 }},
    {{ kind = "reorder", probability = 0.02 }},
    {{ kind = "late", probability = 0.005, hold = 20 }},
    {{ kind = "malformed", probability = 0.01 }},
    {{ kind = "brown_out", probability = 0.0005 }},
    {{ kind = "clock_jump", probability = 0.001, size = -900 }},
    {{ kind = "network_loss", probability = 0.001, hold = 3 }},
]
[[groups]]
name = "old"
devices = 4
types = ["temperature"]
mqtt = "3.1.1"
qos = 2
"""


class Influx:
    """An influxd that is started, killed and started again on the same data."""

    def __init__(self, folder: Path, program: str) -> None:
        folder.mkdir()
        self.folder, self.port = folder, free_port()
        config = folder / "influxdb.conf"
        config.write_text(INFLUXD_CONFIG.format(folder=folder, rpc=free_port(), http=self.port, auth="false"))
        self._command = [program, "-config", str(config)]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_until(self._answers, 30)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ping", timeout=1, trust_env=False).is_success
        except httpx.HTTPError:
            return False


class SoakSite:
    """All programs and links of a soak."""

    def __init__(self, folder: Path, *, seed: int, rate: float) -> None:
        self.folder, self.truth, self.disk = folder, folder / "truth", folder / "disk"
        self.disk.mkdir()
        self.small_disk = _mounted(self.disk)
        self.clock = SteppedClock(folder)
        with warnings.catch_warnings(action="ignore"):
            self.postgres = LocalPostgres()
        self.site = Site(folder, self.postgres.dsn())
        self.region_link, self.device_link = Link(self.site.ingest_port), Link(self.site.broker_port)
        program = shutil.which("influxd")
        self.influx = Influx(folder / "influx", program) if program else None
        self.gateway, self.ingest = self.site.gateway, self.site.ingest
        self.gateway._environment = self.clock.environment
        (folder / "scenario.toml").write_text(f"seed = {seed}\n" + SCENARIO.format(rate=rate))
        self.fleet: Program | None = None

    async def start(self) -> None:
        """Start everything, the fleet last."""
        await self.region_link.up()
        await self.device_link.up()
        config = self.folder / "gateway.toml"
        text = config.read_text().replace(
            f'url = "http://127.0.0.1:{self.site.ingest_port}"',
            f'url = "http://127.0.0.1:{self.region_link.port}"\ntimeout_s = 5.0',
        )
        spool = 'path = "disk/spool.db"\nkeep_delivered_h = 0.1\nmin_free_bytes = 4000000'
        text = text.replace('path = "spool.db"', spool)
        if self.influx is not None:
            await asyncio.to_thread(self.influx.start)
            Influxd(self.influx.url).query("CREATE DATABASE soak")
            text += (
                f'[[destinations]]\nname = "cloud"\nkind = "influxdb"\nurl = "{self.influx.url}"\n'
                'api = "v1"\ndatabase = "soak"\nflush_s = 0.3\ntimeout_s = 5.0\n'
            )
        config.write_text(text)
        await asyncio.to_thread(self.ingest.start)
        await asyncio.to_thread(self.gateway.start)
        self.fleet = Program(
            self.folder,
            "fleet",
            *("sim", "run", "--broker", f"mqtt://127.0.0.1:{self.device_link.port}"),
            *("--truth", str(self.truth), "--scenario", str(self.folder / "scenario.toml"), "--quiet"),
            *("--drain-timeout", "60", "--keepalive", "5", "--json"),
        )
        await asyncio.to_thread(self.fleet.start)

    @property
    def spool(self) -> Path:
        return self.disk / "spool.db"

    async def status(self) -> dict[str, Any] | None:
        """The gateway's own words, or None while it does not answer."""
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=3) as client:
                answer = await client.get(f"http://127.0.0.1:{self.site.status_port}/status")
        except httpx.HTTPError:
            return None
        found: dict[str, Any] | None = answer.json() if answer.is_success else None
        return found

    async def ledger(self) -> tuple[int, int, int]:
        """What the region says: readings of all applied ranges, those stored of them, rows that are there."""
        connection = await asyncpg.connect(self.postgres.dsn())
        try:
            rows, stored = await connection.fetchrow(
                "SELECT coalesce(sum(rows), 0)::int8, coalesce(sum(stored), 0)::int8"
                " FROM ingest_ledger WHERE class = 4"
            )
            return rows, stored, await connection.fetchval("SELECT count(*) FROM reading")
        finally:
            await connection.close()

    def progress(self) -> dict[str, Any]:
        """The fleet's own counters."""
        path = self.truth / "progress.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    async def verify(self, *where: str) -> dict[str, Any]:
        """`tidegate sim verify` against a store, with the spool as evidence."""
        process = await asyncio.create_subprocess_exec(
            *(
                sys.executable,
                "-m",
                "gateway",
                "sim",
                "verify",
                "--truth",
                str(self.truth),
                "--quiet",
                "--json",
            ),
            *where,
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        if not out:
            raise RuntimeError(f"verify: {err.decode()[-2000:]}")
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found

    def stores(self) -> dict[str, tuple[str, ...]]:
        """Where everything must arrive, for `verify`."""
        found: dict[str, tuple[str, ...]] = {
            "region": ("--postgres", self.postgres.dsn()),
            "stick": ("--files", str(self.site.files)),
        }
        if self.influx is not None:
            found["cloud"] = ("--influx", self.influx.url, "--database", "soak")
        return found

    async def close(self) -> None:
        """Stop everything and unmount."""
        await self.region_link.cut()
        await self.device_link.cut()
        for part in (self.fleet, self.gateway, self.ingest, self.influx):
            if part is not None and part.process is not None:
                part.process.send_signal(signal.SIGCONT)
                part.kill()
        await asyncio.to_thread(self.postgres.close)
        if self.small_disk:
            await asyncio.to_thread(subprocess.run, ["umount", "-l", str(self.disk)], check=False)


def rss_mb(process: subprocess.Popen[bytes] | None) -> float:
    """Resident memory of a process, 10^6 bytes; 0 when it is gone."""
    if process is None:
        return 0.0
    try:
        with open(f"/proc/{process.pid}/status", encoding="ascii") as status:  # noqa: PTH123 - not a file of ours
            line = next((text for text in status if text.startswith("VmRSS:")), "VmRSS: 0 kB")
    except OSError:
        return 0.0
    return int(line.split()[1]) * 1024 / 1e6


def _mounted(folder: Path) -> bool:
    """Whether a small file system of its own is mounted there: only root can, and not everywhere."""
    if os.getuid() != 0:
        return False
    command = ["mount", "-t", "tmpfs", "-o", DISK, "tidegate-soak", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
