"""Sparkplug B: births explain aliases, gaps and strangers ask for a rebirth, deaths are told.

Payloads are written with the messages that another package ships, which a protobuf compiler made.
"""

from __future__ import annotations

import random

import pytest
from esio_spb_builder.core import sparkplug_b_pb2 as spb
from hypothesis import given
from hypothesis import strategies as st

from cloud_sync.model.records import Flag
from gateway.payloads.decoder_registry import RuleSet, SingleSeriesDecoder, decode_payload
from gateway.payloads.formats.sparkplug import encode_rebirth_command
from gateway.payloads.formats.sparkplug_births import SparkplugBirths, SparkplugNodeId
from gateway.payloads.rule import FieldConversion, PayloadRule
from gateway.payloads.topics import TopicTemplate

NOW_US = 1_790_000_000_000_000
AT_MS = 1_780_000_000_000
RULE = PayloadRule("spBv1.0/#", "sparkplug_b")
NODE = SparkplugNodeId("plant", "press")
INT8, INT16, INT32, INT64, UINT8, UINT64, FLOAT, DOUBLE, BOOLEAN, STRING = 1, 2, 3, 4, 5, 8, 9, 10, 11, 12


def payload(*metrics, seq=None, at_ms=AT_MS):
    message = spb.Payload()
    if at_ms is not None:
        message.timestamp = at_ms
    if seq is not None:
        message.seq = seq
    for metric in metrics:
        metric = dict(metric)  # noqa: PLW2901 - taken apart
        properties = metric.pop("properties", {})
        added = message.metrics.add(**metric)
        for key, value in properties.items():
            added.properties.keys.append(key)
            kind = "int_value" if isinstance(value, int) else "string_value"
            added.properties.values.add(**{kind: value})
    return message.SerializeToString()


BD = {"name": "bdSeq", "datatype": INT64, "long_value": 3}
NBIRTH = payload(
    BD,
    {"name": "Node Control/Rebirth", "datatype": BOOLEAN, "boolean_value": False},
    {"name": "uptime", "alias": 1, "datatype": INT64, "long_value": 10, "properties": {"engUnit": "s"}},
    seq=0,
)
DBIRTH = payload(
    {"name": "temp", "alias": 7, "datatype": FLOAT, "float_value": 21.5, "properties": {"engUnit": "degC"}},
    {"name": "state", "alias": 8, "datatype": STRING, "string_value": "idle"},
    seq=1,
)


class Plant:
    """A group of nodes as the decoder sees it."""

    def __init__(self, rule=RULE):
        self.births = SparkplugBirths()
        self.rule = rule
        self.now_us = NOW_US

    def says(self, kind, message, device=""):
        topic = f"spBv1.0/plant/{kind}/press" + (f"/{device}" if device else "")
        return decode_payload(message, topic, self.rule, now_us=self.now_us, births=self.births)

    def taken(self, kind, message, device=""):
        found, faults = self.says(kind, message, device)
        assert [(f.reason, f.detail) for f in faults] == []
        return [(*m.name, m.value) for m in found]


@pytest.fixture
def plant():
    born = Plant(PayloadRule("spBv1.0/#", "sparkplug_b", exclude=("Node Control/*",)))
    assert born.taken("NBIRTH", NBIRTH) == [("plant.press", "online", 1), ("plant.press", "uptime", 10)]
    assert born.taken("DBIRTH", DBIRTH, "oven") == [
        ("plant.press:oven", "online", 1),
        ("plant.press:oven", "temp", 21.5),
    ]
    return born


def test_data_is_named_by_the_aliases_of_its_birth_with_time_and_unit(plant):
    data = payload(
        {"alias": 7, "timestamp": AT_MS + 5, "float_value": 22.5}, {"alias": 7, "float_value": 1}, seq=2
    )
    first, second = plant.says("DDATA", data, "oven")[0]
    assert (first.name, first.value, first.time_us) == (
        ("plant.press:oven", "temp"),
        22.5,
        (AT_MS + 5) * 1000,
    )
    assert (first.unit, first.flags, second.time_us) == ("degC", 0, AT_MS * 1000)
    assert plant.births.rebirths == {}


