"""The tiers of the demo as child processes: how each is started, stopped and counted."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn, Protocol

import httpx
import msgspec

from gateway.status.document import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_PR_SET_PDEATHSIG = 1
_TIDEGATE = (sys.executable, "-m", "gateway")


class DemoError(Exception):
    """The demo cannot go on; the message says why and where to look."""


@dataclass(slots=True)
class Processes:
    """Children by name, with their logs in `folder`."""

    folder: Path
    keep_running: bool = False
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def tidegate(self, name: str, *arguments: str) -> None:
        """Start a `tidegate` command."""
        self.start(name, (*_TIDEGATE, *arguments))

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a child; what it prints goes to its log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603 - commands made by the demo itself
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if self.keep_running else _die_with_parent,  # noqa: PLW1509 - one prctl call
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def pids(self) -> dict[str, int]:
        """The pid of every child that runs."""
        return {name: child.pid for name, child in self._running.items() if child.poll() is None}

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut would have it."""
        child = self._running.pop(name)
        child.kill()
        child.wait()

    def stop(self, name: str, within_s: float = 15.0) -> int:
        """SIGTERM, then SIGKILL when it takes too long; returns the exit code."""
        child = self._running.pop(name, None)
        if child is None:
            return 0
        child.terminate()
        try:
            return child.wait(within_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def stop_all(self) -> None:
        """Stop every child, the newest first."""
        for name in reversed(list(self._running)):
            self.stop(name, within_s=5.0)

    def until(self, what: str, name: str, true: Callable[[], bool], within_s: float = 30.0) -> None:
        """Wait until `true()`; fail when the child ends or time runs out."""
        deadline = time.monotonic() + within_s
        while not true():
            if self._running[name].poll() is not None:
                self.fail(name, f"{name} ended while waiting until {what}")
            if time.monotonic() > deadline:
                self.fail(name, f"{name}: not {what} after {within_s:.0f} s")
            time.sleep(0.05)

    def fail(self, name: str, message: str) -> NoReturn:
        """Raise with the last lines of a child's log."""
        log = self.folder / f"{name}.log"
        tail = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
        raise DemoError("\n".join([message, *(f"  {line}" for line in tail), f"  (log: {log})"]))


def terminate_pids(pids: dict[str, int]) -> None:
    """Stop processes of an earlier demo that were left running."""
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


GATEWAY_ID = "demo-gateway"
_TIMEOUT_S = 2.0


def free_port() -> int:
    """A TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Region:
    """PostgreSQL from a wheel, and the ingest service in front of it."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self.dsn = ""
        self.url = f"http://127.0.0.1:{free_port()}"
        self.token_file = folder / "gateway-token"
        self._config = folder / "ingest.toml"
        self._processes = processes

    def prepare(self, dsn: str) -> None:
        """Write the service's configuration and give the gateway a token."""
        from cloud_sync.http import tokens  # noqa: PLC0415 - an extra of the demo

        self.dsn = dsn
        port = self.url.rpartition(":")[2]
        self._config.write_text(
            f'tokens_file = "tokens"\n\n[listen]\nport = {port}\n\n[database]\ndsn = {json.dumps(dsn)}\n'
        )
        (self.folder / "tokens").touch()
        self.token_file.write_text(tokens.add_token(self.folder / "tokens", GATEWAY_ID) + "\n")

    def start(self) -> None:
        """Start the ingest service and wait until it answers."""
        self._processes.tidegate("ingest", "ingest", "--config", str(self._config))
        self._processes.until("it is ready", "ingest", lambda: _is_up(f"{self.url}/readyz"))

    def stop(self) -> None:
        """Stop the ingest service."""
        self._processes.stop("ingest")


class Cloud(Protocol):
    """The cloud tier: a `[[destinations]]` table for the gateway, and how many readings it holds."""

    name: str

    def start(self) -> str:
        """Start it; returns its destination table."""
        ...

    def stored(self) -> int:
        """Readings it holds now."""
        ...


class VictoriaMetrics:
    """The InfluxDB v2 write path, as VictoriaMetrics takes it."""

    name = "victoria-metrics"

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder = folder
        self._processes = processes
        self.url = f"http://127.0.0.1:{free_port()}"

    def start(self) -> str:
        """Start it on a folder of its own."""
        self._processes.start(
            self.name,
            (
                "victoria-metrics",
                f"-storageDataPath={self._folder / 'victoria-metrics'}",
                f"-httpListenAddr={self.url.removeprefix('http://')}",
                "-retentionPeriod=100y",
                "-dedup.minScrapeInterval=1ms",
                "-search.latencyOffset=0s",
            ),
        )
        self._processes.until("it is ready", self.name, lambda: _is_up(f"{self.url}/health"))
        return f'kind = "influxdb"\nurl = "{self.url}"\napi = "v2"\norg = "demo"\nbucket = "demo"\n'

    def stored(self) -> int:
        """Samples of the field `value`, counted by its own query language."""
        query = {
            "query": 'sum(count_over_time({__name__=~".*_value"}[1d]))',
            "time": str(time.time() + 60),
            "nocache": "1",
        }
        try:
            answer = httpx.get(
                f"{self.url}/api/v1/query", params=query, timeout=_TIMEOUT_S, trust_env=False
            ).json()
            return sum(int(float(series["value"][1])) for series in answer["data"]["result"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return 0


class InfluxDb1:
    """InfluxDB 1, through its v1 write path."""

    name = "influxd"

    def __init__(self, folder: Path, processes: Processes) -> None:
        self._folder = folder / "influxdb"
        self._processes = processes
        self.url = f"http://127.0.0.1:{free_port()}"

    def start(self) -> str:
        """Start it on a folder of its own and make a database."""
        self._folder.mkdir()
        config = self._folder / "influxdb.conf"
        config.write_text(
            f'reporting-disabled = true\nbind-address = "127.0.0.1:{free_port()}"\n'
            f'[meta]\ndir = "{self._folder}/meta"\n[data]\ndir = "{self._folder}/data"\n'
            f'wal-dir = "{self._folder}/wal"\n[http]\nbind-address = "{self.url.removeprefix("http://")}"\n'
        )
        self._processes.start(self.name, ("influxd", "-config", str(config)))
        self._processes.until("it is ready", self.name, lambda: _is_up(f"{self.url}/ping"))
        httpx.post(
            f"{self.url}/query", params={"q": 'CREATE DATABASE "demo"'}, timeout=_TIMEOUT_S, trust_env=False
        )
        return f'kind = "influxdb"\nurl = "{self.url}"\napi = "v1"\ndatabase = "demo"\n'

    def stored(self) -> int:
        """Points with the field `value`, over every measurement."""
        query = {"db": "demo", "q": "SELECT count(value) FROM /.*/"}
        try:
            answer = httpx.get(f"{self.url}/query", params=query, timeout=_TIMEOUT_S, trust_env=False).json()
            return sum(int(series["values"][0][1]) for series in answer["results"][0].get("series", ()))
        except (httpx.HTTPError, ValueError, KeyError, IndexError):
            return 0


class FileCloud:
    """No cloud on this machine: line protocol in files, as a site would carry it away on a stick."""

    name = "files"

    def __init__(self, folder: Path, _: Processes) -> None:
        self._folder = folder / "cloud-files"

    def start(self) -> str:
        """Nothing to start."""
        return f'kind = "file"\ndirectory = "{self._folder}"\ncompress = false\nmin_free_bytes = 0\n'

    def stored(self) -> int:
        """Lines written so far."""
        return sum(path.read_bytes().count(b"\n") for path in self._folder.glob("*.lp"))


def choose_cloud(folder: Path, processes: Processes) -> Cloud:
    """The first cloud tier that this machine has."""
    for tier in (VictoriaMetrics, InfluxDb1):
        if shutil.which(tier.name):
            return tier(folder, processes)
    return FileCloud(folder, processes)


class Edge:
    """The gateway."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.folder = folder
        self.broker = f"mqtt://127.0.0.1:{free_port()}"
        self.status_url = f"http://127.0.0.1:{free_port()}"
        self.config = folder / "gateway.toml"
        self._processes = processes

    def prepare(self, region: Region, cloud_table: str) -> None:
        """Write the gateway's configuration."""
        self.config.write_text(
            f'gateway_id = "{GATEWAY_ID}"\n\n[spool]\npath = "spool.db"\n\n'
            f"[ingress.listen]\nport = {self.broker.rpartition(':')[2]}\n\n[ingress.host]\nperiod_s = 2\n\n"
            f"[status]\nport = {self.status_url.rpartition(':')[2]}\n\n"
            f'[[destinations]]\nname = "regional"\nkind = "ingest"\nurl = "{region.url}"\n'
            f'token_file = "{region.token_file.name}"\nflush_s = 0.5\n\n'
            f'[[destinations]]\nname = "cloud"\nflush_s = 0.5\n{cloud_table}'
        )

    def start(self) -> None:
        """Start the gateway and wait until it is ready."""
        self._processes.tidegate("gateway", "gateway", "--config", str(self.config))
        self._processes.until("it is ready", "gateway", lambda: _is_up(f"{self.status_url}/readyz"))

    def kill(self) -> None:
        """SIGKILL."""
        self._processes.kill("gateway")

    def status(self) -> Status | None:
        """Its status document, None while it is down."""
        try:
            answer = httpx.get(f"{self.status_url}/status", timeout=_TIMEOUT_S, trust_env=False)
            return msgspec.json.decode(answer.content, type=Status)
        except (httpx.HTTPError, msgspec.DecodeError):
            return None


class Fleet:
    """The simulated devices and their record of the truth."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.truth = folder / "truth"
        self._processes = processes

    def start(self, broker: str, *, devices: int, rate: float) -> None:
        """Start the fleet and wait until it has published."""
        self._processes.tidegate(
            "fleet",
            *("sim", "run", "--broker", broker, "--truth", str(self.truth), "--quiet"),
            *("--devices", str(devices), "--rate", str(rate), "--seconds", "0", "--drain-timeout", "20"),
        )
        self._processes.until("it has published", "fleet", lambda: self.progress().get("published", 0) > 0)

    def progress(self) -> dict[str, int]:
        """Its counters: produced, published, acknowledged, ..."""
        try:
            counters: dict[str, int] = json.loads((self.truth / "progress.json").read_text())
        except (OSError, ValueError):
            return {}
        return counters

    def stop(self) -> None:
        """Let it stop producing, wait for what is not acknowledged yet, and end."""
        if self._processes.stop("fleet", within_s=40.0) != 0:
            self._processes.fail("fleet", "the fleet did not end properly")

    def verify(self, dsn: str, report: Path) -> dict[str, int]:
        """Compare its record with the region's rows, one by one; returns the differences."""
        with report.open("wb") as out:
            subprocess.run(  # noqa: S603 - our own command
                (
                    *(sys.executable, "-m", "gateway", "sim", "verify", "--quiet", "--json"),
                    *("--truth", str(self.truth), "--postgres", dsn),
                ),
                stdout=out,
                stderr=subprocess.STDOUT,
                check=False,
            )
        try:
            differences: dict[str, int] = json.loads(report.read_text().splitlines()[-1])
        except (IndexError, ValueError):
            raise DemoError(f"the comparison did not end properly; see {report}") from None
        return differences


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url, timeout=_TIMEOUT_S, trust_env=False).is_success
    except httpx.HTTPError:
        return False
