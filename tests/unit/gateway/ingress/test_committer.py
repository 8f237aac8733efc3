"""The committer acknowledges what is durable, holds what cannot be written, and bounds what waits."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import Flag, Readings
from gateway.ingress import committer as committer_module
from gateway.ingress.committer import CommitterHooks
from gateway.mqtt.codec.packets import Publish
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import TopicTemplate
from gateway.spool.appender import Capacity
from tests.support.committers import build_committer
from tests.support.open_spool import open_spool

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass
class Device:
    """Stands where a connection would."""

    name: str = "listen"
    may_publish_sensor: Callable[[str], bool] | None = None
    acknowledged: list[Publish] = field(default_factory=list)
    refused: list[tuple[Publish, int]] = field(default_factory=list)

    def acknowledge(self, publishes: Sequence[Publish]) -> None:
        self.acknowledged += publishes

    def refuse(self, publishes: Sequence[Publish], reason_code: int) -> None:
        self.refused += [(p, reason_code) for p in publishes]


def publish(payload: bytes, topic: bytes = b"sensors/a/t", packet_id: int = 1) -> Publish:
    return Publish(topic, payload, packet_id, 1)


async def test_a_publish_is_acknowledged_once_its_readings_can_be_read_back(tmp_path):
    device = Device()
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool)
        sent = [
            publish(b'{"value": 1.5, "ts": 1700000000000000}'),
            publish(b'[{"value": 2, "ts": 1700000001}]'),
        ]
        committer.submit_publishes(device, sent)
        assert device.acknowledged == []
        assert await committer.commit_once() == 2
        assert device.acknowledged == sent
    async with open_spool(tmp_path / "spool.db") as spool:
        assert await spool.contents() == [("a", 1700000000000000, 1.5), ("a", 1700000001000000, 2.0)]


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        (b"other", b'{"value": 1}', "unknown_topic"),
        (b"sensors/a\x1b/t", b'{"value": 1}', "bad_series_name"),
        (b"sensors/a/t", b"\xff\xfe", "not_json"),
        (b"sensors/a/t", b'{"value": 1, "ts": "noon"}', "bad_time"),
        (b"sensors/a/t", b'{"value": 1, "seq": -4}', "bad_reading"),
        (b"sensors/a/t", b'{"value": 1, "quality": 1e300}', "bad_reading"),
    ],
)
async def test_bad_input_is_quarantined_counted_and_acknowledged(tmp_path, topic, payload, reason):
    device = Device()
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool, clock_us=lambda: 42)
        committer.submit_publishes(device, [publish(payload, topic), publish(b'{"value": 1, "ts": 5}')])
        assert await committer.commit_once() == 1
        assert len(device.acknowledged) == 2
        assert committer.counters.quarantined == 1
        rows = await spool.database.read(
            lambda c: c.execute("SELECT received_at_us, source, reason, payload FROM quarantine").fetchall()
        )
        assert rows == [(42, "listen", reason, payload)]


async def test_readings_without_a_time_get_the_time_of_receipt_each_its_own(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool, clock_us=lambda: 1000)
        committer.submit_publishes(
            Device(), [publish(b'[{"value": 1}, {"value": 2}]'), publish(b'{"value": 3}')]
        )
        await committer.commit_once()
        assert await spool.contents() == [("a", 1000, 1.0), ("a", 1001, 2.0), ("a", 1002, 3.0)]


async def test_a_full_spool_holds_acknowledgements_and_recovers_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(committer_module, "_RETRY_S", 0.01)
    device = Device()
    full = Capacity(min_free_bytes=1 << 62)
    async with open_spool(tmp_path / "spool.db", capacity=full) as spool:
        committer = build_committer(spool)
        committer.submit_publishes(device, [publish(b'{"value": 1, "ts": 5}')])
        committing = asyncio.create_task(committer.commit_once())
        await asyncio.sleep(0.1)
        assert "min_free_bytes" in committer.counters.holding_reason
        assert device.acknowledged == []
        object.__setattr__(full, "min_free_bytes", 0)
        assert await committing == 1
        assert len(device.acknowledged) == 1
        assert committer.counters.holding_reason == ""


async def test_a_full_spool_that_refuses_says_quota_exceeded_and_stores_nothing(tmp_path):
    device = Device()
    async with open_spool(tmp_path / "spool.db", capacity=Capacity(max_bytes=1)) as spool:
        committer = build_committer(spool, refuse_when_full=True)
        committer.submit_publishes(device, [publish(b'{"value": 1, "ts": 5}')])
        assert await committer.commit_once() == 0
        assert [code for _, code in device.refused] == [0x97]
        assert device.acknowledged == []
        assert await spool.contents() == []


async def test_what_waits_in_memory_is_bounded_by_pressing_back(tmp_path):
    pressed: list[bool] = []
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(
            spool, max_pending_bytes=1000, hooks=CommitterHooks(on_pressure=pressed.append)
        )
        for i in range(5):
            committer.submit_publishes(Device(), [publish(b'{"value": 1, "ts": %d}' % i)])
        assert pressed == [True]
        await committer.commit_once()
        assert pressed == [True, False]


async def test_finishing_commits_and_acknowledges_what_was_taken(tmp_path):
    device = Device()
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool)
        running = asyncio.create_task(committer.run())
        committer.submit_publishes(device, [publish(b'{"value": 1, "ts": 5}')])
        committer.finish()
        await asyncio.wait_for(running, 5)
        assert len(device.acknowledged) == 1


async def test_a_device_whose_attributes_change_without_end_cannot_fill_the_book(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool)
        payloads = [b'{"value": 1, "ts": %d, "location": "%d"}' % (i, i) for i in range(500)]
        committer.submit_publishes(Device(), [publish(p) for p in payloads])
        assert await committer.commit_once() == 500
        assert len(spool.catalog) <= 100


async def test_attribute_states_are_counted_over_restarts_and_topics(tmp_path):
    template = TopicTemplate("sensors/{sensor_id}/{sensor_type}")
    rules = RuleSet(template, [PayloadRule("other/{sensor_id}/{sensor_type}", "reading")])
    async with open_spool(tmp_path / "spool.db") as spool:
        for start, topic in ((0, b"sensors/a/t"), (80, b"sensors/a/t"), (160, b"other/a/t")):
            committer = build_committer(spool, rules)
            states = range(start, start + 80)
            payloads = [b'{"value": 1, "ts": %d, "location": "%d"}' % (i, i) for i in states]
            committer.submit_publishes(Device(), [publish(p, topic) for p in payloads])
            assert await committer.commit_once() == 80
        assert len(spool.catalog) <= 100


async def test_faults_of_one_payload_are_limited_whatever_they_are(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool)
        readings = b",".join(b'{"value": 1, "ts": "noon"}' for _ in range(1_000))
        committer.submit_publishes(Device(), [publish(b"[" + readings + b"]")])
        await committer.commit_once()
        assert committer.counters.quarantined == 100


async def test_series_beyond_the_limit_are_quarantined(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        spool.catalog.max_series = 2
        committer = build_committer(spool)
        topics = [b"sensors/s%d/t" % i for i in range(3)]
        committer.submit_publishes(Device(), [publish(b'{"value": 1, "ts": 5}', t) for t in topics])
        assert await committer.commit_once() == 2
        assert committer.counters.quarantined == 1


async def test_a_long_array_is_taken_as_its_readings_one_by_one_would_be(tmp_path):
    members = [
        b'{"value": %d.25, "ts": %d, "quality": 50, "seq": %d, "unit": "C"}'
        % (i, 1_700_000_000_000_000 + i, i)
        for i in range(40)
    ]
    contents = []
    for name, payloads in (("array", [b"[" + b",".join(members) + b"]"] * 2), ("single", members)):
        async with open_spool(tmp_path / name) as spool:
            committer = build_committer(spool)
            for payload in payloads:  # the second time the fast way is taken
                committer.submit_publishes(Device(), [publish(payload)])
                await committer.commit_once()
            claimed = await spool.deliveries.claim("x", ClaimRequest(now_us=1))
            assert claimed is not None
            contents.append((await spool.contents(), committer.counters.quarantined))
    assert contents[0] == contents[1]


async def test_an_array_with_a_time_of_another_unit_in_it_is_read_right(tmp_path):
    times = [1_700_000_000_000_000 + i for i in range(20)]
    payload = [b'{"value": 1, "ts": %d}' % t for t in times]
    odd = [b'{"value": 2, "ts": "2023-11-14T22:13:21Z"}', b'{"value": true, "ts": 1700000002.5}']
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool)
        for _ in range(2):
            committer.submit_publishes(Device(), [publish(b"[" + b",".join([*payload, *odd]) + b"]")])
            await committer.commit_once()
        expected = [("a", t, 1.0) for t in times]
        expected += [("a", 1_700_000_001_000_000, 2.0), ("a", 1_700_000_002_500_000, 1.0)]
        assert await spool.contents() == sorted(expected)


async def test_readings_are_stored_with_the_flags_the_check_gave_them_once_a_group(tmp_path, monkeypatch):
    monkeypatch.setattr(committer_module, "_RETRY_S", 0.01)
    times: list[int] = []

    def check(readings: Readings, now_us: int) -> Readings:
        times.append(now_us)
        return dataclasses.replace(readings, flags=readings.flags | np.int32(Flag.SPIKE))

    full = Capacity(min_free_bytes=1 << 62)
    async with open_spool(tmp_path / "spool.db", capacity=full) as spool:
        committer = build_committer(spool, hooks=CommitterHooks(check=check), clock_us=lambda: 1000)
        committer.submit_publishes(Device(), [publish(b'[{"value": 1}, {"value": 2, "ts": 7}]')])
        committing = asyncio.create_task(committer.commit_once())
        await asyncio.sleep(0.05)
        object.__setattr__(full, "min_free_bytes", 0)
        assert await committing == 2
        assert times == [1000]
        await spool.deliveries.register("x", "file", now_us=1)
        claimed = await spool.deliveries.claim("x", ClaimRequest(now_us=1))
        assert claimed is not None
        batch = await spool.deliveries.read_batch(claimed)
        assert batch is not None
        assert sorted(batch.readings.flags.tolist()) == [Flag.SPIKE, Flag.SPIKE | Flag.TIME_ASSIGNED]
