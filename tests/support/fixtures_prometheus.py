"""A real Prometheus (Debian's), on loopback, with a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.free_ports import free_port
from tests.support.programs import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


class Prometheus:
    """Scrapes each target once a second."""

    def __init__(self, folder: Path, targets: dict[str, str], *, token: str = "") -> None:
        """`targets` is host:port by job; `token` is sent to all of them."""
        self.folder = folder
        jobs = [
            {
                "job_name": job,
                "static_configs": [{"targets": [target]}],
                **({"authorization": {"credentials": token}} if token else {}),
            }
            for job, target in targets.items()
        ]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "scrape_configs": jobs,
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self.url = f"http://127.0.0.1:{free_port()}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self.folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={self.folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self.folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "GOMAXPROCS": "1"},
            )
        wait_until(self._is_ready, 30, lambda: (self.folder / "prometheus.log").read_text()[-2000:])

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The instant vector of an expression."""
        answer = httpx.get(
            f"{self.url}/api/v1/query", params={"query": expression}, timeout=10, trust_env=False
        ).json()
        assert answer["status"] == "success", (expression, answer)
        return answer["data"]["result"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False


@pytest.fixture(scope="module")
def start_prometheus(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Prometheus]]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    started: list[Prometheus] = []

    def start(targets: dict[str, str], **keywords: str) -> Prometheus:
        prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), targets, **keywords)
        started.append(prometheus)
        prometheus.start()
        return prometheus

    yield start
    for prometheus in started:
        prometheus.stop()


@pytest.fixture(scope="session")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed")
    return found
