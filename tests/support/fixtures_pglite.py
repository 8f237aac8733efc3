"""TimescaleDB's semantics without a TimescaleDB: PGlite (PostgreSQL and TimescaleDB in WebAssembly) on Node.

One backend serves every connection: a transaction makes the others wait, there is no query cancel and no
statement_timeout, and no second database can be made, so a test empties what the last one left.
"""

from __future__ import annotations

import select
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parents[1] / "pglite"
NODE_AT_LEAST = 18
STOP_WITHIN_S = 10
EMPTY_WITHIN_S = 10


@dataclass
class PGlite:
    """A running PGlite, all in memory."""

    node: str
    process: subprocess.Popen[str] | None = None
    dsn: str = ""

    def start(self) -> None:
        """Start and set `dsn`; about 4 s."""
        self.process = subprocess.Popen(
            [self.node, "server.mjs"], cwd=FOLDER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        word, _, port = self.process.stdout.readline().strip().partition(" ")
        if word != "listening":
            self.stop()
            pytest.fail("PGlite did not start; see its standard error above")
        self.dsn = f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable"

    def stop(self) -> None:
        """End the process by closing its standard input, and by force when that does not help."""
        if self.process is None:
            return
        process, self.process = self.process, None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def empty(self) -> None:
        """Drop everything tests have made; a server that cannot, is started anew on another port."""
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("empty\n")
            self.process.stdin.flush()
            answered, _, _ = select.select([self.process.stdout], [], [], EMPTY_WITHIN_S)
            if answered and self.process.stdout.readline() == "emptied\n":
                return
        except BrokenPipeError:
            pass
        self.stop()
        self.start()


@pytest.fixture(scope="session")
def pglite() -> Iterator[PGlite]:
    """The server of the session. Memory: 450 to 800 MB."""
    server = PGlite(_node())
    server.start()
    yield server
    server.stop()


@pytest.fixture
def pglite_dsn(pglite: PGlite) -> str:
    """Where it listens, for asyncpg and psycopg; emptied before each test, TimescaleDB created in it."""
    pglite.empty()
    return pglite.dsn


def _node() -> str:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node (Debian package nodejs)")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip().lstrip("v").split(".")[0]) < NODE_AT_LEAST:
        pytest.skip(f"needs node {NODE_AT_LEAST} or later, found {version.strip()}")
    if not (FOLDER / "node_modules" / "@unni-craftsman" / "pglite").is_dir():
        pytest.skip("needs PGlite: npm ci --prefix tests/pglite (Debian package npm)")
    return node
