"""A device's firmware, without its radio: clock, battery, signal, sensors, attributes and sampling. Pure.

Time is simulated: `at_s` counts seconds since the start, `now_us` is the true time of that moment. A reading
carries the device's own clock's time, which drifts, jumps and is corrected every six hours. Everything random
comes from the device's own source: its readings depend only on the seed and on when it is sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from firmware_sim.devices.payloads import (
    FORMATS_WITHOUT_MEASURES,
    PayloadFormat,
    encode_readings,
    sparkplug_topic,
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
from firmware_sim.ground_truth import Publish, Reading, SeriesState

if TYPE_CHECKING:
    import random

    from firmware_sim.ground_truth import GroundTruthWriter

CLOCK_SET_EVERY_S = 21_600.0
_WEAKEST_DBM, _STRONGEST_DBM = -78.0, -40.0
_EMPTY_PERCENT, _NEW_PERCENT = 3.0, 100.0
_JITTER_US = 900
_DAY_S = 86_400.0
_MAX_HIDDEN_SET_BACK_US = 2_000_000  # by less than this a clock is set back without its times showing it


@dataclass(slots=True)
class Sensor:
    """One sensor of a device: its series, its place and the state of its faults."""

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
    """Publishes in the order of sending, and what happened to the device.

    Its network is away for `away_s` simulated seconds from now on; `forgotten` delayed readings are lost with
    its memory; the payload of `malformed` publishes is corrupted.
    """

    publishes: list[Publish] = field(default_factory=list)
    rebooted: bool = False
    lost_memory: bool = False
    away_s: float = 0.0
    malformed: int = 0
    forgotten: int = 0


@dataclass(slots=True)
class Firmware:
    """One device. Its battery (percent) is drained in `battery_days`, then replaced; `clock_ppm` is the drift
    of its clock; `signal_strength` (dBm) is a random walk; `seq` restarts at 1 with the device.
    """

    device_id: str
    rng: random.Random
    sensors: list[Sensor]
    battery_level: float
    signal_strength: float
    topic: str = "sensors/{device}/{type}"
    payload_format: PayloadFormat = "json"
    battery_days: float = 90.0
    clock_ppm: float = 0.0
    upgrades: tuple[FirmwareUpgrade, ...] = ()
    device_faults: DeviceFaults = field(default_factory=lambda: DeviceFaults(()))
    boot_id: str = ""
    seq: int = 0
    _delayed: list[tuple[int, Publish]] = field(default_factory=list)
    _upgraded: int = 0
    _clock_set_s: float = 0.0
    _jump_us: int = 0
    _jump_left: int = 0
    _last_s: float = 0.0

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
        """Advance the device to `at_s`, sample a sensor `readings` times ending then; what is to be sent.

        The readings are in the truth record, not yet on disk, when this returns. Times of one sensor rise by
        at least a microsecond except where its clock was set back.
        """
        outcome = PublishOutcome()
        self._advance(at_s, outcome)
        whole = self.payload_format not in FORMATS_WITHOUT_MEASURES
        state, first_row = sensor.state, truth.rows
        recorded = state if whole else state._replace(attributes=(state.attributes[0], None, None, None))
        number = truth.number_state(recorded) if self.payload_format != "number" else -1
        samples = []
        for back in range(readings - 1, -1, -1):
            before_us = back * spacing_us
            reading = self._sample(sensor, at_s, now_us - before_us, at_s - before_us / 1e6)
            if reading is None:
                continue
            if number >= 0:
                truth.append(number, reading if whole else Reading(reading.time_us, reading.value))
            samples.append(reading)
        if samples:
            topic = self.topic.format(device=self.device_id, type=state.sensor_type)
            if self.payload_format == "sparkplug_b":
                topic = sparkplug_topic("NDATA", self.device_id)
            payload = encode_readings(self.payload_format, state, samples, self.boot_id)
            publish = Publish(topic, payload, first_row, truth.rows - first_row)
            self._send(publish, sensor, at_s, outcome)
        return outcome

    def _advance(self, at_s: float, outcome: PublishOutcome) -> None:
        elapsed_s, self._last_s = max(0.0, at_s - self._last_s), max(at_s, self._last_s)
        self.battery_level -= elapsed_s / (self.battery_days * _DAY_S) * 100
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
        drift_us = int((at_s - self._clock_set_s) * self.clock_ppm)
        return true_us + drift_us + (self._jump_us if self._jump_left else 0)

    def _sample(self, sensor: Sensor, at_s: float, true_us: int, sampled_s: float) -> Reading | None:
        """A reading at `true_us`, of a publish at `at_s`; None when the sensor reports nothing."""
        rng, step_us = self.rng, 1000 if self.payload_format == "sparkplug_b" else 1
        true_us -= rng.randrange(_JITTER_US)
        time_us = self._clock_us(at_s, true_us) // step_us * step_us
        if self._jump_left:
            self._jump_left -= 1
        elif time_us <= sensor.last_us < time_us + _MAX_HIDDEN_SET_BACK_US:
            time_us = sensor.last_us + step_us
        sensor.last_us = time_us
        value = WAVEFORMS[sensor.state.sensor_type][0](sensor.site, true_us / 1e6, rng)
        reported = apply_reading_faults(value, sensor.memory, sensor.faults, rng, sampled_s)
        if reported is None:
            return None
        self.signal_strength = min(
            _STRONGEST_DBM, max(_WEAKEST_DBM, self.signal_strength + rng.gauss(0, 0.3))
        )
        self.seq += 1
        return Reading(
            time_us,
            reported,
            quality=round(min(100.0, max(81.0, rng.gauss(97, 1.5))), 1),
            battery_level=round(self.battery_level, 1),
            signal_strength=float(round(self.signal_strength)),
            seq=self.seq,
        )

    def _send(self, publish: Publish, sensor: Sensor, at_s: float, outcome: PublishOutcome) -> None:
        rng = self.rng
        delay, copies, corrupted = 0, 0, 0
        for fault in sensor.faults:
            if fault.kind in READING_FAULT_KINDS or not fault.occurs(at_s, rng):
                continue
            if fault.kind == "malformed":
                corrupted += 1
            elif fault.kind == "duplicate":
                copies += 1
            elif fault.kind == "reorder":
                delay = max(delay, 1)
            elif fault.kind == "late":
                delay = max(delay, fault.hold)
        if delay:
            self._delayed.append((delay, publish))
        else:
            outcome.publishes.append(publish)
        outcome.publishes += [publish._replace(first_row=0, rows=0)] * copies
        outcome.publishes += [
            Publish(publish.topic, corrupt_payload(publish.payload, rng)) for _ in range(corrupted)
        ]
        outcome.malformed += corrupted
        waiting = []
        for left, delayed in self._delayed:
            if delayed is publish or left > 1:
                waiting.append((left - (delayed is not publish), delayed))
            else:
                outcome.publishes.append(delayed)
        self._delayed = waiting

    def release_delayed(self) -> list[Publish]:
        """Every publish that is still held back, removed from the device."""
        delayed = [publish for _, publish in self._delayed]
        self._delayed.clear()
        return delayed
