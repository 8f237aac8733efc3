"""A paced publisher for row latencies: its own process, single readings, QoS 1.

    python -m benchmarks.pacing PORT PUBLISHES_PER_S SECONDS

Prints when its first publish was due, in seconds of the system's monotonic clock; publish k is due
k / PUBLISHES_PER_S later.
"""

from __future__ import annotations

import socket
import sys
import time

from benchmarks import traffic

_CONNECT = b"\x10\x12\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x05pace%c"
_CONNECTIONS = 10
_TICK_S = 0.001
_ORIGIN_US = 1_770_000_000_000_000


def run(port: int, per_s: int, seconds: float) -> float:
    """Publish; returns when the first publish was due."""
    total = int(per_s * seconds)
    each = -(-total // _CONNECTIONS)
    streams = [
        traffic.build_stream(n, publishes=each, per_publish=1, first=per_s * 1000, origin_us=_ORIGIN_US)
        for n in range(_CONNECTIONS)
    ]
    sockets = [_connect(port, number) for number in range(_CONNECTIONS)]
    start = time.monotonic() + 0.1
    sent = 0
    while sent < total:
        owed = min(total, int((time.monotonic() - start) * per_s) + 1)
        for number, connection in enumerate(sockets):
            begin = -(-(sent - number) // _CONNECTIONS)
            end = -(-(owed - number) // _CONNECTIONS)
            if end > begin:
                connection.sendall(streams[number].packets[begin:end].tobytes())
            _read_acknowledgements(connection)
        sent = max(sent, owed)
        time.sleep(_TICK_S)
    for connection in sockets:
        connection.close()
    return start


def _connect(port: int, number: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_CONNECT % (ord("a") + number))
    answer = connection.recv(256)
    if answer[:1] != b"\x20" or answer[3]:
        raise SystemExit(f"not connected: {answer!r}")
    return connection


def _read_acknowledgements(connection: socket.socket) -> None:
    """Take the acknowledgements that have come."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        connection.settimeout(10)


if __name__ == "__main__":
    print(run(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
