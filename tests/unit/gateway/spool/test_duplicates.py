"""The spool stores each reading once: same series, same time."""

from __future__ import annotations

import random

from cloud_sync.model.records import Series
from tests.support.open_spool import NOW_US, open_spool


async def test_a_reading_that_comes_again_is_stored_once(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        assert (await spool.append([("a", 1, 1.0), ("a", 2, 2.0)])).stored == 2
        again = await spool.append([("a", 2, 2.0), ("a", 3, 3.0), ("a", 1, 1.0)])
        assert (again.stored, again.duplicates, again.conflicts) == (1, 2, 0)
        assert await spool.contents() == [("a", 1, 1.0), ("a", 2, 2.0), ("a", 3, 3.0)]


async def test_a_reading_twice_in_one_group_is_stored_once_and_the_first_value_stays(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        appended = await spool.append([("a", 5, 1.0), ("b", 5, 1.0), ("a", 5, 1.0), ("a", 5, 9.0)])
        assert (appended.stored, appended.duplicates, appended.conflicts) == (2, 1, 1)
        assert await spool.contents() == [("a", 5, 1.0), ("b", 5, 1.0)]


async def test_another_value_for_the_same_time_is_quarantined_and_the_first_stays(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 1, 1.0), ("a", 2, 2.0)])
        assert (await spool.append([("a", 1, 7.0)])).conflicts == 1
        assert await spool.contents() == [("a", 1, 1.0), ("a", 2, 2.0)]
        rows = await spool.database.read(
            lambda c: c.execute("SELECT topic, reason, payload FROM quarantine").fetchall()
        )
        assert rows == [("a/t", "conflict", b'{"value":7.0,"ts":1}')]


async def test_a_late_reading_that_is_new_is_stored(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 100, 1.0)])
        assert (await spool.append([("a", 50, 2.0)])).stored == 1
        assert (await spool.append([("a", 50, 2.0)])).duplicates == 1


async def test_the_same_series_with_other_attributes_is_still_the_same_series(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 1, 1.0)])
        readings = spool.readings([("a", 1, 1.0), ("a", 2, 1.0)])
        moved = spool.catalog.assign_number(Series("a", "t", (("location", "attic"),)))
        assert moved is not None
        readings.series[:] = moved
        appended = await spool.appender.append(readings, [], now_us=NOW_US)
        assert (appended.stored, appended.duplicates) == (1, 1)


async def test_duplicates_are_known_after_a_restart_and_after_compaction(tmp_path):
    rows = [(f"s{i % 7}", 1000 + i, float(i)) for i in range(3000)]
    async with open_spool(tmp_path / "spool.db") as spool:
        for start in range(0, 3000, 10):
            await spool.append(rows[start : start + 10])
    async with open_spool(tmp_path / "spool.db") as spool:
        assert (await spool.append(rows[500:700])).duplicates == 200
        await spool.compaction.compact_once(everything=True)
        assert (await spool.append(rows[100:1100])).duplicates == 1000
    async with open_spool(tmp_path / "spool.db") as spool:
        appended = await spool.append([*rows, ("s1", 1, 5.0)])
        assert (appended.stored, appended.duplicates) == (1, 3000)
        assert len(await spool.contents()) == 3001


async def test_any_order_with_repeats_is_stored_once(tmp_path):
    randomly = random.Random(7)
    rows = [(f"s{i % 5}", i // 5, float(i)) for i in range(600)]
    sent = rows * 3
    randomly.shuffle(sent)
    async with open_spool(tmp_path / "spool.db") as spool:
        while sent:
            size = randomly.randint(1, 40)
            await spool.append(sent[:size])
            del sent[:size]
            if randomly.random() < 0.2:
                await spool.compaction.compact_once(everything=True)
        assert await spool.contents() == sorted(rows)


async def test_a_time_far_ahead_costs_later_readings_nothing_but_a_look(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        await spool.append([("a", 4_000_000_000_000_000, 1.0)])
        assert (await spool.append([("a", 10, 1.0), ("a", 11, 1.0)])).stored == 2
        assert (await spool.append([("a", 11, 1.0), ("a", 12, 1.0)])).duplicates == 1
