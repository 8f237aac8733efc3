"""MQTT 5 over raw sockets: load at full speed (`--rate max`), and hostile devices.

Load: packets are encoded and recorded before the clock starts; every device has a non-blocking connection
with `window` publishes in flight at QoS 1, no TLS; what was not acknowledged when a connection is lost is
sent again. Hostile devices send what no server should accept, one attack after the other; nothing of it is a
reading, so nothing of it is recorded.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from firmware_sim.errors import SimError
from firmware_sim.scenarios import plan_devices

if TYPE_CHECKING:
    import random
    import threading
    from collections.abc import Callable

    from firmware_sim.devices.device import BrokerAddress, FleetCounters
    from firmware_sim.devices.firmware import Firmware, Publish, Sensor
    from firmware_sim.ground_truth import GroundTruthWriter
    from firmware_sim.scenarios import Scenario

ATTACKS = (
    "garbage",
    "silence",
    "slow_connect",
    "huge_length",
    "endless_length",
    "publish_first",
    "wrong_protocol",
    "bad_utf8",
    "broken_payloads",
    "wildcard_topic",
    "torn_publish",
)
_LINGER_S = 0.5
_PAUSE_S = (0.05, 0.5)


def _encode_string(text: bytes) -> bytes:
    return len(text).to_bytes(2, "big") + text


def _encode_packet(first: int, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while True:
        length.append(size & 0x7F | (0x80 if size > 0x7F else 0))  # noqa: PLR2004 - MQTT's variable length
        size >>= 7
        if not size:
            return bytes([first, *length]) + body


def encode_connect(client_id: bytes, *, protocol: bytes = b"MQTT", level: int = 5) -> bytes:
    """A CONNECT with a clean start and a keep-alive of 30 s."""
    properties = b"\x00" if level == 5 else b""  # noqa: PLR2004 - MQTT 5
    return _encode_packet(
        0x10, _encode_string(protocol) + bytes([level, 2, 0, 30]) + properties + _encode_string(client_id)
    )


def encode_publish(topic: bytes, payload: bytes, *, packet_id: int = 1) -> bytes:
    """An MQTT 5 PUBLISH at QoS 1."""
    return _encode_packet(0x32, _encode_string(topic) + packet_id.to_bytes(2, "big") + b"\x00" + payload)


def build_attack(attack: str, client_id: bytes, rng: random.Random) -> list[bytes]:
    """What an attack sends, in pieces with a pause between them. Pure."""
    connect = encode_connect(client_id)
    topic = b"sensors/" + client_id + b"/temperature"
    return {
        "garbage": [rng.randbytes(rng.randrange(1, 4096))],
        "silence": [],
        "slow_connect": [connect[:1], connect[1:3], connect[3:7]],
        "huge_length": [connect, b"\x32\xff\xff\xff\x7f" + rng.randbytes(512)],
        "endless_length": [b"\x10\xff\xff\xff\xff\xff\xff"],
        "publish_first": [encode_publish(topic, b'{"value": "x"}')],
        "wrong_protocol": [encode_connect(client_id, protocol=b"MQTX", level=9)],
        "bad_utf8": [connect, encode_publish(b"sensors/\xff\xfe\xc0/t", b"{}")],
        "broken_payloads": [connect]
        + [
            encode_publish(topic, b"{" + rng.randbytes(rng.randrange(300)), packet_id=n + 1)
            for n in range(20)
        ],
        "wildcard_topic": [connect, encode_publish(b"sensors/+/#", b"{}")],
        "torn_publish": [connect, encode_publish(topic, b"{}" * 500)[:-400]],
    }[attack]


async def run_attacks(
    host: str, port: int, client_id: str, rng: random.Random, counters: FleetCounters
) -> None:
    """Attack until cancelled."""
    while True:
        for kind in rng.sample(ATTACKS, len(ATTACKS)):
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(10):
                    await _attack_once(host, port, build_attack(kind, client_id.encode(), rng))
            counters.attacks += 1
            await asyncio.sleep(rng.uniform(*_PAUSE_S))


async def _attack_once(host: str, port: int, pieces: list[bytes]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
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
_PUBACK = 0x40
_FLUSH_ROWS = 100_000
_RETRY_S = 0.2
_POLL_S = 0.2
_REPORT_EVERY = 1_000
_REFUSED_FROM_CODE = 128


def encode_publishes(
    scenario: Scenario,
    truth: GroundTruthWriter,
    *,
    seed: int,
    start_us: int,
    readings: int,
    encoded: Callable[[int], None],
) -> dict[str, list[Publish]]:
    """The publishes of the first so many readings of a scenario, by device, recorded.

    `encoded` is called now and then with how many readings are ready.

    Raises:
        SimError: a group speaks Sparkplug B.
    """
    if any(group.format == "sparkplug_b" for group in scenario.groups):
        raise SimError("--rate max: Sparkplug B depends on the connection and cannot be encoded beforehand")
    plans = plan_devices(scenario, seed, start_us=start_us)
    publishes: dict[str, list[Publish]] = {plan.firmware.device_id: [] for plan in plans}
    pairs = zip(scenario.groups, scenario.publish_schedules(), strict=True)
    group_schedules = [
        (
            schedule,
            scenario.readings_in(group),
            _order_sensors([plan.firmware for plan in plans if plan.group is group]),
        )
        for group, schedule in pairs
        if not group.hostile
    ]
    made = number = 0
    while made < readings:
        for schedule, each, turns in group_schedules:
            firmware, sensor = turns[number % len(turns)]
            at_s = schedule.time_of(number) * scenario.speed
            outcome = firmware.publish(
                sensor,
                truth,
                at_s=at_s,
                now_us=start_us + int(at_s * 1e6),
                readings=each,
                spacing_us=max(1000, int(len(turns) / schedule.per_s / each * scenario.speed * 1e6)),
            )
            publishes[firmware.device_id] += outcome.publishes
            made += each
        number += 1
        if number % _REPORT_EVERY == 0:
            truth.flush()
            encoded(made)
    truth.flush()
    return publishes


def _order_sensors(members: list[Firmware]) -> list[tuple[Firmware, Sensor]]:
    most = max(len(firmware.sensors) for firmware in members)
    return [(firmware, firmware.sensors[turn]) for turn in range(most) for firmware in members]


@dataclass(slots=True)
class LoadConnection:
    """One device's connection and how far it is. Positions count its publishes from 0.

    Attributes:
        done: publishes before this one are all acknowledged.
    """

    device_id: str
    publishes: list[Publish]
    broker: BrokerAddress
    window: int
    counters: FleetCounters
    settled: Callable[[Publish, int], None]
    done: int = 0
    _sent: int = 0
    _acknowledged: set[int] = field(default_factory=set)
    _ends: list[int] = field(default_factory=list)
    _bytes: bytes = b""
    _written: int = 0
    _arrived: bytearray = field(default_factory=bytearray)
    _connack_left: bool = True
    socket: socket.socket | None = None
    retry_at_s: float = 0.0

    def __post_init__(self) -> None:
        packets = [
            encode_publish(p.topic.encode(), p.payload, packet_id=at % _PACKET_IDS + 1)
            for at, p in enumerate(self.publishes)
        ]
        end = 0
        for packet in packets:
            end += len(packet)
            self._ends.append(end)
        self._bytes = b"".join(packets)

    @property
    def finished(self) -> bool:
        """Whether everything is acknowledged."""
        return self.done == len(self.publishes)

    def connect(self) -> None:
        """Begin a connection, from the first publish that is not acknowledged.

        Raises:
            OSError: it cannot be made.
        """
        connection = socket.create_connection((self.broker.host, self.broker.port), timeout=10)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(encode_connect(self.device_id.encode()))
        connection.setblocking(False)
        self.socket, self._connack_left = connection, True
        self._arrived.clear()
        self.counters.publishes_resent += self._sent - self.done
        self._sent = self.done
        self._written = self._ends[self.done - 1] if self.done else 0

    def write(self) -> None:
        """Send what the window and the socket take."""
        if self._connack_left or self.socket is None:
            return
        until = min(len(self.publishes), self.done + self.window)
        if until > self._sent:
            self.counters.publishes_sent += until - self._sent
            self._sent = until
        limit = self._ends[until - 1] if until else 0
        while self._written < limit:
            try:
                self._written += self.socket.send(memoryview(self._bytes)[self._written : limit])
            except BlockingIOError:
                return

    def read(self) -> None:
        """Take what has come; acknowledgements are settled.

        Raises:
            ConnectionError: the server closed, or sent what is no acknowledgement.
        """
        assert self.socket is not None
        try:
            data = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        if not data:
            raise ConnectionResetError("the server closed the connection")
        self._arrived += data
        at, arrived = 0, self._arrived
        while len(arrived) - at >= 2 and len(arrived) - at >= 2 + arrived[at + 1]:  # noqa: PLR2004 - a fixed header
            kind, size = arrived[at], arrived[at + 1]
            if self._connack_left:
                if kind != 0x20 or arrived[at + 3]:  # noqa: PLR2004 - CONNACK
                    raise ConnectionRefusedError(f"no connection: {bytes(arrived[at : at + 8])!r}")
                self._connack_left = False
            elif kind == _PUBACK:
                reason = arrived[at + 4] if size > 2 else 0  # noqa: PLR2004 - MQTT 5 section 3.4.2.1
                self._settle(int.from_bytes(arrived[at + 2 : at + 4], "big"), reason)
            else:
                raise ConnectionResetError(f"the server sent a packet of type {kind >> 4}")
            at += 2 + size
        del arrived[:at]

    def close(self) -> None:
        """Close the socket."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def _settle(self, packet_id: int, reason: int) -> None:
        at = self.done + (packet_id - 1 - self.done) % _PACKET_IDS
        if at >= len(self.publishes) or at in self._acknowledged:
            return
        publish = self.publishes[at]
        self._acknowledged.add(at)
        while self.done in self._acknowledged:
            self._acknowledged.discard(self.done)
            self.done += 1
        if reason < _REFUSED_FROM_CODE:
            self.counters.acknowledged += publish.rows
        else:
            self.counters.refused += publish.rows
        self.settled(publish, reason)


