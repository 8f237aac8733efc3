"""A spool's ledger of what other gateways delivered: each range once, in parts too, and in bounded room."""

from __future__ import annotations

import random
from uuid import UUID

import numpy as np
import pytest

from cloud_sync.http.responses import progress_to_json
from cloud_sync.model.ledger_rules import RangeConflictError
from cloud_sync.model.records import Batch, BatchRange, Receipt, RecordClass
from gateway.spool import received_ledger
from gateway.spool.received_ledger import ReceivedLedger
from gateway.spool.segments import AppendResult
from tests.support.batches import batch_of
from tests.support.committers import build_committer
from tests.support.open_spool import NOW_US, OpenSpool, open_spool

EPOCH = UUID(int=7)


def batch(first: int, last: int | None = None, *, rows: int = 3, at: int = 0, part: int = 1, parts: int = 1):
    last = first if last is None else last
    made = batch_of(
        [("s", "t", at + 1000 * first + n, float(n)) for n in range(rows)], gateway_id="low", epoch=EPOCH
    )
    return Batch(
        BatchRange("low", EPOCH, RecordClass.READING, first, last, part, parts), made.series, made.readings
    )


async def take(spool: OpenSpool, ledger: ReceivedLedger, *batches: Batch, now_us: int = NOW_US):
    """Store batches as the gateway does, all in one group; what became of each."""
    committer = build_committer(spool)
    futures = []
    for one in batches:
        numbers = np.array([spool.catalog.assign_number(s) for s in one.series], np.int32)
        readings = one.readings.with_series(numbers[one.readings.series])
        futures.append(committer.submit_readings(readings, note=ledger.build_note(one, now_us)))
    await committer.commit_once()
    return [await future for future in futures]


async def test_a_range_that_comes_again_gets_its_first_receipt_also_after_a_restart(tmp_path):
    async with open_spool(tmp_path / "s.db") as spool:
        ledger = ReceivedLedger(spool.database)
        assert await ledger.find_receipt(batch(1, 3)) is None
        (taken,) = await take(spool, ledger, batch(1, 3))
        assert (taken.stored, taken.duplicates, taken.conflicts) == (3, 0, 0)
    async with open_spool(tmp_path / "s.db") as spool:
        receipt = await ReceivedLedger(spool.database).find_receipt(batch(1, 3))
        assert isinstance(receipt, Receipt)
        assert (receipt.rows, receipt.stored, receipt.applied_before) == (3, 3, True)


async def test_each_lot_of_a_group_is_told_what_became_of_its_own_rows(tmp_path):
    async with open_spool(tmp_path / "s.db") as spool:
        ledger = ReceivedLedger(spool.database)
        await spool.append([("s", 2000, 9.0), ("s", 2001, 1.0)])
        spool.catalog.assign_number(batch(1).series[0])
        taken = await take(spool, ledger, batch(1), batch(2, at=-1000), batch(3, rows=0), batch(4, at=-2000))
        assert [(a.stored, a.duplicates, a.conflicts) for a in taken] == [
            (3, 0, 0),
            (0, 3, 0),
            (0, 0, 0),
            (1, 1, 1),
        ]


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (batch(1, 2), "range_overlap"),
        (batch(3, 4), "range_overlap"),
        (batch(2, 3, rows=2), "range_mismatch"),
        (batch(2, 3, at=5), "range_mismatch"),
    ],
)
async def test_a_range_that_overlaps_or_holds_other_rows_is_a_conflict(tmp_path, other, reason):
    async with open_spool(tmp_path / "s.db") as spool:
        ledger = ReceivedLedger(spool.database)
        await take(spool, ledger, batch(2, 3))
        with pytest.raises(RangeConflictError) as fault:
            await ledger.find_receipt(other)
        assert fault.value.reason == reason


async def test_parts_of_a_range_are_each_taken_once_and_make_it_complete(tmp_path):
    async with open_spool(tmp_path / "s.db") as spool:
        ledger = ReceivedLedger(spool.database)
        await take(spool, ledger, batch(1, rows=2, part=1, parts=2))
        assert await ledger.find_receipt(batch(1, rows=2, part=2, parts=2)) is None
        assert isinstance(await ledger.find_receipt(batch(1, rows=2, part=1, parts=2)), Receipt)
        with pytest.raises(RangeConflictError):
            await ledger.find_receipt(batch(1))
        (epoch,) = progress_to_json("low", await ledger.progress("low"))["epochs"]
        assert (epoch["ranges"], epoch["partial"], epoch["rows"]) == ([], [(1, 1)], 2)
        await take(spool, ledger, batch(1, rows=1, at=10, part=3, parts=4))
        await take(spool, ledger, batch(1, rows=1, at=20, part=4, parts=4))
        assert await ledger.find_receipt(batch(1)) == "covered"
        (epoch,) = progress_to_json("low", await ledger.progress("low", EPOCH))["epochs"]
        assert (epoch["ranges"], epoch["partial"], epoch["rows"]) == ([(1, 1)], [], 4)
        assert await ledger.progress("low", UUID(int=8)) is None
        assert await ledger.gateways() == ["low"]


async def test_old_entries_are_merged_so_that_the_ledger_is_bounded_and_still_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(received_ledger, "KEPT_ENTRIES", 20)
    monkeypatch.setattr(received_ledger, "_MERGED_EVERY", 1)
    order = [n for n in range(1, 201) if n != 50]
    random.Random(3).shuffle(order)
    async with open_spool(tmp_path / "s.db") as spool:
        ledger = ReceivedLedger(spool.database)
        for at, commit in enumerate(sorted(order[:100]) + order[100:]):
            await take(spool, ledger, batch(commit), now_us=NOW_US + at)
        count = await spool.database.read(lambda c: c.execute("SELECT count(*) FROM received").fetchone()[0])
        assert count < 45
        (epoch,) = progress_to_json("low", await ledger.progress("low"))["epochs"]
        assert epoch["gaps"] == [(50, 50)]
        assert (epoch["rows"], epoch["stored"]) == (597, 597)
        assert await ledger.find_receipt(batch(1)) == "covered"
        assert await spool.appender.match_stored(_own(spool, batch(1))) == AppendResult(0, 3, 0)
        assert await spool.appender.match_stored(_own(spool, batch(50))) is None
        assert await ledger.find_receipt(batch(order[-1])) == Receipt(3, 3, applied_before=True)
        assert await ledger.find_receipt(batch(50)) is None


def _own(spool: OpenSpool, one: Batch):
    numbers = np.array([spool.catalog.assign_number(s) for s in one.series], np.int32)
    return one.readings.with_series(numbers[one.readings.series])
