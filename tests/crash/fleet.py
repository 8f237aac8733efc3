"""Devices for crash tests: MQTT 3.1.1 written by hand on raw sockets, QoS 1, with a record of every answer.

A device numbers its readings 0, 1, 2, ...; reading n has the time `time_us_of(n)` and the value
`value_of(n)`, so that what a spool holds can be checked without keeping the readings. It keeps `window`
publishes in flight, and sends those without an answer again on its next connection, as real devices do.
"""

from __future__ import annotations

import asyncio
import json
import struct
from dataclasses import dataclass, field

import numpy as np

TYPE = "temperature"
_FIRST_US = 1_750_000_000_000_000
_STEP_US = 250_000
_CONNECT = b"\x00\x04MQTT\x04\x00\x00\x3c"  # protocol level 4, session kept, keep-alive 60 s


def time_us_of(n):
    return _FIRST_US + n * _STEP_US


def number_of(time_us):
    return (time_us - _FIRST_US) // _STEP_US


def value_of(n):
    return n / 4


def _framed(first: int, body: bytes) -> bytes:
    length = bytearray()
    rest = len(body)
    while True:
        rest, low = divmod(rest, 128)
        length.append(low | 128 if rest else low)
        if not rest:
            return bytes((first,)) + bytes(length) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack(">H", len(data)) + data


@dataclass
class Device:
    """One device over all its connections.

    Attributes:
        sent: how often reading n was sent, at index n.
        acked: whether reading n was acknowledged, at index n.
    """

    name: str
    readings_per_publish: int = 1
    window: int = 4
    sent: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int32))
    acked: np.ndarray = field(default_factory=lambda: np.zeros(256, np.bool_))
    unanswered: dict[int, range] = field(default_factory=dict)
    next_reading: int = 0
    next_packet: int = 1
    quiet: bool = False

    def _publish(self, packet_id: int, numbers: range, *, again: bool) -> bytes:
        if numbers.stop > len(self.sent):
            self.sent = np.concatenate([self.sent, np.zeros_like(self.sent)])
            self.acked = np.concatenate([self.acked, np.zeros_like(self.acked)])
        self.sent[numbers.start : numbers.stop] += 1
        readings = [{"value": value_of(n), "ts": time_us_of(n), "seq": n} for n in numbers]
        payload = json.dumps(readings[0] if len(readings) == 1 else readings).encode()
        head = _text(f"sensors/{self.name}/{TYPE}") + struct.pack(">H", packet_id)
        return _framed(0x3A if again else 0x32, head + payload)

    def connected(self) -> bytes:
        """What to send on a new connection: CONNECT, what is unanswered, then new readings."""
        again = [self._publish(p, numbers, again=True) for p, numbers in self.unanswered.items()]
        return b"".join([_framed(0x10, _CONNECT + _text(self.name)), *again, self.fill()])

    def fill(self) -> bytes:
        """New publishes up to the window; none when quiet."""
        out = []
        while not self.quiet and len(self.unanswered) < self.window:
            numbers = range(self.next_reading, self.next_reading + self.readings_per_publish)
            self.next_reading = numbers.stop
            while self.next_packet in self.unanswered:
                self.next_packet = self.next_packet % 65535 + 1
            self.unanswered[self.next_packet] = numbers
            out.append(self._publish(self.next_packet, numbers, again=False))
            self.next_packet = self.next_packet % 65535 + 1
        return b"".join(out)

    def answered(self, packet_id: int) -> None:
        numbers = self.unanswered.pop(packet_id)
        self.acked[numbers.start : numbers.stop] = True


class _Link(asyncio.Protocol):
    def __init__(self, device: Device) -> None:
        self.device = device
        self.closed = asyncio.get_running_loop().create_future()
        self._data = b""

    def connection_made(self, transport) -> None:
        self.transport = transport
        transport.write(self.device.connected())

    def data_received(self, data: bytes) -> None:
        data = self._data + data
        whole = len(data) & ~3  # CONNACK and PUBACK of 3.1.1 are four bytes each
        self._data = data[whole:]
        for first, length, packet_id in struct.iter_unpack(">BBH", data[:whole]):
            assert length == 2
            if first == 0x40:
                self.device.answered(packet_id)
            else:
                assert (first, packet_id & 0xFF) == (0x20, 0), "the gateway refused the connection"
        self.transport.write(self.device.fill())

    def connection_lost(self, _exc) -> None:
        self.closed.set_result(None)


class Fleet:
    """Devices that connect, and connect again whenever the gateway is gone, until `stop`."""

    def __init__(self, devices: int, *, window: int = 4) -> None:
        self.devices = [
            Device(f"d{i}", readings_per_publish=(1, 1, 5)[i % 3], window=window) for i in range(devices)
        ]
        self.port = 0
        self._tasks: list[asyncio.Task] = []

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._keep_connected(device)) for device in self.devices]
        return self

    async def __aexit__(self, *_):
        for task in self._tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self._tasks, return_exceptions=True):
            if outcome is not None and not isinstance(outcome, asyncio.CancelledError):
                raise outcome

    @property
    def acked(self) -> int:
        """Readings acknowledged so far."""
        return sum(int(d.acked.sum()) for d in self.devices)

    async def settled(self, within_s: float) -> None:
        """Send nothing new, and wait until everything sent is acknowledged."""
        for device in self.devices:
            device.quiet = True
        async with asyncio.timeout(within_s):
            while any(device.unanswered for device in self.devices):  # noqa: ASYNC110 - many devices, one look
                await asyncio.sleep(0.02)
        for device in self.devices:
            device.quiet = False

    async def _keep_connected(self, device: Device) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                transport, link = await loop.create_connection(lambda: _Link(device), "127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.03)
                continue
            try:
                await link.closed
            finally:
                transport.abort()