class LoadGenerator:
    """All connections at once.

    Args:
        publishes: by device, as `encode_ahead` made them.
    """

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
            raise SimError("--rate max: only mqtt:// without a user is understood")
        self._truth = truth
        self.counters = counters
        self.senders = [
            LoadConnection(name, todo, broker, window, counters, self._settled)
            for name, todo in publishes.items()
            if todo
        ]
        self._unflushed = 0
        self._started_s = time.monotonic()
        self.took_s = 0.0

    @property
    def outstanding(self) -> int:
        """Publishes not yet acknowledged."""
        return sum(len(sender.publishes) - sender.done for sender in self.senders)

    def progress(self) -> dict[str, object]:
        """The counters as progress.json shows them."""
        elapsed_s = self.took_s or time.monotonic() - self._started_s
        return {
            **asdict(self.counters),
            "devices": len(self.senders),
            "outstanding_publishes": self.outstanding,
            "elapsed_s": round(elapsed_s, 2),
            "readings_per_s": round(self.counters.acknowledged / max(elapsed_s, 1e-9)),
            "producing": not self.took_s,
        }

    def run(self, stop: threading.Event, *, seconds: float, connect_timeout_s: float) -> None:
        """Send everything, or for so many seconds (0: no limit), or until `stop`.

        Raises:
            SimError: nothing could be reached in time.
        """
        poll = select.epoll()
        by_fd: dict[int, LoadConnection] = {}
        for sender in self.senders:
            self._connected(sender, poll, by_fd)
        self._started_s = begin_s = time.monotonic()
        while not stop.is_set() and not all(s.finished for s in self.senders):
            now_s = time.monotonic()
            if seconds and now_s - begin_s >= seconds:
                break
            if not by_fd and not self.counters.acknowledged and now_s - begin_s >= connect_timeout_s:
                raise SimError(
                    f"--broker: not reachable within {connect_timeout_s:g} s: {self.counters.last_fault}"
                )
            for fd, event in poll.poll(_POLL_S):
                self._serve(fd, event, by_fd)
            for sender in self.senders:
                if sender.socket is None and not sender.finished and now_s >= sender.retry_at_s:
                    self._connected(sender, poll, by_fd)
        self.took_s = time.monotonic() - begin_s
        for sender in self.senders:
            sender.close()
        poll.close()
        self._truth.flush()
        self._truth.progress(self.progress())

    def _serve(self, fd: int, event: int, by_fd: dict[int, LoadConnection]) -> None:
        sender = by_fd[fd]
        try:
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                sender.read()
            sender.write()
        except OSError as fault:
            self.counters.last_fault = str(fault)
            self._lost(sender, fd, by_fd)

    def _connected(
        self, sender: LoadConnection, poll: select.epoll, by_fd: dict[int, LoadConnection]
    ) -> None:
        try:
            sender.connect()
        except OSError as fault:
            self.counters.last_fault = str(fault)
            sender.retry_at_s = time.monotonic() + _RETRY_S
            return
        assert sender.socket is not None
        self.counters.devices_connected += 1
        by_fd[sender.socket.fileno()] = sender
        poll.register(sender.socket.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _lost(self, sender: LoadConnection, fd: int, by_fd: dict[int, LoadConnection]) -> None:
        by_fd.pop(fd, None)
        sender.close()
        sender.retry_at_s = time.monotonic() + _RETRY_S
        self.counters.devices_connected -= 1
        self.counters.reconnects += 1

    def _settled(self, publish: Publish, reason: int) -> None:
        if not publish.rows:
            return
        self._truth.settle(publish.first_row, publish.rows, reason, time.time_ns() // 1000)
        self._unflushed += publish.rows
        if self._unflushed >= _FLUSH_ROWS:
            self._unflushed = 0
            self._truth.flush()
