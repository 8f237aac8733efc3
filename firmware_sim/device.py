"""A device's memory and radio: a small ring buffer of publishes, kept until acknowledged.

Invariant: a publish is in the ring from `offer` until its acknowledgement or until the ring is full and it
is the oldest. When a connection ends, what it left unacknowledged goes back to the front of the ring in its
order and is sent first, unchanged, on the next one. A publish the gateway refuses (a reason code of 128 or
more) is forgotten, as MQTT 5 says, and recorded as refused. A restart that loses the memory empties the ring.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiomqtt

from firmware_sim.broker import Broker, Link
from firmware_sim.sparkplug import Message

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from firmware_sim.firmware import Publish
    from firmware_sim.sparkplug import Session

REFUSED = 128
"""MQTT 5 reason codes from here on are failures."""


@dataclass(slots=True)
class Counters:
    """What a fleet did, in readings unless the name says otherwise."""

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


@dataclass(slots=True)
class Radio:
    """How devices talk: shared by all of a group.

    Attributes:
        mqtt: version of the protocol, "5" or "3.1.1".
        will: whether the server is to publish the value 0 for `connected` when a connection is lost.
    """

    broker: Broker
    qos: int = 1
    window: int = 20
    ring_publishes: int = 10_000
    keepalive_s: int = 30
    mqtt: str = "5"
    will: bool = False
    backoff_base_s: float = 0.25
    backoff_cap_s: float = 5.0
    counters: Counters = field(default_factory=Counters)


def backoff_s(attempt: int, *, base_s: float, cap_s: float, rng: random.Random) -> float:
    """How long to wait before connection attempt number `attempt` (0 is the first retry): full jitter."""
    return rng.uniform(0, min(cap_s, base_s * 2 ** min(attempt, 30)))


class Device:
    """One device: offer publishes, run it, and hear of each acknowledgement through `on_settled`.

    Args:
        device_id: MQTT client identifier.
        radio: how it talks, and the counters it adds to.
        on_settled: called with a publish and the reason code of its acknowledgement.
        rng: for the jitter of its backoff.
        session: what it says on each connection where it speaks Sparkplug B.
    """

    def __init__(
        self,
        device_id: str,
        radio: Radio,
        on_settled: Callable[[Publish, int], None],
        rng: random.Random,
        session: Session | None = None,
    ) -> None:
        self.device_id = device_id
        self._radio = radio
        self._on_settled = on_settled
        self._rng = rng
        self._session = session
        self._ring: deque[tuple[Publish, bool]] = deque()  # (publish, was sent before)
        self._in_flight: dict[int, Publish] = {}
        self._link: Link | None = None
        self._answered = False
        self._on = asyncio.Event()
        self._on.set()

    @property
    def outstanding(self) -> int:
        """Publishes not yet acknowledged."""
        return len(self._ring) + len(self._in_flight)

    def offer(self, publish: Publish) -> None:
        """Keep a publish and send it as soon as the window has room. The oldest makes room in a full ring."""
        if self.outstanding >= self._radio.ring_publishes and self._ring:
            dropped, _ = self._ring.popleft()
            self._radio.counters.overrun += dropped.rows
        self._ring.append((publish, False))
        self._pump()

    @property
    def on(self) -> bool:
        """Whether its radio is on and its network there."""
        return self._on.is_set()

    def switch(self, *, on: bool, politely: bool = False) -> None:
        """Switch the radio on or off; off is a lost network, or politely with a DISCONNECT."""
        if on:
            self._on.set()
            return
        self._on.clear()
        if self._link is not None:
            if politely:
                self._link.leave()
            else:
                self._link.drop("its network is away")

    def restart(self, *, forget: bool) -> None:
        """Lose the connection, and with `forget` everything that is not acknowledged."""
        self._radio.counters.reboots += 1
        if forget:
            lost = sum(publish.rows for publish, _ in self._ring)
            self._radio.counters.forgotten += lost + sum(p.rows for p in self._in_flight.values())
            self._ring.clear()
            self._in_flight.clear()
        if self._link is not None:
            self._link.drop("it restarted")

    async def run(self, *, start_after_s: float = 0.0) -> None:
        """Stay connected until cancelled: connect, send, wait for the end, back off, again."""
        await asyncio.sleep(start_after_s)
        attempt = 0
        connected_before = False
        while True:
            self._answered = False
            await self._on.wait()
            link = Link(
                self._radio.broker,
                device=self.device_id,
                keepalive_s=self._radio.keepalive_s,
                on_ack=self._settle,
                mqtt=self._radio.mqtt,
                will=self._will(),
            )
            try:
                async with link:
                    self._radio.counters.reconnects += connected_before
                    connected_before = True
                    await self._serve(link)
            except aiomqtt.MqttError as fault:
                self._radio.counters.last_fault = str(fault)
            finally:
                link.release()
            attempt = 0 if self._answered else attempt + 1
            await asyncio.sleep(
                backoff_s(
                    attempt,
                    base_s=self._radio.backoff_base_s,
                    cap_s=self._radio.backoff_cap_s,
                    rng=self._rng,
                )
            )

    async def _serve(self, link: Link) -> None:
        counters = self._radio.counters
        if not self._on.is_set():
            return
        counters.devices_connected += 1
        self._link = link
        try:
            if self._session is not None:
                link.send(*self._session.birth(time.time_ns() // 1_000_000), 0)
            self._pump()
            counters.last_fault = await link.closed()
        finally:
            self._link = None
            counters.devices_connected -= 1
            self._ring.extendleft((publish, True) for publish in reversed(self._in_flight.values()))
            self._in_flight.clear()

    def _will(self) -> Message | None:
        if self._session is not None:
            return self._session.begin()
        return Message(f"sensors/{self.device_id}/connected", b'{"value": 0}') if self._radio.will else None

    def _pump(self) -> None:
        """Send from the ring while the window has room."""
        link = self._link
        if link is None:
            return
        radio, counters = self._radio, self._radio.counters
        window = min(radio.window, link.receive_maximum)
        while self._ring and len(self._in_flight) < window:
            publish, again = self._ring[0]
            payload = publish.payload if self._session is None else self._session.numbered(publish.payload)
            packet_id = link.send(publish.topic, payload, radio.qos)
            if packet_id is None:
                return  # the connection is gone; `_serve` is about to learn of it
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
        self._answered = True
        if reason_code < REFUSED:
            self._radio.counters.acknowledged += publish.rows
        else:
            self._radio.counters.refused += publish.rows
            self._radio.counters.last_fault = (
                f"the server refused a publish with reason code {reason_code:#x}"
            )
        self._on_settled(publish, reason_code)
        self._pump()
