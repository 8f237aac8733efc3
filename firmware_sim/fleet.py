"""The running fleet: devices that sample and publish on a schedule, and the services its outages stop.

Publish number n of a group is due at a fixed time after the start. Each tick samples what is due, as of the
moment it was due, records it, and only then hands it to the devices: the ground truth depends on seed and
start alone. A fleet that cannot keep up falls behind (`behind_s`); nothing is skipped.
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
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from firmware_sim.devices.device import Device, RadioSettings
from firmware_sim.devices.payloads import SparkplugSession
from firmware_sim.errors import SimError
from firmware_sim.raw_mqtt import run_attacks
from firmware_sim.scenarios import plan_devices

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from firmware_sim.devices.firmware import Firmware, Publish, Sensor
    from firmware_sim.devices.sensors import PublishSchedule
    from firmware_sim.ground_truth import GroundTruthWriter
    from firmware_sim.scenarios import PlannedDevice, Scenario


@dataclass(slots=True)
class ServiceSwitch:
    """One of them. `up` and `down` may be called twice.

    Attributes:
        pid: paused with SIGSTOP and continued with SIGCONT; 0: there is a command.
        command: run with `down` or `up` as its last argument.
    """

    name: str
    pid: int = 0
    command: tuple[str, ...] = ()
    is_down: bool = False

    async def switch(self, *, down: bool) -> None:
        """Take it away or bring it back.

        Raises:
            SimError: the process is not there, or the command failed.
        """
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
    """NAME=PID or NAME=COMMAND.

    Raises:
        SimError: it is neither.
    """
    name, _, what = text.partition("=")
    if name and what.isdigit() and int(what) > 1:
        return ServiceSwitch(name, pid=int(what))
    command = tuple(shlex.split(what))
    if not name or not command or what.isdigit():
        raise SimError(f"--service {text}: expected NAME=PID of a process, or NAME=COMMAND")
    return ServiceSwitch(name, command=command)


_TICK_S = 0.02
_MAX_PUBLISHES_PER_TICK = 2_000
_PROGRESS_S = 1.0
_SWITCH_EVERY_S = 0.05
_CONNECT_THREADS = 32
_CONNECTS_PER_S = 200


@dataclass(slots=True)
class GroupSchedule:
    """One group at work: its beat and whose turn it is."""

    schedule: PublishSchedule
    turns: list[tuple[Device, Firmware, Sensor]]
    readings: int
    spacing_us: int
    next_publish: int = 0


class Fleet:
    """All devices of a scenario, running.

    Args:
        scenario: what to simulate.
        radio: how devices talk, where their group does not say otherwise; its counters are the fleet's.
        truth: where everything is recorded.
        seed: of the fleet.
        start_us: simulated time of the start.
        services: what the scenario's outages stop, by name.
    """

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
        self._start_us = start_us
        self._plans = plan_devices(scenario, seed, start_us=start_us)
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
                self._settled,
                random.Random(f"{seed}/{plan.firmware.device_id}/radio"),
                _build_sparkplug_session(plan) if plan.group.format == "sparkplug_b" else None,
            )
            for plan in self._plans
        ]
        self._away_until_s: dict[str, float] = {}
        self._services = {service.name: service for service in services}
        self._switched = [
            (device, plan)
            for device, plan in zip(self._devices, self._plans, strict=True)
            if plan.awake or plan.away
        ]
        self._device_of = {device.device_id: device for device in self._devices}
        self._schedules = [
            self._build_group_schedule(name, schedule) for name, schedule in self._group_schedules()
        ]
        self._started_s = 0.0
        self.simulated_s = 0.0
        self.behind_s = 0.0
        self.producing = True

    def _group_schedules(self) -> list[tuple[str, PublishSchedule]]:
        pairs = zip(self.scenario.groups, self.scenario.publish_schedules(), strict=True)
        return [(group.name, schedule) for group, schedule in pairs if not group.hostile]

    def _build_group_schedule(self, name: str, schedule: PublishSchedule) -> GroupSchedule:
        members = [
            (device, plan.firmware)
            for device, plan in zip(self._devices, self._plans, strict=True)
            if plan.group.name == name
        ]
        group = next(group for group in self.scenario.groups if group.name == name)
        turns = [
            (device, firmware, firmware.sensors[turn])
            for turn in range(len(group.types))
            for device, firmware in members
        ]
        readings = self.scenario.readings_in(group)
        spacing_us = int(len(turns) / schedule.per_s / readings * self.scenario.speed * 1e6)
        return GroupSchedule(schedule, turns, readings, max(1000, spacing_us))

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
                reached = await self._wait_until_connected(connect_timeout_s, stop)
                if reached:
                    tasks += [
                        group.create_task(
                            run_attacks(
                                self.radio.broker.host, self.radio.broker.port, name, rng, self.counters
                            ),
                            name=f"attacker {name}",
                        )
                        for name, rng in self._attackers()
                    ]
                    await self._produce(stop)
                    self.producing = False
                    await self._restore_networks_and_services()
                    await self._drain(drain_timeout_s)
                for task in tasks:
                    task.cancel()
        finally:
            for service in self._services.values():
                await service.switch(down=False)
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
            "simulated_s": round(self.simulated_s, 1),
            "behind_s": round(self.behind_s, 2),
            "services_down": [name for name, service in self._services.items() if service.is_down],
            "elapsed_s": round(self.elapsed_s, 1),
            "producing": self.producing,
        }

    def produce_once(self, now_s: float) -> int:
        """Sample, record and offer what is due `now_s` seconds after the start; how many publishes.

        At most `_MOST_A_TICK` at a time; `behind_s` says how far that lags.
        """
        offers: list[tuple[Device, Publish]] = []
        due = sorted(
            (group_schedule.schedule.time_of(number), place, number)
            for place, group_schedule in enumerate(self._schedules)
            for number in range(
                group_schedule.next_publish,
                min(
                    group_schedule.schedule.due(now_s),
                    group_schedule.next_publish + _MAX_PUBLISHES_PER_TICK + 1,
                ),
            )
        )
        for _, place, number in due[:_MAX_PUBLISHES_PER_TICK]:
            group_schedule = self._schedules[place]
            group_schedule.next_publish = number + 1
            self._one(group_schedule, number, offers)
        self.behind_s = now_s - due[_MAX_PUBLISHES_PER_TICK][0] if len(due) > _MAX_PUBLISHES_PER_TICK else 0.0
        self.simulated_s = max(0.0, now_s - self.behind_s) * self.scenario.speed
        self._truth.flush()
        for device, publish in offers:
            device.offer(publish)
        return len(offers)

    def _one(self, group_schedule: GroupSchedule, number: int, offers: list[tuple[Device, Publish]]) -> None:
        device, firmware, sensor = group_schedule.turns[number % len(group_schedule.turns)]
        at_s = group_schedule.schedule.time_of(number) * self.scenario.speed
        before = self._truth.rows
        outcome = firmware.publish(
            sensor,
            self._truth,
            at_s=at_s,
            now_us=self._start_us + int(at_s * 1e6),
            readings=group_schedule.readings,
            spacing_us=group_schedule.spacing_us,
        )
        if outcome.rebooted:
            device.restart(forget=outcome.lost_memory)
            self._truth.record_boot(firmware.device_id, firmware.boot_id)
        if outcome.away_s:
            self._away_until_s[device.device_id] = at_s + outcome.away_s
            device.switch(on=False)
        self.counters.produced += self._truth.rows - before
        self.counters.forgotten += outcome.forgotten
        self.counters.malformed_publishes += outcome.malformed
        offers += [(device, publish) for publish in outcome.publishes]

    async def switch_once(self, at_s: float) -> None:
        """Put radios, networks and services into the state that the scenario has for a simulated time."""
        for device, plan in self._switched:
            self._switch(device, plan, at_s)
        for name, until_s in list(self._away_until_s.items()):
            if at_s >= until_s:
                del self._away_until_s[name]
                self._device_of[name].switch(on=True)
        wanted: dict[str, bool] = {}
        for outage in self.scenario.outages:
            if outage.service in self._services:
                wanted[outage.service] = wanted.get(outage.service, False) or outage.window().covers(at_s)
        for name, down in wanted.items():
            await self._services[name].switch(down=down)

    def _switch(self, device: Device, plan: PlannedDevice, at_s: float) -> None:
        away = any(window.covers(at_s) for window in plan.away)
        asleep = plan.awake is not None and not plan.awake.covers(at_s)
        on = not away and not asleep
        if on != device.on and device.device_id not in self._away_until_s:
            device.switch(on=on, send_disconnect=asleep and not away)

    def _attackers(self) -> list[tuple[str, random.Random]]:
        names = [
            f"{group.name}-{number + 1:04d}"
            for group in self.scenario.groups
            if group.hostile
            for number in range(group.devices)
        ]
        return [(name, random.Random(f"{self.seed}/{name}")) for name in names]

    async def _produce(self, stop: asyncio.Event) -> None:
        begin_s = time.monotonic()
        length_s = self.scenario.seconds or float("inf")
        switched_s = -_SWITCH_EVERY_S
        for plan in self._plans:
            self._truth.record_boot(plan.firmware.device_id, plan.firmware.boot_id)
        while not stop.is_set():
            now_s = time.monotonic() - begin_s
            over = now_s >= length_s
            before_the_end_s = min(now_s, length_s - 1e-9)
            self.produce_once(before_the_end_s)
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
        """At the end of a run every network is there, so that what waits can be sent."""
        self._away_until_s.clear()
        for service in self._services.values():
            await service.switch(down=False)
        for device in self._devices:
            device.switch(on=True)

    async def _drain(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self.outstanding and time.monotonic() < deadline_s:
            await asyncio.sleep(_TICK_S)
            self._truth.flush()

    async def _wait_until_connected(self, timeout_s: float | None, stop: asyncio.Event) -> bool:
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


def _build_sparkplug_session(plan: PlannedDevice) -> SparkplugSession:
    """What a device that speaks Sparkplug B says of itself."""
    firmware = plan.firmware
    return SparkplugSession(
        firmware.device_id, ((s.state.sensor_type, s.state.attributes[0] or "") for s in firmware.sensors)
    )
