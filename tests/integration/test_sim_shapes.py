"""Payload shapes, wills, protocol versions and repeatable runs of the simulator, against a real gateway."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from firmware_sim.ground_truth import load_ground_truth
from tests.integration.test_sim_scenarios import Gateway, simulate, verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULES = """
[[ingress.rule]]
topic = "fields/{sensor_id}"
format = "fields"
time = "ts"
include = ["temperature"]
unit = "degC"
[ingress.rule.companions]
quality = "quality"
battery_level = "battery_level"
signal_strength = "signal_strength"
seq = "seq"
location = "location"
manufacturer = "manufacturer"
firmware_version = "firmware_version"
[[ingress.rule]]
topic = "csv/{sensor_id}/{sensor_type}"
format = "csv"
sensor_id = "{sensor_id}"
sensor_type = "{sensor_type}"
columns = ["ts", "value", "quality", "battery_level", "signal_strength", "seq",
    "location", "manufacturer", "version", ""]
include = ["value"]
time = "ts"
time_unit = "us"
unit = "degC"
[ingress.rule.companions]
quality = "quality"
battery_level = "battery_level"
signal_strength = "signal_strength"
seq = "seq"
location = "location"
manufacturer = "manufacturer"
firmware_version = "version"
[[ingress.rule]]
topic = "number/{sensor_id}/{sensor_type}"
format = "number"
[[ingress.rule]]
topic = "spBv1.0/#"
format = "sparkplug_b"
sensor_id = "{node}"
[[ingress.rule]]
topic = "senml/#"
format = "senml"
[[ingress.rule]]
topic = "lines/#"
format = "line_protocol"
"""
SCENARIO = """
rate = 300
seconds = 2
readings_per_publish = 3
[[groups]]
name = "objects"
devices = 3
types = ["temperature"]
format = "fields"
topic = "fields/{device}"
[[groups]]
name = "packs"
devices = 3
types = ["temperature", "humidity"]
format = "senml"
topic = "senml/{device}"
[[groups]]
name = "protocol"
devices = 3
types = ["vibration", "pressure"]
format = "lines"
topic = "lines/{device}/{type}"
mqtt = "3.1.1"
[[groups]]
name = "logger"
devices = 2
types = ["temperature"]
format = "csv"
topic = "csv/{device}/{type}"
[[groups]]
name = "bare"
devices = 1
types = ["occupancy"]
format = "number"
topic = "number/{device}/{type}"
[[groups]]
name = "node"
devices = 2
types = ["temperature", "energy"]
format = "sparkplug_b"
faults = [{ kind = "network_loss", at = 0.5, hold = 1 }]
[[groups]]
name = "plain"
devices = 2
will = true
qos = 2
faults = [{ kind = "network_loss", at = 0.5, hold = 1 }]
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = Gateway(tmp_path_factory.mktemp("shapes"))
    config = made.folder / "gateway.toml"
    config.write_text(config.read_text() + RULES)
    made.start()
    yield made
    made.kill()


def test_every_shape_arrives_value_for_value_and_lost_connections_publish_wills(
    gateway: Gateway, tmp_path: Path
):
    (tmp_path / "s.toml").write_text(SCENARIO)
    outcome = simulate(gateway, tmp_path / "t", "--scenario", str(tmp_path / "s.toml"))
    assert outcome["acknowledged"] == outcome["produced"] > 500
    assert outcome["reconnects"] >= 2
    found = verify(gateway, tmp_path / "t")
    kinds = ("lost", "duplicated", "altered", "unknown")
    assert {k: found[k] for k in kinds} == dict.fromkeys(kinds, 0), found["examples"]
    assert found["matched"] == outcome["produced"]
    written = "".join(path.read_text() for path in (gateway.folder / "files").rglob("*.lp"))
    online = [line.split(" ")[1] for line in written.splitlines() if line.startswith("online,")]
    assert {what.split(",")[0] for what in online} == {"value=1.0", "value=0.0"}
    assert sum(line.startswith("occupancy,") and "bare-0001" in line for line in written.splitlines()) >= 4
    wills = [line for line in written.splitlines() if line.startswith("connected,")]
    assert {line.split("sensor_id=")[1].split(" ")[0] for line in wills} == {"plain-0001", "plain-0002"}


def test_a_seed_and_a_start_give_the_same_readings_again_bit_for_bit(gateway: Gateway, tmp_path: Path):
    arguments = (
        "--devices",
        "5",
        "--rate",
        "400",
        "--seconds",
        "1",
        "--seed",
        "77",
        "--start",
        "2026-03-01T08:00Z",
    )
    for name in ("first", "again"):
        outcome = simulate(gateway, tmp_path / name, *arguments)
        assert outcome["acknowledged"] == outcome["produced"] == 400
    first, again = load_ground_truth(tmp_path / "first"), load_ground_truth(tmp_path / "again")
    assert first.states == again.states
    assert first.produced.tobytes() == again.produced.tobytes()
    assert verify(gateway, tmp_path / "again")["lost"] == 0
    boots = [
        [
            json.loads(line)
            for line in next((tmp_path / name).glob("*.series.jsonl")).read_text().splitlines()[1:]
        ]
        for name in ("first", "again")
    ]
    assert boots[0] == boots[1]
    assert sum("boot_id" in line for line in boots[0]) == 5
