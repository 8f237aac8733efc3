from __future__ import annotations

import json

import pytest

from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.topics import TopicTemplate
from gateway.spool import quarantine_items
from gateway.spool.errors import SpoolAccessError, SpoolInUseError
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spooltools.checker import check_spool
from gateway.spooltools.quarantine_retry import retry_stopped_spool
from tests.support.open_spool import NOW_US, open_spool

_RULES = RuleSet(TopicTemplate("plant/{sensor_id}/{sensor_type}"))


def item(payload: object, reason: str = "unknown_topic", *, topic: str = "plant/a/t", source: str = "listen"):
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return QuarantineItem.from_payload(
        received_at_us=NOW_US, source=source, topic=topic, reason=reason, detail="d", payload=data
    )


async def kept(path, *items: QuarantineItem) -> None:
    async with open_spool(path) as spool:
        await spool.appender.append(None, items, now_us=NOW_US)


async def contents(path):
    async with open_spool(path) as spool:
        return await spool.contents()


async def test_items_that_decode_today_become_readings_as_of_the_time_they_came_in(tmp_path):
    path = tmp_path / "spool.db"
    await kept(path, item({"value": 1.5}), item([{"value": 2, "ts": "2026-05-01T00:00:00Z"}, {"value": 3}]))
    result = await retry_stopped_spool(path, [1, 2], _RULES)
    assert (result.items, result.stored, result.left) == (2, 3, [])
    assert await contents(path) == [
        ("a", 1777593600000000, 2.0),
        ("a", NOW_US, 1.5),
        ("a", NOW_US + 1, 3.0),
    ]
    assert quarantine_items.list_item_numbers(path) == []
    assert check_spool(path).problems == []


async def test_what_is_still_bad_stays_under_its_number_with_the_reason(tmp_path):
    path = tmp_path / "spool.db"
    await kept(
        path,
        item(b"{", "not_json"),
        item({"value": 1}, topic="elsewhere/a/t"),
        item([{"value": 1}, {"value": "x"}]),
        item(b"[]"),
        item({"value": 1, "pad": "x" * 5000}),
        item({"value": 1}, "conflict", source="spool"),
        item([{"value": 1}, {"value": 2, "ts": 1e30}], "bad_time"),
        item({"value": 7}),
    )
    result = await retry_stopped_spool(path, [*range(1, 9), 99], _RULES)
    assert (result.items, result.stored) == (1, 1)
    why = dict(result.left)
    assert list(why) == [1, 2, 3, 4, 5, 6, 7, 99]
    for number, words in {
        1: "still bad: not_json",
        2: "still bad: unknown_topic",
        3: "still bad: bad_reading",
        4: "it holds no reading",
        5: "only the first 4096 of its",
        6: "quarantined by spool",
        7: "would double them",
        99: "no such item",
    }.items():
        assert words in why[number]
    assert quarantine_items.list_item_numbers(path) == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, _, value in await contents(path)] == [7.0]


async def test_a_retried_reading_that_is_stored_already_is_not_stored_again(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        await spool.append([("a", 2_000_000_000_000_000, 1.0)])
    await kept(path, item({"value": 1, "ts": 2_000_000_000}), item({"value": 9, "ts": 2_000_000_000}))
    result = await retry_stopped_spool(path, [1, 2], _RULES)
    assert (result.items, result.stored, result.duplicates, result.conflicts) == (2, 0, 1, 1)
    assert [i.reason for i in quarantine_items.list_items(path)] == ["conflict"]


async def test_a_running_gateway_keeps_its_spool_to_itself(tmp_path):
    path = tmp_path / "spool.db"
    await kept(path, item({"value": 1}))
    async with open_spool(path):
        with pytest.raises(SpoolInUseError):
            await retry_stopped_spool(path, [1], _RULES)
    with pytest.raises(SpoolAccessError, match="no spool"):
        await retry_stopped_spool(tmp_path / "missing.db", [1], _RULES)
    assert not (tmp_path / "missing.db").exists()


async def test_items_are_listed_newest_first_and_dropped_while_a_gateway_writes(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as spool:
        for number in range(6):
            await spool.appender.append(None, [item(b"x", f"r{number % 2}")], now_us=NOW_US)
        assert [i.quarantine_no for i in quarantine_items.list_items(path, limit=3)] == [6, 5, 4]
        assert [i.quarantine_no for i in quarantine_items.list_items(path, reason="r1")] == [6, 4, 2]
        assert {r.reason: r.items for r in quarantine_items.count_items_by_reason(path)} == {"r0": 3, "r1": 3}
        assert quarantine_items.drop_items(path, [2, 4, 77]) == 2
        await spool.append([("a", 1, 1.0)])
        assert quarantine_items.list_item_numbers(path) == [1, 3, 5, 6]
        found = quarantine_items.find_item(path, 3)
        assert found is not None
        assert found.payload == b"x"
        assert quarantine_items.find_item(path, 2) is None
