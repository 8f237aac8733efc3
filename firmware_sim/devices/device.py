"""Devices on the network: each with its MQTT connection and its ring buffer of unacknowledged publishes.

Invariant: a publish is in the ring from `offer` until its acknowledgement, or until the ring is full and it
is the oldest. What a connection leaves unacknowledged goes back to the front of the ring in order and is
sent first on the next one. A refused publish (reason code 128 or more) is dropped and recorded as refused.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import aiomqtt

from firmware_sim.devices.mqtt_connection import BrokerAddress, MqttConnection
from firmware_sim.devices.payloads import MqttMessage
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import REFUSED_FROM_CODE, Publish

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from firmware_sim.devices.payloads import SparkplugSession
    from firmware_sim.ground_truth import GroundTruthWriter

_POLL_S = 0.02
_PROGRESS_EVERY_S = 1.0
_STOPPED_DRAIN_S = 2.0


@dataclass(slots=True)
class FleetCounters:
    """Counts of a fleet, in readings unless the name says otherwise."""

    produced: int = 0
    published: int = 0
    acknowledged: int = 0
    refused: int = 0
    overrun: int = 0
    forgotten: int = 0
    malformed_publishes: int = 0
    reboots: int = 0
    attacks: int = 0
    publishes_sent: int = 0
    publishes_resent: int = 0
    reconnects: int = 0
    devices_connected: int = 0
    last_fault: str = ""

    def count_acknowledgement(self, publish: Publish, reason_code: int) -> None:
        """Count a publish as acknowledged or refused."""
        if reason_code < REFUSED_FROM_CODE:
            self.acknowledged += publish.rows
        else:
            self.refused += publish.rows
            self.last_fault = f"the server refused a publish with reason code {reason_code:#x}"


@dataclass(slots=True)
class RadioSettings:
    """MQTT settings and counters that the devices of a group share.

    With `will` the last will publishes the value 0 for `connected`.
    """

    broker: BrokerAddress
    qos: int = 1
    window: int = 20
    ring_publishes: int = 10_000
    keepalive_s: int = 30
    mqtt: str = "5"
    will: bool = False
    backoff_base_s: float = 0.25
    backoff_cap_s: float = 5.0
    counters: FleetCounters = field(default_factory=FleetCounters)


def backoff_s(attempt: int, *, base_s: float, cap_s: float, rng: random.Random) -> float:
    """Wait before connection attempt number `attempt` (0 is the first retry): exponential, full jitter."""
    return rng.uniform(0, min(cap_s, base_s * 2 ** min(attempt, 30)))


class Device:
    """One device. Every acknowledgement calls `on_acknowledged` with the publish and its reason code."""

    def __init__(
        self,
        device_id: str,
        radio: RadioSettings,
        on_acknowledged: Callable[[Publish, int], None],
        rng: random.Random,
        session: SparkplugSession | None = None,
    ) -> None:
        self.device_id = device_id
        self._radio = radio
        self._on_acknowledged = on_acknowledged
        self._rng = rng
        self._session = session
        self._ring: deque[tuple[Publish, bool]] = deque()  # (publish, was sent before)
        self._in_flight: dict[int, Publish] = {}
        self._connection: MqttConnection | None = None
        self._acknowledged = False
        self._on = asyncio.Event()
        self._on.set()

    @property
    def outstanding(self) -> int:
        """Publishes not yet acknowledged."""
        return len(self._ring) + len(self._in_flight)

    def offer(self, publish: Publish) -> None:
        """Keep a publish and send it as soon as the window has room. A full ring drops its oldest."""
        if self.outstanding >= self._radio.ring_publishes and self._ring:
            dropped, _ = self._ring.popleft()
            self._radio.counters.overrun += dropped.rows
        self._ring.append((publish, False))
        self._send_from_ring()

    @property
    def on(self) -> bool:
        """Whether its radio is on and its network available."""
        return self._on.is_set()

    def switch(self, *, on: bool, send_disconnect: bool = False) -> None:
        """Switch the radio on or off; off is a lost network unless a DISCONNECT is sent."""
        if on:
            self._on.set()
            return
        self._on.clear()
        if self._connection is not None:
            if send_disconnect:
                self._connection.leave()
            else:
                self._connection.drop("its network is away")

    def restart(self, *, forget: bool) -> None:
        """Drop the connection, and with `forget` everything that is not acknowledged."""
        self._radio.counters.reboots += 1
        if forget:
            lost = sum(publish.rows for publish, _ in self._ring)
            self._radio.counters.forgotten += lost + sum(p.rows for p in self._in_flight.values())
            self._ring.clear()
            self._in_flight.clear()
        if self._connection is not None:
            self._connection.drop("it restarted")

    async def run(self, *, start_after_s: float = 0.0) -> None:
        """Connect and send until cancelled; reconnect with backoff."""
        await asyncio.sleep(start_after_s)
        attempt = 0
        connected_before = False
        while True:
            self._acknowledged = False
            await self._on.wait()
            connection = MqttConnection(
                self._radio.broker,
                device=self.device_id,
                keepalive_s=self._radio.keepalive_s,
                on_ack=self._settle,
                mqtt=self._radio.mqtt,
                will=self._will(),
            )
            try:
                async with connection:
                    self._radio.counters.reconnects += connected_before
                    connected_before = True
                    await self._serve(connection)
            except aiomqtt.MqttError as fault:
                self._radio.counters.last_fault = str(fault)
            finally:
                connection.release()
            attempt = 0 if self._acknowledged else attempt + 1
            base_s, cap_s = self._radio.backoff_base_s, self._radio.backoff_cap_s
            await asyncio.sleep(backoff_s(attempt, base_s=base_s, cap_s=cap_s, rng=self._rng))

    async def _serve(self, connection: MqttConnection) -> None:
        counters = self._radio.counters
        if not self._on.is_set():
            return
        counters.devices_connected += 1
        self._connection = connection
        try:
            if self._session is not None:
                connection.send(*self._session.birth(time.time_ns() // 1_000_000), 0)
            self._send_from_ring()
            counters.last_fault = await connection.closed()
        finally:
            self._connection = None
            counters.devices_connected -= 1
            self._ring.extendleft((publish, True) for publish in reversed(self._in_flight.values()))
            self._in_flight.clear()

    def _will(self) -> MqttMessage | None:
        if self._session is not None:
            return self._session.begin()
        return (
            MqttMessage(f"sensors/{self.device_id}/connected", b'{"value": 0}') if self._radio.will else None
        )

    def _send_from_ring(self) -> None:
        connection = self._connection
        if connection is None:
            return
        radio, counters = self._radio, self._radio.counters
        window = min(radio.window, connection.receive_maximum)
        while self._ring and len(self._in_flight) < window:
            publish, again = self._ring[0]
            payload = publish.payload
            if self._session is not None:
                payload = self._session.add_sequence_number(payload)
            packet_id = connection.send(publish.topic, payload, radio.qos)
            if packet_id is None:
                return  # the connection is gone, and `_serve` is about to return
            self._ring.popleft()
            counters.publishes_sent += 1
            if again:
                counters.publishes_resent += 1
            else:
                counters.published += publish.rows
            if radio.qos:
                self._in_flight[packet_id] = publish

    def _settle(self, packet_id: int, reason_code: int) -> None:
        publish = self._in_flight.pop(packet_id, None)
        if publish is None:  # QoS 0, where nothing is acknowledged
            return
        self._acknowledged = True
        self._radio.counters.count_acknowledgement(publish, reason_code)
        self._on_acknowledged(publish, reason_code)
        self._send_from_ring()


class DevicePool:
    """The devices of one command: connects them all, lets `work` feed them, reports their progress."""

    def __init__(self, devices: Sequence[Device], radio: RadioSettings, truth: GroundTruthWriter) -> None:
        self.devices = devices
        self._radio = radio
        self._truth = truth
        self._started_s = time.monotonic()

    @property
    def outstanding(self) -> int:
        """Publishes not yet acknowledged."""
        return sum(device.outstanding for device in self.devices)

    def progress(self) -> dict[str, object]:
        """The counters as `progress.json` and the display show them."""
        return {
            **asdict(self._radio.counters),
            "devices": len(self.devices),
            "outstanding_publishes": self.outstanding,
            "elapsed_s": round(time.monotonic() - self._started_s, 1),
        }

    async def run(
        self,
        work: Callable[[], Awaitable[None]],
        stop: asyncio.Event,
        *,
        connect_timeout_s: float | None,
        on_progress: Callable[[], None],
        ramp_s: float = 0.0,
        background: Sequence[Coroutine[None, None, None]] = (),
    ) -> None:
        """Connect over `ramp_s`, wait for a first connection unless there is no timeout, and run `work`."""
        self._started_s = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(
                        device.run(start_after_s=ramp_s * n / len(self.devices)),
                        name=f"device {device.device_id}",
                    )
                    for n, device in enumerate(self.devices)
                ]
                tasks.append(group.create_task(self._report(on_progress), name="progress"))
                tasks += [group.create_task(each, name="attacker") for each in background]
                connected = await self._wait_until_connected(connect_timeout_s, stop)
                if connected:
                    await work()
                for task in tasks:
                    task.cancel()
        finally:
            self._truth.flush()
            on_progress()
        if not connected and not stop.is_set():
            why = self._radio.counters.last_fault or "no answer"
            raise SimError(f"{self._radio.broker}: not reachable within {connect_timeout_s:g} s: {why}")

    async def drain(self, timeout_s: float, stop: asyncio.Event | None = None) -> None:
        """Wait for acknowledgements at most `timeout_s`.

        With `stop` the timeout restarts with each acknowledgement and is cut to 2 s once `stop` is set.
        """
        since_s, left = time.monotonic(), self.outstanding
        while self.outstanding and time.monotonic() - since_s < timeout_s:
            await asyncio.sleep(_POLL_S)
            self._truth.flush()
            if stop is not None and self.outstanding < left:
                since_s, left = time.monotonic(), self.outstanding
            if stop is not None and stop.is_set():
                timeout_s = min(timeout_s, _STOPPED_DRAIN_S)

    async def _wait_until_connected(self, timeout_s: float | None, stop: asyncio.Event) -> bool:
        deadline_s = time.monotonic() + (timeout_s or 0.0)
        while timeout_s is not None and not self._radio.counters.devices_connected:
            if stop.is_set() or time.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _report(self, on_progress: Callable[[], None]) -> None:
        while True:
            self._truth.flush()  # a reader of the progress finds in the record what it counts
            on_progress()
            await asyncio.sleep(_PROGRESS_EVERY_S)
