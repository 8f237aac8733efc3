"""Presets: payloads as each project documents them, and what becomes of them."""

from __future__ import annotations

import json
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from gateway.payloads.decoder_registry import RuleSet, SingleSeriesDecoder
from gateway.payloads.presets import PRESETS, build_preset_rules
from gateway.payloads.topics import TopicTemplate

NOW_US = 1_790_000_000_000_000
AT_US = 1_780_000_000_000_000


def taken(preset, topic, payload, **options):
    """(sensor_id, sensor_type, value) of each reading, with the times; no faults."""
    rules = RuleSet(TopicTemplate("sensors/{sensor_id}/{sensor_type}"), build_preset_rules(preset, **options))
    decode = rules.decoder_for(topic)
    assert not isinstance(decode, SingleSeriesDecoder)
    raw = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    found, faults = decode(raw, NOW_US)
    assert [(f.reason, f.detail) for f in faults] == []
    return found


def rows(found):
    return [(*m.name, m.value) for m in found]


def test_zigbee2mqtt():
    payload = {
        "battery": 91,
        "humidity": 44.72,
        "linkquality": 120,
        "temperature": 27.34,
        "contact": False,
        "state": "ON",
        "last_seen": "2026-05-28T20:26:40+00:00",
        "update": {"state": "idle", "installed_version": 587},
        "update_available": False,
    }
    found = taken("zigbee2mqtt", "zigbee2mqtt/attic", payload)
    assert rows(found) == [
        ("attic", "humidity", 44.72),
        ("attic", "linkquality", 120),
        ("attic", "temperature", 27.34),
        ("attic", "contact", 0),
        ("attic", "state", 1),
    ]
    assert {(m.time_us, m.battery_level) for m in found} == {(AT_US, 91)}
    assert rows(taken("zigbee2mqtt", "zigbee2mqtt/attic/availability", {"state": "offline"})) == [
        ("attic", "online", 0)
    ]
    assert rows(taken("zigbee2mqtt", "zigbee2mqtt/button", {"action": "single"})) == []
    for topic in ("zigbee2mqtt/bridge/state", "zigbee2mqtt/lamp/set", "zigbee2mqtt/lamp/get"):
        assert rows(taken("zigbee2mqtt", topic, b"anything")) == []
    assert rows(taken("zigbee2mqtt", "home/z/attic", {"t": 1}, base="home/z")) == [("attic", "t", 1)]


