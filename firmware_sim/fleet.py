"""The fleet: devices that sample on a schedule and publish what they sampled.

Each group has a beat: publish number n of a group is due at a fixed time after the start and belongs to its
sensors in turn. Each tick samples what is due, as of the moment it was due, records it, and only then hands
it to the devices. So what is in the record depends on seed and start alone; what the network does decides
only what of it was acknowledged. A fleet that cannot keep up falls behind and says so (`behind_s`); nothing
is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from firmware_sim.device import Device, Radio
from firmware_sim.errors import SimError
from firmware_sim.hostile import attack
from firmware_sim.planning import plan_devices
from firmware_sim.sparkplug import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from firmware_sim.firmware import Firmware, Publish, Sensor
    from firmware_sim.outages import ServiceSwitch
    from firmware_sim.planning import Plan
    from firmware_sim.scenarios import Scenario
    from firmware_sim.truth import TruthWriter
    from firmware_sim.windows import Beat

_TICK_S = 0.02
_MOST_A_TICK = 2_000
_PROGRESS_S = 1.0
_SWITCH_EVERY_S = 0.05
_CONNECT_THREADS = 32
_CONNECTS_PER_S = 200


@dataclass(slots=True)
class Troop:
    """One group at work: its beat and whose turn it is."""

    beat: Beat
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
        radio: Radio,
        truth: TruthWriter,
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
                _session(plan) if plan.group.format == "sparkplug_b" else None,
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
        self._troops = [self._troop(name, beat) for name, beat in self._beats()]
        self._started_s = 0.0
        self.simulated_s = 0.0
        self.behind_s = 0.0
        self.producing = True

    def _beats(self) -> list[tuple[str, Beat]]:
        pairs = zip(self.scenario.groups, self.scenario.beats(), strict=True)
        return [(group.name, beat) for group, beat in pairs if not group.hostile]

    def _troop(self, name: str, beat: Beat) -> Troop:
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
        spacing_us = int(len(turns) / beat.per_s / readings * self.scenario.speed * 1e6)
        return Troop(beat, turns, readings, max(1000, spacing_us))

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
                    tasks += [
                        group.create_task(
                            attack(self.radio.broker.host, self.radio.broker.port, name, rng, self.counters),
                            name=f"attacker {name}",
                        )
                        for name, rng in self._attackers()
                    ]
                    await self._produce(stop)
                    self.producing = False
                    await self._everything_up()
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
            (troop.beat.time_of(number), place, number)
            for place, troop in enumerate(self._troops)
            for number in range(
                troop.next_publish, min(troop.beat.due(now_s), troop.next_publish + _MOST_A_TICK + 1)
            )
        )
        for _, place, number in due[:_MOST_A_TICK]:
            troop = self._troops[place]
            troop.next_publish = number + 1
            self._one(troop, number, offers)
        self.behind_s = now_s - due[_MOST_A_TICK][0] if len(due) > _MOST_A_TICK else 0.0
        self.simulated_s = max(0.0, now_s - self.behind_s) * self.scenario.speed
        self._truth.flush()
        for device, publish in offers:
            device.offer(publish)
        return len(offers)

    def _one(self, troop: Troop, number: int, offers: list[tuple[Device, Publish]]) -> None:
        device, firmware, sensor = troop.turns[number % len(troop.turns)]
        at_s = troop.beat.time_of(number) * self.scenario.speed
        before = self._truth.rows
        happened = firmware.publish(
            sensor,
            self._truth,
            at_s=at_s,
            now_us=self._start_us + int(at_s * 1e6),
            readings=troop.readings,
            spacing_us=troop.spacing_us,
        )
        if happened.rebooted:
            device.restart(forget=happened.forgot)
            self._truth.booted(firmware.device_id, firmware.boot_id)
        if happened.away_s:
            self._away_until_s[device.device_id] = at_s + happened.away_s
            device.switch(on=False)
        self.counters.produced += self._truth.rows - before
        self.counters.forgotten += happened.forgotten
        self.counters.malformed_publishes += happened.malformed
        offers += [(device, publish) for publish in happened.publishes]

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

    def _switch(self, device: Device, plan: Plan, at_s: float) -> None:
        away = any(window.covers(at_s) for window in plan.away)
        asleep = plan.awake is not None and not plan.awake.covers(at_s)
        on = not away and not asleep
        if on != device.on and device.device_id not in self._away_until_s:
            device.switch(on=on, politely=asleep and not away)

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
            self._truth.booted(plan.firmware.device_id, plan.firmware.boot_id)
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
            for publish in plan.firmware.let_go():
                device.offer(publish)

    async def _everything_up(self) -> None:
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


def _session(plan: Plan) -> Session:
    """What a device that speaks Sparkplug B says of itself."""
    firmware = plan.firmware
    return Session(
        firmware.device_id, ((s.state.sensor_type, s.state.attributes[0] or "") for s in firmware.sensors)
    )
