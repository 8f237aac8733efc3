"""What was heard on topics turns into rules that take it."""

from __future__ import annotations

import json
import tomllib

import cbor2
import pytest
from esio_spb_builder.core import sparkplug_b_pb2 as spb

from gateway.discovery.payload_guess import guess_format
from gateway.discovery.topic_observer import (
    PAYLOADS_PER_TOPIC_MAX,
    TOPICS_MAX,
    TopicObserver,
    format_rule_table,
    propose_rules,
)
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import TopicTemplate
from gateway.settings.sources import IngressRule

NOW_US = 1_790_000_000_000_000
TEMPLATE = TopicTemplate("sensors/{sensor_id}/{sensor_type}")


def heard(*published):
    seen = TopicObserver()
    for topic, payload in published:
        seen.add(topic.encode(), payload if isinstance(payload, bytes) else json.dumps(payload).encode())
    return seen


def learnt(*published, rules=()):
    return propose_rules(heard(*published), RuleSet(TEMPLATE, rules), now_us=NOW_US)


@pytest.mark.parametrize(
    ("payload", "shape"),
    [
        (b"21.5", "number"),
        (b"ON", "number"),
        (b'{"value": 1}', "reading"),
        (b'[{"value": 1, "ts": 5}]', "reading"),
        (b'{"value": 1}\n{"value": 2}', "ndjson"),
        (b'{"t": 1, "x": {"y": 2}}', "fields"),
        (b'[{"t": 1, "at": 5, "h": 4}]', "fields"),
        (b'[{"bn": "a:", "n": "b", "v": 1}]', "senml"),
        (cbor2.dumps([{-2: "a:", 0: "b", 2: 1}]), "senml"),
        (b"weather,host=a t=1 5", "line_protocol"),
        (b"2026-05-01T12:00:00Z;21.5;40", "csv"),
        (b"hello there", None),
        (b"", None),
        (b"\xff\xfe", None),
        (b'{"s": "x"}', None),
        (b"[1, 2]", None),
        (b"nan", None),
    ],
)
def test_a_payload_looks_like_its_shape(payload, shape):
    found = guess_format(payload)
    assert (found.format if found else None) == shape


def test_levels_that_differ_become_names_and_members_their_meaning():
    (proposal,) = learnt(
        (
            "plant/press/state",
            {"t": 1, "ts": 1780000000, "battery": 80, "rssi": -60, "door": "open", "fw": "1.2"},
        ),
        (
            "plant/oven/state",
            {"t": 2, "ts": 1780000001, "battery": 81, "rssi": -61, "door": "closed", "fw": "1.2"},
        ),
    ).proposals
    assert proposal.table == {
        "topic": "plant/{sensor_id}/state",
        "format": "fields",
        "time": "ts",
        "companions": {"battery_level": "battery", "signal_strength": "rssi", "firmware_version": "fw"},
        "values": {"closed": 0, "open": 1},
    }
    assert [(*m.name, m.value, m.time_us) for m in proposal.readings] == [
        ("oven", "t", 2, 1_780_000_001_000_000),
        ("oven", "door", 0, 1_780_000_001_000_000),
        ("press", "t", 1, 1_780_000_000_000_000),
        ("press", "door", 1, 1_780_000_000_000_000),
    ]
    assert proposal.faults == []


def test_one_topic_for_many_devices_takes_the_device_from_the_payload():
    (proposal,) = learnt(("up", {"device": "a", "t": 1}), ("up", {"device": "b", "t": 2})).proposals
    assert proposal.table == {"topic": "up", "format": "fields", "sensor_id": "{device}"}
    assert [m.name for m in proposal.readings] == [("a", "t"), ("b", "t")]


def test_numbers_take_device_and_type_from_the_topic():
    (proposal,) = learnt(("home/attic/t", b"21.5"), ("home/attic/h", b"40"), ("home/barn/t", b"3")).proposals
    assert proposal.table == {"topic": "home/{sensor_id}/{sensor_type}", "format": "number"}
    assert sorted(m.name for m in proposal.readings) == [("attic", "h"), ("attic", "t"), ("barn", "t")]


