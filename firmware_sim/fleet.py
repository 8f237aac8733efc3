"""The running fleet: devices that sample and publish on a schedule, and the services its outages stop.

Publish number n of a group is due at a fixed time after the start. Each tick samples what is due, as of the
moment it was due, records it, and only then hands it to the devices: the ground truth depends on seed and
start alone. A fleet that cannot keep up falls behind (`behind_s`); no publish is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shlex
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from firmware_sim.devices.device import Device, DevicePool, RadioSettings
from firmware_sim.devices.payloads import SparkplugSession
from firmware_sim.errors import SimError
from firmware_sim.raw_mqtt import run_attacks
from firmware_sim.scenarios import PlannedDevice, Scenario, build_group_schedules, plan_devices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from firmware_sim.ground_truth import GroundTruthWriter, Publish


@dataclass(slots=True)
class ServiceSwitch:
    """Takes a service down and up: a process with SIGSTOP and SIGCONT, else a command with `down` or `up`."""

    name: str
    pid: int = 0
    command: tuple[str, ...] = ()
    is_down: bool = False

    async def switch(self, *, down: bool) -> None:
        """Switch the service if it is not in that state; SimError when that fails."""
        if down == self.is_down:
            return
        self.is_down = down
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGSTOP if down else signal.SIGCONT)
            except OSError as fault:
                raise SimError(f"--service {self.name}={self.pid}: {fault.strerror}") from fault
            return
        process = await asyncio.create_subprocess_exec(*self.command, "down" if down else "up")
        if await process.wait():
            raise SimError(
                f"--service {self.name}: {shlex.join(self.command)} ended with {process.returncode}"
            )


def parse_service(text: str) -> ServiceSwitch:
    """Parse NAME=PID or NAME=COMMAND."""
    name, _, target = text.partition("=")
    if name and target.isdigit() and int(target) > 1:
        return ServiceSwitch(name, pid=int(target))
    command = tuple(shlex.split(target))
    if not name or not command or target.isdigit():
        raise SimError(f"--service {text}: expected NAME=PID of a process, or NAME=COMMAND")
    return ServiceSwitch(name, command=command)


_TICK_S = 0.02
_MAX_PUBLISHES_PER_TICK = 2_000
_SWITCH_EVERY_S = 0.05
_CONNECT_THREADS = 32
_CONNECTS_PER_S = 200


class Fleet:
    """All devices of a scenario, running. The counters of `radio` are the fleet's."""

    def __init__(
        self,
        scenario: Scenario,
        radio: RadioSettings,
        truth: GroundTruthWriter,
        *,
        seed: int,
        start_us: int,
        services: Sequence[ServiceSwitch] = (),
    ) -> None:
        self.scenario = scenario
        self.radio = radio
        self.counters = radio.counters
        self.seed = seed
        self._truth = truth
        self._plans = plan_devices(scenario, seed, start_us=start_us)
        self._schedules = build_group_schedules(scenario, self._plans, start_us=start_us)
        radios = {
            group.name: replace(
                radio,
                qos=radio.qos if group.qos is None else group.qos,
                mqtt=group.mqtt or scenario.mqtt,
                will=group.will,
                ring_publishes=group.ring_publishes or radio.ring_publishes,
            )
            for group in scenario.groups
        }
        self._devices = [
            Device(
                plan.firmware.device_id,
                radios[plan.group.name],
                truth.settle,
                random.Random(f"{seed}/{plan.firmware.device_id}/radio"),
                _build_sparkplug_session(plan) if plan.group.format == "sparkplug_b" else None,
            )
            for plan in self._plans
        ]
        self._pool = DevicePool(self._devices, radio, truth)
        self._device_by_id = {device.device_id: device for device in self._devices}
        self._away_until_s: dict[str, float] = {}
        self._services = {service.name: service for service in services}
        self.simulated_s = 0.0
        self.behind_s = 0.0
        self.producing = True

    async def run(
        self,
        stop: asyncio.Event,
        *,
        drain_timeout_s: float,
        connect_timeout_s: float | None,
        on_progress: Callable[[dict[str, object]], None],
    ) -> None:
        """Connect, produce until the time is over or `stop` is set, then wait for acknowledgements."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_CONNECT_THREADS))
        broker = self.radio.broker
        hostile = [device_id for device_id, _, _ in self.scenario.devices_of(hostile=True)]

        async def produce_and_drain() -> None:
            await self._produce(stop)
            self.producing = False
            await self._restore_networks_and_services()
            await self._pool.drain(drain_timeout_s)

        try:
            await self._pool.run(
                produce_and_drain,
                stop,
                connect_timeout_s=connect_timeout_s,
                on_progress=lambda: on_progress(self.progress()),
                ramp_s=len(self._devices) / _CONNECTS_PER_S,
                background=[
                    run_attacks(broker, name, random.Random(f"{self.seed}/{name}"), self.counters)
                    for name in hostile
                ],
            )
        finally:
            for service in self._services.values():
                await service.switch(down=False)

    def progress(self) -> dict[str, object]:
        """The counters as `progress.json` and the display show them."""
        return {
            **self._pool.progress(),
            "simulated_s": round(self.simulated_s, 1),
            "behind_s": round(self.behind_s, 2),
            "services_down": [name for name, service in self._services.items() if service.is_down],
            "producing": self.producing,
        }

    def produce_once(self, now_s: float) -> int:
        """Sample, record and offer what is due `now_s` seconds after the start; how many publishes.

        At most `_MAX_PUBLISHES_PER_TICK` at a time; `behind_s` is how far that lags.
        """
        offers: list[tuple[Device, Publish]] = []
        due = sorted(
            (group.schedule.time_of(number), place, number)
            for place, group in enumerate(self._schedules)
            for number in range(
                group.next_publish,
                min(group.schedule.due(now_s), group.next_publish + _MAX_PUBLISHES_PER_TICK + 1),
            )
        )
        for _, place, number in due[:_MAX_PUBLISHES_PER_TICK]:
            self._schedules[place].next_publish = number + 1
            offers += self._sample(place, number)
        self.behind_s = now_s - due[_MAX_PUBLISHES_PER_TICK][0] if len(due) > _MAX_PUBLISHES_PER_TICK else 0.0
        self.simulated_s = max(0.0, now_s - self.behind_s) * self.scenario.speed
        self._truth.flush()
        for device, publish in offers:
            device.offer(publish)
        return len(offers)

    def _sample(self, place: int, number: int) -> list[tuple[Device, Publish]]:
        before = self._truth.rows
        firmware, at_s, outcome = self._schedules[place].publish(number, self._truth)
        device = self._device_by_id[firmware.device_id]
        if outcome.rebooted:
            device.restart(forget=outcome.lost_memory)
            self._truth.record_boot(firmware.device_id, firmware.boot_id)
        if outcome.away_s:
            self._away_until_s[device.device_id] = at_s + outcome.away_s
            device.switch(on=False)
        self.counters.produced += self._truth.rows - before
        self.counters.forgotten += outcome.forgotten
        self.counters.malformed_publishes += outcome.malformed
        return [(device, publish) for publish in outcome.publishes]

    async def switch_once(self, at_s: float) -> None:
        """Put radios, networks and services into the state that the scenario has for a simulated time."""
        for device, plan in zip(self._devices, self._plans, strict=True):
            if plan.awake or plan.away:
                self._switch(device, plan, at_s)
        for name, until_s in list(self._away_until_s.items()):
            if at_s >= until_s:
                del self._away_until_s[name]
                self._device_by_id[name].switch(on=True)
        down: dict[str, bool] = {}
        for outage in self.scenario.outages:
            if outage.service in self._services:
                down[outage.service] = down.get(outage.service, False) or outage.window().covers(at_s)
        for name, is_down in down.items():
            await self._services[name].switch(down=is_down)

    def _switch(self, device: Device, plan: PlannedDevice, at_s: float) -> None:
        away = any(window.covers(at_s) for window in plan.away)
        asleep = plan.awake is not None and not plan.awake.covers(at_s)
        on = not away and not asleep
        if on != device.on and device.device_id not in self._away_until_s:
            device.switch(on=on, send_disconnect=asleep and not away)

    async def _produce(self, stop: asyncio.Event) -> None:
        begin_s = time.monotonic()
        length_s = self.scenario.seconds or float("inf")
        switched_s = -_SWITCH_EVERY_S
        for plan in self._plans:
            self._truth.record_boot(plan.firmware.device_id, plan.firmware.boot_id)
        while not stop.is_set():
            now_s = time.monotonic() - begin_s
            over = now_s >= length_s
            self.produce_once(min(now_s, length_s - 1e-9))
            if now_s - switched_s >= _SWITCH_EVERY_S:
                switched_s = now_s
                await self.switch_once(self.simulated_s)
            if over and not self.behind_s:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(
                    stop.wait(), 0.001 if self.behind_s else min(_TICK_S, max(0.001, length_s - now_s))
                )
        for device, plan in zip(self._devices, self._plans, strict=True):
            for publish in plan.firmware.release_delayed():
                device.offer(publish)

    async def _restore_networks_and_services(self) -> None:
        self._away_until_s.clear()
        for service in self._services.values():
            await service.switch(down=False)
        for device in self._devices:
            device.switch(on=True)


def _build_sparkplug_session(plan: PlannedDevice) -> SparkplugSession:
    states = [sensor.state for sensor in plan.firmware.sensors]
    metrics = ((state.sensor_type, state.attributes[0] or "") for state in states)
    return SparkplugSession(plan.firmware.device_id, metrics)
