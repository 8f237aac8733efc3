"""`tidegate decode`: a person's way to see what a payload becomes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from esio_spb_builder.core import sparkplug_b_pb2 as spb

ROOT = Path(__file__).parents[2]


def decode(*arguments, payload=b""):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return subprocess.run(
        [sys.executable, "-m", "gateway", "decode", *map(str, arguments)],
        input=payload,
        capture_output=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=environment,
    )


def told(*arguments, payload=b"", code=0):
    outcome = decode(*arguments, "--json", payload=payload)
    assert (outcome.returncode, outcome.stderr) == (code, b"")
    return json.loads(outcome.stdout)


def test_without_rules_a_payload_is_json_readings_on_the_listeners_topic(tmp_path):
    (tmp_path / "payload").write_bytes(b'[{"value": 21.5, "ts": 1780000000}, {"value": "x"}]')
    outcome = decode(tmp_path / "payload", "--topic", "sensors/a/t")
    assert outcome.returncode == 1
    lines = outcome.stdout.decode().splitlines()
    assert lines[0] == "no rule; default: topic sensors/{sensor_id}/{sensor_type}, format reading"
    assert any("21.5" in line and "2026-05-28 20:26:40Z" in line for line in lines)
    assert any(line.startswith("quarantine: bad_reading: member 1: ") for line in lines)
    assert lines[-1] == "1 readings, 1 quarantined"


def test_the_rules_of_a_configuration_count_and_the_one_that_does_is_named(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text(
        'gateway_id = "g"\n[spool]\npath = "s.db"\n'
        '[[ingress.rule]]\npreset = "tasmota"\n'
        '[[ingress.rule]]\ntopic = "up/{sensor_id}"\nformat = "fields"\nunit = "V"\n'
    )
    found = told("-", "-t", "up/m1", "--config", path, payload=b'{"u": 3.5}')
    assert (found["rule_no"], found["topic"], found["format"]) == (7, "up/{sensor_id}", "fields")
    assert [(r["sensor_id"], r["sensor_type"], r["value"], r["unit"]) for r in found["readings"]] == [
        ("m1", "u", 3.5, "V")
    ]


def test_a_rule_or_a_preset_can_be_tried_out(tmp_path):
    rule = '{ topic = "up/+", format = "fields", sensor_id = "{dev}", include = ["t"] }'
    found = told("-", "-t", "up/x", "--rule", rule, payload=b'{"dev": "a", "t": 1}')
    assert [(r["sensor_id"], r["value"]) for r in found["readings"]] == [("a", 1)]
    found = told("-", "-t", "attic/sensor/t/state", "--preset", "esphome", payload=b"21.5")
    assert [(r["sensor_id"], r["sensor_type"]) for r in found["readings"]] == [("attic", "t")]


def test_what_came_before_explains_what_comes_now(tmp_path):
    birth, data = spb.Payload(timestamp=1, seq=0), spb.Payload(timestamp=2, seq=1)
    birth.metrics.add(name="t", alias=4, datatype=9, float_value=1)
    data.metrics.add(alias=4, float_value=2.5)
    (tmp_path / "birth").write_bytes(birth.SerializeToString())
    arguments = ("-", "-t", "spBv1.0/g/NDATA/n", "--preset", "sparkplug_b")
    found = told(*arguments, payload=data.SerializeToString(), code=1)
    assert found["faults"][0]["reason"] == "unknown_alias"
    found = told(
        *arguments, "--after", f"spBv1.0/g/NBIRTH/n={tmp_path / 'birth'}", payload=data.SerializeToString()
    )
    assert [(r["sensor_id"], r["sensor_type"], r["value"]) for r in found["readings"]] == [("g.n", "t", 2.5)]


def test_a_topic_that_nothing_is_for_says_so():
    found = told("-", "-t", "what/is/this/here", payload=b"1", code=1)
    assert found["rule_no"] is None
    assert found["faults"][0]["reason"] == "unknown_topic"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("absent", "-t", "a"), "absent: cannot be read: No such file"),
        (("-", "-t", "a", "--rule", "{"), "not a TOML table"),
        (("-", "-t", "a", "--rule", "7"), "not a TOML table"),
        (("-", "-t", "a", "--rule", '{ topic = "a", format = "x" }'), "format: Input should be 'reading'"),
        (("-", "-t", "a", "--rule", '{ topic = "a", format = "number" }'), "knows nothing"),
        (("-", "-t", "a", "--preset", "x"), "preset: Input should be 'zigbee2mqtt'"),
        (("-", "-t", "a", "--after", "x"), "expected TOPIC=FILE"),
        (("-", "-t", "a", "--config", "absent.toml"), "there is no such file"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_message(arguments, words):
    outcome = decode(*arguments, payload=b"1")
    assert (outcome.returncode, outcome.stdout) == (2, b"")
    assert words in outcome.stderr.decode()
    assert "Traceback" not in outcome.stderr.decode()
