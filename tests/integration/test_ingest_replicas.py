"""Several services on one database, its minimal role, and its timeouts."""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest

from cloud_sync.destinations.ingest_client import IngestClient
from cloud_sync.http import tokens
from cloud_sync.model.errors import DeliveryError, RetryLaterError
from cloud_sync.timescale import schema
from cloud_sync.timescale.sink import TimescaleSink
from tests.integration.test_ingest_command import run, served, write_config
from tests.support.wire_examples import START_US, batch, readings

if TYPE_CHECKING:
    from cloud_sync.model.records import Receipt

DOCUMENT = Path(__file__).parents[2] / "docs" / "region.md"
GATEWAYS, BATCHES = 4, 12


async def execute(dsn: str, statement: str, *arguments: Any) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        if arguments:
            return await connection.fetchval(statement, *arguments)
        return await connection.execute(statement)
    finally:
        await connection.close()


async def count(dsn: str, table: str) -> int:
    return int(await execute(dsn, f"SELECT count(*) FROM {table} WHERE $1", True))


def content(gateway: int, commit: int) -> Any:
    start_us = START_US + (gateway * BATCHES + commit) * 10**9
    return batch(commit, gateway_id=f"gw-{gateway}", content=readings(600, 40, start_us=start_us))


async def test_two_services_take_the_same_batches_of_all_gateways_and_store_them_once(postgres_dsn, tmp_path):
    config = write_config(tmp_path, postgres_dsn)
    every = [tokens.add_token(tmp_path / "tokens", f"gw-{n}") for n in range(GATEWAYS)]
    with served(config) as (first, one), served(config) as (_, two):
        clients = [[IngestClient("r", url, token, timeout_s=20) for url in (one, two)] for token in every]

        async def deliver(gateway: int, commit: int, by: int) -> Receipt:
            client = clients[gateway][by]
            while True:
                try:
                    return await client.send(client.encode(content(gateway, commit)))
                except DeliveryError:
                    client = clients[gateway][1]  # the first service is killed on the way
                    await asyncio.sleep(0.05)

        work = [
            deliver(gateway, commit, by)
            for commit in range(1, BATCHES + 1)
            for gateway in range(GATEWAYS)
            for by in (0, 1)
        ]
        running = asyncio.gather(*work)
        await asyncio.sleep(0.3)
        first.kill()
        receipts = await running
        for pair in clients:
            for client in pair:
                await client.aclose()

    assert {(receipt.rows, receipt.stored, receipt.duplicates) for receipt in receipts} == {(600, 600, 0)}
    assert sum(not receipt.applied_before for receipt in receipts) <= GATEWAYS * BATCHES
    assert await count(postgres_dsn, "reading") == 600 * GATEWAYS * BATCHES
    assert await count(postgres_dsn, "ingest_ledger") == GATEWAYS * BATCHES
    assert await count(postgres_dsn, "series") == 40


def role_statements(database: str) -> str:
    found = re.search(r"```sql\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1].replace(":database", database)


async def test_the_role_in_the_document_is_enough_for_the_service_and_for_nothing_more(
    postgres_dsn, tmp_path
):
    assert run("migrate", "--config", write_config(tmp_path, postgres_dsn)).returncode == 0
    database = re.search(r"tidegate_test_\w+", postgres_dsn)
    assert database is not None
    await execute(postgres_dsn, "REVOKE TEMPORARY ON DATABASE " + database[0] + " FROM public")
    await execute(postgres_dsn, "DROP ROLE IF EXISTS tidegate_ingest")
    await execute(postgres_dsn, role_statements(database[0]))
    dsn = postgres_dsn.replace("postgres@", "tidegate_ingest@", 1)
    try:
        await as_the_role(dsn, tmp_path)
    finally:
        await execute(postgres_dsn, "DROP OWNED BY tidegate_ingest; DROP ROLE tidegate_ingest")


async def as_the_role(dsn: str, folder: Path) -> None:
    config = write_config(folder, dsn)
    gateway = tokens.add_token(folder / "tokens", "gw-1")
    client = tokens.add_token(folder / "tokens", "app", "readings")
    files = folder / "files"
    files.mkdir()
    (files / "a.lp").write_bytes(b"t,sensor_id=f value=1 1000000000\nt,sensor_id=f value=2 1000000000\n")
    with served(config) as (_, url):
        sender = IngestClient("r", url, gateway)
        for each in (batch(1), batch(1), batch(2), batch(3, content=readings(12, start_us=1))):
            await sender.send(sender.encode(each))
        assert len(await sender.applied_ranges("gw-1", batch().range.epoch)) == 1
        await sender.aclose()
        reading = {"sensor_id": "s", "sensor_type": "t", "value": 1}
        headers = {"Authorization": f"Bearer {client}", "Idempotency-Key": "k"}
        posted = await asyncio.to_thread(_post, f"{url}/v1/readings", reading, headers)
        assert posted == (200, 1)
    loaded = run("load", files, "--config", config)
    assert "1 readings stored, 0 duplicates, 1 conflicts" in loaded.stdout
    assert run("gateways", "--config", config).returncode == 0
    sink = TimescaleSink(dsn, policies=schema.TimescalePolicies())
    await sink.merge_ledger(timedelta(0))
    await sink.aclose()
    for forbidden in (
        "DELETE FROM reading",
        "UPDATE reading SET value = 0",
        "TRUNCATE ingest_ledger",
        "DROP TABLE sensor",
        "CREATE TABLE mine (n int)",
        "DELETE FROM reading_conflict",
        "INSERT INTO schema_migration VALUES (9, 'x')",
    ):
        with pytest.raises(asyncpg.PostgresError):
            await execute(dsn, forbidden)


def _post(url: str, body: Any, headers: dict[str, str]) -> tuple[int, int]:
    response = httpx.post(url, json=body, headers=headers, timeout=20)
    return response.status_code, response.json()["stored"]


async def test_a_statement_that_takes_too_long_is_given_up_and_the_next_one_works(postgres_dsn):
    sink = TimescaleSink(postgres_dsn, statement_timeout_s=0.5, pool_size=2)
    await sink.apply(batch(1))
    blocker = await asyncpg.connect(postgres_dsn)
    await blocker.execute("BEGIN; LOCK TABLE reading IN EXCLUSIVE MODE")

    with pytest.raises(RetryLaterError):
        await sink.apply(batch(2))

    await blocker.close()
    assert (await sink.apply(batch(2))).duplicates == 12
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND $1"
    assert await execute(postgres_dsn, waiting + " AND state = 'idle in transaction'", True) == 0
    await sink.aclose()


async def test_the_server_itself_knows_the_timeout(postgres_dsn):
    sink = TimescaleSink(postgres_dsn, statement_timeout_s=7)
    shown = await sink.transact(lambda connection: connection.fetchval("SHOW statement_timeout"))

    assert shown == "7s"
    await sink.aclose()
