"""One device on the network: its MQTT connection, and its ring buffer of unacknowledged publishes.

Invariant: a publish is in the ring from `offer` until its acknowledgement, or until the ring is full and it
is the oldest. What a connection leaves unacknowledged goes back to the front of the ring in order and is
sent first on the next one. A refused publish (reason code 128 or more) is dropped and recorded as refused.

Four things the connection does that plain aiomqtt 2.5 does not, each needed for an exact record:

- the reason code of a PUBACK is looked at (aiomqtt counts a refused publish as delivered);
- the server's Receive Maximum is kept (paho ignores it);
- a connection closed before its CONNACK fails at once, not after the timeout, and its socket is closed;
- a socket is registered for writing at once, never after it was closed and its number given to another.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import aiomqtt
from paho.mqtt.client import MQTT_ERR_SUCCESS

from firmware_sim.devices.payloads import MqttMessage
from firmware_sim.errors import SimError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable
    from pathlib import Path

    import paho.mqtt.client as paho
    from paho.mqtt.properties import Properties
    from paho.mqtt.reasoncodes import ReasonCode

    from firmware_sim.devices.firmware import Publish
    from firmware_sim.devices.payloads import SparkplugSession

DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
CONNECT_TIMEOUT_S = 5.0
MQTT_VERSIONS = {"5": aiomqtt.ProtocolVersion.V5, "3.1.1": aiomqtt.ProtocolVersion.V311}

_silent_logger = logging.getLogger(
    __name__
)  # paho reports each lost connection as an error; `closed` says it too
_silent_logger.setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where devices publish to. `{device}` in user name or password becomes the device's id."""

    host: str
    port: int
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return f"{'mqtts' if self.tls else 'mqtt'}://{self.host}:{self.port}"


