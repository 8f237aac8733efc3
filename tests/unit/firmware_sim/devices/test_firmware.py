"""A simulated device lives as a real one does: clock, battery, restarts, and each kind of fault."""

import asyncio
import json
import random

import msgspec
import numpy as np
import pytest

from firmware_sim.devices.device import RadioSettings
from firmware_sim.devices.mqtt_connection import parse_broker
from firmware_sim.devices.payloads import encode_readings
from firmware_sim.devices.sensors import (
    Fault,
    PublishSchedule,
    SensorFaultState,
    TimeWindow,
    apply_reading_faults,
    corrupt_payload,
    parse_duration_s,
)
from firmware_sim.fleet import Fleet
from firmware_sim.ground_truth import GroundTruthWriter, load_ground_truth
from firmware_sim.scenarios import (
    FaultEntry,
    Group,
    Outage,
    Scenario,
    Sleep,
    UpgradeEntry,
    plan_devices,
    read_scenario,
)
from tests.unit.gateway.payloads.test_json_reading import decode_readings

START_US = 1_767_225_600_000_000
BROKER = parse_broker("mqtt://127.0.0.1:1")


def live(tmp_path, *, hours=24, every_s=600, run="a", seed=1, **group):
    """One device with one sensor; everything it publishes, and its record."""
    scenario = Scenario(groups=(Group(**{"types": ("temperature",), **group}),))
    (plan,) = plan_devices(scenario, seed=seed, start_us=START_US)
    device, outcome = plan.firmware, []
    with GroundTruthWriter(tmp_path, run, {}) as truth:
        outcome += [
            device.publish(
                device.sensors[0],
                truth,
                at_s=at_s,
                now_us=START_US + at_s * 1_000_000,
                readings=1,
                spacing_us=1000,
            )
            for at_s in range(0, hours * 3600, every_s)
        ]
    return device, outcome, load_ground_truth(tmp_path)


def samples(outcome):
    payloads = [p.payload for h in outcome for p in h.publishes if p.rows]
    return [json.loads(payload) for payload in payloads]


def test_a_battery_drains_is_changed_and_the_device_restarts_with_a_new_boot_id(tmp_path):
    _, outcome, _ = live(tmp_path, hours=48, battery_days=1.0)
    sent = samples(outcome)
    levels = np.array([s["battery_level"] for s in sent])
    assert levels.max() > 90
    assert levels.min() < 10
    boots = [s["boot_id"] for s in sent]
    assert len(set(boots)) == 1 + sum(h.rebooted for h in outcome) >= 2
    first_after = [s["seq"] for b, s in zip(boots, sent[1:], strict=False) if s["boot_id"] != b]
    assert set(first_after) == {1}


def test_a_clock_drifts_and_is_set_right_again_and_a_jump_is_larger(tmp_path):
    _, _, steady = live(tmp_path / "steady", clock_ppm=100.0, seed=4)
    true_us = START_US + np.arange(steady.rows) * 600_000_000
    off_us = np.abs(steady.produced["time_us"] - true_us)
    assert 100_000 < off_us.max() < 100e-6 * 6 * 3600 * 1e6 + 2000
    assert off_us[36] < 2_000  # set right after six hours
    jump = FaultEntry("clock_jump", at="2h", size=-7200.0, hold=5)
    _, _, jumped = live(tmp_path / "jumped", clock_ppm=0.0, faults=(jump,))
    off_us = jumped.produced["time_us"] - true_us
    assert ((off_us < -7_100_000_000).nonzero()[0] == np.arange(12, 17)).all()


def test_an_upgrade_changes_the_version_and_restarts(tmp_path):
    upgrades = (UpgradeEntry("2.0", "6h"), UpgradeEntry("2.1", "12h"))
    _, outcome, truth = live(tmp_path, firmware_version="1.9", upgrades=upgrades)
    versions = [s["firmware_version"] for s in samples(outcome)]
    assert versions == ["1.9"] * 36 + ["2.0"] * 36 + ["2.1"] * 72
    assert [h.rebooted for h in outcome].count(True) == 2
    assert [state.attributes[3] for state in truth.states] == ["1.9", "2.0", "2.1"]


