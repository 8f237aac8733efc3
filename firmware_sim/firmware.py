"""A device's firmware, without its radio: clock, battery, signal, sensors, what it samples and what it is.
Pure.

Time is simulated: `at_s` counts seconds since the start, `now_us` is the true time of that moment. What a
device writes into a reading is its own clock's time, which drifts and jumps and is set right now and then.
Everything random comes from the device's own source, so that a device's readings depend on the seed, on the
moments it is asked at, and on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from firmware_sim import sparkplug
from firmware_sim.faults import OF_READINGS, DeviceFaults, Fault, SensorState, distort, spoil
from firmware_sim.payloads import Sample, Shape, encode, says_measures, says_times, step_us
from firmware_sim.truth import SEQ_ABSENT, State
from firmware_sim.waveforms import WAVEFORMS, Site

if TYPE_CHECKING:
    import random

    from firmware_sim.truth import TruthWriter

CLOCK_SET_EVERY_S = 21_600.0
_WEAKEST_DBM, _STRONGEST_DBM = -78.0, -40.0
_EMPTY_PERCENT, _NEW_PERCENT = 3.0, 100.0
_JITTER_US = 900
_DAY_S = 86_400.0
_SET_BACK_US = 2_000_000  # by less than this a clock is set back without its times showing it


class Publish(NamedTuple):
    """One PUBLISH and the rows of the truth record it carries (none for what no record counts)."""

    topic: str
    payload: bytes
    first_row: int
    rows: int


@dataclass(slots=True)
class Sensor:
    """One sensor of a device: what it measures, and what it remembers."""

    state: State
    site: Site
    faults: tuple[Fault, ...]
    memory: SensorState
    last_us: int = 0


class Upgrade(NamedTuple):
    """The firmware this device has from `at_s` on."""

    at_s: float
    version: str


@dataclass(slots=True)
class Happened:
    """What a device did in one go: publishes in the order of sending, and what became of itself.

    Attributes:
        rebooted: it started anew, with another boot id.
        forgot: it lost its memory with that.
        away_s: its network is away for so long from now on, simulated seconds.
        malformed: how many of the publishes are spoilt.
        forgotten: readings that were kept back and are lost with its memory.
    """

    publishes: list[Publish] = field(default_factory=list)
    rebooted: bool = False
    forgot: bool = False
    away_s: float = 0.0
    malformed: int = 0
    forgotten: int = 0


@dataclass(slots=True)
class Firmware:
    """One device.

    Attributes:
        battery_level: percent; drained in `battery_days`, and then a new battery is put in.
        signal_strength: dBm, wandering.
        clock_ppm: how fast its clock runs wrong.
        seq: of the last reading; begins again at 1 when it restarts.
    """

    device_id: str
    rng: random.Random
    sensors: list[Sensor]
    battery_level: float
    signal_strength: float
    topic: str = "sensors/{device}/{type}"
    shape: Shape = "json"
    battery_days: float = 90.0
    clock_ppm: float = 0.0
    upgrades: tuple[Upgrade, ...] = ()
    device_faults: DeviceFaults = field(default_factory=lambda: DeviceFaults(()))
    boot_id: str = ""
    seq: int = 0
    _kept_back: list[tuple[int, Publish]] = field(default_factory=list)
    _upgraded: int = 0
    _clock_set_s: float = 0.0
    _jump_us: int = 0
    _jump_left: int = 0
    _seen_s: float = 0.0

    def __post_init__(self) -> None:
        self._boot()

    def publish(
        self, sensor: Sensor, truth: TruthWriter, *, at_s: float, now_us: int, readings: int, spacing_us: int
    ) -> Happened:
        """Live up to `at_s`, take `readings` samples of a sensor ending then, and say what is sent.

        They are in the truth record, not yet on disk, when this returns. Times of one sensor rise by at
        least a microsecond but where its clock was set back.
        """
        happened = Happened()
        self._live(at_s, happened)
        publish = self._sample(
            sensor, truth, at_s=at_s, now_us=now_us, readings=readings, spacing_us=spacing_us
        )
        if publish is not None:
            self._send(publish, sensor, at_s, happened)
        return happened

    def _live(self, at_s: float, happened: Happened) -> None:
        gone_s, self._seen_s = max(0.0, at_s - self._seen_s), max(at_s, self._seen_s)
        self.battery_level -= gone_s / (self.battery_days * _DAY_S) * 100
        if self.battery_level < _EMPTY_PERCENT:
            self.battery_level = _NEW_PERCENT
            happened.rebooted = True
        if at_s - self._clock_set_s >= CLOCK_SET_EVERY_S:
            self._clock_set_s = at_s
        while self._upgraded < len(self.upgrades) and at_s >= self.upgrades[self._upgraded].at_s:
            version = self.upgrades[self._upgraded].version
            self._upgraded += 1
            for sensor in self.sensors:
                unit, location, manufacturer, _ = sensor.state.attributes
                sensor.state = sensor.state._replace(attributes=(unit, location, manufacturer, version))
            happened.rebooted = True
        for fault in self.device_faults.due(at_s, self.rng):
            if fault.kind == "clock_jump":
                self._jump_us, self._jump_left = int(fault.size * 1e6), fault.hold
            elif fault.kind == "brown_out":
                happened.rebooted = happened.forgot = True
                happened.forgotten += sum(publish.rows for publish in self.let_go())
            elif fault.kind == "network_loss":
                happened.away_s = max(happened.away_s, float(fault.hold))
        if happened.rebooted:
            self._boot()

    def _boot(self) -> None:
        self.boot_id = f"{self.rng.getrandbits(48):012x}"
        self.seq = 0

    def _clock_us(self, at_s: float, true_us: int) -> int:
        """What the device's clock says."""
        drift_us = int((at_s - self._clock_set_s) * self.clock_ppm)
        return true_us + drift_us + (self._jump_us if self._jump_left else 0)

    def _sample(
        self, sensor: Sensor, truth: TruthWriter, *, at_s: float, now_us: int, readings: int, spacing_us: int
    ) -> Publish | None:
        whole, step = says_measures(self.shape), step_us(self.shape)
        said = sensor.state if whole else sensor.state._replace(attributes=_only_unit(sensor.state))
        state = truth.state(said) if says_times(self.shape) else -1
        waveform, unit = WAVEFORMS[sensor.state.sensor_type]
        _, location, manufacturer, firmware_version = sensor.state.attributes
        rng = self.rng
        first_row = truth.rows
        samples = []
        for back in range(readings - 1, -1, -1):
            true_us = now_us - back * spacing_us - rng.randrange(_JITTER_US)
            time_us = self._clock_us(at_s, true_us) // step * step
            if self._jump_left:
                self._jump_left -= 1
            elif time_us <= sensor.last_us < time_us + _SET_BACK_US:
                time_us = sensor.last_us + step
            sensor.last_us = time_us
            value = distort(
                waveform(sensor.site, true_us / 1e6, rng),
                sensor.memory,
                sensor.faults,
                rng,
                at_s - back * spacing_us / 1e6,
            )
            if value is None:
                continue
            self.signal_strength = min(
                _STRONGEST_DBM, max(_WEAKEST_DBM, self.signal_strength + rng.gauss(0, 0.3))
            )
            quality = round(min(100.0, max(81.0, rng.gauss(97, 1.5))), 1)
            battery_level = round(self.battery_level, 1)
            signal_strength = float(round(self.signal_strength))
            self.seq += 1
            if state < 0:
                pass
            elif whole:
                truth.produce(state, time_us, value, quality, battery_level, signal_strength, self.seq)
            else:
                truth.produce(state, time_us, value, math.nan, math.nan, math.nan, SEQ_ABSENT)
            samples.append(
                Sample(
                    value,
                    time_us,
                    quality,
                    battery_level,
                    signal_strength,
                    self.seq,
                    self.boot_id,
                    location,
                    manufacturer,
                    firmware_version,
                    unit,
                )
            )
        if not samples:
            return None
        topic = self.topic.format(device=self.device_id, type=sensor.state.sensor_type)
        if self.shape == "sparkplug_b":
            topic = sparkplug.topic("NDATA", self.device_id)
        rows = truth.rows - first_row
        return Publish(topic, encode(self.shape, sensor.state, samples), first_row if rows else 0, rows)

    def _send(self, publish: Publish, sensor: Sensor, at_s: float, happened: Happened) -> None:
        rng = self.rng
        keep, copies, spoilt = 0, 1, 0
        for fault in sensor.faults:
            if fault.kind in OF_READINGS or not fault.strikes(at_s, rng):
                continue
            if fault.kind == "malformed":
                spoilt += 1
            elif fault.kind == "duplicate":
                copies += 1
            elif fault.kind == "reorder":
                keep = max(keep, 1)
            elif fault.kind == "late":
                keep = max(keep, fault.hold)
        if keep:
            self._kept_back.append((keep, publish))
        else:
            happened.publishes.append(publish)
        happened.publishes += [publish._replace(first_row=0, rows=0)] * (copies - 1)
        happened.publishes += [
            Publish(publish.topic, spoil(publish.payload, rng), 0, 0) for _ in range(spoilt)
        ]
        happened.malformed += spoilt
        waiting = []
        for left, kept in self._kept_back:
            if kept is publish or left > 1:
                waiting.append((left - (kept is not publish), kept))
            else:
                happened.publishes.append(kept)
        self._kept_back = waiting

    def let_go(self) -> list[Publish]:
        """What was kept back, at the end of a run."""
        kept = [publish for _, publish in self._kept_back]
        self._kept_back.clear()
        return kept


def _only_unit(state: State) -> tuple[str | None, ...]:
    """The attributes of a shape that carries no others."""
    return (state.attributes[0], *(None for _ in state.attributes[1:]))