def parse_broker(url: str, *, ca_file: Path | None = None) -> BrokerAddress:
    """The broker that a URL like mqtt://user:password@host:1883 names.

    Raises:
        SimError: the URL is not understood, or the CA file cannot be read.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as fault:
        raise SimError(f"--broker {url}: {fault}; expected mqtt://HOST[:PORT]") from fault
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname or parts.path.strip("/") or parts.query:
        raise SimError(f"--broker {url}: expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    tls = None
    if parts.scheme == "mqtts":
        try:
            tls = ssl.create_default_context(cafile=ca_file)
        except OSError as fault:
            raise SimError(f"--ca-file {ca_file}: {fault}; expected a PEM file of certificates") from fault
    return BrokerAddress(
        parts.hostname,
        port or DEFAULT_PORTS[parts.scheme],
        unquote(parts.username) if parts.username else None,
        unquote(parts.password) if parts.password else None,
        tls,
    )


class MqttConnection(aiomqtt.Client):
    """One MQTT connection. Enter it to connect; `closed` returns when it is gone.

    Attributes:
        receive_maximum: how many QoS 1 and 2 publishes the server takes unacknowledged.
    """

    def __init__(
        self,
        broker: BrokerAddress,
        *,
        device: str,
        keepalive_s: int,
        on_ack: Callable[[int, int], None],
        mqtt: str = "5",
        will: MqttMessage | None = None,
    ) -> None:
        def fill(text: str | None) -> str | None:
            return None if text is None else text.replace("{device}", device)

        super().__init__(
            broker.host,
            broker.port,
            identifier=device,
            username=fill(broker.username),
            password=fill(broker.password),
            protocol=MQTT_VERSIONS[mqtt],
            will=aiomqtt.Will(*will, qos=1) if will else None,
            keepalive=keepalive_s,
            timeout=CONNECT_TIMEOUT_S,
            tls_context=broker.tls,
            logger=_silent_logger,
        )
        self._client.max_inflight_messages_set(0)  # 0 is unlimited: the window is the device's
        self._on_ack = on_ack
        self._loop_thread = threading.get_ident()
        self.receive_maximum = 65_535

    def send(self, topic: str, payload: bytes, qos: int) -> int | None:
        """Hand a publish to the connection; its packet identifier, or None if the connection is gone."""
        info = self._client.publish(topic, payload, qos)
        return info.mid if info.rc == MQTT_ERR_SUCCESS else None

    async def closed(self) -> str:
        """Wait until the connection has ended; why, in words."""
        await asyncio.wait({self._disconnected})
        fault = self._disconnected.exception()
        return str(fault) if fault else "closed"

    def drop(self, why: str) -> None:
        """Lose the connection without a word to the server; `closed` returns `why`."""
        if not self._disconnected.done():
            self._disconnected.set_exception(aiomqtt.MqttError(why))
        self.release()

    def leave(self) -> None:
        """Send DISCONNECT and close."""
        self._client.disconnect()

    def release(self) -> None:
        """Close the socket if it is still open. Nothing is sent."""
        if self._misc_task is not None:
            self._misc_task.cancel()
        self._client._reset_sockets()  # noqa: SLF001 - paho has no public way to drop a half-made connection

    def _on_connect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.ConnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        self.receive_maximum = getattr(properties, "ReceiveMaximum", 65_535)
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_disconnect(
        self,
        client: paho.Client,
        userdata: Any,
        flags: paho.DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        if not self._connected.done():
            self._connected.set_exception(
                aiomqtt.MqttError("the server closed the connection before its CONNACK")
            )
        super()._on_disconnect(client, userdata, flags, reason_code, properties)

    def _on_publish(
        self,
        client: paho.Client,  # noqa: ARG002 - paho's signature
        userdata: Any,  # noqa: ARG002 - paho's signature
        mid: int,
        reason_code: ReasonCode,
        properties: Properties,  # noqa: ARG002 - paho's signature
    ) -> None:
        self._on_ack(mid, reason_code.value)

    def _on_socket_register_write(self, client: paho.Client, userdata: Any, sock: Any) -> None:
        if threading.get_ident() == self._loop_thread:
            self._loop.add_writer(sock.fileno(), self._write, client)
        else:
            super()._on_socket_register_write(client, userdata, sock)

    def _write(self, client: paho.Client) -> None:
        try:
            client.loop_write()
        except OSError as fault:
            if not self._disconnected.done():
                self._disconnected.set_exception(fault)


REFUSED_FROM_CODE = 128
"""MQTT 5 reason codes from here on are failures."""


@dataclass(slots=True)
class FleetCounters:
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
class RadioSettings:
    """How devices talk: shared by all of a group.

    Attributes:
        mqtt: version of the protocol, "5" or "3.1.1".
        will: whether the server is to publish the value 0 for `connected` when a connection is lost.
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
        radio: RadioSettings,
        on_acknowledged: Callable[[Publish, int], None],
        rng: random.Random,
        session: SparkplugSession | None = None,
    ) -> None:
        self.device_id = device_id
        self._radio = radio
        self._on_settled = on_acknowledged
        self._rng = rng
        self._session = session
        self._ring: deque[tuple[Publish, bool]] = deque()  # (publish, was sent before)
        self._in_flight: dict[int, Publish] = {}
        self._link: MqttConnection | None = None
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
        self._send_from_ring()

    @property
    def on(self) -> bool:
        """Whether its radio is on and its network there."""
        return self._on.is_set()

    def switch(self, *, on: bool, send_disconnect: bool = False) -> None:
        """Switch the radio on or off; off is a lost network, or politely with a DISCONNECT."""
        if on:
            self._on.set()
            return
        self._on.clear()
        if self._link is not None:
            if send_disconnect:
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
            link = MqttConnection(
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

    async def _serve(self, link: MqttConnection) -> None:
        counters = self._radio.counters
        if not self._on.is_set():
            return
        counters.devices_connected += 1
        self._link = link
        try:
            if self._session is not None:
                link.send(*self._session.birth(time.time_ns() // 1_000_000), 0)
            self._send_from_ring()
            counters.last_fault = await link.closed()
        finally:
            self._link = None
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
        if reason_code < REFUSED_FROM_CODE:
            self._radio.counters.acknowledged += publish.rows
        else:
            self._radio.counters.refused += publish.rows
            self._radio.counters.last_fault = (
                f"the server refused a publish with reason code {reason_code:#x}"
            )
        self._on_settled(publish, reason_code)
        self._send_from_ring()