def test_duplicates_reordering_late_and_spoilt_publishes_are_what_they_say(tmp_path):
    faults = (
        FaultEntry("duplicate", at="1h", lasts="10m"),
        FaultEntry("reorder", at="2h", lasts="10m"),
        FaultEntry("late", at="3h", lasts="10m", hold=4),
        FaultEntry("malformed", at="5h", lasts="10m"),
    )
    _, outcome, truth = live(tmp_path, hours=6, faults=faults)
    publishes = [p for h in outcome for p in h.publishes]
    rows = [p.first_row for p in publishes if p.rows]
    assert sorted(rows) == list(range(36))
    assert rows.index(12) == 13  # after the next one
    assert rows.index(18) == 18 + 4
    unrecorded = [p for p in publishes if not p.rows]
    assert len(unrecorded) == 2
    assert unrecorded[0].payload == next(p.payload for p in publishes if p.first_row == 6)
    assert truth.rows == 36
    assert sum(h.malformed for h in outcome) == 1


def test_a_brown_out_forgets_and_a_network_loss_lasts(tmp_path):
    faults = (FaultEntry("brown_out", at="1h"), FaultEntry("network_loss", at="2h", hold=900))
    _, outcome, _ = live(tmp_path, hours=4, faults=faults)
    assert [n for n, h in enumerate(outcome) if h.lost_memory] == [6]
    assert [(n, h.away_s) for n, h in enumerate(outcome) if h.away_s] == [(12, 900.0)]


def test_drift_grows_to_its_size_and_noise_spreads():
    rng = random.Random(1)
    state = SensorFaultState()
    drift = [Fault("drift", 1.0, size=10, hold=5)]
    values = [apply_reading_faults(0.0, state, drift if n == 0 else [], rng) for n in range(7)]
    assert values == pytest.approx([2, 4, 6, 8, 10, 0, 0])
    state = SensorFaultState()
    noisy = [
        apply_reading_faults(0.0, state, [Fault("noise", 1.0, size=10, hold=200)] if n == 0 else [], rng)
        for n in range(201)
    ]
    assert 7 < np.std([v for v in noisy[:200] if v is not None]) < 13
    assert noisy[200] == 0.0


def test_no_spoilt_payload_is_a_reading():
    rng = random.Random(2)
    payload = b'[{"value":21.5,"ts":1767225600000000},{"value":22,"ts":1767225600000001}]'
    for _ in range(500):
        readings, faults = decode_readings(corrupt_payload(payload, rng))
        assert list(readings) == []
        assert faults


@pytest.mark.parametrize("shape", ["json", "fields", "senml", "lines"])
def test_every_shape_carries_value_and_time(tmp_path, shape):
    device, outcome, truth = live(tmp_path, hours=1, format=shape)
    for number, publish in enumerate(p for h in outcome for p in h.publishes):
        value, time_us = float(truth.produced[number]["value"]), int(truth.produced[number]["time_us"])
        if shape == "lines":
            key, fields, stamp = publish.payload.decode().rsplit(" ", 2)
            assert key.startswith("temperature,sensor_id=sim-0001,")
            assert (f"value={value!r}" in fields, int(stamp)) == (True, time_us * 1000)
            continue
        sent = json.loads(publish.payload)
        if shape == "senml":
            (record,) = sent
            assert record["bn"] + record["n"] == "sim-0001:temperature"
            assert (record["v"], round((record["bt"] + record["t"]) * 1e6)) == (value, time_us)
            assert truth.produced[number]["seq"] == -1
        else:
            assert (sent["value" if shape == "json" else "temperature"], sent["ts"]) == (value, time_us)
    assert encode_readings("json", device.sensors[0].state, []) == b"[]"


