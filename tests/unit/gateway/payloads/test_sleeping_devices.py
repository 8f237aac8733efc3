"""Devices that were asleep: arrays of hundreds of old readings, shuffled, partly sent before, stored once."""

from __future__ import annotations

import json
import random

import pytest

from gateway.mqtt.codec.packets import Publish
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import TopicTemplate
from tests.support.committers import build_committer
from tests.support.open_spool import open_spool

START_S = 1_780_000_000
RULES = RuleSet(
    TopicTemplate("sensors/{sensor_id}/{sensor_type}"),
    [
        PayloadRule("fields/{sensor_id}", "fields", time="at"),
        PayloadRule("csv/{sensor_id}", "csv", columns=("at", "t"), time="at"),
        PayloadRule("senml/{sensor_id}", "senml", sensor_type="t"),
        PayloadRule("lines/{sensor_id}", "line_protocol"),
    ],
)


def lines(rows):
    return "\n".join(f"t value={value} {at}000000000" for at, value in rows)


WRITERS = {
    b"sensors/m/t": lambda rows: json.dumps([{"value": v, "ts": at} for at, v in rows]),
    b"fields/m": lambda rows: json.dumps([{"t": v, "at": at} for at, v in rows]),
    b"csv/m": lambda rows: "\n".join(f"{at},{v}" for at, v in rows),
    b"senml/m": lambda rows: json.dumps([{"bn": "x:", "n": "t", "t": at, "v": v} for at, v in rows]),
    b"lines/m": lines,
}


class Device:
    name, may_publish_sensor = "listen", None

    def acknowledge(self, publishes):
        pass

    def refuse(self, publishes, reason_code):
        raise AssertionError((publishes, reason_code))


@pytest.mark.parametrize("topic", WRITERS)
async def test_arrays_of_old_readings_out_of_order_and_sent_before_are_stored_once(tmp_path, topic):
    chance = random.Random(topic)
    rows = [(START_S + 60 * n, n + 0.5) for n in range(600)]
    write = WRITERS[topic]
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool, RULES)

        async def send(part):
            committer.submit_publishes(Device(), [Publish(topic, write(part).encode(), 1, 1)])
            return await committer.commit_once()

        assert await send([rows[-1]]) == 1  # the newest came before the device fell asleep
        assert await send(chance.sample(rows[:400], 400)) == 400
        assert await send(chance.sample(rows[200:600], 400)) == 199
        assert await send(chance.sample(rows, 600)) == 0
        assert committer.counters.duplicates == 200 + 1 + 600
        assert committer.counters.quarantined == 0
        assert [(at, value) for _, at, value in await spool.contents()] == [
            (a * 1_000_000, v) for a, v in rows
        ]


async def test_a_reading_sent_again_with_another_value_is_a_conflict_and_the_first_stays(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool, RULES)
        for values in ((1, 2, 3), (1, 7, 3)):
            payload = json.dumps([{"t": v, "at": START_S + n} for n, v in enumerate(values)]).encode()
            committer.submit_publishes(Device(), [Publish(b"fields/m", payload, 1, 1)])
            await committer.commit_once()
        assert (committer.counters.duplicates, committer.counters.conflicts) == (2, 1)
        assert [value for _, _, value in await spool.contents()] == [1, 2, 3]
