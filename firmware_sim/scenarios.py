"""Scenarios: groups of devices, their sensors, faults and outages; the devices and schedules built from one.

docs/simulator.md has every key. Durations are of simulated time, in seconds or as "15m", "6h", "2d". The same
scenario, seed and start give the same devices and readings. A struct checks its own values when it is built,
so that msgspec names the place in the file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from firmware_sim.devices.firmware import Firmware, FirmwareUpgrade, PublishOutcome, Sensor
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

    from firmware_sim.ground_truth import GroundTruthWriter

Positive = Annotated[int, Meta(ge=1)]
AboveZero = Annotated[float, Meta(gt=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Qos = Annotated[int, Meta(ge=0, le=2)]
MqttVersion = Literal["5", "3.1.1"]
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class FaultEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups.faults]]`; the kinds are in `devices.sensors`."""

    kind: FaultKind
    probability: Probability | None = None
    size: float | None = None
    hold: Positive = 20
    at: Duration | None = None
    lasts: Duration = 0.0
    every: Duration = 0.0

    def __post_init__(self) -> None:
        if self.probability is None and self.at is None:
            raise ValueError(f"fault {self.kind}: it needs a probability, or a time (at)")
        self.build_fault()

    def build_fault(self) -> Fault:
        """The fault with its defaults."""
        window, probability, size = None, self.probability, self.size
        if self.at is not None:
            window = TimeWindow(*map(parse_duration_s, (self.at, self.lasts, self.every)))
        if probability is None:
            probability = float(self.at is not None)
        if size is None:
            size = DEFAULT_CLOCK_JUMP_S if self.kind == "clock_jump" else DEFAULT_FAULT_SIZE
        return Fault(self.kind, probability, size, self.hold, window)


class Burst(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`burst` of a group: `factor` times the rate for `lasts`, at the end of each `every`."""

    every: Duration
    lasts: Duration
    factor: AboveZero = 10.0

    def __post_init__(self) -> None:
        if not parse_duration_s(self.lasts) < parse_duration_s(self.every):
            raise ValueError("burst: lasts must be less than every")


class Sleep(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`sleep` of a group: the radio is on for `awake` once in `every`; readings wait in the ring buffer."""

    every: Duration
    awake: Duration

    def __post_init__(self) -> None:
        if not parse_duration_s(self.awake) < parse_duration_s(self.every):
            raise ValueError("sleep: awake must be less than every")


class UpgradeEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups.upgrades]]`: devices restart with a firmware, one after the other, until `over` later."""

    to: str
    at: Duration
    over: Duration = 0.0

    def __post_init__(self) -> None:
        self.starts_s(0.0)

    def starts_s(self, share: float) -> float:
        """When the device at `share` of the group (0..1) restarts."""
        return parse_duration_s(self.at) + parse_duration_s(self.over) * share


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

    def __post_init__(self) -> None:
        unknown = [each for each in self.types if each not in WAVEFORMS]
        if unknown or not self.types:
            raise ValueError(f"unknown type {', '.join(unknown)!r}; known: {', '.join(WAVEFORMS)}")
        try:
            self.topic.format(device="d", type="t")
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"topic {self.topic!r}: expected {{device}} and {{type}} only") from None


class Outage(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[outages]]`: the network of some groups (none named: of all), or a service, is down."""

    at: Duration
    lasts: Duration
    every: Duration = 0.0
    groups: tuple[str, ...] = ()
    service: str = ""

    def __post_init__(self) -> None:
        if self.groups and self.service:
            raise ValueError("expected groups or a service, not both")
        self.window()

    def window(self) -> TimeWindow:
        """When it is down."""
        return TimeWindow(*map(parse_duration_s, (self.at, self.lasts, self.every)))


class Scenario(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A scenario file. Values of a group win over those here."""

    seed: int | None = None
    rate: AboveZero = 10.0
    seconds: Annotated[float, Meta(ge=0)] = 60.0
    span: Duration | None = None
    readings_per_publish: Positive = 1
    qos: Qos = 1
    mqtt: MqttVersion = "5"
    groups: tuple[Group, ...] = (Group(devices=20),)
    outages: tuple[Outage, ...] = ()

    def __post_init__(self) -> None:
        names = {group.name for group in self.groups}
        unknown = [name for outage in self.outages for name in outage.groups if name not in names]
        if not names:
            raise ValueError("expected at least one [[groups]]")
        if len(names) < len(self.groups):
            raise ValueError("two groups have the same name, and so would their devices")
        if unknown:
            raise ValueError(f"outages: no group is called {', '.join(unknown)}")
        if self.span is not None and not parse_duration_s(self.span):
            raise ValueError("span: expected more than 0")

    @property
    def speed(self) -> float:
        """Simulated seconds per second."""
        return parse_duration_s(self.span) / self.seconds if self.span is not None and self.seconds else 1.0

    def readings_in(self, group: Group) -> int:
        """Readings per publish of a group."""
        return group.readings_per_publish or self.readings_per_publish

    def devices_of(self, *, hostile: bool) -> list[tuple[str, Group, int]]:
        """(device id, group, number in it) of every device, those of a group together."""
        return [
            (f"{group.name}-{number + 1:04d}", group, number)
            for group in self.groups
            if group.hostile == hostile
            for number in range(group.devices)
        ]

    def publish_schedules(self) -> list[PublishSchedule]:
        """How often each group publishes. Groups without a rate share the rest by number of sensors."""
        fixed = sum(group.rate for group in self.groups if group.rate)
        sensors = sum(len(g.types) * g.devices for g in self.groups if not g.rate and not g.hostile)
        scale = self.rate / fixed if fixed and (fixed > self.rate or not sensors) else 1.0
        schedules = []
        for group in self.groups:
            share = len(group.types) * group.devices / sensors if sensors else 0.0
            rate = group.rate * scale if group.rate else max(self.rate - fixed, self.rate / 100) * share
            burst = group.burst
            schedules.append(
                PublishSchedule(
                    max(rate, 1e-9) / self.readings_in(group),
                    parse_duration_s(burst.every) / self.speed if burst else 0.0,
                    parse_duration_s(burst.lasts) / self.speed if burst else 0.0,
                    burst.factor if burst else 1.0,
                )
            )
        return schedules


