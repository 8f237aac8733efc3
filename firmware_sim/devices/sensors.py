"""What sensors measure over simulated time: waveforms, schedules, and faults. Pure.

Waveforms are functions of a site (one place with its own weather), the time in seconds since 1970, and a
random source for noise. Windows and schedules are in simulated seconds since the start of the run; in
scenario files a duration is a number of seconds or a text such as "90s", "15m", "6h", "2d".

Faults of a reading, each with a probability per reading:
    dropout       no value is measured
    spike         one value that is off by `size`
    stuck         the value again and again, for `hold` readings
    drift         off by more and more, up to `size` after `hold` readings; then it is calibrated
    noise         a deviation of `size` for `hold` readings
Of a publish, per publish:
    malformed     its payload comes again, corrupted: no record counts that as a reading
    duplicate     it is sent twice
    reorder       it is sent after the next one
    late          it is delayed and sent after `hold` others
Of a device, per publish:
    clock_jump    its clock jumps by `size` seconds until it is set again, `hold` readings later
    brown_out     it loses its memory: ring buffer, sequence number, and it gets a new boot id
    network_loss  its network is down for `hold` seconds

With `at`, `lasts`, `every` a fault is possible in its windows only, and certain there unless it has a
probability. Those of a device happen once a window.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

DAY_S = 86_400.0
_WARMEST_HOUR = 15.0
_OFFICE_HOURS = (7, 18)


@dataclass(frozen=True, slots=True)
class Site:
    """The weather of one place: base temperature, half the day-night swing, phases of six slow fronts in
    radians, local time minus UTC, and how busy its machinery is, 0..1.
    """

    mean_c: float
    swing_c: float
    phases: tuple[float, ...]
    hour_offset: float
    load: float


def build_site(rng: random.Random) -> Site:
    """A random temperate place."""
    return Site(
        mean_c=rng.uniform(14, 22),
        swing_c=rng.uniform(2, 7),
        phases=tuple(rng.uniform(0, math.tau) for _ in range(6)),
        hour_offset=rng.uniform(-1, 2),
        load=rng.uniform(0.2, 0.9),
    )


def _weather_front(site: Site, time_s: float, first: int) -> float:
    days = time_s / DAY_S
    a, b, c = site.phases[first : first + 3]
    return (
        0.5 * math.sin(math.tau * days / 3.7 + a)
        + 0.3 * math.sin(math.tau * days / 1.63 + b)
        + 0.2 * math.sin(math.tau * days / 0.31 + c)
    )


def _air_temperature_c(site: Site, time_s: float) -> float:
    hour = time_s / 3600 + site.hour_offset
    return (
        site.mean_c
        + site.swing_c * math.cos(math.tau * (hour - _WARMEST_HOUR) / 24)
        + 3 * _weather_front(site, time_s, 0)
    )


def _temperature(site: Site, time_s: float, rng: random.Random) -> float:
    return round(_air_temperature_c(site, time_s) + rng.gauss(0, 0.05), 2)


def _humidity(site: Site, time_s: float, rng: random.Random) -> float:
    warmth = _air_temperature_c(site, time_s) - site.mean_c
    percent = 58 - 3.2 * warmth + 12 * _weather_front(site, time_s, 3) + rng.gauss(0, 0.4)
    return round(min(99.0, max(8.0, percent)), 1)


def _pressure(site: Site, time_s: float, rng: random.Random) -> float:
    tide = 0.6 * math.cos(math.tau * time_s / (DAY_S / 2) + site.phases[0])
    return round(1013.25 + 14 * _weather_front(site, time_s, 2) + tide + rng.gauss(0, 0.03), 2)


def _vibration(site: Site, time_s: float, rng: random.Random) -> float:
    running = math.sin(math.tau * time_s / 900 + site.phases[4]) > 1 - 2 * site.load
    scale = 4.5 if running else 0.25
    return round(abs(rng.gauss(scale, scale / 6)), 4)


def _occupancy(site: Site, time_s: float, rng: random.Random) -> float:
    hour = (time_s / 3600 + site.hour_offset) % 24
    day = (
        max(0.0, math.sin(math.pi * (hour - 7) / 11)) if _OFFICE_HOURS[0] <= hour <= _OFFICE_HOURS[1] else 0.0
    )
    return float(int(day * 24 * site.load + rng.random() * 0.5))


def _energy(site: Site, time_s: float, rng: random.Random) -> float:
    watts = 180 + 900 * site.load
    return float(int(watts * time_s / 3600 + rng.random()) % 65_536)


WAVEFORMS: dict[str, tuple[Callable[[Site, float, random.Random], float], str]] = {
    "temperature": (_temperature, "degC"),
    "humidity": (_humidity, "%"),
    "pressure": (_pressure, "hPa"),
    "vibration": (_vibration, "mm/s"),
    "occupancy": (_occupancy, "1"),
    "energy": (_energy, "Wh"),
}
"""sensor_type to (waveform, unit)."""


_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")

Duration = float | str
"""Seconds, or a text with a unit."""


def parse_duration_s(text: Duration) -> float:
    """Seconds of a duration; ValueError for anything else."""
    if isinstance(text, (int, float)):
        if text < 0:
            raise ValueError(f"{text:g}: expected seconds, 0 or more")
        return float(text)
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r}: expected a duration such as 90, '90s', '15m', '6h', '2d'")
    return float(match[1]) * _UNITS_S[match[2]]


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """From `at_s` on for `lasts_s`, and again `every_s` later (0: never again).

    A window without length covers nothing, but it begins.
    """

    at_s: float = 0.0
    lasts_s: float = 0.0
    every_s: float = 0.0

    def begun(self, at_s: float) -> int:
        """How many times it has begun at that time."""
        if at_s < self.at_s:
            return 0
        return 1 + int((at_s - self.at_s) // self.every_s) if self.every_s else 1

    def covers(self, at_s: float) -> bool:
        """Whether that time is within it."""
        times = self.begun(at_s)
        return bool(times) and at_s < self.at_s + (times - 1) * self.every_s + self.lasts_s


@dataclass(frozen=True, slots=True)
class PublishSchedule:
    """Publishes at `per_s`, with bursts: a cycle ends with `burst_s` at `factor` times the rate. A cycle of
    0 s means no bursts.
    """

    per_s: float
    cycle_s: float = 0.0
    burst_s: float = 0.0
    factor: float = 1.0

    def time_of(self, number: int) -> float:
        """When publish `number` (from 0) is due, seconds after the start."""
        if not self.cycle_s:
            return number / self.per_s
        calm = self.per_s * (self.cycle_s - self.burst_s)
        cycles, rest = divmod(number, calm + self.per_s * self.factor * self.burst_s)
        begin_s = cycles * self.cycle_s
        if rest < calm:
            return begin_s + rest / self.per_s
        return begin_s + self.cycle_s - self.burst_s + (rest - calm) / (self.per_s * self.factor)

    def due(self, elapsed_s: float) -> int:
        """How many publishes are due by then."""
        bound = int(max(0.0, elapsed_s) * self.per_s * max(1.0, self.factor)) + 2
        return bisect_right(range(bound), elapsed_s, key=self.time_of)


ReadingFault = Literal["dropout", "spike", "stuck", "drift", "noise"]
PublishFault = Literal["malformed", "duplicate", "reorder", "late"]
DeviceFault = Literal["clock_jump", "brown_out", "network_loss"]
FaultKind = ReadingFault | PublishFault | DeviceFault

READING_FAULT_KINDS: frozenset[str] = frozenset(get_args(ReadingFault))
DEVICE_FAULT_KINDS: frozenset[str] = frozenset(get_args(DeviceFault))
DEFAULT_FAULT_SIZE = 40.0
DEFAULT_CLOCK_JUMP_S = 3600.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault. `probability`, `size` and `hold` are as in the table above; no window: always."""

    kind: FaultKind
    probability: float
    size: float = DEFAULT_FAULT_SIZE
    hold: int = 20
    window: TimeWindow | None = None

    def occurs(self, at_s: float, rng: random.Random) -> bool:
        """Whether it happens at that simulated time."""
        if self.window is not None and not self.window.covers(at_s):
            return False
        return self.probability >= 1 or rng.random() < self.probability


