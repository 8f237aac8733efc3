"""MQTT 5 over raw sockets: load at full speed (`--rate max`), and hostile devices.

Load: packets are encoded and recorded before the clock starts; every device has a non-blocking connection
with `window` publishes in flight at QoS 1, no TLS; what was not acknowledged when a connection is lost is
sent again. Hostile devices send packets that no server should accept, one attack after the other; none
carries a reading, so none is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

from firmware_sim.errors import SimError
from firmware_sim.scenarios import build_group_schedules, plan_devices

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from firmware_sim.devices.device import FleetCounters
    from firmware_sim.devices.mqtt_connection import BrokerAddress
    from firmware_sim.ground_truth import GroundTruthWriter, Publish
    from firmware_sim.scenarios import Scenario

_MQTT_5 = 5
_LINGER_S = 0.5
_PAUSE_S = (0.05, 0.5)


def _encode_string(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


def _encode_packet(first: int, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while size >= 1 << 7:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([first, *length, size]) + body


def encode_connect(client_id: bytes, *, protocol: bytes = b"MQTT", level: int = _MQTT_5) -> bytes:
    """A CONNECT with a clean start and a keep-alive of 30 s."""
    properties = b"\x00" if level == _MQTT_5 else b""
    return _encode_packet(
        0x10, _encode_string(protocol) + bytes([level, 2, 0, 30]) + properties + _encode_string(client_id)
    )


def encode_publish(topic: bytes, payload: bytes, *, packet_id: int = 1) -> bytes:
    """An MQTT 5 PUBLISH at QoS 1."""
    return _encode_packet(0x32, _encode_string(topic) + packet_id.to_bytes(2, "big") + b"\x00" + payload)


def build_attacks(client_id: bytes, rng: random.Random) -> list[list[bytes]]:
    """The bytes of each attack, in pieces with a pause between them. Pure."""
    connect = encode_connect(client_id)
    topic = b"sensors/" + client_id + b"/temperature"
    broken_payloads = [b"{" + rng.randbytes(rng.randrange(300)) for _ in range(20)]
    return [
        [],  # silence
        [rng.randbytes(rng.randrange(1, 4096))],
        [connect[:1], connect[1:3], connect[3:7]],  # a slow CONNECT
        [connect, b"\x32\xff\xff\xff\x7f" + rng.randbytes(512)],  # a huge remaining length
        [b"\x10\xff\xff\xff\xff\xff\xff"],  # a remaining length without end
        [encode_publish(topic, b'{"value": "x"}')],  # PUBLISH before CONNECT
        [encode_connect(client_id, protocol=b"MQTX", level=9)],
        [connect, encode_publish(b"sensors/\xff\xfe\xc0/t", b"{}")],  # a topic that is not UTF-8
        [connect, *(encode_publish(topic, each, packet_id=n + 1) for n, each in enumerate(broken_payloads))],
        [connect, encode_publish(b"sensors/+/#", b"{}")],  # wildcards in a topic
        [connect, encode_publish(topic, b"{}" * 500)[:-400]],  # a torn PUBLISH
    ]


async def run_attacks(
    broker: BrokerAddress, client_id: str, rng: random.Random, counters: FleetCounters
) -> None:
    """Attack until cancelled."""
    while True:
        attacks = build_attacks(client_id.encode(), rng)
        rng.shuffle(attacks)
        for pieces in attacks:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(10):
                    await _attack_once(broker, pieces)
            counters.attacks += 1
            await asyncio.sleep(rng.uniform(*_PAUSE_S))


async def _attack_once(broker: BrokerAddress, pieces: list[bytes]) -> None:
    reader, writer = await asyncio.open_connection(broker.host, broker.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while await reader.read(4096):
                    pass
    finally:
        writer.transport.abort()


_PACKET_IDS = 65_535
_CONNACK, _PUBACK = 0x20, 0x40
_FIXED_HEADER_BYTES = 2
_PUBACK_WITH_REASON_BYTES = 3
_FLUSH_ROWS = 100_000
_RETRY_S = 0.2
_POLL_S = 0.2
_REPORT_EVERY = 1_000


def encode_publishes(
    scenario: Scenario,
    truth: GroundTruthWriter,
    *,
    seed: int,
    start_us: int,
    readings: int,
    on_encoded: Callable[[int], None],
) -> dict[str, list[Publish]]:
    """The publishes of the first `readings` readings of a scenario, by device, recorded."""
    if any(group.format == "sparkplug_b" for group in scenario.groups):
        raise SimError("--rate max: Sparkplug B depends on the connection and cannot be encoded beforehand")
    plans = plan_devices(scenario, seed, start_us=start_us)
    publishes: dict[str, list[Publish]] = {plan.firmware.device_id: [] for plan in plans}
    group_schedules = build_group_schedules(scenario, plans, start_us=start_us)
    encoded = number = 0
    while encoded < readings:
        for group in group_schedules:
            firmware, _, outcome = group.publish(number, truth)
            publishes[firmware.device_id] += outcome.publishes
            encoded += group.readings
        number += 1
        if number % _REPORT_EVERY == 0:
            truth.flush()
            on_encoded(encoded)
    truth.flush()
    return publishes


@dataclass(slots=True)
class LoadConnection:
    """One device's connection. Positions count its publishes from 0; all before `done` are acknowledged."""

    device_id: str
    publishes: list[Publish]
    broker: BrokerAddress
    window: int
    counters: FleetCounters
    on_acknowledged: Callable[[Publish, int], None]
    done: int = 0
    _sent: int = 0
    _acknowledged: set[int] = field(default_factory=set)
    _ends: list[int] = field(default_factory=list)
    _bytes: bytes = b""
    _written: int = 0
    _arrived: bytearray = field(default_factory=bytearray)
    _connected: bool = False
    sock: socket.socket | None = None
    retry_at_s: float = 0.0

    def __post_init__(self) -> None:
        packets = [
            encode_publish(p.topic.encode(), p.payload, packet_id=at % _PACKET_IDS + 1)
            for at, p in enumerate(self.publishes)
        ]
        self._ends = list(accumulate(map(len, packets)))
        self._bytes = b"".join(packets)

    @property
    def finished(self) -> bool:
        """Whether all publishes are acknowledged."""
        return self.done == len(self.publishes)

    def connect(self) -> socket.socket:
        """Connect and start from the first publish that is not acknowledged; OSError when that fails."""
        connection = socket.create_connection((self.broker.host, self.broker.port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(encode_connect(self.device_id.encode()))
        connection.setblocking(False)
        self.sock, self._connected = connection, False
        self._arrived.clear()
        self.counters.publishes_resent += self._sent - self.done
        self._sent = self.done
        self._written = self._ends[self.done - 1] if self.done else 0
        return connection

    def write(self) -> None:
        """Send as much as the window and the socket accept."""
        if not self._connected or self.sock is None:
            return
        until = min(len(self.publishes), self.done + self.window)
        if until > self._sent:
            self.counters.publishes_sent += until - self._sent
            self._sent = until
        limit = self._ends[until - 1] if until else 0
        while self._written < limit:
            try:
                self._written += self.sock.send(memoryview(self._bytes)[self._written : limit])
            except BlockingIOError:
                return

    def read(self) -> None:
        """Read and settle acknowledgements; ConnectionError when the server closed or broke the protocol."""
        assert self.sock is not None
        try:
            data = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._arrived += data
        at, arrived = 0, self._arrived
        while len(arrived) - at >= _FIXED_HEADER_BYTES:
            kind, size = arrived[at], arrived[at + 1]
            body = arrived[at + _FIXED_HEADER_BYTES : at + _FIXED_HEADER_BYTES + size]
            if len(body) < size:
                break
            if not self._connected:
                if kind != _CONNACK or body[1]:
                    raise ConnectionRefusedError(f"no connection: {bytes(arrived[at : at + 8])!r}")
                self._connected = True
            elif kind == _PUBACK:
                reason = body[2] if size >= _PUBACK_WITH_REASON_BYTES else 0  # MQTT 5 section 3.4.2.1
                self._settle(int.from_bytes(body[:2], "big"), reason)
            else:
                raise ConnectionResetError(f"the server sent a packet of type {kind >> 4}")
            at += _FIXED_HEADER_BYTES + size
        del arrived[:at]

    def close(self) -> None:
        """Close the socket if it is open."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def _settle(self, packet_id: int, reason: int) -> None:
        at = self.done + (packet_id - 1 - self.done) % _PACKET_IDS
        if at >= len(self.publishes) or at in self._acknowledged:
            return
        publish = self.publishes[at]
        self._acknowledged.add(at)
        while self.done in self._acknowledged:
            self._acknowledged.discard(self.done)
            self.done += 1
        self.counters.count_acknowledgement(publish, reason)
        self.on_acknowledged(publish, reason)


class LoadGenerator:
    """Sends the publishes of `encode_publishes`, one connection a device."""

    def __init__(
        self,
        publishes: dict[str, list[Publish]],
        broker: BrokerAddress,
        truth: GroundTruthWriter,
        counters: FleetCounters,
        *,
        window: int,
    ) -> None:
        if broker.tls is not None or broker.username:
            raise SimError("--rate max: expected mqtt:// without user and password")
        self._truth = truth
        self.counters = counters
        self.connections = [
            LoadConnection(name, own, broker, window, counters, self._settle)
            for name, own in publishes.items()
            if own
        ]
        self._poll = select.epoll()
        self._by_fd: dict[int, LoadConnection] = {}
        self._unflushed = 0
        self._started_s = time.monotonic()
        self.elapsed_s = 0.0

    @property
    def outstanding(self) -> int:
        """Publishes not yet acknowledged."""
        return sum(len(connection.publishes) - connection.done for connection in self.connections)

    def progress(self) -> dict[str, object]:
        """The counters as `progress.json` and the display show them."""
        elapsed_s = self.elapsed_s or time.monotonic() - self._started_s
        return {
            **asdict(self.counters),
            "devices": len(self.connections),
            "outstanding_publishes": self.outstanding,
            "elapsed_s": round(elapsed_s, 2),
            "readings_per_s": round(self.counters.acknowledged / max(elapsed_s, 1e-9)),
            "producing": not self.elapsed_s,
        }

    async def run(
        self,
        stop: asyncio.Event,
        *,
        seconds: float,
        connect_timeout_s: float,
        on_progress: Callable[[dict[str, object]], None],
    ) -> None:
        """Send all publishes, or for `seconds` (0: no limit), or until `stop`, in a thread."""
        work = asyncio.ensure_future(asyncio.to_thread(self._send, stop, seconds, connect_timeout_s))
        while not (await asyncio.wait({work}, timeout=1.0))[0]:
            on_progress(self.progress())
        await work
        on_progress(self.progress())

    def _send(self, stop: asyncio.Event, seconds: float, connect_timeout_s: float) -> None:
        for connection in self.connections:
            self._connect(connection)
        self._started_s = begin_s = time.monotonic()
        while not stop.is_set() and not all(s.finished for s in self.connections):
            now_s = time.monotonic()
            if seconds and now_s - begin_s >= seconds:
                break
            if not self._by_fd and not self.counters.acknowledged and now_s - begin_s >= connect_timeout_s:
                raise SimError(
                    f"--broker: not reachable within {connect_timeout_s:g} s: {self.counters.last_fault}"
                )
            for fd, event in self._poll.poll(_POLL_S):
                self._serve(self._by_fd[fd], event)
            for connection in self.connections:
                if connection.sock is None and not connection.finished and now_s >= connection.retry_at_s:
                    self._connect(connection)
        self.elapsed_s = time.monotonic() - begin_s
        for connection in self.connections:
            connection.close()
        self._poll.close()
        self._truth.flush()

    def _serve(self, connection: LoadConnection, event: int) -> None:
        try:
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                connection.read()
            connection.write()
        except OSError as fault:
            if connection.sock is not None:
                del self._by_fd[connection.sock.fileno()]
            connection.close()
            self._retry_later(connection, fault)
            self.counters.devices_connected -= 1
            self.counters.reconnects += 1

    def _connect(self, connection: LoadConnection) -> None:
        try:
            opened = connection.connect()
        except OSError as fault:
            self._retry_later(connection, fault)
            return
        self.counters.devices_connected += 1
        self._by_fd[opened.fileno()] = connection
        self._poll.register(opened.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _retry_later(self, connection: LoadConnection, fault: OSError) -> None:
        self.counters.last_fault = str(fault)
        connection.retry_at_s = time.monotonic() + _RETRY_S

    def _settle(self, publish: Publish, reason: int) -> None:
        self._truth.settle(publish, reason)
        self._unflushed += publish.rows
        if self._unflushed >= _FLUSH_ROWS:
            self._unflushed = 0
            self._truth.flush()