@pytest.mark.parametrize(
    ("datatype", "field", "sent", "meant"),
    [
        (INT8, "int_value", 0xFF, -1),
        (INT8, "int_value", 0xFFFFFFFF, -1),
        (INT16, "int_value", 0x8000, -32768),
        (INT32, "int_value", 0xFFFFFFFE, -2),
        (INT64, "long_value", (1 << 64) - 5, -5),
        (UINT8, "int_value", 200, 200),
        (UINT64, "long_value", (1 << 64) - 1, float((1 << 64) - 1)),
        (DOUBLE, "double_value", 1e-300, 1e-300),
        (BOOLEAN, "boolean_value", True, 1),
    ],
)
def test_values_are_read_as_their_datatype_says(plant, datatype, field, sent, meant):
    data = payload({"name": "m", "datatype": datatype, field: sent}, seq=2)
    assert plant.taken("NDATA", data) == [("plant.press", "m", meant)]


def test_the_datatype_of_the_birth_holds_for_data_that_leaves_it_out(plant):
    data = payload({"alias": 1, "long_value": (1 << 64) - 5}, seq=2)
    assert plant.taken("NDATA", data) == [("plant.press", "uptime", -5)]


def test_quality_and_what_a_store_held_back_are_told(plant):
    data = payload(
        {"alias": 7, "float_value": 1, "is_historical": True, "properties": {"Quality": 192}},
        {"alias": 7, "float_value": 2, "properties": {"Quality": 500}},
        seq=2,
    )
    good, stale = plant.says("DDATA", data, "oven")[0]
    assert (good.quality, good.flags) == (100, Flag.HISTORICAL)
    assert (stale.quality, stale.flags) == (0, 0)


def test_texts_count_where_the_rule_knows_them():
    plant = Plant(
        PayloadRule(
            "spBv1.0/#", "sparkplug_b", members={"state": FieldConversion(values={"idle": 0, "run": 1})}
        )
    )
    assert ("plant.press:oven", "state", 0.0) in plant.taken("DBIRTH", DBIRTH, "oven")


def test_a_gap_in_the_sequence_is_counted_and_asks_for_a_rebirth_once_in_a_while(plant):
    for seq, gaps in ((2, 0), (3, 0), (5, 1), (6, 1), (255, 2), (0, 2)):
        plant.taken("NDATA", payload({"alias": 1, "long_value": 1}, seq=seq))
        assert plant.births.seq_gaps == gaps
    assert list(plant.births.rebirths) == [NODE]
    plant.births.rebirths.clear()
    plant.taken("NDATA", payload({"alias": 1, "long_value": 1}, seq=77))
    assert plant.births.rebirths == {}
    plant.now_us += 31_000_000
    plant.taken("NDATA", payload({"alias": 1, "long_value": 1}, seq=99))
    assert list(plant.births.rebirths) == [NODE]
    plant.taken("NBIRTH", NBIRTH)
    assert plant.births.rebirths == {}


def test_an_alias_that_no_birth_explained_costs_its_metric_and_asks_for_a_rebirth(plant):
    data = payload({"alias": 99, "float_value": 1}, {"alias": 7, "float_value": 2}, seq=2)
    found, (fault,) = plant.says("DDATA", data, "oven")
    assert [m.value for m in found] == [2]
    assert fault.reason == "unknown_alias"
    assert fault.detail == "metric 0: no birth received declares alias 99"
    assert list(plant.births.rebirths) == [NODE]
    plant.taken(
        "DBIRTH", payload({"name": "late", "alias": 99, "datatype": FLOAT, "float_value": 0}, seq=3), "oven"
    )
    again, faults = decode_payload(
        fault.part, "spBv1.0/plant/DDATA/press/oven", plant.rule, now_us=1, births=plant.births.for_replay()
    )
    assert faults == []
    assert [(m.name.sensor_type, m.value, m.time_us) for m in again] == [("late", 1, AT_MS * 1000)]


