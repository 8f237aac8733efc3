"""The fleet: devices that sample on a schedule and publish what they sampled.

One schedule for the whole fleet: publish number n is due n x readings_per_publish / rate seconds after the
start and belongs to the sensors in turn. Each tick samples what is due, records it, and only then offers it
to the devices. Time and randomness are arguments of the pure part (`sample_publish`); the loop has them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING

import msgspec

from firmware_sim.device import Device, Publish, Radio
from firmware_sim.errors import SimError
from firmware_sim.faults import distort, spoils
from firmware_sim.scenarios import DevicePlan, Scenario, Sensor, plan_devices
from firmware_sim.waveforms import WAVEFORMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from firmware_sim.truth import TruthWriter

_TICK_S = 0.02
_MAX_CATCH_UP_S = 1.0
_PROGRESS_S = 1.0
_CONNECT_THREADS = 32
_CONNECTS_PER_S = 200
_BATTERY_PER_S = 100 / (90 * 86_400)
_encoder = msgspec.json.Encoder()


class Sample(msgspec.Struct, omit_defaults=True):
    """One reading as JSON: the gateway's own field names."""

    value: float
    ts: int
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    boot_id: str | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


def encode_payload(samples: list[Sample]) -> bytes:
    """One reading as an object, several as an array. Floats are their shortest exact decimal form."""
    return _encoder.encode(samples[0] if len(samples) == 1 else samples)


def sample_publish(
    plan: DevicePlan,
    sensor: Sensor,
    truth: TruthWriter,
    *,
    now_us: int,
    readings: int,
    spacing_us: int,
    up_s: float,
) -> Publish | None:
    """Take `readings` samples ending now, record them, and make their publish; None if all dropped out.

    Times of one sensor always rise, by at least a microsecond.
    """
    state = truth.state(sensor.state)
    waveform, unit = WAVEFORMS[sensor.state.sensor_type]
    _, location, manufacturer, firmware_version = sensor.state.attributes
    rng = plan.rng
    first_row = truth.rows
    samples = []
    for back in range(readings - 1, -1, -1):
        time_us = max(now_us - back * spacing_us, sensor.last_us + 1)
        sensor.last_us = time_us
        value = distort(waveform(sensor.site, time_us / 1e6, rng), sensor.memory, sensor.faults, rng)
        if value is None:
            continue
        plan.signal_strength = min(-40.0, max(-78.0, plan.signal_strength + rng.gauss(0, 0.3)))
        quality = round(min(100.0, max(81.0, rng.gauss(97, 1.5))), 1)
        battery_level = round(max(15.0, plan.battery_level - up_s * _BATTERY_PER_S), 1)
        signal_strength = float(round(plan.signal_strength))
        plan.seq += 1
        truth.produce(state, time_us, value, quality, battery_level, signal_strength, plan.seq)
        samples.append(
            Sample(
                value,
                time_us,
                quality,
                battery_level,
                signal_strength,
                plan.seq,
                plan.boot_id,
                location,
                manufacturer,
                firmware_version,
                unit,
            )
        )
    if not samples:
        return None
    topic = f"sensors/{sensor.state.sensor_id}/{sensor.state.sensor_type}"
    return Publish(topic, encode_payload(samples), first_row, len(samples))


