"""Predefined payload rules for common devices and platforms. Pure.

docs/presets.md describes the device settings each preset needs and the series it produces.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, get_args

from gateway.payloads.rule import FieldConversion, PayloadRule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import tzinfo

Preset = Literal["zigbee2mqtt", "tasmota", "esphome", "shelly", "sparkplug_b", "senml", "homie", "ttn"]
PRESETS: Final = get_args(Preset)

_ON_OFF_VALUES: Final = {"ON": 1, "OFF": 0, "on": 1, "off": 0}
_ONLINE_VALUES: Final = {"online": 1, "offline": 0, "Online": 1, "Offline": 0}
_TASMOTA_STATE_FIELDS: Final = (
    "POWER*",
    "Dimmer",
    "UptimeSec",
    "Heap",
    "LoadAvg",
    "Vcc",
    "Wifi.RSSI",
    "Wifi.LinkCount",
)
_SPARKPLUG_COMMANDS: Final = ("Node Control/*", "Device Control/*")


def build_preset_rules(
    preset: Preset, base: str | None = None, time_zone: tzinfo | None = None
) -> Sequence[PayloadRule]:
    """The rules of a preset, in order, for topics that begin with `base` (None: as usual).

    `time_zone` is that of a clock that writes local time without an offset (tasmota only, else ValueError).
    """
    usual, build = _PRESETS[preset]
    if time_zone is not None and preset != "tasmota":
        raise ValueError(
            f"time_zone is not for preset {preset!r}: its times say their offset, or there are none"
        )
    base = (usual if base is None else base).strip("/")
    return build(f"{base}/" if base else "", time_zone)


def _ignore(*topics: str) -> Sequence[PayloadRule]:
    return [PayloadRule(topic, "ignore") for topic in topics]


def _zigbee2mqtt(base: str, _: tzinfo | None) -> Sequence[PayloadRule]:
    return (
        *_ignore(f"{base}bridge/#", f"{base}+/set/#", f"{base}+/get/#"),
        PayloadRule(
            f"{base}{{sensor_id}}/availability",
            "fields",
            members={"state": FieldConversion(name="online", values=_ONLINE_VALUES)},
        ),
        PayloadRule(
            f"{base}{{sensor_id}}",
            "fields",
            values=_ON_OFF_VALUES,
            exclude=("update*", "last_seen", "device.*", "color.*"),
            companions={"battery_level": "battery"},
            time="last_seen",
            may_be_empty=True,
        ),
    )


def _tasmota(base: str, time_zone: tzinfo | None) -> Sequence[PayloadRule]:
    sensor = PayloadRule(
        f"{base}tele/{{sensor_id}}/SENSOR",
        "fields",
        values=_ON_OFF_VALUES,
        time=None if time_zone is None else "Time",
        time_zone=time_zone,
        may_be_empty=True,
    )
    return (
        sensor,
        replace(
            sensor,
            topic=f"{base}tele/{{sensor_id}}/STATE",
            include=_TASMOTA_STATE_FIELDS,
            companions={"signal_strength": "Wifi.Signal"},
        ),
        PayloadRule(f"{base}tele/{{sensor_id}}/LWT", "number", sensor_type="online", values=_ONLINE_VALUES),
        *_ignore(f"{base}tele/#", f"{base}stat/#", f"{base}cmnd/#"),
    )


def _esphome(base: str, _: tzinfo | None) -> Sequence[PayloadRule]:
    kinds = ("sensor", "binary_sensor", "switch", "number", "light", "fan")
    states = [
        PayloadRule(
            f"{base}{{sensor_id}}/{kind}/{{sensor_type}}/state",
            "number",
            values=_ON_OFF_VALUES,
            may_be_empty=True,
        )
        for kind in kinds
    ]
    return (
        *states,
        PayloadRule(f"{base}{{sensor_id}}/status", "number", sensor_type="online", values=_ONLINE_VALUES),
        PayloadRule(f"{base}+/debug", "ignore"),
        *(PayloadRule(f"{base}+/{kind}/#", "ignore") for kind in (*kinds, "text_sensor", "climate", "cover")),
    )


def _shelly(base: str, _: tzinfo | None) -> Sequence[PayloadRule]:
    return (
        PayloadRule(
            f"{base}{{sensor_id}}/events/rpc",
            "fields",
            root="params",
            exclude=("ts", "events*", "*.id", "*.minute_ts", "*.by_minute*", "*.tF"),
            time="params.ts",
            time_unit="s",
            may_be_empty=True,
        ),
        PayloadRule(f"{base}{{sensor_id}}/online", "number", sensor_type="online"),
        *_ignore(f"{base}+/status/#", f"{base}+/debug/#", "shellies/+/info"),
        *_ignore("shellies/+/announce", "shellies/+/command", "shellies/announce", "shellies/command"),
        PayloadRule(
            "shellies/{sensor_id}/{sensor_type#}",
            "number",
            values={**_ON_OFF_VALUES, "open": 1, "close": 0, "closed": 0},
            may_be_empty=True,
        ),
    )


def _homie(base: str, _: tzinfo | None) -> Sequence[PayloadRule]:
    states = {"ready": 1, "alert": 1, "sleeping": 1, "init": 0, "disconnected": 0, "lost": 0}
    return (
        PayloadRule(f"{base}{{sensor_id}}/$state", "number", sensor_type="online", values=states),
        PayloadRule(
            f"{base}{{sensor_id}}/{{node}}/{{property}}",
            "number",
            sensor_type="{node}.{property}",
            may_be_empty=True,
        ),
        PayloadRule(f"{base}#", "ignore"),
    )


def _ttn(base: str, _: tzinfo | None) -> Sequence[PayloadRule]:
    return (
        PayloadRule(
            f"{base}+/devices/{{sensor_id}}/up",
            "fields",
            root="uplink_message.decoded_payload",
            time="uplink_message.received_at",
            companions={
                "signal_strength": "uplink_message.rx_metadata.0.rssi",
                "seq": "uplink_message.f_cnt",
            },
            may_be_empty=True,
        ),
        PayloadRule(f"{base}+/devices/#", "ignore"),
    )


_PRESETS: Final[Mapping[str, tuple[str, Callable[[str, tzinfo | None], Sequence[PayloadRule]]]]] = {
    "zigbee2mqtt": ("zigbee2mqtt", _zigbee2mqtt),
    "tasmota": ("", _tasmota),
    "esphome": ("", _esphome),
    "shelly": ("", _shelly),
    "sparkplug_b": (
        "spBv1.0",
        lambda base, _: [PayloadRule(f"{base}#", "sparkplug_b", exclude=_SPARKPLUG_COMMANDS)],
    ),
    "senml": ("senml", lambda base, _: [PayloadRule(f"{base}#", "senml")]),
    "homie": ("homie", _homie),
    "ttn": ("v3", _ttn),
}