def read_scenario(path: Path) -> Scenario:
    """Read a scenario file; a SimError names the file, the key and what is allowed."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Scenario)
    except OSError as fault:
        raise SimError(f"--scenario {path}: {fault.strerror}") from fault
    except (msgspec.DecodeError, UnicodeDecodeError) as fault:
        raise SimError(f"--scenario {path}: {fault}") from fault


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
    """One device before it is switched on: when its radio is on (None: always) and its network is down."""

    firmware: Firmware
    group: Group
    awake: TimeWindow | None
    away: tuple[TimeWindow, ...]


def plan_devices(scenario: Scenario, seed: int, *, start_us: int) -> list[PlannedDevice]:
    """The devices of a scenario, those of a group together, without the hostile groups."""
    plans = []
    sites: dict[str, Site] = {}
    for device_id, group, number in scenario.devices_of(hostile=False):
        locations = group.locations or _LOCATIONS
        location = locations[number % len(locations)]
        site = sites.setdefault(location, build_site(random.Random(f"{seed}/{location}")))
        away = tuple(
            outage.window()
            for outage in scenario.outages
            if not outage.service and (not outage.groups or group.name in outage.groups)
        )
        awake = None
        if group.sleep:
            every_s, awake_s = parse_duration_s(group.sleep.every), parse_duration_s(group.sleep.awake)
            awake = TimeWindow(every_s * number / group.devices, awake_s, every_s)
        upgrades = tuple(
            FirmwareUpgrade(upgrade.starts_s(number / group.devices), upgrade.to)
            for upgrade in group.upgrades
        )
        rng = random.Random(f"{seed}/{device_id}")
        maker, versions = rng.choice(_MANUFACTURERS)
        attributes = (location, group.manufacturer or maker, group.firmware_version or rng.choice(versions))
        faults = [entry.build_fault() for entry in group.faults]
        sensor_faults = tuple(fault for fault in faults if fault.kind not in DEVICE_FAULT_KINDS)
        sensors = [
            Sensor(
                SeriesState(device_id, kind, (WAVEFORMS[kind][1], *attributes)),
                site,
                sensor_faults,
                SensorFaultState(),
            )
            for kind in group.types
        ]
        firmware = Firmware(
            device_id,
            random.Random(f"{seed}/{device_id}/{start_us}"),
            sensors,
            battery_level=rng.uniform(55, 100),
            signal_strength=rng.uniform(-72, -45),
            topic=group.topic,
            payload_format=group.format,
            battery_days=group.battery_days,
            clock_ppm=rng.uniform(-group.clock_ppm, group.clock_ppm),
            upgrades=upgrades,
            device_faults=DeviceFaults([fault for fault in faults if fault.kind in DEVICE_FAULT_KINDS]),
        )
        plans.append(PlannedDevice(firmware, group, awake, away))
    return plans


@dataclass(slots=True)
class GroupSchedule:
    """When each sensor of a group publishes: the sensors take turns, publish after publish."""

    schedule: PublishSchedule
    turns: list[tuple[Firmware, Sensor]]
    readings: int
    spacing_us: int
    speed: float
    start_us: int
    next_publish: int = 0

    def publish(self, number: int, truth: GroundTruthWriter) -> tuple[Firmware, float, PublishOutcome]:
        """Sample and record publish `number`: its device, its simulated time, and what is to be sent."""
        firmware, sensor = self.turns[number % len(self.turns)]
        at_s = self.schedule.time_of(number) * self.speed
        outcome = firmware.publish(
            sensor,
            truth,
            at_s=at_s,
            now_us=self.start_us + int(at_s * 1e6),
            readings=self.readings,
            spacing_us=self.spacing_us,
        )
        return firmware, at_s, outcome


def build_group_schedules(
    scenario: Scenario, plans: list[PlannedDevice], *, start_us: int
) -> list[GroupSchedule]:
    """The schedule of each group that is not hostile."""
    schedules = []
    for group, schedule in zip(scenario.groups, scenario.publish_schedules(), strict=True):
        if group.hostile:
            continue
        members = [plan.firmware for plan in plans if plan.group is group]
        turns = [(firmware, firmware.sensors[n]) for n in range(len(group.types)) for firmware in members]
        readings = scenario.readings_in(group)
        spacing_us = max(1000, int(len(turns) / schedule.per_s / readings * scenario.speed * 1e6))
        schedules.append(GroupSchedule(schedule, turns, readings, spacing_us, scenario.speed, start_us))
    return schedules
