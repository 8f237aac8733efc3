"""Rules: which topics carry which payload shape, whose readings they are, and what goes into the spool."""

from __future__ import annotations

import gzip

import msgspec
import pytest
import zstandard

from gateway.auth.authenticator import allow_own_sensors, allow_own_topics, allow_unregistered_topics
from gateway.mqtt.codec.packets import Publish
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import NameTemplate, TopicPattern, TopicTemplate
from tests.support.committers import build_committer
from tests.support.open_spool import open_spool
from tests.unit.gateway.payloads.test_json_reading import decode_readings

TEMPLATE = TopicTemplate("sensors/{sensor_id}/{sensor_type}")


class Device:
    name = "listen"

    def __init__(self, may_publish_sensor=None):
        self.may_publish_sensor = may_publish_sensor
        self.acknowledged = []

    def acknowledge(self, publishes):
        self.acknowledged += publishes

    def refuse(self, publishes, reason_code):
        raise AssertionError((publishes, reason_code))


@pytest.mark.parametrize(
    ("pattern", "topic", "levels"),
    [
        ("a/{x}/c", "a/b/c", {"x": "b"}),
        ("a/{x}/c", "a/b/d", None),
        ("a/{x}/c", "a//c", None),
        ("a/+/{x}", "a//b", {"x": "b"}),
        ("a/#", "a", {}),
        ("a/#", "a/b/c", {}),
        ("a/#", "ab", None),
        ("#", "$SYS/x", None),
        ("#", "any/thing", {}),
        ("+/x", "$SYS/x", None),
        ("$SYS/{x}", "$SYS/b", {"x": "b"}),
        ("a/{rest#}", "a/b/c", {"rest": "b.c"}),
        ("{rest#}", "a/b", {"rest": "a.b"}),
        ("a.b/{x}", "a.b/c", {"x": "c"}),
        ("a.b/{x}", "aXb/c", None),
    ],
)
def test_a_pattern_fits_topics_as_the_filter_it_stands_for(pattern, topic, levels):
    assert TopicPattern(pattern).match(topic) == levels


def test_a_pattern_is_a_filter_to_subscribe_with():
    assert TopicPattern("a/{x}/+/{rest#}").filter == "a/+/+/#"


@pytest.mark.parametrize("pattern", ["", "a/#/b", "a/{x}/{x}", "a/b{x}", "{rest#}/b", "a/b+", "a/{}/b"])
def test_what_is_no_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match=r"level|twice|character"):
        TopicPattern(pattern)


def test_a_template_is_filled_in_step_by_step():
    template = NameTemplate("{group}.{node}:{member}")
    assert template.names == ("group", "node", "member")
    part = template.fill({"node": "n", "group": "g"})
    assert (part.names, part.text) == (("member",), None)
    assert part.fill({"member": "m"}).text == "g.n:m"
    assert part.render(str.upper) == "g.n:MEMBER"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"topic": "a/b", "format": "number"}, "knows nothing"),
        ({"topic": "a/#/b", "format": "number"}, "topic = 'a/#/b': level '#' stands for all"),
        ({"topic": "a/{x}", "format": "number", "sensor_id": "{y}"}, "knows x"),
        ({"topic": "a/{sensor_id}", "format": "csv"}, "columns"),
        ({"topic": "a/{sensor_id}", "format": "fields", "columns": ("a",)}, "columns"),
        ({"topic": "a/{sensor_id}", "format": "fields", "time_unit": "h"}, "time_unit"),
        ({"topic": "a/{sensor_id}", "format": "fields", "companions": {"battery": "b"}}, "battery_level"),
        ({"topic": "a/{sensor_id}", "format": "senml", "time": "ts"}, "says its own"),
        ({"topic": "a/{sensor_id}", "format": "reading", "include": ("a",)}, "include"),
        ({"topic": "a/{sensor_id}", "format": "csv", "columns": ("a",), "time": "ts"}, "'ts'"),
        ({"topic": "a", "format": "fields", "sensor_id": "{member}"}, "sensor_id cannot"),
        ({"topic": "a", "format": "fields", "sensor_id": "{a"}, "braces"),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        PayloadRule(**arguments)