def test_an_alias_of_another_device_is_none_of_this_one(plant):
    _, (fault,) = plant.says("DDATA", payload({"alias": 7, "float_value": 1}, seq=2), "fridge")
    assert fault.reason == "unknown_alias"


def test_data_of_a_node_that_was_never_born_is_taken_by_name_and_asks_for_a_rebirth():
    plant = Plant()
    data = payload({"name": "t", "float_value": 1}, {"alias": 1, "float_value": 1}, seq=9)
    found, faults = plant.says("NDATA", data)
    assert [m.name for m in found] == [("plant.press", "t")]
    assert [f.reason for f in faults] == ["unknown_alias"]
    assert list(plant.births.rebirths) == [NODE]


def test_a_death_is_a_reading_and_forgets_the_aliases_unless_it_is_of_an_older_birth(plant):
    assert plant.taken("NDEATH", payload({**BD, "long_value": 2}, at_ms=None)) == []
    assert plant.births.node(NODE) is not None
    (dead,) = plant.says("NDEATH", payload(BD, at_ms=None))[0]
    assert (dead.name, dead.value, dead.time_us) == (("plant.press", "online"), 0, None)
    assert plant.births.node(NODE) is None
    assert plant.says("NDATA", payload({"alias": 1, "long_value": 1}))[1][0].reason == "unknown_alias"


def test_the_death_of_a_device_is_a_reading_of_that_device(plant):
    assert plant.taken("DDEATH", payload(seq=2), "oven") == [("plant.press:oven", "online", 0)]


def test_births_are_shared_by_the_topics_of_a_gateway():
    rules = RuleSet(TopicTemplate("sensors/{sensor_id}/{sensor_type}"), [RULE])
    born, said = (rules.decoder_for(f"spBv1.0/plant/{kind}/press") for kind in ("NBIRTH", "NDATA"))
    assert not isinstance(born, SingleSeriesDecoder)
    assert not isinstance(said, SingleSeriesDecoder)
    born(NBIRTH, NOW_US)
    found, faults = said(payload({"alias": 1, "long_value": 4}, seq=1), NOW_US)
    assert ([m.value for m in found], faults) == ([4], [])
    assert rules.has_sensor_id_in_payload("spBv1.0/plant/NDATA/press")


@pytest.mark.parametrize(
    "topic", ["spBv1.0/STATE/host", "spBv1.0/plant/NCMD/press", "spBv1.0/plant/DCMD/press/x"]
)
def test_commands_and_states_of_hosts_are_not_readings(topic):
    assert decode_payload(b"\xff", topic, RULE, now_us=1) == ((), [])


@pytest.mark.parametrize(
    "topic",
    [
        "spBv1.0",
        "spBv1.0/plant/NDATA",
        "spBv1.0/plant/NDATA/press/oven",
        "spBv1.0/plant/DDATA/press",
        "spBv1.0/a/X/b",
    ],
)
def test_topics_that_are_none_of_sparkplug_are_faults(topic):
    assert [f.reason for f in decode_payload(NBIRTH, topic, RULE, now_us=1)[1]] == ["bad_topic"]


