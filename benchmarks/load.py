"""The load generator: its own process, raw sockets, publishes encoded before the clock starts.

    python -m benchmarks.load '{"port": 1883, "connections": 100, "window": 50, "seconds": 4, ...}'

Prints one JSON object. Every acknowledgement is compared, byte for byte and in order, with the one its
publish must get. Without `paced_per_s` each connection keeps `window` publishes in flight. With it publishes
leave at that rate, round the connections, and latency counts from when a publish was due, not from when it
could leave.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from benchmarks import processes, traffic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_CONNECT = b"\x10%c\x00\x04MQTT\x05\x02\x00\x00\x00\x00%c%b"
_ACK_BYTES = 4
_QUIET_S = 30.0
_BOTH = 2
_SHORTEST_S = 0.05
_FASTEST_PER_S = 500_000


class LoadOptions(msgspec.Struct, kw_only=True):
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

    def __init__(self, number: int, options: LoadOptions, publishes: int) -> None:
        stream = traffic.build_stream(
            number,
            publishes=publishes,
            per_publish=options.per_publish,
            first=options.first,
            origin_us=options.origin_us,
        )
        self.publishes = len(stream.packets)
        self.publish_bytes = len(stream.packets[0])
        self.seqs = stream.seqs
        self._bytes = stream.packets.reshape(-1).data
        self._expected = stream.acknowledgements
        self._sent_bytes = 0
        self._allowed_bytes = 0
        self._acknowledged_bytes = 0
        self.socket = _connect(options.port, number)

    @property
    def acknowledged(self) -> int:
        """Publishes acknowledged."""
        return self._acknowledged_bytes // _ACK_BYTES

    def allow(self, publishes: int) -> int:
        """Send up to the first `publishes` in all; returns how many more that are than before."""
        before = self._allowed_bytes
        self._allowed_bytes = max(before, min(publishes, self.publishes) * self.publish_bytes)
        self.flush()
        publish_bytes: int = self.publish_bytes
        return (self._allowed_bytes - before) // publish_bytes

    def flush(self) -> None:
        """Send as much of what is allowed as the socket accepts."""
        while self._sent_bytes < self._allowed_bytes:
            try:
                self._sent_bytes += self.socket.send(self._bytes[self._sent_bytes : self._allowed_bytes])
            except BlockingIOError:
                return

    def receive(self) -> int:
        """Read acknowledgements; returns how many have arrived in total."""
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

    @property
    def marks(self) -> int:
        """How many there are: one after the beginning, two after the end."""
        return len(self._marks)

    def mark(self, acknowledged: int) -> None:
        """The beginning or the end."""
        watched = processes.cpu_s(self._pid) if self._pid else 0.0
        self._marks.append((time.monotonic(), acknowledged, time.process_time(), watched))

    def differences(self) -> tuple[float, int, float, float]:
        """Seconds, publishes, own CPU seconds, watched CPU seconds."""
        if self.marks < _BOTH or self._marks[1][0] - self._marks[0][0] < _SHORTEST_S:
            raise SystemExit("the publishes were used up before anything was measured")
        begin, end = self._marks
        return end[0] - begin[0], end[1] - begin[1], end[2] - begin[2], end[3] - begin[3]


def run(options: LoadOptions) -> Outcome:
    """Send the publishes and measure."""
    devices = [
        _Device(number, options, _publishes_per_device(options)) for number in range(options.connections)
    ]
    for device in devices:
        device.socket.setblocking(False)
    meter = _Meter(options.watch_pid)
    if options.paced_per_s:
        due, acknowledged, behind_s = _run_paced(devices, options, meter)
    else:
        due, acknowledged, behind_s = np.empty(0), np.empty(0), 0.0
        _run_unpaced(devices, options, meter)
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
        total_readings=total * options.per_publish,
        seq_sum=sum(int(device.seqs[: device.acknowledged].sum()) for device in devices),
        next_first=options.first + devices[0].publishes // traffic.SERIES_PER_DEVICE * options.per_publish,
        ran_dry=not (options.publishes or options.paced_per_s)
        and all(device.acknowledged == device.publishes for device in devices),
        latency_ms=_percentiles_ms(acknowledged - due) if len(due) else {},
        behind_ms=behind_s * 1e3,
    )


def _publishes_per_device(options: LoadOptions) -> int:
    """Publishes to encode for each device."""
    if options.publishes:
        return -(-options.publishes // options.connections)
    fitting = options.budget_bytes // traffic.publish_bytes(options.per_publish)
    fastest_per_s = options.paced_per_s or _FASTEST_PER_S
    fitting = min(fitting, int(fastest_per_s * (options.seconds + options.warm_up_s)) + options.connections)
    return max(traffic.SERIES_PER_DEVICE, fitting // options.connections)


def _connect(port: int, number: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client_id = b"bench-%05d" % number
    connection.sendall(_CONNECT % (13 + len(client_id), len(client_id), client_id))
    answer = connection.recv(256)
    if answer[:1] != b"\x20" or answer[3]:
        raise SystemExit(f"not connected: {answer!r}")
    return connection


def _run_unpaced(devices: list[_Device], options: LoadOptions, meter: _Meter) -> None:
    """Keep every window full until the time is up or nothing is left, then wait for what is in flight."""
    poll, by_fd = _build_poll(devices)
    now = time.monotonic()
    begin = now if options.publishes else now + options.warm_up_s
    end = float("inf") if options.publishes else begin + options.seconds
    sent = sum(device.allow(options.window) for device in devices)
    acknowledged = acknowledged_before = 0
    quiet_since = now
    while acknowledged < sent:
        now = time.monotonic()
        if meter.marks == 0 and now >= begin:
            meter.mark(acknowledged)
        if meter.marks == 1 and now >= end:
            meter.mark(acknowledged)
        for fd, event in poll.poll(0.2):
            device = by_fd[fd]
            if event & select.EPOLLIN:
                before = device.acknowledged
                arrived = device.receive()
                acknowledged += arrived - before
                if meter.marks < _BOTH:
                    sent += device.allow(arrived + options.window)
            if event & select.EPOLLOUT:
                device.flush()
        quiet_since = _check_progress(
            now, quiet_since, acknowledged - acknowledged_before, sent - acknowledged
        )
        acknowledged_before = acknowledged
    if meter.marks < _BOTH:
        meter.mark(acknowledged)


def _run_paced(devices: list[_Device], options: LoadOptions, meter: _Meter) -> tuple[Floats, Floats, float]:
    """Publish at a rate; returns when each counted publish was due and acknowledged, and the worst delay."""
    poll, by_fd = _build_poll(devices)
    assign_number = {device.socket.fileno(): number for number, device in enumerate(devices)}
    rate = options.paced_per_s
    total = min(int(rate * (options.seconds + options.warm_up_s)), len(devices) * devices[0].publishes)
    uncounted = int(rate * options.warm_up_s)
    arrivals: list[tuple[int, int, int, float]] = []
    sent, acknowledged, behind_s = 0, 0, 0.0
    start = quiet_since = time.monotonic()
    while acknowledged < total:
        now = time.monotonic()
        owed = min(total, int((now - start) * rate) + 1)
        if meter.marks == 0 and owed > uncounted:
            meter.mark(acknowledged)
        if uncounted < sent < owed:
            behind_s = max(behind_s, now - start - sent / rate)
        for position in range(sent, owed):
            devices[position % len(devices)].allow(position // len(devices) + 1)
        sent = owed
        wait_s = start + sent / rate - time.monotonic() if sent < total else 0.2
        before_poll = acknowledged
        for fd, event in poll.poll(max(0.0, wait_s)):
            device = by_fd[fd]
            if event & select.EPOLLIN:
                before = device.acknowledged
                arrived = device.receive()
                arrivals.append((assign_number[fd], before, arrived, time.monotonic()))
                acknowledged += arrived - before
            if event & select.EPOLLOUT:
                device.flush()
        quiet_since = _check_progress(now, quiet_since, acknowledged - before_poll, sent - acknowledged)
    meter.mark(acknowledged)
    at = np.zeros(total)
    for number, first, after, moment in arrivals:
        at[np.arange(first, after) * len(devices) + number] = moment
    due = start + np.arange(total) / rate
    return due[uncounted:], at[uncounted:], behind_s


def _check_progress(now: float, quiet_since: float, progress: int, in_flight: int) -> float:
    """Since when nothing has been acknowledged though something is in flight; ends the run after a while."""
    if progress or not in_flight:
        return now
    if now - quiet_since > _QUIET_S:
        raise SystemExit(
            f"nothing was acknowledged for {_QUIET_S:.0f} s; {in_flight} publishes are in flight"
        )
    return quiet_since


def _build_poll(devices: list[_Device]) -> tuple[select.epoll, dict[int, _Device]]:
    poll = select.epoll()
    for device in devices:
        poll.register(device.socket.fileno(), select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
    return poll, {device.socket.fileno(): device for device in devices}


def _percentiles_ms(seconds: Floats) -> dict[str, float]:
    points = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9, "max": 100}
    return {name: float(np.percentile(seconds, point)) * 1e3 for name, point in points.items()}


if __name__ == "__main__":
    print(msgspec.json.encode(run(msgspec.json.decode(sys.argv[1], type=LoadOptions))).decode())
