"""The load generator: its own process, raw sockets, publishes encoded before the clock starts.

    python -m benchmarks.load '{"port": 1883, "connections": 100, "window": 50, "seconds": 4, ...}'

Prints one JSON object. Every acknowledgement is compared, byte for byte and in order, with the one its publish
must get. Without `paced_per_s` each connection keeps `window` publishes in flight. With it publishes leave at
that rate, round the connections, and latency counts from when a publish was due, not from when it could leave.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from itertools import pairwise

import msgspec
import numpy as np

from benchmarks import processes, traffic

_CONNECT = b"\x10%c\x00\x04MQTT\x05\x02\x00\x00\x00\x00%c%b"
_ACK_BYTES = 4
_DRAIN_S = 20.0


class Order(msgspec.Struct, kw_only=True):
    """What to do.

    Attributes:
        first: number of the first reading of each series (see `traffic`).
        budget_bytes: publishes are encoded up to this size; the run ends early when they are used up.
        warm_up_s: publishes of the first moments are not counted.
        watch_pid: a process whose CPU time is taken over the counted seconds; 0 for none.
        publishes: send exactly so many and count all of them; 0 to go by time.
    """

    port: int
    connections: int = 100
    window: int = 50
    seconds: float = 4.0
    per_publish: int = 1
    first: int = 0
    origin_us: int = 0
    paced_per_s: float = 0.0
    budget_bytes: int = 640 << 20
    warm_up_s: float = 0.5
    watch_pid: int = 0
    publishes: int = 0


class Outcome(msgspec.Struct, kw_only=True):
    """What happened. Rates and CPU are of the counted seconds, the totals of everything.

    Attributes:
        total_readings, seq_sum: of all publishes acknowledged, the warm-up's too.
        next_first: the number of the first reading that was not encoded.
        latency_ms: percentiles from due to acknowledged, when paced.
        behind_ms: how late a publish left at worst, when paced.
        ran_dry: the encoded publishes were used up before the time was.
    """

    counted_s: float
    publishes_per_s: float
    generator_cpu_share: float
    watched_cpu_s: float
    watched_publishes: int
    total_publishes: int
    total_readings: int
    seq_sum: int
    next_first: int
    ran_dry: bool
    latency_ms: dict[str, float] = {}
    behind_ms: float = 0.0


class _Device:
    """One connection: what it has sent and what of it was acknowledged, in publishes."""

    def __init__(self, number: int, order: Order, publishes: int) -> None:
        stream = traffic.stream_of(
            number,
            publishes=publishes,
            per_publish=order.per_publish,
            first=order.first,
            origin_us=order.origin_us,
        )
        self.publishes, self.publish_bytes = stream.packets.shape
        self.seqs = stream.seqs
        self._bytes = memoryview(stream.packets.reshape(-1))
        self._expected = stream.acknowledgements
        self._sent_bytes = 0
        self._allowed_bytes = 0
        self._acknowledged_bytes = 0
        self.socket = _connected(order.port, number)

    @property
    def acknowledged(self) -> int:
        """Publishes acknowledged."""
        return self._acknowledged_bytes // _ACK_BYTES

    def allow(self, publishes: int) -> bool:
        """Send up to the first `publishes` in all; whether everything allowed has left."""
        self._allowed_bytes = min(publishes, self.publishes) * self.publish_bytes
        return self.flush()

    def flush(self) -> bool:
        """Send what the socket takes of what is allowed; whether nothing is left."""
        while self._sent_bytes < self._allowed_bytes:
            try:
                self._sent_bytes += self.socket.send(self._bytes[self._sent_bytes : self._allowed_bytes])
            except BlockingIOError:
                return False
        return True

    def receive(self) -> int:
        """Take acknowledgements; returns how many have come in all."""
        data = self.socket.recv(1 << 18)
        at = self._acknowledged_bytes
        if not data or data != self._expected[at : at + len(data)]:
            raise SystemExit(f"unexpected bytes for acknowledgement {at // _ACK_BYTES}: {data[:16]!r}")
        self._acknowledged_bytes = at + len(data)
        return self._acknowledged_bytes // _ACK_BYTES


class _Meter:
    """The counted seconds: publishes acknowledged, own CPU, the watched process's CPU."""

    def __init__(self, watch_pid: int) -> None:
        self._pid = watch_pid
        self._marks: list[tuple[float, int, float, float]] = []

    def mark(self, acknowledged: int) -> None:
        """The beginning or the end."""
        watched = processes.cpu_s(self._pid) if self._pid else 0.0
        self._marks.append((time.monotonic(), acknowledged, time.process_time(), watched))

    def differences(self) -> tuple[float, int, float, float]:
        """Seconds, publishes, own CPU seconds, watched CPU seconds."""
        begin, end = self._marks[0], self._marks[-1]
        return end[0] - begin[0], end[1] - begin[1], end[2] - begin[2], end[3] - begin[3]


def run(order: Order) -> Outcome:
    """Do what is ordered."""
    devices = [_Device(number, order, _each(order)) for number in range(order.connections)]
    for device in devices:
        device.socket.setblocking(False)
    meter = _Meter(order.watch_pid)
    if order.paced_per_s:
        due, acknowledged, behind_s = _paced(devices, order, meter)
    else:
        due, acknowledged, behind_s = np.empty(0), np.empty(0), 0.0
        _at_once(devices, order, meter)
    counted_s, publishes, own_s, watched_s = meter.differences()
    for device in devices:
        device.socket.close()
    total = sum(device.acknowledged for device in devices)
    return Outcome(
        counted_s=counted_s,
        publishes_per_s=publishes / counted_s,
        generator_cpu_share=own_s / counted_s,
        watched_cpu_s=watched_s,
        watched_publishes=publishes,
        total_publishes=total,
        total_readings=total * order.per_publish,
        seq_sum=sum(int(device.seqs[: device.acknowledged].sum()) for device in devices),
        next_first=order.first + devices[0].publishes // traffic.SERIES_PER_DEVICE * order.per_publish,
        ran_dry=all(device.acknowledged == device.publishes for device in devices) and not order.publishes,
        latency_ms=_percentiles_ms(acknowledged - due) if len(due) else {},
        behind_ms=behind_s * 1e3,
    )