@pytest.mark.parametrize(
    ("message", "survivors", "reason", "words"),
    [
        (NBIRTH[:-3], 0, "not_sparkplug", "cut short"),
        (b"\xff" * 10, 0, "not_sparkplug", "cut short"),
        (payload({"datatype": FLOAT, "float_value": 1}), 0, "bad_metric", "metric 0: it has neither"),
        (payload({"name": "x", "double_value": float("nan")}), 0, "bad_member", "x: expected a number that"),
        (payload({"name": "x", "double_value": float("inf")}), 0, "bad_member", "x: expected a number that"),
        (payload({"name": "x", "timestamp": (1 << 64) - 1, "int_value": 1}), 0, "bad_time", "outside"),
        (
            payload(
                {"name": "x", "int_value": 1}, {"alias": 4, "int_value": 1}, {"name": "y", "int_value": 1}
            ),
            2,
            "unknown_alias",
            "metric 1",
        ),
        (payload(*[{"alias": 1}] * 100_001), 0, "too_many_members", "100001 metrics"),
    ],
)
def test_what_is_bad_in_a_message_costs_the_least_that_it_can(message, survivors, reason, words):
    found, faults = decode_payload(message, "spBv1.0/plant/NDATA/press", RULE, now_us=1)
    assert len(found) == survivors
    assert [f.reason for f in faults] == [reason]
    assert words in faults[0].detail


def test_a_metric_of_a_birth_without_a_name_is_a_fault():
    _, faults = decode_payload(
        payload({"alias": 1, "int_value": 1}), "spBv1.0/plant/NBIRTH/press", RULE, now_us=1
    )
    assert [f.reason for f in faults] == ["bad_metric"]


def test_what_is_null_or_no_number_is_passed_over():
    message = spb.Payload()
    message.metrics.add(name="null", is_null=True, int_value=1)
    message.metrics.add(name="bytes", bytes_value=b"x")
    message.metrics.add(name="set").dataset_value.num_of_columns = 1
    message.metrics.add(name="empty")
    assert decode_payload(message.SerializeToString(), "spBv1.0/plant/NDATA/press", RULE, now_us=1) == (
        [],
        [],
    )


def test_the_rebirth_command_is_what_another_package_reads_as_one():
    message = spb.Payload.FromString(encode_rebirth_command(NOW_US))
    (metric,) = message.metrics
    assert (metric.name, metric.datatype, metric.boolean_value) == ("Node Control/Rebirth", BOOLEAN, True)
    assert message.timestamp == NOW_US // 1000


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=10).filter(lambda name: name not in ("bdSeq", "online")),
            st.one_of(
                st.floats(allow_nan=False, allow_infinity=False).map(
                    lambda v: (DOUBLE, "double_value", v, v)
                ),
                st.integers(-(2**31), 2**31 - 1).map(lambda v: (INT32, "int_value", v % 2**32, v)),
                st.integers(0, 2**63).map(lambda v: (UINT64, "long_value", v, v)),
                st.booleans().map(lambda v: (BOOLEAN, "boolean_value", v, int(v))),
            ),
        ),
        max_size=8,
        unique_by=lambda pair: pair[0],
    )
)
def test_what_an_independent_encoder_wrote_arrives_as_it_was_meant(metrics):
    plant = Plant()
    born = payload(
        *({"name": n, "alias": i, "datatype": d, f: s} for i, (n, (d, f, s, _)) in enumerate(metrics)), seq=0
    )
    plant.taken("NBIRTH", born)
    data = payload(*({"alias": i, f: s} for i, (_, (_, f, s, _)) in enumerate(metrics)), seq=1)
    assert plant.taken("NDATA", data) == [("plant.press", n, float(m)) for n, (_, _, _, m) in metrics]


def test_no_mutation_of_a_message_makes_the_decoder_raise():
    chance = random.Random(4)
    plant = Plant()
    for _ in range(3_000):
        message = bytearray(chance.choice((NBIRTH, DBIRTH, payload({"alias": 7, "float_value": 1}, seq=2))))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(message))
            message[at : at + chance.randrange(2)] = bytes((chance.randrange(256),) * chance.randrange(3))
            message = message or bytearray(b"\0")
        kind, device = chance.choice((("NBIRTH", ""), ("DBIRTH", "oven"), ("NDATA", ""), ("DDATA", "oven")))
        plant.says(kind, bytes(message), device)
