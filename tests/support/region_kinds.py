"""The regional tier for the contract suite: the ingest service, and its database directly."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg

from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.timescale.sink import TimescaleSink
from tests.support.destination_kinds import Kind, Subject
from tests.support.fixtures_postgres import fresh_database
from tests.support.ingest_service import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    import pytest

    from cloud_sync.destinations import Destination
    from tests.support.batches import Row

ROWS = """
    SELECT sensor_id, sensor_type, (extract(epoch FROM time) * 1000000)::int8, value
    FROM sensor_data WHERE sensor_id = ANY($1::text[])
"""


def _rows_in(dsn: str) -> Callable[[set[str]], Awaitable[list[Row]]]:
    async def stored(sensor_ids: set[str]) -> list[Row]:
        connection = await asyncpg.connect(dsn)
        try:
            return [tuple(row) for row in await connection.fetch(ROWS, list(sensor_ids))]
        finally:
            await connection.close()

    return stored


@asynccontextmanager
async def _ingest(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Subject]:
    server = request.getfixturevalue("postgres_server")
    async with fresh_database(server.dsn()) as dsn, running(dsn, folder) as service:

        def at(url: str) -> Destination:
            return IngestClient("region", url, service.token, timeout_s=0.5)

        destination = service.client()
        yield Subject(destination, _rows_in(dsn), at)
        await destination.aclose()


@asynccontextmanager
async def _timescaledb(request: pytest.FixtureRequest, _: Path) -> AsyncIterator[Subject]:
    async with fresh_database(request.getfixturevalue("postgres_server").dsn()) as dsn:
        destination = TimescaleSink(dsn)
        yield Subject(destination, _rows_in(dsn))
        await destination.aclose()


REGION_KINDS = {"ingest": Kind(_ingest), "timescaledb": Kind(_timescaledb, http=False)}
