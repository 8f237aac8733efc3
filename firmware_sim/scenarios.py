"""Scenarios: groups of devices, their sensors, faults and outages; and the devices built from one.

    seed = 7                      # the same seed makes the same fleet and the same readings
    rate = 50                     # readings per second of the whole fleet
    seconds = 60                  # how long it runs; 0: until stopped
    span = "1d"                   # how much simulated time that is; without it, as much as it takes
    readings_per_publish = 1
    qos = 1
    mqtt = "5"                    # or "3.1.1"

    [[groups]]
    name = "greenhouse"           # device ids are greenhouse-0001, ...
    devices = 12
    types = ["temperature", "humidity"]
    locations = ["hall-a", "hall-b"]

    [[groups.faults]]
    kind = "spike"
    probability = 0.001

    [[outages]]
    groups = ["greenhouse"]       # their network is away; or service = "region", see --service
    at = "2h"
    lasts = "30m"

Durations are of simulated time, in seconds or as "15m", "6h", "2d". docs/simulator.md has every key. The same
scenario, seed and start give the same devices, and they give the same readings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from firmware_sim.devices.firmware import Firmware, FirmwareUpgrade, Sensor
from firmware_sim.devices.payloads import PayloadFormat  # noqa: TC001 - msgspec reads the annotations
from firmware_sim.devices.sensors import (
    DEFAULT_CLOCK_JUMP_S,
    DEFAULT_FAULT_SIZE,
    DEVICE_FAULT_KINDS,
    WAVEFORMS,
    DeviceFaults,
    Duration,
    Fault,
    FaultKind,
    PublishSchedule,
    SensorFaultState,
    Site,
    TimeWindow,
    build_site,
    parse_duration_s,
)
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import SeriesState

if TYPE_CHECKING:
    from pathlib import Path

Positive = Annotated[int, Meta(ge=1)]
AboveZero = Annotated[float, Meta(gt=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Qos = Annotated[int, Meta(ge=0, le=2)]
MqttVersion = Literal["5", "3.1.1"]
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class FaultEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups.faults]]`; see `faults` for the kinds."""

    kind: FaultKind
    probability: Probability | None = None
    size: float | None = None
    hold: Positive = 20
    at: Duration | None = None
    lasts: Duration = 0.0
    every: Duration = 0.0

    def fault(self) -> Fault:
        """As the firmware takes it."""
        scheduled = self.at is not None
        window = (
            TimeWindow(*map(parse_duration_s, (self.at or 0.0, self.lasts, self.every)))
            if scheduled
            else None
        )
        usual = DEFAULT_CLOCK_JUMP_S if self.kind == "clock_jump" else DEFAULT_FAULT_SIZE
        return Fault(
            self.kind,
            self.probability if self.probability is not None else float(scheduled),
            self.size if self.size is not None else usual,
            self.hold,
            window,
        )


class Burst(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`burst` of a group: `factor` times the rate for `lasts`, at the end of each `every`."""

    every: Duration
    lasts: Duration
    factor: AboveZero = 10.0


class Sleep(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`sleep` of a group: the radio is on for `awake` once in `every`; readings wait in the ring buffer."""

    every: Duration
    awake: Duration


class UpgradeEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups.upgrades]]`: from `at` on devices restart with a firmware, the last of them `over`
    later.
    """

    to: str
    at: Duration
    over: Duration = 0.0


class Group(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups]]`. Empty attributes are filled from the seed; None is the scenario's own."""

    name: Annotated[str, Meta(pattern=_NAME_PATTERN)] = "sim"
    devices: Positive = 1
    types: tuple[str, ...] = ("temperature", "humidity", "pressure")
    locations: tuple[str, ...] = ()
    manufacturer: str = ""
    firmware_version: str = ""
    faults: tuple[FaultEntry, ...] = ()
    rate: AboveZero | None = None
    readings_per_publish: Positive | None = None
    qos: Qos | None = None
    mqtt: MqttVersion | None = None
    format: PayloadFormat = "json"
    topic: str = "sensors/{device}/{type}"
    ring_publishes: Positive | None = None
    battery_days: AboveZero = 90.0
    clock_ppm: Annotated[float, Meta(ge=0)] = 20.0
    burst: Burst | None = None
    sleep: Sleep | None = None
    upgrades: tuple[UpgradeEntry, ...] = ()
    will: bool = False
    hostile: bool = False