def test_the_first_rule_whose_topic_fits_counts_and_the_template_comes_last():
    first = PayloadRule("plant/special/#", "ignore")
    second = PayloadRule("plant/{sensor_id}/{sensor_type}", "number")
    rules = RuleSet(TEMPLATE, [first, second])
    assert rules.rule_for("plant/special/x") is first
    assert rules.rule_for("plant/a/b") is second
    assert rules.rule_for("sensors/a/b") is None
    assert [rules.sensor_id_from_topic(t) for t in ("plant/a/b", "sensors/a/b", "else")] == ["a", "a", None]


def test_ownership_is_of_the_topic_where_it_names_the_device_and_of_the_payload_where_not():
    rules = RuleSet(
        TEMPLATE,
        [
            PayloadRule("z/{sensor_id}", "fields"),
            PayloadRule("many/#", "fields", sensor_id="{device}"),
            PayloadRule("noise/#", "ignore"),
        ],
    )
    mine = allow_own_topics("pump", rules)
    granted = {t: mine(t.encode()) for t in ("z/pump", "z/other", "sensors/pump/t", "many/x", "noise/x", "?")}
    assert granted == {
        "z/pump": True,
        "z/other": False,
        "sensors/pump/t": True,
        "many/x": True,
        "noise/x": True,
        "?": False,
    }
    nobody = allow_unregistered_topics(lambda: {"pump"}, rules)
    assert [nobody(t) for t in (b"z/pump", b"z/other", b"many/x")] == [False, True, True]


async def test_a_device_that_names_another_in_its_payload_is_not_believed(tmp_path):
    rules = RuleSet(TEMPLATE, [PayloadRule("many", "fields", sensor_id="{device}", include=("t",))])
    payload = b'[{"device": "pump", "t": 1}, {"device": "pump:b", "t": 2}, {"device": "other", "t": 3}]'
    device = Device(allow_own_sensors("pump"))
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool, rules, clock_us=lambda: 1000)
        committer.submit_publishes(device, [Publish(b"many", payload, 1, 1)])
        assert await committer.commit_once() == 2
        assert len(device.acknowledged) == 1
        assert await spool.contents() == [("pump", 1000, 1.0), ("pump:b", 1000, 2.0)]
        rows = await spool.database.read(
            lambda c: c.execute("SELECT reason, detail FROM quarantine").fetchall()
        )
    assert rows == [("not_its_own", "other t: the device may not publish as this sensor")]


async def test_topics_of_every_shape_go_into_one_commit(tmp_path):
    rules = RuleSet(
        TEMPLATE,
        [
            PayloadRule("z/{sensor_id}", "fields", time="at", time_unit="ms"),
            PayloadRule("n/{sensor_id}/{sensor_type}", "number"),
            PayloadRule("noise/#", "ignore"),
        ],
    )
    published = [
        (b"sensors/a/t", b'{"value": 1, "ts": 1700000000}'),
        (b"z/b", b'{"t": 2, "h": 3, "at": 5}'),
        (b"n/c/t", b"4.5"),
        (b"noise/x", b"\xff"),
        (b"z/b", b"\xff"),
    ]
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool, rules, clock_us=lambda: 7)
        device = Device()
        committer.submit_publishes(device, [Publish(t, p, n, 1) for n, (t, p) in enumerate(published, 1)])
        assert await committer.commit_once() == 4
        assert len(device.acknowledged) == 5
        assert committer.counters.quarantined == 1
        assert await spool.contents() == [
            ("a", 1700000000000000, 1.0),
            ("b", 5000, 2.0),
            ("b", 5000, 3.0),
            ("c", 7, 4.5),
        ]


async def test_names_that_cannot_be_stored_cost_their_reading_only(tmp_path):
    rules = RuleSet(TEMPLATE, [PayloadRule("z", "fields", sensor_id="{d}", include=("t", "x*"))])
    bad = {"d": "a", "t": 1, "x\x1b": 2, "x" * 300: 3}
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = build_committer(spool, rules)
        committer.submit_publishes(Device(), [Publish(b"z", msgspec.json.encode(bad), 1, 1)])
        assert await committer.commit_once() == 1
        assert committer.counters.quarantined == 2


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_compressed_readings_are_expanded_within_a_bound(pack):
    payload = pack(b'[{"value": 1.5}]')
    readings, faults = decode_readings(payload)
    assert ([r.value for r in readings], faults) == ([1.5], [])
    assert [f.reason for f in decode_readings(payload[:9])[1]] == ["bad_compression"]
    assert [f.reason for f in decode_readings(pack(payload))[1]] == ["bad_compression"]
    assert [f.reason for f in decode_readings(pack(b" " * (8 << 20) + b"1"))[1]] == ["too_large"]
