"""Ranges in parts, with refused rows, and merged when they are old: on every database there is."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import asyncpg
import pytest

from cloud_sync.codec import wire
from cloud_sync.model.ledger_rules import RangeConflictError
from cloud_sync.model.records import Batch, Readings, Receipt
from cloud_sync.timescale.sink import TimescaleSink
from tests.support.wire_examples import SECOND_US, START_US, batch, readings

NOW = timedelta(0)


@pytest.fixture
async def sink(region_dsn):
    sink = TimescaleSink(region_dsn)
    yield sink
    await sink.aclose()


def part_of(whole: Batch, part: int, parts: int, *, without: int = 0) -> Batch:
    """A part of a batch, its last rows left out as refused."""
    range_ = whole.range._replace(part=part, parts=parts)
    chosen = range_.rows_of_part(whole.rows)
    content = Readings(*(getattr(whole.readings, name)[chosen] for name in whole.readings.__slots__))
    if without:
        content = Readings(*(getattr(content, name)[:-without] for name in content.__slots__))
    series = whole.series if content.rows else ()
    return wire.decode(wire.encode(Batch(range_, series, content, without)))


def other(number: int) -> Readings:
    return readings(12, start_us=START_US + number * 10**9)


async def fetch(dsn: str, statement: str) -> Any:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 12, 13])
def test_parts_of_a_range_hold_each_of_its_rows_once(parts):
    whole = batch().range
    slices = [whole._replace(part=part, parts=parts).rows_of_part(12) for part in range(1, parts + 1)]

    assert (slices[0].start, slices[-1].stop) == (0, 12)
    assert all(a.stop == b.start for a, b in pairwise(slices))


async def test_a_range_is_complete_when_all_its_parts_are_there(region_dsn, sink):
    whole = batch(3, 9, content=readings(12))
    await sink.apply(batch(1, 2, content=other(1)))
    for part, parts in ((3, 4), (1, 2)):
        assert (await sink.apply(part_of(whole, part, parts))).stored == 12 // parts
        (known,) = await sink.progress("gw-1")
        assert [(r.range.first_commit, r.range.last_commit, r.complete) for r in known.ranges] == [
            (1, 2, True),
            (3, 9, False),
        ]

    assert (await sink.apply(part_of(whole, 4, 4))).stored == 3

    (known,) = await sink.progress("gw-1")
    assert [(r.range.first_commit, r.range.last_commit, r.complete) for r in known.ranges] == [(1, 9, True)]
    assert await fetch(region_dsn, "SELECT count(*) FROM reading") == 24


async def test_a_part_sent_twice_gets_the_same_receipt_and_overlapping_parts_are_refused(region_dsn, sink):
    whole = batch(3, 9)
    first = await sink.apply(part_of(whole, 2, 3))

    assert await sink.apply(part_of(whole, 2, 3)) == replace(first, applied_before=True)
    for part, parts in ((1, 1), (1, 2), (2, 2), (2, 4)):
        with pytest.raises(RangeConflictError) as refused:
            await sink.apply(part_of(whole, part, parts))
        assert refused.value.reason == "range_overlap"
    with pytest.raises(RangeConflictError):
        await sink.apply(part_of(batch(3, 9, content=other(1)), 2, 3))
    assert await fetch(region_dsn, "SELECT count(*) FROM reading") == 4


async def test_rows_that_came_another_way_do_not_complete_a_range(sink):
    whole = batch(3, 9)
    await sink.apply(part_of(whole, 2, 3))
    await sink.apply(batch(1, gateway_id="gw-2"))

    with pytest.raises(RangeConflictError):
        await sink.apply(whole)

    (known,) = await sink.progress("gw-1")
    assert [r.complete for r in known.ranges] == [False]


async def test_overlapping_ranges_sent_to_two_services_at_once_are_applied_by_one(region_dsn, sink):
    second = TimescaleSink(region_dsn)
    for start in range(1, 60, 6):
        ranges = [batch(start + n, start + 3 + n, content=other(start + n)) for n in (0, 2)]
        outcomes = await asyncio.gather(
            sink.apply(ranges[0]), second.apply(ranges[1]), return_exceptions=True
        )
        assert sorted(type(each).__name__ for each in outcomes) == ["RangeConflictError", "Receipt"]
    await second.aclose()


async def test_pieces_of_what_was_applied_whole_are_known_by_their_rows(region_dsn, sink):
    whole = batch(3, 9)
    await sink.apply(whole)

    piece = await sink.apply(part_of(whole, 2, 4))
    sub = await sink.apply(batch(4, 5, content=part_of(whole, 1, 2).readings))

    assert piece == Receipt(3, 0, duplicates=3, applied_before=True)
    assert sub == Receipt(6, 0, duplicates=6, applied_before=True)
    for unknown in (
        part_of(batch(3, 9, content=other(1)), 1, 2),
        batch(4, 5, content=other(1)),
    ):
        with pytest.raises(RangeConflictError):
            await sink.apply(unknown)
    assert await fetch(region_dsn, "SELECT count(*) FROM reading") == 12
    assert await fetch(region_dsn, "SELECT count(*) FROM ingest_ledger") == 1


async def test_rows_that_were_refused_are_counted_and_the_range_is_complete(region_dsn, sink):
    whole = batch(1, 4)

    assert await sink.apply(part_of(whole, 1, 2, without=2)) == Receipt(4, 4)
    assert await sink.apply(part_of(whole, 2, 2, without=6)) == Receipt(0, 0)
    assert (await sink.apply(part_of(whole, 2, 2, without=6))).applied_before

    (known,) = await sink.progress("gw-1")
    assert [(r.rows, r.refused, r.complete) for r in known.ranges] == [(4, 8, True)]
    assert await fetch(region_dsn, "SELECT count(*) FROM reading") == 4


async def test_old_ranges_side_by_side_become_one_entry_and_progress_stays_the_same(region_dsn, sink):
    for first, last in ((1, 3), (4, 4), (7, 8), (9, 12)):
        await sink.apply(batch(first, last, content=other(first)))
    for part in (2, 1):
        await sink.apply(part_of(batch(5, 5, content=other(50)), part, 2))
    await sink.apply(part_of(batch(13, 14, content=other(60)), 1, 2))
    before = await sink.progress("gw-1")
    assert await sink.merge_ledger(timedelta(days=1)) == 0

    assert await sink.merge_ledger(NOW) == 1

    assert await fetch(region_dsn, "SELECT count(*) FROM ingest_ledger") == 3
    assert await sink.progress("gw-1") == before
    await sink.merge_ledger(NOW)
    assert await sink.progress("gw-1") == before
    await sink.apply(batch(6, content=other(70)))
    await sink.merge_ledger(NOW)
    assert await fetch(region_dsn, "SELECT count(*) FROM ingest_ledger") == 2


async def test_a_batch_inside_a_merged_range_is_known_by_its_rows_or_refused(region_dsn, sink):
    sent = [batch(n, content=other(n)) for n in (1, 2, 3)]
    for each in sent:
        await sink.apply(each)
    await sink.merge_ledger(NOW)

    again = [await sink.apply(each) for each in sent]

    assert again == [Receipt(12, 0, duplicates=12, applied_before=True)] * 3
    restored = readings(12, start_us=START_US + 10**9 + SECOND_US // 2)
    with pytest.raises(RangeConflictError):
        await sink.apply(batch(2, content=restored))
    with pytest.raises(RangeConflictError):
        await sink.apply(batch(3, 4, content=other(3)))
    assert await fetch(region_dsn, "SELECT count(*) FROM reading") == 36
    assert await fetch(region_dsn, "SELECT count(*) FROM ingest_ledger") == 1
