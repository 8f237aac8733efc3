"""What a fleet is: groups of devices, their sensors, faults and outages; from a TOML file or from options.

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

Durations are of simulated time, in seconds or as "15m", "6h", "2d". docs/simulator.md has every key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from firmware_sim.errors import SimError
from firmware_sim.faults import JUMP_S, SPIKE_AND_NOISE_SIZE, Fault, FaultKind
from firmware_sim.payloads import Shape  # noqa: TC001 - msgspec reads the annotations
from firmware_sim.waveforms import WAVEFORMS
from firmware_sim.windows import Beat, Duration, Window, duration_s

if TYPE_CHECKING:
    from pathlib import Path

Positive = Annotated[int, Meta(ge=1)]
Above = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
Qos = Annotated[int, Meta(ge=0, le=2)]
Protocol = Literal["5", "3.1.1"]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class FaultEntry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One `[[groups.faults]]`; see `faults` for the kinds."""

    kind: FaultKind
    probability: Share | None = None
    size: float | None = None
    hold: Positive = 20
    at: Duration | None = None
    lasts: Duration = 0.0
    every: Duration = 0.0

    def fault(self) -> Fault:
        """As the firmware takes it."""
        scheduled = self.at is not None
        window = Window(*map(duration_s, (self.at or 0.0, self.lasts, self.every))) if scheduled else None
        usual = JUMP_S if self.kind == "clock_jump" else SPIKE_AND_NOISE_SIZE
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
    factor: Above = 10.0


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

    name: Annotated[str, Meta(pattern=_NAME)] = "sim"
    devices: Positive = 1
    types: tuple[str, ...] = ("temperature", "humidity", "pressure")
    locations: tuple[str, ...] = ()
    manufacturer: str = ""
    firmware_version: str = ""
    faults: tuple[FaultEntry, ...] = ()
    rate: Above | None = None
    readings_per_publish: Positive | None = None
    qos: Qos | None = None
    mqtt: Protocol | None = None
    format: Shape = "json"
    topic: str = "sensors/{device}/{type}"
    ring_publishes: Positive | None = None
    battery_days: Above = 90.0
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

    def window(self) -> Window:
        """When."""
        return Window(duration_s(self.at), duration_s(self.lasts), duration_s(self.every))


class Scenario(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole fleet."""

    seed: int | None = None
    rate: Above = 10.0
    seconds: Annotated[float, Meta(ge=0)] = 60.0
    span: Duration | None = None
    readings_per_publish: Positive = 1
    qos: Qos = 1
    mqtt: Protocol = "5"
    groups: tuple[Group, ...] = (Group(devices=20),)
    outages: tuple[Outage, ...] = ()

    @property
    def speed(self) -> float:
        """Simulated seconds per second."""
        return duration_s(self.span) / self.seconds if self.span is not None and self.seconds else 1.0

    def readings_in(self, group: Group) -> int:
        """Readings per publish of a group."""
        return group.readings_per_publish or self.readings_per_publish

    def beats(self) -> list[Beat]:
        """How often each group publishes. Groups without a rate share what is left by their sensors."""
        said = sum(group.rate for group in self.groups if group.rate)
        sensors = sum(len(g.types) * g.devices for g in self.groups if not g.rate and not g.hostile)
        scale = self.rate / said if said and (said > self.rate or not sensors) else 1.0
        beats = []
        for group in self.groups:
            share = len(group.types) * group.devices / sensors if sensors else 0.0
            rate = group.rate * scale if group.rate else max(self.rate - said, self.rate / 100) * share
            burst = group.burst
            beats.append(
                Beat(
                    max(rate, 1e-9) / self.readings_in(group),
                    duration_s(burst.every) / self.speed if burst else 0.0,
                    duration_s(burst.lasts) / self.speed if burst else 0.0,
                    burst.factor if burst else 1.0,
                )
            )
        return beats


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
    wrong = fault_in(scenario)
    if wrong:
        raise SimError(f"--scenario {path}: {wrong}")
    return scenario


def fault_in(scenario: Scenario) -> str:
    """What is wrong with a scenario beyond its types, in words; "" when nothing is."""
    if not scenario.groups or any(not group.types for group in scenario.groups):
        return "at least one [[groups]] with at least one type is needed"
    names = [group.name for group in scenario.groups]
    if len(set(names)) < len(names):
        return "two groups have the same name, and so would their devices"
    try:
        if scenario.span is not None and not duration_s(scenario.span):
            return "span: expected more than 0"
        faults = [
            *(f"group {group.name}: {_fault_in_group(group)}" for group in scenario.groups),
            *(f"outages[{n}]: {_fault_in_outage(each, names)}" for n, each in enumerate(scenario.outages)),
        ]
    except ValueError as fault:
        return str(fault)
    return next((fault for fault in faults if not fault.endswith(": ")), "")


def _fault_in_outage(outage: Outage, names: list[str]) -> str:
    outage.window()
    unknown = [name for name in outage.groups if name not in names]
    if unknown:
        return f"no group is called {', '.join(unknown)}"
    return "it is of groups or of a service, not of both" if outage.groups and outage.service else ""


def _fault_in_group(group: Group) -> str:
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
    if group.burst and not duration_s(group.burst.lasts) < duration_s(group.burst.every):
        return "burst: lasts must be less than every"
    if group.sleep and not duration_s(group.sleep.awake) < duration_s(group.sleep.every):
        return "sleep: awake must be less than every"
    for upgrade in group.upgrades:
        duration_s(upgrade.at), duration_s(upgrade.over)
    return ""
