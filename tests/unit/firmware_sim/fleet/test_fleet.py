"""Simulated devices are believable, repeatable, and recorded before they are sent."""

import json
import random
import subprocess
import sys
from itertools import pairwise

import pytest

from firmware_sim.devices.device import backoff_s
from firmware_sim.devices.mqtt_connection import parse_broker
from firmware_sim.devices.sensors import WAVEFORMS, Fault, SensorFaultState, apply_reading_faults, build_site
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import GroundTruthWriter, load_ground_truth
from firmware_sim.scenarios import FaultEntry, Group, Scenario, plan_devices, read_scenario

NOW_US = 1_767_225_600_000_000
RANGES = {
    "temperature": (-50, 100),
    "humidity": (0, 100),
    "pressure": (800, 1200),
    "vibration": (0, 50),
    "occupancy": (0, 60),
    "energy": (0, 65_535),
}


@pytest.mark.parametrize("kind", WAVEFORMS)
def test_a_year_of_every_waveform_stays_in_its_range_and_moves(kind):
    rng = random.Random(1)
    site = build_site(rng)
    values = [WAVEFORMS[kind][0](site, NOW_US / 1e6 + hour * 3600, rng) for hour in range(0, 8760, 5)]
    low, high = RANGES[kind]
    assert low <= min(values) < max(values) <= high


def only_device(start_us=NOW_US, seed=1, **group):
    (plan,) = plan_devices(Scenario(groups=(Group(**group),)), seed=seed, start_us=start_us)
    return plan.firmware


def test_payloads_say_what_the_record_says_and_times_rise(tmp_path):
    device = only_device(types=("humidity",))
    (sensor,) = device.sensors
    with GroundTruthWriter(tmp_path, "a", {}) as writer:
        taken = [
            device.publish(
                sensor, writer, at_s=at, now_us=NOW_US + at * 1_000_000, readings=3, spacing_us=1000
            )
            for at in (0, 1)
        ]
    truth = load_ground_truth(tmp_path)
    publishes = [publish for outcome in taken for publish in outcome.publishes]
    sent = [reading for publish in publishes for reading in json.loads(publish.payload)]
    assert [p.topic for p in publishes] == ["sensors/sim-0001/humidity"] * 2
    assert [(p.first_row, p.rows) for p in publishes] == [(0, 3), (3, 3)]
    assert [reading["ts"] for reading in sent] == truth.produced["time_us"].tolist()
    assert [reading["value"] for reading in sent] == truth.produced["value"].tolist()
    assert [reading["seq"] for reading in sent] == list(range(1, 7))
    assert all(later["ts"] > earlier["ts"] for earlier, later in pairwise(sent))
    assert {reading["boot_id"] for reading in sent} == {device.boot_id}
    assert tuple(sent[0][n] for n in ("unit", "location", "manufacturer", "firmware_version")) == (
        truth.states[0].attributes
    )


def test_the_same_seed_makes_the_same_fleet_and_another_does_not():
    scenario = Scenario(groups=(Group(devices=5),))

    def fleet(seed):
        plans = plan_devices(scenario, seed, start_us=NOW_US)
        return [
            (p.firmware.device_id, p.firmware.battery_level, [s.state for s in p.firmware.sensors])
            for p in plans
        ]

    assert fleet(1) == fleet(1)
    assert fleet(1) != fleet(2)


def test_faults_drop_spike_and_stick():
    rng = random.Random(3)
    assert apply_reading_faults(1.0, SensorFaultState(), [Fault("dropout", 1.0)], rng) is None
    assert apply_reading_faults(1.0, SensorFaultState(), [Fault("spike", 1.0, size=7)], rng) in {8.0, -6.0}
    state = SensorFaultState()
    stuck = [
        apply_reading_faults(float(n), state, [Fault("stuck", 1.0, hold=3)] if n == 0 else [], rng)
        for n in range(6)
    ]
    assert stuck == [0.0, 0.0, 0.0, 0.0, 4.0, 5.0]


def test_a_sensor_that_only_drops_out_publishes_nothing(tmp_path):
    device = only_device(types=("humidity",), faults=(FaultEntry("dropout", 1.0),))
    with GroundTruthWriter(tmp_path, "a", {}) as writer:
        outcome = device.publish(
            device.sensors[0], writer, at_s=0, now_us=NOW_US, readings=2, spacing_us=1000
        )
    assert outcome.publishes == []
    assert load_ground_truth(tmp_path).rows == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rate = 0", r"\$.rate"),
        ("speed = 1", "unknown field `speed`"),
        ("[[groups]]\nname = 'a/b'", r"\$.groups\[0\].name"),
        ("[[groups]]\ntypes = ['light']", "unknown type 'light'; known: temperature"),
        ("[[groups]]\n[[groups]]", "two groups have the same name"),
        (
            "[[groups]]\nfaults = [{kind = 'spike'}]",
            r"fault spike: it needs a probability, or a time \(at\) - at `\$.groups\[0\].faults\[0\]`",
        ),
        ("[[groups]]\nfaults = [{kind = 'spike', at = '2 hours'}]", "'2 hours': expected a duration"),
        ("[[groups]]\ntopic = 'a/{sensor}'", "topic 'a/{sensor}': expected {device} and {type} only"),
        ("[[groups]]\nsleep = {every = 60, awake = 60}", "sleep: awake must be less than every"),
        ("[[groups]]\n[[outages]]\ngroups = ['x']\nat = 0\nlasts = 1", "outages: no group is called x"),
        ("groups = []", r"at least one \[\[groups\]\]"),
        ("rate =", "scenario"),
    ],
)
def test_a_wrong_scenario_is_refused_with_file_and_key(tmp_path, text, words):
    path = tmp_path / "site.toml"
    path.write_text(text)
    with pytest.raises(SimError, match=words) as caught:
        read_scenario(path)
    assert str(path) in str(caught.value)


def test_shipped_scenarios_are_read(pytestconfig):
    paths = sorted((pytestconfig.rootpath / "config" / "scenarios").glob("*.toml"))
    assert paths
    for path in paths:
        assert plan_devices(read_scenario(path), seed=1, start_us=NOW_US)


@pytest.mark.parametrize("url", ["http://h", "mqtt://", "mqtt://h:x", "mqtt://h/path", "127.0.0.1:1883"])
def test_a_wrong_broker_url_is_refused_with_what_is_expected(url):
    with pytest.raises(SimError, match="expected mqtt://HOST"):
        parse_broker(url)


def test_backoff_grows_to_its_cap_with_full_jitter():
    rng = random.Random(1)
    waits = [max(backoff_s(n, base_s=0.25, cap_s=5, rng=rng) for _ in range(200)) for n in range(12)]
    assert waits[0] <= 0.25 < waits[3] <= 2.0
    assert 4.5 < waits[11] <= 5.0
    assert 0 <= min(backoff_s(11, base_s=0.25, cap_s=5, rng=rng) for _ in range(200)) < 0.5


def test_the_simulator_imports_nothing_of_gateway_or_cloud_sync():
    script = (
        "import sys, pkgutil, importlib, firmware_sim\n"
        "for m in pkgutil.walk_packages(firmware_sim.__path__, 'firmware_sim.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)\n"
        "print(sorted(n for n in sys.modules if n.split('.')[0] in ('gateway', 'cloud_sync')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