@dataclass(slots=True)
class SensorFaultState:
    """State of a sensor's lasting faults."""

    last: float | None = None
    stuck_left: int = 0
    drift_left: int = 0
    drift: Fault | None = None
    noise_left: int = 0
    noise_size: float = 0.0


def apply_reading_faults(
    value: float, state: SensorFaultState, faults: Sequence[Fault], rng: random.Random, at_s: float = 0.0
) -> float | None:
    """The value the sensor reports for a true `value`, or None when it reports nothing."""
    if state.stuck_left and state.last is not None:
        state.stuck_left -= 1
        return state.last
    reported = value
    for fault in faults:
        if fault.kind not in READING_FAULT_KINDS or not fault.occurs(at_s, rng):
            continue
        if fault.kind == "dropout":
            return None
        if fault.kind == "spike":
            reported = value + rng.choice((-1, 1)) * fault.size
        else:
            _start_fault(fault, state)
    if state.drift_left and state.drift is not None:
        state.drift_left -= 1
        reported += state.drift.size * (1 - state.drift_left / state.drift.hold)
    if state.noise_left:
        state.noise_left -= 1
        reported = round(reported + rng.gauss(0, state.noise_size), 4)
    state.last = reported
    return reported


def _start_fault(fault: Fault, state: SensorFaultState) -> None:
    if fault.kind == "stuck":
        state.stuck_left = fault.hold
    elif fault.kind == "drift" and not state.drift_left:
        state.drift_left, state.drift = fault.hold, fault
    elif fault.kind == "noise" and not state.noise_left:
        state.noise_left, state.noise_size = fault.hold, fault.size


@dataclass(slots=True)
class DeviceFaults:
    """The faults of a device. Those with a window happen once in each."""

    faults: Sequence[Fault]
    _begun: dict[int, int] = field(default_factory=dict)

    def due(self, at_s: float, rng: random.Random) -> list[Fault]:
        """Faults that happen before the next publish."""
        due = []
        for number, fault in enumerate(self.faults):
            if fault.window is not None:
                begun = fault.window.begun(at_s)
                if begun <= self._begun.get(number, 0):
                    continue
                self._begun[number] = begun
            if fault.probability >= 1 or rng.random() < fault.probability:
                due.append(fault)
        return due


def corrupt_payload(payload: bytes, rng: random.Random) -> bytes:
    """A payload, of one of several kinds, that no gateway can decode."""
    half = payload[: len(payload) // 2].rstrip(b"}]") or b"{"
    kinds = (
        half,
        payload[:-2],
        b"",
        b"\xff\xfe" + payload,
        b'{"value": NaN, "ts": %d}' % rng.getrandbits(40),
        json.dumps({"value": "warm", "ts": 0}).encode(),
        b"[" * rng.randrange(100, 5_000),
        rng.randbytes(rng.randrange(1, 2_000)) + b"\x00",
    )
    return rng.choice(kinds) if payload[:1] in {b"{", b"["} else kinds[-1]
