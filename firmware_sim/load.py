"""`--rate max`: as fast as the server acknowledges, from packets encoded before the clock starts.

The readings are those of the same scenario at its own rate, in the record before anything is sent. Each
device has a connection of its own, raw and non-blocking, with `window` publishes in flight at QoS 1; a lost
connection is made again and what was not acknowledged is sent again. MQTT 5 only, no TLS: this is for
finding out what a gateway takes, and spends itself as little as it can.
"""

from __future__ import annotations

import select
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from firmware_sim.errors import SimError
from firmware_sim.hostile import connect_packet, publish_packet
from firmware_sim.planning import plan_devices

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from firmware_sim.broker import Broker
    from firmware_sim.device import Counters
    from firmware_sim.firmware import Firmware, Publish, Sensor
    from firmware_sim.scenarios import Scenario
    from firmware_sim.truth import TruthWriter

_PACKET_IDS = 65_535
_PUBACK = 0x40
_FLUSH_ROWS = 100_000
_RETRY_S = 0.2
_POLL_S = 0.2
_REPORT_EVERY = 1_000
_REFUSED = 128


def encode_ahead(
    scenario: Scenario,
    truth: TruthWriter,
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
    pairs = zip(scenario.groups, scenario.beats(), strict=True)
    troops = [
        (beat, scenario.readings_in(group), _turns([plan.firmware for plan in plans if plan.group is group]))
        for group, beat in pairs
        if not group.hostile
    ]
    made = number = 0
    while made < readings:
        for beat, each, turns in troops:
            firmware, sensor = turns[number % len(turns)]
            at_s = beat.time_of(number) * scenario.speed
            happened = firmware.publish(
                sensor,
                truth,
                at_s=at_s,
                now_us=start_us + int(at_s * 1e6),
                readings=each,
                spacing_us=max(1000, int(len(turns) / beat.per_s / each * scenario.speed * 1e6)),
            )
            publishes[firmware.device_id] += happened.publishes
            made += each
        number += 1
        if number % _REPORT_EVERY == 0:
            truth.flush()
            encoded(made)
    truth.flush()
    return publishes


def _turns(members: list[Firmware]) -> list[tuple[Firmware, Sensor]]:
    most = max(len(firmware.sensors) for firmware in members)
    return [(firmware, firmware.sensors[turn]) for turn in range(most) for firmware in members]


@dataclass(slots=True)
class Sender:
    """One device's connection and how far it is. Positions count its publishes from 0.

    Attributes:
        done: publishes before this one are all acknowledged.
    """

    device_id: str
    publishes: list[Publish]
    broker: Broker
    window: int
    counters: Counters
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
            publish_packet(p.topic.encode(), p.payload, packet_id=at % _PACKET_IDS + 1)
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
        connection.sendall(connect_packet(self.device_id.encode()))
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
        if reason < _REFUSED:
            self.counters.acknowledged += publish.rows
        else:
            self.counters.refused += publish.rows
        self.settled(publish, reason)


class Load:
    """All connections at once.

    Args:
        publishes: by device, as `encode_ahead` made them.
    """

    def __init__(
        self,
        publishes: dict[str, list[Publish]],
        broker: Broker,
        truth: TruthWriter,
        counters: Counters,
        *,
        window: int,
    ) -> None:
        if broker.tls is not None or broker.username:
            raise SimError("--rate max: only mqtt:// without a user is understood")
        self._truth = truth
        self.counters = counters
        self.senders = [
            Sender(name, todo, broker, window, counters, self._settled)
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
        by_fd: dict[int, Sender] = {}
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

    def _serve(self, fd: int, event: int, by_fd: dict[int, Sender]) -> None:
        sender = by_fd[fd]
        try:
            if event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                sender.read()
            sender.write()
        except OSError as fault:
            self.counters.last_fault = str(fault)
            self._lost(sender, fd, by_fd)

    def _connected(self, sender: Sender, poll: select.epoll, by_fd: dict[int, Sender]) -> None:
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

    def _lost(self, sender: Sender, fd: int, by_fd: dict[int, Sender]) -> None:
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