def test_windows_and_durations():
    window = TimeWindow(3600, 600, 7200)
    assert [window.covers(t) for t in (0, 3599, 3600, 4199, 4200, 10_800, 11_399, 11_400)] == [
        False, False, True, True, False, True, True, False,
    ]  # fmt: skip
    assert [window.begun(t) for t in (0, 3600, 10_799, 10_800)] == [0, 1, 1, 2]
    assert [parse_duration_s(t) for t in (5, "90s", "15m", "1.5h", "2d", "1w")] == [
        5,
        90,
        900,
        5400,
        172_800,
        604_800,
    ]
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration_s("soon")


@pytest.mark.parametrize(
    "schedule",
    [PublishSchedule(7.0), PublishSchedule(3.0, 10.0, 2.0, 20.0), PublishSchedule(0.25, 60.0, 10.0, 3.0)],
)
def test_a_beat_is_due_when_its_times_say(schedule):
    times = [schedule.time_of(n) for n in range(500)]
    assert times == sorted(times)
    for elapsed_s in [random.Random(1).uniform(0, times[-1]) for _ in range(200)]:
        assert schedule.due(elapsed_s) == sum(t <= elapsed_s for t in times)


def test_a_burst_is_as_many_times_as_fast_as_it_says():
    schedule = PublishSchedule(1.0, 100.0, 10.0, 20.0)
    assert (schedule.due(89.99), schedule.due(99.99) - schedule.due(89.99)) == (90, 200)


def produce(scenario, folder, *, step_s):
    """Run a fleet's sampling without any network, in steps of any length."""
    with GroundTruthWriter(folder, "a", {}) as truth:
        fleet = Fleet(scenario, RadioSettings(BROKER), truth, seed=scenario.seed or 0, start_us=START_US)
        now_s = 0.0
        while now_s < scenario.seconds:
            fleet.produce_once(now_s)
            now_s += step_s
        fleet.produce_once(scenario.seconds)
        while fleet.behind_s:
            fleet.produce_once(scenario.seconds)
    return load_ground_truth(folder)


@pytest.mark.parametrize(
    "name", ["sensor-faults-day", "firmware-rollout", "factory-burst", "returning-fleet"]
)
def test_a_scenario_run_twice_from_one_seed_produces_the_same(tmp_path, pytestconfig, name):
    scenario = read_scenario(pytestconfig.rootpath / "config" / "scenarios" / f"{name}.toml")
    scenario = msgspec.structs.replace(scenario, seconds=5.0)
    first = produce(scenario, tmp_path / "first", step_s=0.02)
    again = produce(scenario, tmp_path / "again", step_s=0.7)
    assert first.states == again.states
    assert first.produced.tobytes() == again.produced.tobytes()
    assert first.rows > 200
    other = produce(msgspec.structs.replace(scenario, seed=999), tmp_path / "other", step_s=0.02)
    assert other.rows != first.rows or not (other.produced["value"] == first.produced["value"]).all()


async def test_networks_and_sleep_follow_the_schedule_and_services_as_well(tmp_path):
    log = tmp_path / "log"
    from firmware_sim.fleet import ServiceSwitch  # noqa: PLC0415 - used here only

    scenario = Scenario(
        groups=(
            Group("a", devices=2, sleep=Sleep(every=100, awake=50)),
            Group("b", devices=1),
        ),
        outages=(Outage(at=10, lasts=20, groups=("b",)), Outage(at=10, lasts=20, service="region")),
    )
    service = ServiceSwitch("region", command=("/bin/sh", "-c", f'echo "$0" >> {log}'))
    with GroundTruthWriter(tmp_path / "t", "a", {}) as truth:
        fleet = Fleet(scenario, RadioSettings(BROKER), truth, seed=1, start_us=START_US, services=[service])
        seen = []
        for at_s in (0.0, 15.0, 35.0, 60.0, 120.0):
            await fleet.switch_once(at_s)
            seen.append([device.on for device in fleet._devices])
    assert seen == [
        [True, False, True],
        [True, False, False],
        [True, False, True],
        [False, True, True],
        [True, False, True],
    ]
    assert log.read_text().split() == ["down", "up"]
    await asyncio.sleep(0)
