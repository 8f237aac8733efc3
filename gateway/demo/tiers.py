"""The tiers of the demo as child processes: how each is started, stopped and counted."""

from __future__ import annotations

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
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import httpx

from gateway.status.document import Status
from gateway.web.client import GatewayClient, GatewayClientError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_PR_SET_PDEATHSIG = 1
_TIDEGATE = (sys.executable, "-m", "gateway")


class DemoError(Exception):
    """The demo cannot continue; the message says why and where to look."""


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
        die_with_parent = partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, signal.SIGKILL)
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603 - commands made by the demo itself
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if self.keep_running else die_with_parent,  # noqa: PLW1509 - one prctl call
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def pids(self) -> dict[str, int]:
        """The pids of running children."""
        return {name: child.pid for name, child in self._running.items() if child.poll() is None}

    def kill(self, name: str) -> None:
        """SIGKILL, to stand in for a power cut."""
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

    def wait_until(self, state: str, name: str, reached: Callable[[], bool], within_s: float = 30.0) -> None:
        """Wait until `reached`; fail when the child ends or time runs out."""
        deadline = time.monotonic() + within_s
        while not reached():
            if self._running[name].poll() is not None:
                self.fail(name, f"{name} ended before it was {state}")
            if time.monotonic() > deadline:
                self.fail(name, f"{name}: not {state} after {within_s:.0f} s")
            time.sleep(0.05)

    def fail(self, name: str, message: str) -> NoReturn:
        """Raise with the last lines of a child's log."""
        log = self.folder / f"{name}.log"
        tail = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
        raise DemoError("\n".join([message, *(f"  {line}" for line in tail), f"  (log: {log})"]))


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
        """Write the service's configuration and create the gateway's token."""
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
        self._processes.wait_until("ready", "ingest", lambda: _is_up(f"{self.url}/readyz"))


@dataclass(frozen=True, slots=True)
class Cloud:
    """A running cloud tier: the gateway's destination table for it, and how many readings it holds."""

    table: str
    count: Callable[[], int]


def start_victoria_metrics(folder: Path, processes: Processes) -> Cloud:
    """VictoriaMetrics, through its InfluxDB v2 write path."""
    url = f"http://127.0.0.1:{free_port()}"
    processes.start(
        "victoria-metrics",
        (
            "victoria-metrics",
            f"-storageDataPath={folder / 'victoria-metrics'}",
            f"-httpListenAddr={url.removeprefix('http://')}",
            "-retentionPeriod=100y",
            "-dedup.minScrapeInterval=1ms",
            "-search.latencyOffset=0s",
        ),
    )
    processes.wait_until("ready", "victoria-metrics", lambda: _is_up(f"{url}/health"))

    def count() -> int:
        query = 'sum(count_over_time({__name__=~".*_value"}[1d]))'
        answer = _get(f"{url}/api/v1/query", query=query, time=str(time.time() + 60), nocache="1").json()
        return sum(int(float(series["value"][1])) for series in answer["data"]["result"])

    return Cloud(f'kind = "influxdb"\nurl = "{url}"\napi = "v2"\norg = "demo"\nbucket = "demo"\n', count)


def start_influxdb1(folder: Path, processes: Processes) -> Cloud:
    """InfluxDB 1, through its v1 write path."""
    url, home = f"http://127.0.0.1:{free_port()}", folder / "influxdb"
    home.mkdir()
    config = home / "influxdb.conf"
    config.write_text(
        f'reporting-disabled = true\nbind-address = "127.0.0.1:{free_port()}"\n'
        f'[meta]\ndir = "{home}/meta"\n[data]\ndir = "{home}/data"\n'
        f'wal-dir = "{home}/wal"\n[http]\nbind-address = "{url.removeprefix("http://")}"\n'
    )
    processes.start("influxd", ("influxd", "-config", str(config)))
    processes.wait_until("ready", "influxd", lambda: _is_up(f"{url}/ping"))
    create = {"q": 'CREATE DATABASE "demo"'}
    httpx.post(f"{url}/query", params=create, timeout=_TIMEOUT_S, trust_env=False).raise_for_status()

    def count() -> int:
        answer = _get(f"{url}/query", db="demo", q="SELECT count(value) FROM /.*/").json()
        return sum(int(series["values"][0][1]) for series in answer["results"][0].get("series", ()))

    return Cloud(f'kind = "influxdb"\nurl = "{url}"\napi = "v1"\ndatabase = "demo"\n', count)


def start_file_cloud(folder: Path, _: Processes) -> Cloud:
    """No cloud on this machine: line protocol in files."""
    home = folder / "cloud-files"
    return Cloud(
        f'kind = "file"\ndirectory = "{home}"\ncompress = false\nmin_free_bytes = 0\n',
        lambda: sum(path.read_bytes().count(b"\n") for path in home.glob("*.lp")),
    )


_CLOUDS = {"victoria-metrics": start_victoria_metrics, "influxd": start_influxdb1}


def choose_cloud() -> tuple[str, Callable[[Path, Processes], Cloud]]:
    """The name of the first cloud tier that this machine has, and how to start it."""
    found = (entry for entry in _CLOUDS.items() if shutil.which(entry[0]))
    return next(found, ("files", start_file_cloud))


def count_stored(cloud: Cloud) -> int:
    """Readings the cloud holds now; 0 while it does not answer."""
    try:
        return cloud.count()
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError):
        return 0


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
        self._processes.wait_until("ready", "gateway", lambda: _is_up(f"{self.status_url}/readyz"))

    def status(self) -> Status | None:
        """Its status document, None while it is down."""
        try:
            return GatewayClient(self.status_url, timeout_s=_TIMEOUT_S).get("/status", Status)
        except GatewayClientError:
            return None


class Fleet:
    """The simulated devices and their record of what they published."""

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
        self._processes.wait_until("publishing", "fleet", lambda: self.progress().get("published", 0) > 0)

    def progress(self) -> dict[str, int]:
        """Its counters: produced, published, acknowledged, ..."""
        try:
            counters: dict[str, int] = json.loads((self.truth / "progress.json").read_text())
        except (OSError, ValueError):
            return {}
        return counters

    def stop(self) -> None:
        """Stop publishing, wait for outstanding acknowledgements, and end."""
        if self._processes.stop("fleet", within_s=40.0) != 0:
            self._processes.fail("fleet", "the fleet ended with an error")

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
            raise DemoError(f"the comparison failed; see {report}") from None
        return differences


def _get(url: str, **query: str) -> httpx.Response:
    return httpx.get(url, params=query, timeout=_TIMEOUT_S, trust_env=False)


def _is_up(url: str) -> bool:
    try:
        return _get(url).is_success
    except httpx.HTTPError:
        return False
