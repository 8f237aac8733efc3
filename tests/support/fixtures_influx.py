"""Real servers that take line protocol: Debian's influxd 1.6 (v1) and VictoriaMetrics (v1 and v2 writes).

Each runs on loopback with free ports and a data folder of its own, and is stopped by its process. A stub
for what only an InfluxDB 2 answers is in `http_stub`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import httpx
import pytest

from tests.support.free_ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_WITHIN_S = 30

INFLUXD_CONFIG = """
reporting-disabled = true
bind-address = "127.0.0.1:{rpc}"
[meta]
  dir = "{folder}/meta"
  logging-enabled = false
[data]
  dir = "{folder}/data"
  wal-dir = "{folder}/wal"
  query-log-enabled = false
[monitor]
  store-enabled = false
[subscriber]
  enabled = false
[continuous_queries]
  enabled = false
[http]
  bind-address = "127.0.0.1:{http}"
  log-enabled = false
  auth-enabled = {auth}
  max-body-size = 150000
"""


@dataclass(frozen=True)
class Influxd:
    """A running influxd."""

    url: str

    def query(
        self, text: str, *, database: str = "", auth: tuple[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """The series of the first result."""
        params = {"q": text, "db": database, "epoch": "ns"}
        answer = httpx.post(f"{self.url}/query", params=params, auth=auth, timeout=20).raise_for_status()
        result = json.loads(answer.text, parse_int=_number)["results"][0]
        assert "error" not in result, result
        series: list[dict[str, Any]] = result.get("series", [])
        return series

    def new_database(self) -> str:
        """The name of a fresh database."""
        name = f"t{uuid4().hex[:12]}"
        self.query(f'CREATE DATABASE "{name}"')
        return name

    def points(self, database: str) -> list[dict[str, Any]]:
        """Every point of a database: its columns (tags, fields, `time` in ns), and `measurement`."""
        return [
            {"measurement": series["name"], **dict(zip(series["columns"], row, strict=True))}
            for series in self.query("SELECT * FROM /.*/", database=database)
            for row in series["values"]
        ]


@dataclass(frozen=True)
class Victoria:
    """A running VictoriaMetrics. It keeps milliseconds, answers 204 to nonsense, and ignores tokens."""

    url: str

    def points(self, sensor_ids: set[str]) -> list[tuple[dict[str, str], int, float]]:
        """(labels, time_ms, value) of every sample of these sensors."""
        httpx.get(f"{self.url}/internal/force_flush", timeout=20).raise_for_status()
        # a filter never asked before: answers to known ones come from a cache that is behind new series
        params = {
            "match[]": f'{{sensor_id!="",asked!="{uuid4().hex}"}}',
            "start": "0",
            "reduce_mem_usage": "1",
        }
        text = httpx.get(f"{self.url}/api/v1/export", params=params, timeout=20).raise_for_status().text
        return [
            (series["metric"], time_ms, value)
            for series in map(json.loads, text.split("\n")[:-1])
            if series["metric"].get("sensor_id") in sensor_ids
            for time_ms, value in zip(series["timestamps"], series["values"], strict=True)
        ]


@pytest.fixture(scope="session")
def influxd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influxd]:
    """An influxd without passwords."""
    yield from _influxd(tmp_path_factory.mktemp("influxd"), auth=False)


@pytest.fixture(scope="session")
def influxd_with_passwords(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Influxd]:
    """An influxd that wants credentials: the administrator is `root`, `secret`."""
    for server in _influxd(tmp_path_factory.mktemp("influxd-auth"), auth=True):
        server.query("CREATE USER root WITH PASSWORD 'secret' WITH ALL PRIVILEGES")
        yield server


@pytest.fixture(scope="session")
def victoria(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victoria]:
    """A VictoriaMetrics."""
    binary = _binary("victoria-metrics", "victoria-metrics")
    folder, port = tmp_path_factory.mktemp("victoria"), free_port()
    command = [
        binary,
        f"-storageDataPath={folder}/data",
        f"-httpListenAddr=127.0.0.1:{port}",
        "-retentionPeriod=100y",
        "-dedup.minScrapeInterval=1ms",
        "-memory.allowedBytes=128MB",
        "-loggerLevel=ERROR",
    ]
    url = f"http://127.0.0.1:{port}"
    with _running(command, folder / "log", f"{url}/health"):
        yield Victoria(url)


def _number(text: str) -> float:
    """An integer, but minus zero keeps its sign."""
    return -0.0 if text == "-0" else int(text)


def _influxd(folder: Path, *, auth: bool) -> Iterator[Influxd]:
    binary = _binary("influxd", "influxdb")
    port = free_port()
    config = folder / "influxdb.conf"
    config.write_text(
        INFLUXD_CONFIG.format(folder=folder, rpc=free_port(), http=port, auth=str(auth).lower())
    )
    url = f"http://127.0.0.1:{port}"
    with _running([binary, "-config", str(config)], folder / "log", f"{url}/ping"):
        yield Influxd(url)


def _binary(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name} (Debian package {package})")
    return path


class _running:  # noqa: N801 - reads as a verb where it is used
    """A server process, answering when the block begins and gone when it ends."""

    def __init__(self, command: list[str], log: Path, probe: str) -> None:
        self._command, self._log, self._probe = command, log, probe

    def __enter__(self) -> None:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._log.parent
            )
        deadline = time.monotonic() + START_WITHIN_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                pytest.fail(f"{self._command[0]} did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        try:
            return httpx.get(self._probe, timeout=1).is_success
        except httpx.HTTPError:
            return False
