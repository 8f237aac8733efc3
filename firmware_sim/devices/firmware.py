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

from firmware_sim.devices import payloads
from firmware_sim.devices.payloads import (
    PayloadFormat,
    Sample,
    carries_measures,
    carries_times,
    encode_samples,
    time_resolution_us,
)
from firmware_sim.devices.sensors import (
    READING_FAULT_KINDS,
    WAVEFORMS,
    DeviceFaults,
    Fault,
    SensorFaultState,
    Site,
    apply_reading_faults,
    corrupt_payload,
)
from firmware_sim.ground_truth import SEQ_ABSENT, SeriesState

if TYPE_CHECKING:
    import random

    from firmware_sim.ground_truth import GroundTruthWriter

CLOCK_SET_EVERY_S = 21_600.0
_WEAKEST_DBM, _STRONGEST_DBM = -78.0, -40.0
_EMPTY_PERCENT, _NEW_PERCENT = 3.0, 100.0
_JITTER_US = 900
_DAY_S = 86_400.0
_MAX_HIDDEN_SET_BACK_US = 2_000_000  # by less than this a clock is set back without its times showing it


class Publish(NamedTuple):
    """One PUBLISH and the rows of the truth record it carries (none for what no record counts)."""

    topic: str
    payload: bytes
    first_row: int
    rows: int


@dataclass(slots=True)
class Sensor:
    """One sensor of a device: what it measures, and what it remembers."""

    state: SeriesState
    site: Site
    faults: tuple[Fault, ...]
    memory: SensorFaultState
    last_us: int = 0


class FirmwareUpgrade(NamedTuple):
    """The firmware this device has from `at_s` on."""

    at_s: float
    version: str


@dataclass(slots=True)
class PublishOutcome:
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
    lost_memory: bool = False
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
    shape: PayloadFormat = "json"
    battery_days: float = 90.0
    clock_ppm: float = 0.0
    upgrades: tuple[FirmwareUpgrade, ...] = ()
    device_faults: DeviceFaults = field(default_factory=lambda: DeviceFaults(()))
    boot_id: str = ""
    seq: int = 0
    _kept_back: list[tuple[int, Publish]] = field(default_factory=list)
    _upgraded: int = 0
    _clock_set_s: float = 0.0
    _jump_us: int = 0
    _jump_left: int = 0
    _last_seen_s: float = 0.0

    def __post_init__(self) -> None:
        self._boot()

    def publish(
        self,
        sensor: Sensor,
        truth: GroundTruthWriter,
        *,
        at_s: float,
        now_us: int,
        readings: int,
        spacing_us: int,
    ) -> PublishOutcome:
        """Live up to `at_s`, take `readings` samples of a sensor ending then, and say what is sent.

        They are in the truth record, not yet on disk, when this returns. Times of one sensor rise by at
        least a microsecond but where its clock was set back.
        """
        outcome = PublishOutcome()
        self._live(at_s, outcome)
        publish = self._sample(
            sensor, truth, at_s=at_s, now_us=now_us, readings=readings, spacing_us=spacing_us
        )
        if publish is not None:
            self._send(publish, sensor, at_s, outcome)
        return outcome

    def _live(self, at_s: float, outcome: PublishOutcome) -> None:
        gone_s, self._last_seen_s = max(0.0, at_s - self._last_seen_s), max(at_s, self._last_seen_s)
        self.battery_level -= gone_s / (self.battery_days * _DAY_S) * 100
        if self.battery_level < _EMPTY_PERCENT:
            self.battery_level = _NEW_PERCENT
            outcome.rebooted = True
        if at_s - self._clock_set_s >= CLOCK_SET_EVERY_S:
            self._clock_set_s = at_s
        while self._upgraded < len(self.upgrades) and at_s >= self.upgrades[self._upgraded].at_s:
            version = self.upgrades[self._upgraded].version
            self._upgraded += 1
            for sensor in self.sensors:
                unit, location, manufacturer, _ = sensor.state.attributes
                sensor.state = sensor.state._replace(attributes=(unit, location, manufacturer, version))
            outcome.rebooted = True
        for fault in self.device_faults.due(at_s, self.rng):
            if fault.kind == "clock_jump":
                self._jump_us, self._jump_left = int(fault.size * 1e6), fault.hold
            elif fault.kind == "brown_out":
                outcome.rebooted = outcome.lost_memory = True
                outcome.forgotten += sum(publish.rows for publish in self.release_delayed())
            elif fault.kind == "network_loss":
                outcome.away_s = max(outcome.away_s, float(fault.hold))
        if outcome.rebooted:
            self._boot()

    def _boot(self) -> None:
        self.boot_id = f"{self.rng.getrandbits(48):012x}"
        self.seq = 0

    def _clock_us(self, at_s: float, true_us: int) -> int:
        """What the device's clock says."""
        drift_us = int((at_s - self._clock_set_s) * self.clock_ppm)
        return true_us + drift_us + (self._jump_us if self._jump_left else 0)

    def _sample(
        self,
        sensor: Sensor,
        truth: GroundTruthWriter,
        *,
        at_s: float,
        now_us: int,
        readings: int,
        spacing_us: int,
    ) -> Publish | None:
        whole, step = carries_measures(self.shape), time_resolution_us(self.shape)
        said = sensor.state if whole else sensor.state._replace(attributes=_keep_unit_only(sensor.state))
        state = truth.state(said) if carries_times(self.shape) else -1
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
            elif time_us <= sensor.last_us < time_us + _MAX_HIDDEN_SET_BACK_US:
                time_us = sensor.last_us + step
            sensor.last_us = time_us
            value = apply_reading_faults(
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
            topic = payloads.sparkplug_topic("NDATA", self.device_id)
        rows = truth.rows - first_row
        return Publish(
            topic, encode_samples(self.shape, sensor.state, samples), first_row if rows else 0, rows
        )

    def _send(self, publish: Publish, sensor: Sensor, at_s: float, outcome: PublishOutcome) -> None:
        rng = self.rng
        keep, copies, corrupted = 0, 1, 0
        for fault in sensor.faults:
            if fault.kind in READING_FAULT_KINDS or not fault.occurs(at_s, rng):
                continue
            if fault.kind == "malformed":
                corrupted += 1
            elif fault.kind == "duplicate":
                copies += 1
            elif fault.kind == "reorder":
                keep = max(keep, 1)
            elif fault.kind == "late":
                keep = max(keep, fault.hold)
        if keep:
            self._kept_back.append((keep, publish))
        else:
            outcome.publishes.append(publish)
        outcome.publishes += [publish._replace(first_row=0, rows=0)] * (copies - 1)
        outcome.publishes += [
            Publish(publish.topic, corrupt_payload(publish.payload, rng), 0, 0) for _ in range(corrupted)
        ]
        outcome.malformed += corrupted
        waiting = []
        for left, kept in self._kept_back:
            if kept is publish or left > 1:
                waiting.append((left - (kept is not publish), kept))
            else:
                outcome.publishes.append(kept)
        self._kept_back = waiting

    def release_delayed(self) -> list[Publish]:
        """What was kept back, at the end of a run."""
        kept = [publish for _, publish in self._kept_back]
        self._kept_back.clear()
        return kept


def _keep_unit_only(state: SeriesState) -> tuple[str | None, ...]:
    """The attributes of a shape that carries no others."""
    return (state.attributes[0], *(None for _ in state.attributes[1:]))
