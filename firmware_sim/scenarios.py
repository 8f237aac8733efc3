"""What a fleet is: groups of devices, their sensors, their faults; from a TOML file or from options.

seed = 7                      # the same seed makes the same fleet
rate = 50                     # readings per second of the whole fleet
seconds = 60                  # 0: until stopped
readings_per_publish = 1
qos = 1

[[groups]]
name = "greenhouse"           # device ids are greenhouse-0001, ...
devices = 12
types = ["temperature", "humidity"]
locations = ["hall-a", "hall-b"]
manufacturer = "Halden Instruments"
firmware_version = "2.4.1"

[[groups.faults]]
kind = "spike"                # dropout, spike, stuck, malformed
probability = 0.001
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta

from firmware_sim.errors import SimError
from firmware_sim.faults import Fault, FaultKind, SensorState
from firmware_sim.truth import State
from firmware_sim.waveforms import WAVEFORMS, Site, make_site

if TYPE_CHECKING:
    from pathlib import Path

Positive = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

_LOCATIONS = ("hall-a", "hall-b", "roof", "yard", "boiler-room", "cold-store", "office-1", "office-2")
_MAKERS = (
    ("Halden Instruments", ("2.4.1", "2.5.0")),
    ("Orrest Sensorik", ("1.0.9", "1.1.2")),
    ("Kestrel Labs", ("7.3", "7.4")),
)


class FaultEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups.faults]]`."""

    kind: FaultKind
    probability: Share
    size: float = 40.0
    hold: Positive = 20


class Group(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups]]`. Empty attributes are filled from the seed."""

    name: Annotated[str, Meta(pattern=_NAME)] = "sim"
    devices: Positive = 1
    types: tuple[str, ...] = ("temperature", "humidity", "pressure")
    locations: tuple[str, ...] = ()
    manufacturer: str = ""
    firmware_version: str = ""
    faults: tuple[FaultEntry, ...] = ()


class Scenario(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole fleet."""

    seed: int | None = None
    rate: Annotated[float, Meta(gt=0)] = 10.0
    seconds: Annotated[float, Meta(ge=0)] = 60.0
    readings_per_publish: Positive = 1
    qos: Annotated[int, Meta(ge=0, le=2)] = 1
    groups: tuple[Group, ...] = (Group(devices=20),)


@dataclass(slots=True)
class Sensor:
    """One sensor of a device: what it measures, and what it remembers."""

    state: State
    site: Site
    faults: tuple[Fault, ...]
    memory: SensorState
    last_us: int = 0


@dataclass(slots=True)
class DevicePlan:
    """A device before it is switched on. Battery in percent at the start, signal in dBm."""

    device_id: str
    boot_id: str
    sensors: list[Sensor]
    battery_level: float
    signal_strength: float
    rng: random.Random
    seq: int = 0


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
    for group in scenario.groups:
        for sensor_type in group.types:
            if sensor_type not in WAVEFORMS:
                known = ", ".join(WAVEFORMS)
                raise SimError(
                    f"--scenario {path}: group {group.name}: unknown type {sensor_type!r}; known: {known}"
                )
    if not scenario.groups or any(not group.types for group in scenario.groups):
        raise SimError(f"--scenario {path}: at least one [[groups]] with at least one type is needed")
    names = [group.name for group in scenario.groups]
    if len(set(names)) < len(names):
        raise SimError(f"--scenario {path}: two groups have the same name, and so would their devices")
    return scenario


def plan_devices(scenario: Scenario, seed: int, *, boot: str) -> list[DevicePlan]:
    """The devices of a scenario. The same scenario, seed and boot give the same devices."""
    plans = []
    for group in scenario.groups:
        locations = group.locations or _LOCATIONS
        sites: dict[str, Site] = {}
        for number in range(1, group.devices + 1):
            device_id = f"{group.name}-{number:04d}"
            rng = random.Random(f"{seed}/{device_id}")
            location = locations[(number - 1) % len(locations)]
            site = sites.setdefault(location, make_site(random.Random(f"{seed}/{location}")))
            maker, versions = rng.choice(_MAKERS)
            attributes = (
                location,
                group.manufacturer or maker,
                group.firmware_version or rng.choice(versions),
            )
            faults = tuple(Fault(f.kind, f.probability, f.size, f.hold) for f in group.faults)
            sensors = [
                Sensor(State(device_id, kind, (WAVEFORMS[kind][1], *attributes)), site, faults, SensorState())
                for kind in group.types
            ]
            plans.append(
                DevicePlan(
                    device_id,
                    f"{boot}-{rng.getrandbits(32):08x}",
                    sensors,
                    battery_level=rng.uniform(55, 100),
                    signal_strength=rng.uniform(-72, -45),
                    rng=rng,
                )
            )
    return plans
