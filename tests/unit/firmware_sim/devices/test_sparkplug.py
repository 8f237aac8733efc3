"""The simulator's Sparkplug B, read with messages that a protobuf compiler made; its lines and numbers."""

from __future__ import annotations

from esio_spb_builder.core import sparkplug_b_pb2 as spb

from firmware_sim.devices.payloads import SparkplugSession, encode_readings
from firmware_sim.ground_truth import Reading, SeriesState

STATE = SeriesState("d", "temperature", ("degC", "hall", "m", "1"))
READINGS = [Reading(1_790_000_000_001_000, -21.5), Reading(1_790_000_000_002_000, 0.1, 97.5, seq=3)]


def read(payload: bytes):
    message = spb.Payload()
    message.ParseFromString(payload)
    return message


def test_data_names_the_aliases_of_the_birth_and_counts_from_it():
    session = SparkplugSession("d", [("humidity", "%"), ("temperature", "degC")])
    will = session.begin()
    birth = session.birth(1_790_000_000_000)
    assert (will.topic, birth.topic) == ("spBv1.0/sim/NDEATH/d", "spBv1.0/sim/NBIRTH/d")
    born = read(birth.payload)
    assert (born.timestamp, born.seq) == (1_790_000_000_000, 0)
    assert [m.name for m in born.metrics] == ["bdSeq", "Node Control/Rebirth", "humidity", "temperature"]
    assert born.metrics[0].long_value == read(will.payload).metrics[0].long_value == 0
    assert born.metrics[2].is_null
    assert born.metrics[3].properties.values[0].string_value == "degC"
    payload = encode_readings("sparkplug_b", STATE, READINGS)
    messages = [read(session.add_sequence_number(payload)) for _ in range(256)]
    assert [m.seq for m in messages] == [*range(1, 256), 0]
    assert [(m.alias, m.timestamp, m.double_value) for m in messages[0].metrics] == [
        (born.metrics[3].alias, 1_790_000_000_001, -21.5),
        (born.metrics[3].alias, 1_790_000_000_002, 0.1),
    ]
    session.begin()
    again = read(session.birth(1).payload)
    assert (again.metrics[0].long_value, again.seq) == (1, 0)
    assert read(session.add_sequence_number(payload)).seq == 1


def test_lines_have_every_column_and_a_number_is_the_newest_alone():
    lines = encode_readings("csv", STATE, READINGS).decode().splitlines()
    assert lines == [
        "1790000000001000,-21.5,,,,,hall,m,1,degC",
        "1790000000002000,0.1,97.5,,,3,hall,m,1,degC",
    ]
    assert encode_readings("number", STATE, READINGS) == b"0.1"