class Outage(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[outages]]`: the network of some groups (none named: of all), or a service, is away."""

    at: Duration
    lasts: Duration
    every: Duration = 0.0
    groups: tuple[str, ...] = ()
    service: str = ""

    def window(self) -> TimeWindow:
        """When."""
        return TimeWindow(
            parse_duration_s(self.at), parse_duration_s(self.lasts), parse_duration_s(self.every)
        )


class Scenario(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole fleet."""

    seed: int | None = None
    rate: AboveZero = 10.0
    seconds: Annotated[float, Meta(ge=0)] = 60.0
    span: Duration | None = None
    readings_per_publish: Positive = 1
    qos: Qos = 1
    mqtt: MqttVersion = "5"
    groups: tuple[Group, ...] = (Group(devices=20),)
    outages: tuple[Outage, ...] = ()

    @property
    def speed(self) -> float:
        """Simulated seconds per second."""
        return parse_duration_s(self.span) / self.seconds if self.span is not None and self.seconds else 1.0

    def readings_in(self, group: Group) -> int:
        """Readings per publish of a group."""
        return group.readings_per_publish or self.readings_per_publish

    def publish_schedules(self) -> list[PublishSchedule]:
        """How often each group publishes. Groups without a rate share what is left by their sensors."""
        said = sum(group.rate for group in self.groups if group.rate)
        sensors = sum(len(g.types) * g.devices for g in self.groups if not g.rate and not g.hostile)
        scale = self.rate / said if said and (said > self.rate or not sensors) else 1.0
        publish_schedules = []
        for group in self.groups:
            share = len(group.types) * group.devices / sensors if sensors else 0.0
            rate = group.rate * scale if group.rate else max(self.rate - said, self.rate / 100) * share
            burst = group.burst
            publish_schedules.append(
                PublishSchedule(
                    max(rate, 1e-9) / self.readings_in(group),
                    parse_duration_s(burst.every) / self.speed if burst else 0.0,
                    parse_duration_s(burst.lasts) / self.speed if burst else 0.0,
                    burst.factor if burst else 1.0,
                )
            )
        return publish_schedules


def read_scenario(path: Path) -> Scenario:
    """Read a scenario file.

    Raises:
        SimError: naming the file, the key and what is allowed.
    """
    try:
        scenario = msgspec.toml.decode(path.read_bytes(), type=Scenario)
    except OSError as fault:
        raise SimError(f"--scenario {path}: {fault.strerror}") from fault
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise SimError(f"--scenario {path}: {fault}") from fault
    wrong = find_scenario_error(scenario)
    if wrong:
        raise SimError(f"--scenario {path}: {wrong}")
    return scenario


def find_scenario_error(scenario: Scenario) -> str:
    """What is wrong with a scenario beyond its types, in words; "" when nothing is."""
    if not scenario.groups or any(not group.types for group in scenario.groups):
        return "at least one [[groups]] with at least one type is needed"
    names = [group.name for group in scenario.groups]
    if len(set(names)) < len(names):
        return "two groups have the same name, and so would their devices"
    try:
        if scenario.span is not None and not parse_duration_s(scenario.span):
            return "span: expected more than 0"
        faults = [
            *(f"group {group.name}: {_find_group_error(group)}" for group in scenario.groups),
            *(f"outages[{n}]: {_find_outage_error(each, names)}" for n, each in enumerate(scenario.outages)),
        ]
    except ValueError as fault:
        return str(fault)
    return next((fault for fault in faults if not fault.endswith(": ")), "")


def _find_outage_error(outage: Outage, names: list[str]) -> str:
    outage.window()
    unknown = [name for name in outage.groups if name not in names]
    if unknown:
        return f"no group is called {', '.join(unknown)}"
    return "it is of groups or of a service, not of both" if outage.groups and outage.service else ""


def _find_group_error(group: Group) -> str:
    for sensor_type in group.types:
        if sensor_type not in WAVEFORMS:
            return f"unknown type {sensor_type!r}; known: {', '.join(WAVEFORMS)}"
    for entry in group.faults:
        if entry.probability is None and entry.at is None:
            return f"fault {entry.kind}: it needs a probability, or a time (at)"
        entry.fault()
    try:
        group.topic.format(device="d", type="t")
    except (KeyError, IndexError, ValueError):
        return f"topic {group.topic!r}: expected only {{device}} and {{type}} in braces"
    if group.burst and not parse_duration_s(group.burst.lasts) < parse_duration_s(group.burst.every):
        return "burst: lasts must be less than every"
    if group.sleep and not parse_duration_s(group.sleep.awake) < parse_duration_s(group.sleep.every):
        return "sleep: awake must be less than every"
    for upgrade in group.upgrades:
        parse_duration_s(upgrade.at), parse_duration_s(upgrade.over)
    return ""


_LOCATIONS = (
    "hall-a/line-1", "hall-a/line-2", "hall-b/press-3", "hall-b/oven-1", "roof/north", "roof/south",
    "yard/gate-2", "boiler-room", "cold-store/rack-4", "office/floor-1", "office/floor-2", "pump-house",
    "silo-7", "loading-bay",
)  # fmt: skip
_MANUFACTURERS = (
    ("Halden Instruments", ("2.4.1", "2.5.0")),
    ("Orrest Sensorik", ("1.0.9", "1.1.2")),
    ("Kestrel Labs", ("7.3", "7.4")),
    ("Morava Controls", ("3.12.0", "3.12.4")),
)


@dataclass(frozen=True, slots=True)
class PlannedDevice:
    """One device before it is switched on.

    Attributes:
        group: its group in the scenario.
        awake: when its radio is on, where it sleeps.
        away: when its network is away.
    """

    firmware: Firmware
    group: Group
    awake: TimeWindow | None
    away: tuple[TimeWindow, ...]


def plan_devices(scenario: Scenario, seed: int, *, start_us: int) -> list[PlannedDevice]:
    """The devices of a scenario, those of a group together. Hostile groups have none of these."""
    plans = []
    for group in scenario.groups:
        if group.hostile:
            continue
        away = tuple(
            outage.window()
            for outage in scenario.outages
            if not outage.service and (not outage.groups or group.name in outage.groups)
        )
        sites: dict[str, Site] = {}
        for number in range(group.devices):
            firmware = _build_firmware(group, number, seed, start_us, sites)
            awake = None
            if group.sleep:
                every_s, awake_s = parse_duration_s(group.sleep.every), parse_duration_s(group.sleep.awake)
                awake = TimeWindow(every_s * number / group.devices, awake_s, every_s)
            plans.append(PlannedDevice(firmware, group, awake, away))
    return plans


def _build_firmware(group: Group, number: int, seed: int, start_us: int, sites: dict[str, Site]) -> Firmware:
    locations = group.locations or _LOCATIONS
    device_id = f"{group.name}-{number + 1:04d}"
    rng = random.Random(f"{seed}/{device_id}")
    location = locations[number % len(locations)]
    site = sites.setdefault(location, build_site(random.Random(f"{seed}/{location}")))
    maker, versions = rng.choice(_MANUFACTURERS)
    attributes = (location, group.manufacturer or maker, group.firmware_version or rng.choice(versions))
    faults = [entry.fault() for entry in group.faults]
    of_sensors = tuple(fault for fault in faults if fault.kind not in DEVICE_FAULT_KINDS)
    sensors = [
        Sensor(
            SeriesState(device_id, kind, (WAVEFORMS[kind][1], *attributes)),
            site,
            of_sensors,
            SensorFaultState(),
        )
        for kind in group.types
    ]
    upgrades = tuple(
        FirmwareUpgrade(
            parse_duration_s(entry.at) + parse_duration_s(entry.over) * number / group.devices, entry.to
        )
        for entry in group.upgrades
    )
    firmware = Firmware(
        device_id,
        random.Random(f"{seed}/{device_id}/{start_us}"),
        sensors,
        battery_level=rng.uniform(55, 100),
        signal_strength=rng.uniform(-72, -45),
        topic=group.topic,
        shape=group.format,
        battery_days=group.battery_days,
        clock_ppm=rng.uniform(-group.clock_ppm, group.clock_ppm),
        upgrades=upgrades,
    )
    firmware.device_faults = DeviceFaults([fault for fault in faults if fault.kind in DEVICE_FAULT_KINDS])
    return firmware
