"""From a scenario and a seed to devices that can be switched on.

The same scenario, seed and start give the same devices, and they give the same readings.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from firmware_sim.faults import OF_DEVICES, DeviceFaults, SensorState
from firmware_sim.firmware import Firmware, Sensor, Upgrade
from firmware_sim.truth import State
from firmware_sim.waveforms import WAVEFORMS, Site, make_site
from firmware_sim.windows import Window, duration_s

if TYPE_CHECKING:
    from firmware_sim.scenarios import Group, Scenario

_LOCATIONS = (
    "hall-a/line-1", "hall-a/line-2", "hall-b/press-3", "hall-b/oven-1", "roof/north", "roof/south",
    "yard/gate-2", "boiler-room", "cold-store/rack-4", "office/floor-1", "office/floor-2", "pump-house",
    "silo-7", "loading-bay",
)  # fmt: skip
_MAKERS = (
    ("Halden Instruments", ("2.4.1", "2.5.0")),
    ("Orrest Sensorik", ("1.0.9", "1.1.2")),
    ("Kestrel Labs", ("7.3", "7.4")),
    ("Morava Controls", ("3.12.0", "3.12.4")),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """One device before it is switched on.

    Attributes:
        group: its group in the scenario.
        awake: when its radio is on, where it sleeps.
        away: when its network is away.
    """

    firmware: Firmware
    group: Group
    awake: Window | None
    away: tuple[Window, ...]


def plan_devices(scenario: Scenario, seed: int, *, start_us: int) -> list[Plan]:
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
            firmware = _firmware(group, number, seed, start_us, sites)
            awake = None
            if group.sleep:
                every_s, awake_s = duration_s(group.sleep.every), duration_s(group.sleep.awake)
                awake = Window(every_s * number / group.devices, awake_s, every_s)
            plans.append(Plan(firmware, group, awake, away))
    return plans


def _firmware(group: Group, number: int, seed: int, start_us: int, sites: dict[str, Site]) -> Firmware:
    locations = group.locations or _LOCATIONS
    device_id = f"{group.name}-{number + 1:04d}"
    rng = random.Random(f"{seed}/{device_id}")
    location = locations[number % len(locations)]
    site = sites.setdefault(location, make_site(random.Random(f"{seed}/{location}")))
    maker, versions = rng.choice(_MAKERS)
    attributes = (location, group.manufacturer or maker, group.firmware_version or rng.choice(versions))
    faults = [entry.fault() for entry in group.faults]
    of_sensors = tuple(fault for fault in faults if fault.kind not in OF_DEVICES)
    sensors = [
        Sensor(State(device_id, kind, (WAVEFORMS[kind][1], *attributes)), site, of_sensors, SensorState())
        for kind in group.types
    ]
    upgrades = tuple(
        Upgrade(duration_s(entry.at) + duration_s(entry.over) * number / group.devices, entry.to)
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
    firmware.device_faults = DeviceFaults([fault for fault in faults if fault.kind in OF_DEVICES])
    return firmware
