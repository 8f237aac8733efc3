"""What every database that a batch is applied to must do, plain or TimescaleDB."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import numpy as np
import pytest

from cloud_sync.model.errors import RefusedError, RetryLaterError, UnauthorisedError
from cloud_sync.model.ledger_rules import RangeConflictError
from cloud_sync.model.records import SEQ_ABSENT, Batch, Readings, Receipt, Series
from cloud_sync.timescale import schema
from cloud_sync.timescale.sink import TimescaleSink
from tests.support.wire_examples import EPOCH, SECOND_US, START_US, batch, from_rows, readings, series

ROWS = """
    SELECT d.sensor_id, s.sensor_type, timestamptz_send(r.time), r.value,
           r.quality, r.battery_level, r.signal_strength, r.seq, r.flags
    FROM reading r JOIN series s USING (series_no) JOIN sensor d USING (sensor_no)
"""
POSTGRES_EPOCH_US = 946_684_800_000_000


@pytest.fixture
async def sink(region_dsn):
    sink = TimescaleSink(region_dsn)
    yield sink
    await sink.aclose()


async def fetch(dsn: str, statement: str, *arguments: Any) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        return list(await connection.fetch(statement, *arguments))
    finally:
        await connection.close()


async def value(dsn: str, statement: str) -> Any:
    return (await fetch(dsn, statement))[0][0]


def expected_rows(of: Batch) -> set[tuple[Any, ...]]:
    """A batch as rows of ROWS; absent is None; floats as their bits would print."""
    columns = of.readings
    found = set()
    for row in range(of.rows):
        identity = of.series[columns.series[row]]
        optional = (
            None if math.isnan(column[row]) else float(column[row])
            for column in (columns.quality, columns.battery_level, columns.signal_strength)
        )
        seq = int(columns.seq[row])
        found.add(
            (
                identity.sensor_id,
                identity.sensor_type,
                int(columns.time_us[row]),
                float(columns.value[row]),
                *optional,
                None if seq == SEQ_ABSENT else seq,
                int(columns.flags[row]),
            )
        )
    return found


async def stored_rows(dsn: str) -> list[tuple[Any, ...]]:
    rows = await fetch(dsn, ROWS)
    return [(*row[:2], int.from_bytes(row[2], signed=True) + POSTGRES_EPOCH_US, *row[3:]) for row in rows]


async def test_every_column_of_every_reading_is_stored_as_it_was_sent(region_dsn, sink):
    sent = batch(content=readings(40_000, 7))

    assert await sink.apply(sent) == Receipt(rows=40_000, stored=40_000)

    stored = await stored_rows(region_dsn)
    assert len(stored) == 40_000
    assert set(stored) == expected_rows(sent)


async def test_special_values_names_and_times_are_stored_exactly(region_dsn, sink):
    times = [
        -210_866_803_200_000_000,
        -62_135_596_800_000_001,
        -1,
        0,
        1,
        9_223_372_036_854_775,  # 2262, where nanoseconds in int64 end
        9_223_371_331_199_999_999,
    ]
    values = [0.0, -0.0, 5e-324, -1.7976931348623157e308, 1e308, 0.1, 2.0**53 + 2]
    names = ["é", "名前 テスト", "a,b=c d\"e'f\\g", "%\t\n\r", "\U0001f321", " ", "x" * 1024]
    content = Readings(
        np.arange(7, dtype=np.int32),
        np.array(times, np.int64),
        np.array(values),
        np.array([0, 100, np.nan, np.inf, 0.1, -0.0, 99.5], np.float32),
        np.array([np.nan] * 6 + [3.4028235e38], np.float32),
        np.array([-np.inf, np.nan, -128, 0, 1, 2, 3], np.float32),
        np.array([-1, 0, 1, 2**63 - 1, -(2**63), -2, 7], np.int64),
        np.array([0, 1, -1, 2**31 - 1, -(2**31), 512, 3], np.int32),
    )
    sent = batch(content=content, of=tuple(Series(name, f"type {name[:9]}") for name in names))

    assert (await sink.apply(sent)).stored == 7

    stored = await stored_rows(region_dsn)
    assert set(stored) == expected_rows(sent)
    negative_zero = next(row for row in stored if row[0] == names[1])
    assert math.copysign(1, negative_zero[3]) == -1


async def test_a_batch_sent_twice_is_applied_once_and_gets_the_same_receipt(region_dsn, sink):
    first = await sink.apply(batch())
    again = await sink.apply(batch())

    assert again == replace(first, applied_before=True)
    assert await value(region_dsn, "SELECT count(*) FROM reading") == 12


async def test_a_batch_applied_by_two_services_at_once_is_stored_once(region_dsn, sink):
    other = TimescaleSink(region_dsn)
    sent = batch(content=readings(20_000))

    receipts = await asyncio.gather(*(s.apply(sent) for s in (sink, other, sink, other)))

    await other.aclose()
    assert sorted(receipt.applied_before for receipt in receipts) == [False, True, True, True]
    assert {receipt.stored for receipt in receipts} == {20_000}
    assert await value(region_dsn, "SELECT count(*) FROM reading") == 20_000
    assert await value(region_dsn, "SELECT count(*) FROM ingest_ledger") == 1


async def test_readings_that_are_there_already_are_duplicates_and_the_others_are_stored(region_dsn, sink):
    await sink.apply(batch(1, content=readings(12)))

    partly = Readings.concat([readings(12), readings(6, start_us=START_US + 10**9)]).in_order()
    again = await sink.apply(batch(2, content=partly))

    assert again == Receipt(rows=18, stored=6, duplicates=12)
    assert set(await stored_rows(region_dsn)) == expected_rows(batch(content=partly))
    assert await value(region_dsn, "SELECT count(*) FROM reading_conflict") == 0


async def test_another_value_for_the_same_time_leaves_the_first_and_is_kept_as_a_conflict(region_dsn, sink):
    await sink.apply(batch(1, content=from_rows((0, START_US, 1.0), (0, START_US + 1, 2.0))))

    receipt = await sink.apply(
        batch(2, content=from_rows((0, START_US, 9.0), (0, START_US + 1, 2.0), (0, START_US + 2, 3.0)))
    )

    assert receipt == Receipt(rows=3, stored=1, duplicates=1, conflicts=1)
    values = await fetch(region_dsn, "SELECT value FROM reading ORDER BY time")
    assert [row[0] for row in values] == [1.0, 2.0, 3.0]
    conflicts = await fetch(
        region_dsn, "SELECT value, stored_value, gateway_id, epoch, first_commit FROM reading_conflict"
    )
    assert [tuple(row) for row in conflicts] == [(9.0, 1.0, "gw-1", EPOCH, 2)]


async def test_duplicates_and_conflicts_within_one_batch_keep_the_first_in_order(region_dsn, sink):
    twice = (Series("s", "t", (("location", "old"),)), Series("s", "t", (("location", "new"),)))
    content = from_rows((0, 10, 1.0), (0, 10, 1.0), (0, 20, 5.0), (1, 10, 1.0), (1, 20, 6.0), (1, 30, 7.0))

    receipt = await sink.apply(batch(content=content, of=twice))

    assert receipt == Receipt(rows=6, stored=3, duplicates=2, conflicts=1)
    rows = await fetch(region_dsn, "SELECT value, location FROM sensor_data ORDER BY time")
    assert [tuple(row) for row in rows] == [(1.0, "new"), (5.0, "new"), (7.0, "new")]


async def test_a_range_that_overlaps_an_applied_one_is_refused_and_nothing_is_written(region_dsn, sink):
    await sink.apply(batch(10, 20))

    for number, (first, last) in enumerate(
        [(1, 10), (20, 20), (9, 21), (12, 13), (10, 19), (11, 20), (5, 30)]
    ):
        content = readings(5, start_us=START_US + (number + 1) * 10**9)
        with pytest.raises(RangeConflictError) as refused:
            await sink.apply(batch(first, last, content=content))
        assert refused.value.reason == "range_overlap"

    assert await value(region_dsn, "SELECT count(*) FROM reading") == 12
    assert await value(region_dsn, "SELECT count(*) FROM ingest_ledger") == 1


@pytest.mark.parametrize(
    "content", [readings(11), readings(12, start_us=START_US + 1)], ids=["rows", "times"]
)
async def test_an_applied_range_with_other_contents_is_refused(region_dsn, sink, content):
    await sink.apply(batch(10, 20))

    with pytest.raises(RangeConflictError) as refused:
        await sink.apply(batch(10, 20, content=content))

    assert refused.value.reason == "range_mismatch"
    assert await value(region_dsn, "SELECT count(*) FROM reading") == 12


async def test_ranges_of_other_gateways_and_epochs_are_their_own(region_dsn, sink):
    others = [batch(1), batch(1, gateway_id="gw-2"), batch(1, epoch=UUID(int=2)), batch(2)]

    receipts = [await sink.apply(other) for other in others]

    assert [receipt.stored for receipt in receipts] == [12, 0, 0, 0]
    assert [receipt.duplicates for receipt in receipts] == [0, 12, 12, 12]


async def test_progress_tells_adjacent_ranges_as_one_and_leaves_gaps(sink):
    for first, last in [(8, 9), (1, 3), (4, 4), (20, 30), (31, 31)]:
        await sink.apply(batch(first, last))
    await sink.apply(batch(5, epoch=UUID(int=7)))

    (known,) = await sink.progress("gw-1", EPOCH)

    ranges = known.ranges
    assert [(r.range.first_commit, r.range.last_commit, r.rows) for r in ranges] == [
        (1, 4, 24),
        (8, 9, 12),
        (20, 31, 24),
    ]
    assert len((await sink.progress("gw-1"))[0].ranges) == 4
    assert await sink.progress("nobody") == []


async def test_attributes_follow_the_newest_reading_and_not_the_order_of_arrival(region_dsn, sink):
    def spoken(commit: int, second: int, **attributes: str) -> Batch:
        content = from_rows((0, START_US + second * SECOND_US, float(second)))
        return batch(commit, content=content, of=series(1, attributes))

    state = "SELECT DISTINCT location, manufacturer, firmware_version, unit FROM sensor_data"
    await sink.apply(spoken(1, 1000, location="hall", manufacturer="acme", unit="degC"))
    await sink.apply(spoken(2, 900, location="cellar", unit="K", firmware_version="0.9"))
    assert await fetch(region_dsn, state) == [("hall", "acme", None, "degC")]
    await sink.apply(spoken(3, 1100))
    await sink.apply(spoken(4, 1050, location="roof"))
    assert await fetch(region_dsn, state) == [("roof", "acme", None, "degC")]
    await sink.apply(spoken(5, 2000, firmware_version="1.0"))
    await sink.apply(spoken(6, 1900, location="cellar", firmware_version="0.5", unit="K"))
    assert await fetch(region_dsn, state) == [("roof", "acme", "1.0", "degC")]


async def test_a_service_that_remembers_nothing_keeps_newer_attributes_too(region_dsn, sink):
    for commit, minute in ((1, 0), (2, 30), (3, 60)):
        content = from_rows((0, START_US + minute * 60 * SECOND_US, 1.0))
        await sink.apply(batch(commit, content=content, of=series(1, {"location": "hall"})))
    other = TimescaleSink(region_dsn)

    late = from_rows((0, START_US + 45 * 60 * SECOND_US, 1.0))
    await other.apply(batch(4, content=late, of=series(1, {"location": "cellar"})))

    await other.aclose()
    assert await value(region_dsn, "SELECT location FROM sensor") == "hall"


async def test_series_have_one_number_however_many_gateways_and_services_carry_them(region_dsn, sink):
    other = TimescaleSink(region_dsn)
    parts = [
        s.apply(batch(n, gateway_id=f"gw-{n}", content=readings(400, 40, start_us=START_US + n * 10**9)))
        for n in range(1, 7)
        for s in ((sink, other)[n % 2],)
    ]

    receipts = await asyncio.gather(*parts)

    await other.aclose()
    assert [receipt.stored for receipt in receipts] == [400] * 6
    assert await value(region_dsn, "SELECT count(*) FROM sensor") == 40
    assert await value(region_dsn, "SELECT count(*) FROM series") == 40
    assert await value(region_dsn, "SELECT max(series_no) FROM series") < 300


async def test_what_a_database_cannot_hold_is_refused_and_nothing_is_written(region_dsn, sink):
    for time_us in (-(2**63), -210_866_803_200_000_001, 9_223_371_331_200_000_000, 2**63 - 1):
        with pytest.raises(RefusedError) as refused:
            await sink.apply(batch(content=from_rows((0, 0, 1.0), (0, time_us, 1.0))))
        assert refused.value.reason == "time_out_of_range"

    random_name = np.random.default_rng(1).integers(0x4E00, 0x9FFF, 1024)
    unindexable = Series("".join(map(chr, random_name)), "t")
    with pytest.raises(RefusedError) as refused:
        await sink.apply(batch(content=from_rows((0, 0, 1.0)), of=(unindexable,)))
    assert refused.value.reason == "unacceptable_data"
    await sink.prepare()
    assert await value(region_dsn, "SELECT count(*) FROM ingest_ledger") == 0
    assert await value(region_dsn, "SELECT count(*) FROM sensor") == 0


async def test_a_parcel_is_sent_like_any_destinations(sink):
    encoded_batch = sink.encode(batch())

    assert await sink.send(encoded_batch) == Receipt(12, 12)
    assert (await sink.send(encoded_batch)).applied_before
    await sink.aclose()
    await sink.aclose()


async def test_services_that_start_at_once_prepare_the_database_once(region_dsn):
    sinks = [TimescaleSink(region_dsn) for _ in range(4)]

    states = await asyncio.gather(*(s.prepare() for s in sinks))

    for each in sinks:
        await each.aclose()
    assert sorted(len(state.applied) for state in states) == [0, 0, 0, len(schema.load_migrations())]


async def test_a_database_of_a_newer_release_is_refused_in_words(region_dsn, sink):
    await sink.prepare()
    await fetch(region_dsn, "INSERT INTO schema_migration (version, name) VALUES (900, 'from the future')")

    older = TimescaleSink(region_dsn)
    with pytest.raises(schema.SchemaTooNewError, match="schema version 900, this release knows up to"):
        await older.prepare()
    with pytest.raises(RetryLaterError, match="900"):
        await older.apply(batch())
    await older.aclose()


async def test_a_migration_that_fails_leaves_the_database_as_it_was(region_dsn):
    steps = [
        schema.Migration(1, "001_a", "CREATE TABLE a (n int)"),
        schema.Migration(2, "002_b", "nonsense"),
    ]
    connection = await asyncpg.connect(region_dsn)
    try:
        with pytest.raises(asyncpg.PostgresSyntaxError):
            await schema.prepare_schema(connection, None, steps)
        assert await connection.fetchval("SELECT to_regclass('a')") is None
        assert await connection.fetchval("SELECT to_regclass('schema_migration')") is None
    finally:
        await connection.close()


async def test_on_timescaledb_readings_are_a_hypertable_with_the_policies_asked_for(timescale_dsn):
    async def jobs(policies: schema.TimescalePolicies | None) -> dict[str, str]:
        sink = TimescaleSink(timescale_dsn, policies=policies)
        state = await sink.prepare()
        await sink.aclose()
        assert state.timescale_version is not None
        rows = await fetch(
            timescale_dsn,
            "SELECT proc_name, config FROM timescaledb_information.jobs WHERE hypertable_name = 'reading'",
        )
        return {row[0]: row[1] for row in rows}

    by_default = await jobs(schema.TimescalePolicies())
    assert set(by_default) == {"policy_compression"}
    assert await value(timescale_dsn, "SELECT count(*) FROM timescaledb_information.hypertables") == 2
    with_retention = await jobs(schema.TimescalePolicies(drop_after=timedelta(days=30)))
    assert set(with_retention) == {"policy_compression", "policy_retention"}
    assert "30 days" in str(with_retention["policy_retention"])
    assert set(await jobs(None)) == {"policy_compression", "policy_retention"}
    assert await jobs(schema.TimescalePolicies(compress_after=None)) == {}


async def test_late_readings_enter_compressed_chunks(timescale_dsn):
    sink = TimescaleSink(timescale_dsn)
    await sink.apply(batch(1, content=readings(300)))
    await fetch(timescale_dsn, "SELECT compress_chunk(c) FROM show_chunks('reading') c")

    late = await sink.apply(batch(2, content=readings(300, start_us=START_US + SECOND_US // 2, seed=2)))
    again = await sink.apply(batch(3, content=readings(300)))

    await sink.aclose()
    assert late == Receipt(300, 300)
    assert again == Receipt(300, 0, duplicates=300)
    assert await value(timescale_dsn, "SELECT count(*) FROM reading") == 600


async def test_a_chunk_is_opened_for_many_late_readings_and_not_for_a_few(timescale_dsn):
    compressed = "SELECT count(*) FILTER (WHERE is_compressed) FROM timescaledb_information.chunks"
    first = TimescaleSink(timescale_dsn)
    await first.apply(batch(1, content=readings(3000)))
    await fetch(timescale_dsn, "SELECT compress_chunk(c) FROM show_chunks('reading') c")
    await first.aclose()
    sink = TimescaleSink(timescale_dsn)

    few = await sink.apply(batch(2, content=readings(300, start_us=START_US + 1, seed=2)))
    assert (few, await value(timescale_dsn, compressed)) == (Receipt(300, 300), 1)
    many = readings(21_000, start_us=START_US + 2, seed=3)
    receipts = await asyncio.gather(
        *(sink.apply(batch(3, content=many)) for _ in range(2)),
        sink.apply(batch(4, gateway_id="gw-2", content=readings(300, start_us=START_US + 1, seed=2))),
        return_exceptions=True,
    )

    assert await value(timescale_dsn, compressed) == 0
    assert all(isinstance(each, Receipt | RetryLaterError) for each in receipts)
    assert (await sink.apply(batch(3, content=many))).stored == 21_000
    assert (await sink.apply(batch(3, content=many))).applied_before
    assert await value(timescale_dsn, "SELECT count(*) FROM reading") == 24_300
    await sink.aclose()


async def test_a_database_killed_before_the_commit_has_nothing_of_the_batch(own_postgres_server):
    dsn = own_postgres_server.dsn()
    sink = TimescaleSink(dsn)
    await sink.apply(batch(1))
    blocker = await asyncpg.connect(dsn)
    await blocker.execute("BEGIN; LOCK TABLE ingest_ledger IN EXCLUSIVE MODE")
    applying = asyncio.create_task(sink.apply(batch(2, content=readings(5000, start_us=START_US + 10**9))))
    waiting = (
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'WITH seen%'"
    )
    while await value(dsn, waiting) == 0:  # noqa: ASYNC110 - another process is waited for
        await asyncio.sleep(0.01)

    await asyncio.to_thread(own_postgres_server.kill)

    with pytest.raises(RetryLaterError):
        await applying
    with pytest.raises(RetryLaterError):
        await sink.apply(batch(2))
    blocker.terminate()
    await asyncio.to_thread(own_postgres_server.start)
    assert await value(dsn, "SELECT count(*) FROM reading") == 12
    again = await sink.apply(batch(2, content=readings(5000, start_us=START_US + 10**9)))
    assert again == Receipt(5000, 5000)
    assert await value(dsn, "SELECT count(*) FROM reading") == 5012
    await sink.aclose()


async def test_a_database_that_was_emptied_is_prepared_again(postgres_dsn):
    sink = TimescaleSink(postgres_dsn)
    await sink.apply(batch(1))
    await fetch(postgres_dsn, "DROP SCHEMA public CASCADE")
    await fetch(postgres_dsn, "CREATE SCHEMA public")

    with pytest.raises(RetryLaterError):
        await sink.apply(batch(2))

    assert await sink.apply(batch(2)) == Receipt(12, 12)
    await sink.aclose()


async def test_a_database_that_is_away_or_refuses_us_says_so(postgres_server, postgres_dsn, tmp_path):
    away = TimescaleSink(f"postgresql://postgres@/postgres?host={tmp_path}")
    with pytest.raises(RetryLaterError, match="database:"):
        await away.apply(batch())
    nobody = TimescaleSink(postgres_dsn.replace("postgres@", "nobody@", 1))
    with pytest.raises(UnauthorisedError, match="nobody"):
        await nobody.apply(batch())
    missing = TimescaleSink(postgres_server.dsn("not_yet_made"))
    with pytest.raises(RetryLaterError, match="not_yet_made"):
        await missing.apply(batch())
    for sink in (away, nobody, missing):
        await sink.aclose()