def _each(order: Order) -> int:
    """Publishes to encode for each device."""
    if order.publishes:
        return -(-order.publishes // order.connections)
    fitting = order.budget_bytes // traffic.publish_bytes(order.per_publish)
    if order.paced_per_s:
        fitting = min(fitting, int(order.paced_per_s * (order.seconds + order.warm_up_s)) + order.connections)
    return max(traffic.SERIES_PER_DEVICE, fitting // order.connections)


def _connected(port: int, number: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client_id = b"bench-%05d" % number
    connection.sendall(_CONNECT % (13 + len(client_id), len(client_id), client_id))
    answer = connection.recv(256)
    if answer[:1] != b"\x20" or answer[3]:
        raise SystemExit(f"not connected: {answer!r}")
    return connection


def _at_once(devices: list[_Device], order: Order, meter: _Meter) -> None:
    """Keep every window full until the time is up, then wait for what is in flight."""
    poll, by_fd = _polled(devices)
    begin = time.monotonic() + (0 if order.publishes else order.warm_up_s)
    end = begin + order.seconds if not order.publishes else float("inf")
    stop = end + _DRAIN_S if not order.publishes else begin + 600
    stages, acknowledged = iter((begin, end)), 0
    next_mark = next(stages)
    if order.publishes:
        meter.mark(0)
        next_mark = end
    sending = True
    for device in devices:
        device.allow(order.window)
    in_flight = {device: min(order.window, device.publishes) for device in devices}
    total = sum(device.publishes for device in devices)
    while acknowledged < total:
        now = time.monotonic()
        if now >= next_mark:
            meter.mark(acknowledged)
            sending = next_mark == begin
            next_mark = next(stages, float("inf"))
            if not sending:
                total = acknowledged + sum(n - d.acknowledged for d, n in in_flight.items())
                end = stop
        if now > stop:
            raise SystemExit(f"{total - acknowledged} publishes were not acknowledged in time")
        for fd, event in poll.poll(0.2):
            device = by_fd[fd]
            if event & select.EPOLLIN:
                before = device.acknowledged
                arrived = device.receive()
                acknowledged += arrived - before
                if sending:
                    in_flight[device] = min(arrived + order.window, device.publishes)
                    device.allow(in_flight[device])
            else:
                device.flush()
    if next_mark != float("inf") or order.publishes:
        meter.mark(acknowledged)


def _paced(
    devices: list[_Device], order: Order, meter: _Meter
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], np.ndarray[tuple[int], np.dtype[np.float64]], float]:
    """Publish at a rate; returns when each counted publish was due and acknowledged, and the worst delay."""
    poll, by_fd = _polled(devices)
    number_of = {device.socket.fileno(): number for number, device in enumerate(devices)}
    total = min(int(order.paced_per_s * (order.seconds + order.warm_up_s)), len(devices) * devices[0].publishes)
    uncounted = int(order.paced_per_s * order.warm_up_s)
    arrivals: list[tuple[int, int, int, float]] = []
    sent, acknowledged, behind_s = 0, 0, 0.0
    start = time.monotonic()
    marked = False
    while acknowledged < total:
        now = time.monotonic()
        owed = min(total, int((now - start) * order.paced_per_s) + 1)
        if not marked and owed > uncounted:
            meter.mark(acknowledged)
            marked = True
        if sent < owed and sent > uncounted:
            behind_s = max(behind_s, now - start - sent / order.paced_per_s)
        for position in range(sent, owed):
            devices[position % len(devices)].allow(position // len(devices) + 1)
        sent = owed
        wait_s = start + sent / order.paced_per_s - time.monotonic() if sent < total else 0.2
        for fd, event in poll.poll(max(0.0, wait_s)):
            device = by_fd[fd]
            if event & select.EPOLLIN:
                before = device.acknowledged
                arrived = device.receive()
                arrivals.append((number_of[fd], before, arrived, time.monotonic()))
                acknowledged += arrived - before
            else:
                device.flush()
        if now > start + total / order.paced_per_s + _DRAIN_S:
            raise SystemExit(f"{total - acknowledged} publishes were not acknowledged in time")
    meter.mark(acknowledged)
    at = np.zeros(total)
    for number, first, after, moment in arrivals:
        at[np.arange(first, after) * len(devices) + number] = moment
    due = start + np.arange(total) / order.paced_per_s
    return due[uncounted:], at[uncounted:], behind_s


def _polled(devices: list[_Device]) -> tuple[select.epoll, dict[int, _Device]]:
    poll = select.epoll()
    for device in devices:
        poll.register(device.socket.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
    return poll, {device.socket.fileno(): device for device in devices}


def _percentiles_ms(seconds: np.ndarray[tuple[int], np.dtype[np.float64]]) -> dict[str, float]:
    points = (50, 90, 99, 99.9, 100)
    names = ("p50", "p90", "p99", "p999", "max")
    assert all(low < high for low, high in pairwise(points))
    return {n: float(v) * 1e3 for n, v in zip(names, np.percentile(seconds, points), strict=True)}


if __name__ == "__main__":
    print(msgspec.json.encode(run(msgspec.json.decode(sys.argv[1], type=Order))).decode())