def test_several_levels_that_differ_name_the_device_together():
    (proposal,) = learnt(("a/x/1/s", {"t": 1}), ("a/y/1/s", {"t": 1}), ("a/x/2/s", {"t": 1})).proposals
    assert proposal.table["topic"] == "a/{level_2}/{level_3}/s"
    assert {m.name.sensor_id for m in proposal.readings} == {"x.1", "y.1", "x.2"}


def test_csv_gets_columns_to_be_named():
    (proposal,) = learnt(("log/m1", b"21.5;40;ok"), ("log/m2", b"22;41;ok")).proposals
    assert proposal.table == {
        "topic": "log/{sensor_id}",
        "format": "csv",
        "columns": ["column_1", "column_2", "column_3"],
        "separator": ";",
    }


def birth():
    message = spb.Payload(timestamp=1, seq=0)
    message.metrics.add(name="t", alias=4, datatype=9, float_value=1)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("table", "published"),
    [
        ({"preset": "zigbee2mqtt"}, [("zigbee2mqtt/bridge/state", b"{}"), ("zigbee2mqtt/a", {"t": 1})]),
        (
            {"preset": "zigbee2mqtt", "base": "home/z"},
            [("home/z/bridge/info", b"{}"), ("home/z/a", {"t": 1})],
        ),
        ({"preset": "tasmota"}, [("tele/p/SENSOR", {"A": {"T": 1}}), ("stat/p/RESULT", {"POWER": "ON"})]),
        (
            {"preset": "esphome"},
            [("attic/sensor/t/state", b"1"), ("attic/debug", b"x"), ("attic/status", b"online")],
        ),
        ({"preset": "shelly"}, [("s/events/rpc", {"params": {"ts": 1, "switch:0": {"apower": 1}}})]),
        ({"preset": "shelly"}, [("shellies/s/relay/0/power", b"1")]),
        ({"preset": "sparkplug_b"}, [("spBv1.0/g/NBIRTH/n", birth())]),
        ({"preset": "senml"}, [("senml/x", [{"n": "a/t", "v": 1}])]),
        (
            {"preset": "homie"},
            [("homie/d/$state", b"ready"), ("homie/d/n/t", b"1"), ("homie/d/n/t/$unit", b"C")],
        ),
        (
            {"preset": "ttn"},
            [("v3/a@t/devices/d/up", {"uplink_message": {"decoded_payload": {"t": 1}}})],
        ),
    ],
)
def test_the_devices_of_a_preset_are_recognised(table, published):
    found = learnt(*published)
    assert [p.table for p in found.proposals] == [table]
    assert found.proposals[0].readings
    assert found.proposals[0].faults == []
    assert found.unknown == []


def test_what_the_rules_of_today_take_is_not_proposed_again():
    found = learnt(
        ("sensors/a/t", {"value": 1}),
        ("mine/x", {"t": 1}),
        ("$SYS/broker/uptime", b"1"),
        ("dark/matter", b"\xff"),
        rules=[PayloadRule("mine/{sensor_id}", "fields")],
    )
    assert found.proposals == []
    assert found.known == ["mine/x", "sensors/a/t"]
    assert found.unknown == ["dark/matter"]


@pytest.mark.parametrize("level", ['we "ird', "a\x7fb"])
def test_a_proposal_is_a_table_of_the_configuration(level):
    published = [(f"{level}/m\\1", {"t": 1, "state": "ON"}), (f"{level}/m\u00e9", {"t": 1, "state": "OFF"})]
    (proposal,) = learnt(*published).proposals
    (table,) = tomllib.loads(format_rule_table(proposal))["ingress"]["rule"]
    assert table == proposal.table
    assert IngressRule(**table).rules[0].topic == f"{level}/{{sensor_id}}"


def test_what_is_kept_of_a_flood_is_bounded():
    seen = TopicObserver()
    for n in range(TOPICS_MAX + 10):
        seen.add(b"t/%d" % n, b"1")
    for n in range(100):
        seen.add(b"t/0", b"%d" % n)
    seen.add(b"t/1", b"x" * 100_000)
    assert (len(seen.topics), seen.left_out) == (TOPICS_MAX, 10)
    assert len(seen.topics["t/0"]) == PAYLOADS_PER_TOPIC_MAX
    assert seen.topics["t/0"][0] == b"1"
    assert seen.topics["t/0"][-1] == b"99"
    assert seen.topics["t/1"] == [b"1"]
