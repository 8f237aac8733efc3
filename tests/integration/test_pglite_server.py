"""The test server itself: it must not be what makes another test pass or fail."""

from __future__ import annotations

import asyncio
import datetime as dt

import asyncpg
import pytest


@pytest.fixture
async def table(pglite_dsn):
    connection = await asyncpg.connect(pglite_dsn)
    await connection.execute(
        "CREATE TABLE h (time timestamptz NOT NULL, n bigint, v float8, UNIQUE (n, time))"
    )
    await connection.execute("SELECT create_hypertable('h', 'time')")
    yield connection
    if connection.is_closed():
        connection = await asyncpg.connect(pglite_dsn)
    await connection.execute("DROP TABLE IF EXISTS h")
    await connection.close()


def instant(second: int) -> dt.datetime:
    return dt.datetime(2026, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=second)


async def test_timescaledb_is_there(pglite_dsn):
    connection = await asyncpg.connect(pglite_dsn)
    version = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")
    await connection.close()
    assert version.startswith("2.")


async def test_a_large_binary_copy_arrives_whole(table):
    rows = [(instant(n), n, n / 3) for n in range(40_000)]
    await table.copy_records_to_table("h", records=rows)
    assert await table.fetchval("SELECT count(*) FROM h") == 40_000
    assert await table.fetchval("SELECT v FROM h WHERE n = 39999") == 39_999 / 3


async def test_a_copy_that_fails_stores_nothing_and_the_connection_goes_on(table):
    row = (instant(1), 1, 1.0)
    await table.copy_records_to_table("h", records=[row])
    with pytest.raises(asyncpg.UniqueViolationError):
        await table.copy_records_to_table("h", records=[(instant(2), 2, 2.0), row])
    assert await table.fetchval("SELECT count(*) FROM h") == 1


async def test_on_conflict_and_compression_work(table):
    await table.copy_records_to_table("h", records=[(instant(n), 1, float(n)) for n in range(1000)])
    tag = await table.execute("INSERT INTO h VALUES ($1, 1, 7) ON CONFLICT DO NOTHING", instant(3))
    assert tag == "INSERT 0 0"
    await table.execute("ALTER TABLE h SET (timescaledb.compress, timescaledb.compress_segmentby = 'n')")
    assert await table.fetchval("SELECT count(compress_chunk(c)) FROM show_chunks('h') c") == 1
    assert await table.fetchval("SELECT sum(v) FROM h") == 499_500


async def test_connections_prepare_statements_of_the_same_name_apart(pglite_dsn):
    pools = [await asyncpg.create_pool(pglite_dsn, min_size=2, max_size=2) for _ in range(2)]

    async def ask(number: int) -> int:
        result: int = await pools[number % 2].fetchval(f"SELECT $1::int + {number}", 1)
        return result

    assert await asyncio.gather(*map(ask, range(60))) == [n + 1 for n in range(60)]
    for pool in pools:
        await pool.close()


async def test_unnamed_statements_of_two_connections_do_not_mix(pglite_dsn):
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(_ask_unnamed(pglite_dsn, number))


async def _ask_unnamed(dsn: str, number: int) -> None:
    connection = await asyncpg.connect(dsn, statement_cache_size=0)
    for turn in range(20):
        assert await connection.fetchval(f"SELECT $1::int * {number}", turn) == turn * number
        await asyncio.sleep(0)
    await connection.close()


async def test_a_transaction_is_isolated_and_makes_others_wait(table, pglite_dsn):
    other = await asyncpg.connect(pglite_dsn)
    async with table.transaction():
        await table.execute("INSERT INTO h VALUES ($1, 1, 1)", instant(1))
        waiting = asyncio.ensure_future(other.fetchval("SELECT count(*) FROM h"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
    assert await waiting == 1
    await other.close()


async def test_a_connection_that_breaks_off_in_a_transaction_is_rolled_back(table, pglite_dsn):
    other = await asyncpg.connect(pglite_dsn)
    await other.execute("BEGIN")
    await other.execute("INSERT INTO h VALUES ($1, 1, 1)", instant(1))
    other.terminate()
    assert await table.fetchval("SELECT count(*) FROM h") == 0


async def test_an_error_leaves_the_connection_usable(table):
    for statement in ("SELECT 1/0", "SELECT nonsense", "no statement at all"):
        with pytest.raises(asyncpg.PostgresError):
            await table.fetch(statement)
    with pytest.raises(asyncpg.DivisionByZeroError):
        await _fail_in_a_transaction(table)
    assert await table.fetchval("SELECT count(*) FROM h") == 0


async def _fail_in_a_transaction(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await connection.execute("INSERT INTO h VALUES ($1, 1, 1)", instant(1))
        await connection.fetch("SELECT 1 / $1::int", 0)


async def test_settings_of_one_connection_are_not_anothers(pglite_dsn):
    first = await asyncpg.connect(pglite_dsn, server_settings={"timezone": "Asia/Tokyo"})
    second = await asyncpg.connect(pglite_dsn)
    for _ in range(2):
        assert await first.fetchval("SHOW timezone") == "Asia/Tokyo"
        assert await second.fetchval("SHOW timezone") != "Asia/Tokyo"
    await first.close()
    await second.close()


async def test_a_cursor_reads_in_portions(table):
    await table.copy_records_to_table("h", records=[(instant(n), n, float(n)) for n in range(100)])
    async with table.transaction():
        found = [row["n"] async for row in table.cursor("SELECT n FROM h ORDER BY n", prefetch=7)]
    assert found == list(range(100))