def test_zigbee2mqtt_counts_last_seen_in_milliseconds_when_told_to():
    found = taken("zigbee2mqtt", "zigbee2mqtt/attic", {"t": 1, "last_seen": AT_US // 1000})
    assert [m.time_us for m in found] == [AT_US]


SENSOR = {
    "Time": "2026-05-28T22:26:40",
    "BME280": {"Temperature": 21.7, "Humidity": 66.6, "Pressure": 984.4},
    "ENERGY": {"Power": [12, 0], "TotalStartTime": "2025-01-01T00:00:00"},
    "Switch1": "ON",
    "PressureUnit": "hPa",
    "TempUnit": "C",
}


def test_tasmota():
    found = taken("tasmota", "tele/plug/SENSOR", SENSOR)
    assert rows(found) == [
        ("plug", "BME280.Temperature", 21.7),
        ("plug", "BME280.Humidity", 66.6),
        ("plug", "BME280.Pressure", 984.4),
        ("plug", "ENERGY.Power.0", 12),
        ("plug", "ENERGY.Power.1", 0),
        ("plug", "Switch1", 1),
    ]
    assert {m.time_us for m in found} == {None}
    state = {
        "Time": "2026-05-28T22:26:40",
        "Uptime": "0T00:25:09",
        "UptimeSec": 1509,
        "POWER": "OFF",
        "Wifi": {"AP": 1, "SSId": "barn", "Channel": 6, "RSSI": 100, "Signal": -45, "Downtime": "0T00:00:04"},
    }
    found = taken("tasmota", "tele/plug/STATE", state)
    assert rows(found) == [("plug", "UptimeSec", 1509), ("plug", "POWER", 0), ("plug", "Wifi.RSSI", 100)]
    assert {m.signal_strength for m in found} == {-45}
    assert rows(taken("tasmota", "tele/plug/LWT", b"Online")) == [("plug", "online", 1)]
    for topic in ("stat/plug/RESULT", "cmnd/plug/POWER", "tele/plug/INFO1"):
        assert rows(taken("tasmota", topic, b"{}")) == []


def test_tasmota_times_count_where_the_zone_of_its_clock_is_told():
    found = taken("tasmota", "tele/plug/SENSOR", SENSOR, time_zone=ZoneInfo("Europe/Berlin"))
    assert {m.time_us for m in found} == {AT_US}


def test_esphome():
    assert rows(taken("esphome", "attic/sensor/room_temperature/state", b"21.5")) == [
        ("attic", "room_temperature", 21.5)
    ]
    assert rows(taken("esphome", "attic/sensor/room_temperature/state", b"nan")) == []
    assert rows(taken("esphome", "attic/binary_sensor/door/state", b"ON")) == [("attic", "door", 1)]
    assert rows(taken("esphome", "attic/switch/fan/state", b"OFF")) == [("attic", "fan", 0)]
    assert rows(taken("esphome", "attic/status", b"offline")) == [("attic", "online", 0)]
    for topic in ("attic/debug", "attic/switch/fan/command", "attic/text_sensor/wifi/state"):
        assert rows(taken("esphome", topic, b"\x1b[0m")) == []
    assert rows(taken("esphome", "home/attic/sensor/t/state", b"1", base="home")) == [("attic", "t", 1)]


def test_shelly_of_the_second_generation_and_later():
    notice = {
        "src": "shellyplus1pm-a8032abe54dc",
        "dst": "shellyplus1pm-a8032abe54dc/events",
        "method": "NotifyStatus",
        "params": {
            "ts": AT_US / 1e6,
            "switch:0": {
                "id": 0,
                "output": True,
                "source": "button",
                "apower": 12.5,
                "aenergy": {"total": 11.679, "by_minute": [0, 1, 2], "minute_ts": 1780000000},
                "temperature": {"tC": 53.3, "tF": 127.9},
            },
        },
    }
    found = taken("shelly", "shellyplus1pm-a8032abe54dc/events/rpc", notice)
    assert [(m.name.sensor_type, m.value) for m in found] == [
        ("switch:0.output", 1),
        ("switch:0.apower", 12.5),
        ("switch:0.aenergy.total", 11.679),
        ("switch:0.temperature.tC", 53.3),
    ]
    assert {(m.name.sensor_id, m.time_us) for m in found} == {("shellyplus1pm-a8032abe54dc", AT_US)}
    press = {
        "method": "NotifyEvent",
        "params": {"ts": 1, "events": [{"component": "input:0", "id": 0, "ts": 1}]},
    }
    assert rows(taken("shelly", "s/events/rpc", press)) == []
    assert rows(taken("shelly", "s/online", b"true")) == [("s", "online", 1)]
    assert rows(taken("shelly", "s/status/switch:0", {"apower": 1})) == []


def test_shelly_of_the_first_generation():
    assert rows(taken("shelly", "shellies/shellyht-1/sensor/temperature", b"21.5")) == [
        ("shellyht-1", "sensor.temperature", 21.5)
    ]
    assert rows(taken("shelly", "shellies/shelly1-1/relay/0", b"on")) == [("shelly1-1", "relay.0", 1)]
    assert rows(taken("shelly", "shellies/shellydw-1/sensor/state", b"close")) == [
        ("shellydw-1", "sensor.state", 0)
    ]
    assert rows(taken("shelly", "shellies/shelly1-1/input_event/0", {"event": "S", "event_cnt": 2})) == []
    assert rows(taken("shelly", "shellies/shelly1-1/online", b"false")) == [("shelly1-1", "online", 0)]
    assert rows(taken("shelly", "shellies/announce", {"id": "x"})) == []


def test_homie():
    assert rows(taken("homie", "homie/weather/outside/temperature", b"21.5")) == [
        ("weather", "outside.temperature", 21.5)
    ]
    assert rows(taken("homie", "homie/weather/outside/raining", b"true")) == [
        ("weather", "outside.raining", 1)
    ]
    assert rows(taken("homie", "homie/weather/outside/mode", b"auto")) == []
    assert rows(taken("homie", "homie/weather/$state", b"lost")) == [("weather", "online", 0)]
    for topic in (
        "homie/weather/$name",
        "homie/weather/$stats/uptime",
        "homie/weather/outside/$properties",
        "homie/weather/outside/temperature/$unit",
        "homie/weather/outside/temperature/set",
    ):
        assert rows(taken("homie", topic, b"5")) == []
    five = taken("homie", "homie/5/weather/outside/temperature", b"1", base="homie/5")
    assert rows(five) == [("weather", "outside.temperature", 1)]


def test_ttn():
    uplink: dict[str, Any] = {
        "end_device_ids": {"device_id": "dev1", "application_ids": {"application_id": "app1"}},
        "received_at": "2026-05-28T20:26:40.100000000Z",
        "uplink_message": {
            "f_port": 1,
            "f_cnt": 77,
            "frm_payload": "gkHe",
            "decoded_payload": {"temperature": 1.5, "door": {"open": True}, "label": "x"},
            "rx_metadata": [{"rssi": -35, "snr": 5.2}],
            "received_at": "2026-05-28T20:26:40.000000000Z",
        },
    }
    found = taken("ttn", "v3/app1@ttn/devices/dev1/up", uplink)
    assert rows(found) == [("dev1", "temperature", 1.5), ("dev1", "door.open", 1)]
    assert {(m.time_us, m.seq, m.signal_strength) for m in found} == {(AT_US, 77, -35)}
    del uplink["uplink_message"]["decoded_payload"]
    assert rows(taken("ttn", "v3/app1@ttn/devices/dev1/up", uplink)) == []
    assert rows(taken("ttn", "v3/app1@ttn/devices/dev1/join", {})) == []


def test_senml_and_sparkplug_are_taken_under_their_base():
    pack = [{"bn": "urn:dev:mac:1:", "n": "t", "v": 1}]
    assert rows(taken("senml", "senml/anything", pack)) == [("urn:dev:mac:1", "t", 1)]
    assert rows(taken("sparkplug_b", "spBv1.0/STATE/host", b"")) == []


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "tasmota"])
def test_a_time_zone_is_refused_where_it_says_nothing(preset):
    with pytest.raises(ValueError, match="time_zone is not for preset"):
        build_preset_rules(preset, time_zone=ZoneInfo("UTC"))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_takes_what_is_the_listeners_own_topic(preset):
    rules = RuleSet(TopicTemplate("sensors/{sensor_id}/{sensor_type}"), build_preset_rules(preset))
    assert rules.rule_for("sensors/a/temperature") is None