class Fleet:
    """All devices of a scenario, running.

    Args:
        scenario: what to simulate.
        radio: how devices talk; its counters are the fleet's.
        truth: where everything is recorded.
        seed: of the fleet.
        boot: names this start of the devices.
    """

    def __init__(self, scenario: Scenario, radio: Radio, truth: TruthWriter, *, seed: int, boot: str) -> None:
        self.scenario = scenario
        self.radio = radio
        self.counters = radio.counters
        self._truth = truth
        self._plans = plan_devices(scenario, seed, boot=boot)
        self._devices = [
            Device(plan.device_id, radio, self._settled, random.Random(f"{seed}/{plan.device_id}/radio"))
            for plan in self._plans
        ]
        most = max(len(plan.sensors) for plan in self._plans)
        self._turns = [
            (device, plan, plan.sensors[turn])
            for turn in range(most)
            for device, plan in zip(self._devices, self._plans, strict=True)
            if turn < len(plan.sensors)
        ]
        self._next_publish = 0
        self._started_s = 0.0
        self.producing = True

    @property
    def size(self) -> int:
        """Number of devices."""
        return len(self._devices)

    @property
    def outstanding(self) -> int:
        """Publishes kept by the devices, not yet acknowledged."""
        return sum(device.outstanding for device in self._devices)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    async def run(
        self,
        stop: asyncio.Event,
        *,
        drain_timeout_s: float,
        connect_timeout_s: float | None,
        show: Callable[[Fleet], None],
    ) -> None:
        """Connect, produce until time is over or `stop` is set, then wait for acknowledgements.

        Raises:
            SimError: nothing was reachable within `connect_timeout_s`.
        """
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_CONNECT_THREADS))
        self._started_s = time.monotonic()
        ramp_s = self.size / _CONNECTS_PER_S
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        device.run(start_after_s=ramp_s * n / self.size), name=f"device {device.device_id}"
                    )
                    for n, device in enumerate(self._devices)
                ]
                tasks.append(group.create_task(self._show(show), name="progress"))
                reached = await self._reached(connect_timeout_s, stop)
                if reached:
                    await self._produce(stop)
                    self.producing = False
                    await self._drain(drain_timeout_s)
                for task in tasks:
                    task.cancel()
        finally:
            self._truth.flush()
            self._truth.progress(self.progress())
        if not reached:
            why = self.counters.last_fault or "no answer"
            raise SimError(f"{self.radio.broker}: not reachable within {connect_timeout_s:g} s: {why}")

    def progress(self) -> dict[str, object]:
        """The counters as progress.json shows them."""
        return {
            **asdict(self.counters),
            "devices": self.size,
            "outstanding_publishes": self.outstanding,
            "elapsed_s": round(self.elapsed_s, 1),
            "producing": self.producing,
        }

    def produce_once(self, now_s: float, now_us: int) -> int:
        """Sample, record and offer everything due `now_s` seconds after the start; how many publishes."""
        scenario = self.scenario
        readings = scenario.readings_per_publish
        publish_rate = scenario.rate / readings
        due = int(now_s * publish_rate) + 1
        behind = int(_MAX_CATCH_UP_S * publish_rate) + 1
        self._next_publish = max(self._next_publish, due - behind)
        spacing_us = int(len(self._turns) / scenario.rate * 1e6)
        offers = []
        for number in range(self._next_publish, due):
            device, plan, sensor = self._turns[number % len(self._turns)]
            publish = sample_publish(
                plan, sensor, self._truth, now_us=now_us, readings=readings, spacing_us=spacing_us, up_s=now_s
            )
            if publish is None:
                continue
            offers.append((device, publish))
            if spoils(sensor.faults, plan.rng):
                offers.append((device, Publish(publish.topic, publish.payload[:-2], 0, 0)))
                self.counters.malformed_publishes += 1
            self.counters.produced += publish.rows
        self._next_publish = due
        self._truth.flush()
        for device, publish in offers:
            device.offer(publish)
        return len(offers)

    async def _produce(self, stop: asyncio.Event) -> None:
        begin_s = time.monotonic()
        length_s = self.scenario.seconds or float("inf")
        while not stop.is_set():
            now_s = time.monotonic() - begin_s
            if now_s >= length_s:
                return
            self.produce_once(now_s, time.time_ns() // 1000)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), min(_TICK_S, length_s - now_s))

    async def _drain(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.outstanding and time.monotonic() < deadline_s:
            await asyncio.sleep(_TICK_S)
            self._truth.flush()

    async def _reached(self, timeout_s: float | None, stop: asyncio.Event) -> bool:
        """Whether a first device connected in time; at once when there is no limit."""
        deadline_s = time.monotonic() + (timeout_s or 0.0)
        while timeout_s is not None and not self.counters.devices_connected and not stop.is_set():
            if time.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(_TICK_S)
        return True

    async def _show(self, show: Callable[[Fleet], None]) -> None:
        while True:
            self._truth.progress(self.progress())
            show(self)
            await asyncio.sleep(_PROGRESS_S)

    def _settled(self, publish: Publish, reason_code: int) -> None:
        if publish.rows:
            self._truth.settle(publish.first_row, publish.rows, reason_code, time.time_ns() // 1000)
