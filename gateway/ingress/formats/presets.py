"""Rules for devices as they come: what their projects document about topics and payloads. Pure.

docs/presets.md says what to set at the device, and what each preset makes of its payloads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

from gateway.ingress.formats.rule import Member, Rule, rule_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import tzinfo

Preset = Literal["zigbee2mqtt", "tasmota", "esphome", "shelly", "sparkplug_b", "senml", "homie", "ttn"]
PRESETS: Final = get_args(Preset)

_SWITCHED: Final = {"ON": 1, "OFF": 0, "on": 1, "off": 0}
_ONLINE: Final = {"online": 1, "offline": 0, "Online": 1, "Offline": 0}
_TASMOTA_STATE: Final = (
    "POWER*",
    "Dimmer",
    "UptimeSec",
    "Heap",
    "LoadAvg",
    "Vcc",
    "Wifi.RSSI",
    "Wifi.LinkCount",
)
_OPENED: Final = {"open": 1, "close": 0, "closed": 0}


def rules_of(preset: Preset, base: str | None = None, time_zone: tzinfo | None = None) -> Sequence[Rule]:
    """The rules of a preset, in order.

    Args:
        preset: one of `PRESETS`.
        base: what its topics begin with; its usual one unless given, "" for nothing.
        time_zone: of a clock that writes local time without an offset (tasmota).

    Raises:
        ValueError: `base` is no topic, or time_zone is not for this preset.
    """
    usual, make = _PRESETS[preset]
    if time_zone is not None and preset != "tasmota":
        raise ValueError(
            f"time_zone is not for preset {preset!r}: its times say their offset, or there are none"
        )
    if base is None:
        base = usual
    base = base.strip("/")
    return make(f"{base}/" if base else "", time_zone)


def _zigbee2mqtt(base: str, _: tzinfo | None) -> Sequence[Rule]:
    return (
        rule_of(f"{base}bridge/#", "ignore"),
        rule_of(f"{base}+/set/#", "ignore"),
        rule_of(f"{base}+/get/#", "ignore"),
        rule_of(
            f"{base}{{sensor_id}}/availability",
            "fields",
            members={"state": Member(name="online", values=_ONLINE)},
        ),
        rule_of(
            f"{base}{{sensor_id}}",
            "fields",
            values=_SWITCHED,
            exclude=("update*", "last_seen", "device.*", "color.*"),
            companions={"battery_level": "battery"},
            time="last_seen",
            may_be_empty=True,
        ),
    )


def _tasmota(base: str, time_zone: tzinfo | None) -> Sequence[Rule]:
    time = None if time_zone is None else "Time"
    return (
        rule_of(
            f"{base}tele/{{sensor_id}}/SENSOR",
            "fields",
            values=_SWITCHED,
            time=time,
            time_zone=time_zone,
            may_be_empty=True,
        ),
        rule_of(
            f"{base}tele/{{sensor_id}}/STATE",
            "fields",
            include=(
                "POWER*",
                "Dimmer",
                "UptimeSec",
                "Heap",
                "LoadAvg",
                "Vcc",
                "Wifi.RSSI",
                "Wifi.LinkCount",
            ),
            values=_SWITCHED,
            companions={"signal_strength": "Wifi.Signal"},
            time=time,
            time_zone=time_zone,
            may_be_empty=True,
        ),
        rule_of(f"{base}tele/{{sensor_id}}/LWT", "number", sensor_type="online", values=_ONLINE),
        rule_of(f"{base}tele/#", "ignore"),
        rule_of(f"{base}stat/#", "ignore"),
        rule_of(f"{base}cmnd/#", "ignore"),
    )


def _esphome(base: str, _: tzinfo | None) -> Sequence[Rule]:
    kinds = ("sensor", "binary_sensor", "switch", "number", "light", "fan")
    states = [
        rule_of(
            f"{base}{{sensor_id}}/{kind}/{{sensor_type}}/state", "number", values=_SWITCHED, may_be_empty=True
        )
        for kind in kinds
    ]
    return (
        *states,
        rule_of(f"{base}{{sensor_id}}/status", "number", sensor_type="online", values=_ONLINE),
        rule_of(f"{base}+/debug", "ignore"),
        *(rule_of(f"{base}+/{kind}/#", "ignore") for kind in (*kinds, "text_sensor", "climate", "cover")),
    )


def _shelly(base: str, _: tzinfo | None) -> Sequence[Rule]:
    return (
        rule_of(
            f"{base}{{sensor_id}}/events/rpc",
            "fields",
            root="params",
            exclude=("ts", "events*", "*.id", "*.minute_ts", "*.by_minute*", "*.tF"),
            time="params.ts",
            time_unit="s",
            may_be_empty=True,
        ),
        rule_of(f"{base}{{sensor_id}}/online", "number", sensor_type="online"),
        rule_of(f"{base}+/status/#", "ignore"),
        rule_of(f"{base}+/debug/#", "ignore"),
        rule_of("shellies/+/info", "ignore"),
        rule_of("shellies/+/announce", "ignore"),
        rule_of("shellies/+/command", "ignore"),
        rule_of("shellies/announce", "ignore"),
        rule_of("shellies/command", "ignore"),
        rule_of(
            "shellies/{sensor_id}/{sensor_type#}",
            "number",
            values={**_SWITCHED, **_OPENED},
            may_be_empty=True,
        ),
    )


def _sparkplug_b(base: str, _: tzinfo | None) -> Sequence[Rule]:
    exclude = ("Node Control/*", "Device Control/*")
    return (rule_of(f"{base}#", "sparkplug_b", exclude=exclude),)


def _senml(base: str, _: tzinfo | None) -> Sequence[Rule]:
    return (rule_of(f"{base}#", "senml"),)


def _homie(base: str, _: tzinfo | None) -> Sequence[Rule]:
    states = {"ready": 1, "alert": 1, "sleeping": 1, "init": 0, "disconnected": 0, "lost": 0}
    return (
        rule_of(f"{base}{{sensor_id}}/$state", "number", sensor_type="online", values=states),
        rule_of(
            f"{base}{{sensor_id}}/{{node}}/{{property}}",
            "number",
            sensor_type="{node}.{property}",
            may_be_empty=True,
        ),
        rule_of(f"{base}#", "ignore"),
    )


def _ttn(base: str, _: tzinfo | None) -> Sequence[Rule]:
    return (
        rule_of(
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
        rule_of(f"{base}+/devices/#", "ignore"),
    )


_PRESETS: Final[Mapping[str, tuple[str, Callable[[str, tzinfo | None], Sequence[Rule]]]]] = {
    "zigbee2mqtt": ("zigbee2mqtt", _zigbee2mqtt),
    "tasmota": ("", _tasmota),
    "esphome": ("", _esphome),
    "shelly": ("", _shelly),
    "sparkplug_b": ("spBv1.0", _sparkplug_b),
    "senml": ("senml", _senml),
    "homie": ("homie", _homie),
    "ttn": ("v3", _ttn),
}
