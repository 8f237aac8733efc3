"""Processes that the benchmarks start and watch: on loopback, with folders of their own, stopped by pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).parents[1]
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_START_WITHIN_S = 30.0
_STOP_WITHIN_S = 60.0


@contextmanager
def running(command: Sequence[str], *, port: int, log: Path) -> Iterator[int]:
    """A process that listens on `port`, until the end of the block; its pid.

    Raises:
        SystemExit: it ended by itself. Its log's last lines are printed then, and when the block fails.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    whole = False
    try:
        deadline = time.monotonic() + _START_WITHIN_S
        while not listens(port) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        yield process.pid
        whole = process.poll() is None
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if not whole:
            print(f"{log.name} ends with:\n{_tail(log)}", file=sys.stderr)
    if not whole:
        raise SystemExit(f"{command[0]} ended by itself with {process.returncode}")


@contextmanager
def gateway(folder: Path, *, spool: str = "spool.db", extra: str = "") -> Iterator[tuple[int, int]]:
    """The agent as an operator runs it, `listen` only, with its default settings; its pid and MQTT port.

    Its configuration, its spool (a file name) and its log are in `folder`. `extra` ends the configuration.
    """
    port = free_port()
    config = folder / "gateway.toml"
    config.write_text(
        f'gateway_id = "bench"\n[spool]\npath = "{spool}"\n'
        f"[ingress.listen]\nport = {port}\n[ingress.host]\nenabled = false\n[status]\nenabled = false\n"
        + extra,
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "gateway", "gateway", "--config", str(config)]
    with running(command, port=port, log=folder / "gateway.log") as pid:
        yield pid, port


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether something accepts connections on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def rss_mb(pid: int, *, peak: bool = False) -> float:
    """Resident memory of a process in megabytes (10^6), now or at its highest."""
    name = "VmHWM:" if peak else "VmRSS:"
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"process {pid} is gone")


def written_bytes(pid: int) -> int:
    """Bytes a process has caused to be written to storage so far."""
    for line in Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/{pid}/io does not say write_bytes")


def file_system_type(folder: Path) -> str:
    """Type of the file system that holds `folder`: a figure taken on tmpfs says nothing about a disk."""
    best = ("", "unknown")
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, kind = line.split()[:3]
        if folder.absolute().is_relative_to(mount) and len(mount) > len(best[0]):
            best = (mount, kind)
    return best[1]


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]
