"""`make bench NAME=memory`: what the agent holds in memory: idle, busy, with a large spool, after a month.

The agent is the real one. A month is simulated by its readings' own times: every series publishes 30 days of
readings, one day after another, as fast as they are acknowledged. Windows close, rollups are made, all is
delivered to files.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import msgspec

from benchmarks import filling, processes
from benchmarks.figures import Figures, say
from benchmarks.ingress import FOLDER, READINGS_PER_PUBLISH, LoadTotals, load
from benchmarks.spool import measure_opening

if TYPE_CHECKING:
    from collections.abc import Iterator

_GB = 10**9
_SETTLED_S = 5.0
_DAY_US = 86_400_000_000
_SERIES = 100
_FOLLOWED_WITHIN_S = 300.0


def idle(folder: Path, figures: Figures) -> None:
    """Started, and left alone."""
    with processes.gateway(folder, spool="idle.db") as (pid, _):
        time.sleep(_SETTLED_S)
        figures.add("rss_idle_mb", processes.rss_mb(pid), "nothing connected, MB", "<= 100")


def at_100k(folder: Path, figures: Figures, seconds: float) -> None:
    """100,000 readings a second, 50 a publish."""
    totals = LoadTotals()
    with processes.gateway(folder, spool="rate.db") as (pid, port):
        rate = 100_000 / READINGS_PER_PUBLISH
        done = load(port, totals, seconds=seconds, paced_per_s=rate, per_publish=READINGS_PER_PUBLISH)
        figures.add(
            "rss_100k_mb", processes.rss_mb(pid, peak=True), "100,000 readings/s, highest, MB", "<= 100"
        )
    figures.add_hidden("readings_per_s", done.publishes_per_s * READINGS_PER_PUBLISH)


def large(folder: Path, figures: Figures, size_gb: int, seconds: float) -> None:
    """A large spool: opened, and taking 10,000 readings a second beside following what is in it."""
    path = folder / "large.db"
    started = time.perf_counter()
    rows = asyncio.run(filling.fill(path, size_gb * _GB))
    say(f"built {size_gb} GB, {rows:,} readings, in {time.perf_counter() - started:.0f} s")
    filling.forget_cached(path)
    start_s, peak_mb = measure_opening(folder, path, LoadTotals(next_first=10**6), seconds)
    path.unlink()
    reached = size_gb >= 10
    what = f"{size_gb} GB spooled, taking 10,000/s, highest, MB"
    figures.add("rss_10gb_mb", peak_mb if reached else None, what, "<= 100")
    figures.add(
        "start_s", start_s if reached else None, f"{size_gb} GB spooled: start to first PUBACK, s", "<= 1"
    )
    if not reached:
        figures.add(f"rss_{size_gb}gb_mb", peak_mb, what)
        figures.add(f"start_{size_gb}gb_s", start_s, f"{size_gb} GB spooled: start to first PUBACK, s")
    figures.add_hidden("spooled_gb", size_gb)


def month(folder: Path, figures: Figures, days: int, every_s: int) -> None:
    """Days of readings of `_SERIES` series, one every `every_s`, into a gateway with a destination."""
    port, status_port = processes.free_port(), processes.free_port()
    config = folder / "month.toml"
    config.write_text(
        f'gateway_id = "bench"\n[spool]\npath = "month.db"\n[ingress.listen]\nport = {port}\n'
        f"[status]\nport = {status_port}\n"
        '[[destinations]]\nname = "files"\nkind = "file"\ndirectory = "files"\nmin_free_bytes = 0\n',
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "gateway", "gateway", "--config", str(config)]
    origin_us = time.time_ns() // 1000 - (days + 1) * _DAY_US
    with processes.running(command, port=port, log=folder / "month.log") as pid:
        readings, after_mb = 0, []
        with socket.create_connection(("127.0.0.1", port), timeout=120) as connection:
            connection.sendall(b"\x10\x12\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x05month")
            _receive(connection, 0)
            for day in range(days):
                readings += _publish(connection, build_day(origin_us + day * _DAY_US, every_s))
                after_mb.append(processes.rss_mb(pid))
            delivered = _wait_until_followed(status_port, readings)
            after_mb.append(processes.rss_mb(pid))
        figures.add("rss_1d_mb", after_mb[0], "after the first simulated day, MB")
        figures.add(f"rss_{days}d_mb", after_mb[-1], f"after {days} simulated days, MB", "<= 100")
        figures.add(f"rss_{days}d_peak_mb", processes.rss_mb(pid, peak=True), "the highest on the way, MB")
    figures.add_hidden("readings_of_the_month", readings)
    figures.add_hidden("delivered_of_the_month", delivered)


def build_day(origin_us: int, every_s: int) -> Iterator[bytes]:
    """The publishes of one day, QoS 1: `READINGS_PER_PUBLISH` readings each, the series in turn."""
    chance = random.Random(origin_us)
    count = 86_400 // every_s
    for first in range(0, count, READINGS_PER_PUBLISH):
        for series in range(_SERIES):
            payload = msgspec.json.encode(
                [
                    {
                        "value": round(chance.gauss(20, 3), 2),
                        "ts": origin_us + n * every_s * 1_000_000 + series,
                        "seq": n,
                    }
                    for n in range(first, min(first + READINGS_PER_PUBLISH, count))
                ]
            )
            topic = b"sensors/month-%d/temperature" % series
            body = len(topic).to_bytes(2, "big") + topic + (series + 1).to_bytes(2, "big") + b"\x00" + payload
            yield b"\x32" + _encode_length(len(body)) + body


def _publish(connection: socket.socket, publishes: Iterator[bytes]) -> int:
    """Send, `_SERIES` publishes at a time, each acknowledged before the next go; how many readings."""
    readings, waiting = 0, []
    for publish in publishes:
        readings += publish.count(b'"ts"')
        waiting.append(publish)
        if len(waiting) == _SERIES:
            connection.sendall(b"".join(waiting))
            _receive(connection, len(waiting))
            waiting.clear()
    return readings


def _receive(connection: socket.socket, acknowledgements: int) -> None:
    """Wait for so many PUBACKs, or for CONNACK where it is 0."""
    received = b""
    while len(received) < 4 * acknowledgements or not received:
        more = connection.recv(1 << 16)
        if not more:
            raise SystemExit("the agent closed the connection")
        received += more
    if acknowledgements and received[::4] != b"\x40" * acknowledgements:
        raise SystemExit(f"unexpected answers: {received[:16]!r}")


def _encode_length(size: int) -> bytes:
    """MQTT 5 section 1.5.5."""
    out = bytearray()
    while True:
        size, digit = divmod(size, 128)
        out.append(digit | (0x80 if size else 0))
        if not size:
            return bytes(out)


def _wait_until_followed(status_port: int, readings: int) -> int:
    """Wait until the destination has everything; what it was given."""
    deadline = time.monotonic() + _FOLLOWED_WITHIN_S
    while time.monotonic() < deadline:
        answer = httpx.get(f"http://127.0.0.1:{status_port}/status", timeout=30, trust_env=False).json()
        files = answer["destinations"][0]
        if files["delivered"] >= readings and not files["backlog_readings"]:
            return int(files["delivered"])
        time.sleep(1)
    raise SystemExit(f"FAILED: {files['delivered']} of {readings} readings were delivered")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of the run at 100,000 readings/s")
    parser.add_argument("--small", action="store_true", help="1 GB instead of 10")
    parser.add_argument("--days", type=int, default=30, help="simulated")
    parser.add_argument(
        "--every", type=int, default=60, help="seconds between readings of a series, simulated"
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the spools are, on a real disk")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kind = processes.file_system_type(options.folder)
    figures = Figures(f"memory of the agent; on {kind}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="memory-") as name:
        folder = Path(name)
        say("idle, then 100,000 readings a second")
        idle(folder, figures)
        at_100k(folder, figures, options.seconds)
        say(f"{options.days} days")
        month(folder, figures, options.days, options.every)
        large(folder, figures, 1 if options.small else 10, min(5.0, options.seconds))
    figures.add_hidden("file_system", kind)
    figures.print()


if __name__ == "__main__":
    main()
