"""The real programs as child processes, configured in a folder of the test's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from tests.support.free_ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]


def run(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a `tidegate` command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )


class Program:
    """A `tidegate` command that is started, killed and started again."""

    def __init__(
        self, folder: Path, name: str, *arguments: str, ready_url: str = "", **environment: str
    ) -> None:
        self.log = folder / f"{name}.log"
        self._arguments = arguments
        self._ready_url = ready_url
        self._environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self._environment},
            )
        if self._ready_url:
            wait_until(self._is_ready, 20, lambda: f"{self._arguments}: {self.log.read_text()[-2000:]}")

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}: {self.log.read_text()[-2000:]}")
        try:
            return httpx.get(self._ready_url, timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def stop(self, timeout: float = 30) -> int:
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(timeout)
        self.process = None
        return code


def wait_until(true: Callable[[], bool], within_s: float, why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + within_s
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {why()}")
        time.sleep(0.05)


class Site:
    """A gateway, its region and its file destination on this machine."""

    def __init__(self, folder: Path, dsn: str, *, gateway_id: str = "gw-1") -> None:
        self.folder = folder
        self.dsn = dsn
        self.gateway_id = gateway_id
        self.broker_port, self.status_port, self.ingest_port = free_port(), free_port(), free_port()
        self.broker = f"mqtt://127.0.0.1:{self.broker_port}"
        self.spool = folder / "spool.db"
        self.files = folder / "files"
        (folder / "ingest.toml").write_text(
            f'tokens_file = "tokens"\n[listen]\nport = {self.ingest_port}\n'
            f"[database]\ndsn = {json.dumps(dsn)}\n"
        )
        token = run("ingest", "token", "add", gateway_id, "--tokens-file", str(folder / "tokens"))
        (folder / "token").write_text(token.stdout)
        (folder / "gateway.toml").write_text(
            f'gateway_id = "{gateway_id}"\n[spool]\npath = "spool.db"\n'
            f"[ingress.listen]\nport = {self.broker_port}\n[ingress.host]\nenabled = false\n"
            f"[status]\nport = {self.status_port}\n"
            f'[[destinations]]\nname = "region"\nkind = "ingest"\nurl = "http://127.0.0.1:{self.ingest_port}"\n'
            'token_file = "token"\nflush_s = 0.2\n'
            '[[destinations]]\nname = "stick"\nkind = "file"\ndirectory = "files"\ncompress = false\n'
            "min_free_bytes = 0\nflush_s = 0.2\n"
        )
        config = str(folder / "gateway.toml")
        self.gateway = Program(
            folder,
            "gateway",
            "gateway",
            "-c",
            config,
            ready_url=f"http://127.0.0.1:{self.status_port}/readyz",
        )
        self.ingest = Program(
            folder,
            "ingest",
            *("ingest", "--config", str(folder / "ingest.toml")),
            ready_url=f"http://127.0.0.1:{self.ingest_port}/readyz",
        )

    def status(self) -> dict[str, Any]:
        answer = httpx.get(f"http://127.0.0.1:{self.status_port}/status", timeout=5, trust_env=False)
        return answer.json()

    def drain(self, within_s: float = 60) -> None:
        wait_until(
            lambda: all(not d["backlog_readings"] for d in self.status()["destinations"]),
            within_s,
            lambda: str(self.status()["destinations"]),
        )

    def verify(self, truth: Path, *where: str) -> dict[str, Any]:
        where = where or ("--postgres", self.dsn)
        done = run("sim", "verify", "--truth", str(truth), "--quiet", "--json", *where)
        return json.loads(done.stdout.splitlines()[-1])

    def close(self) -> None:
        self.gateway.kill()
        self.ingest.kill()
