"""`make bench NAME=sweeps`: one thing varied at a time, for the curves of the report.

Throughput by readings per publish, latency by load, bytes by segment size, memory over time while the
backlog grows, cost of a device that is connected. The agent is the real one with its default settings; what
it acknowledged is compared with what it stored. The last line is one JSON object of lists of points.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import backlog, filling, processes
from benchmarks.figures import say
from benchmarks.ingress import FOLDER, LoadTotals, load, stored
from benchmarks.sizes import bytes_per_reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.load import Outcome

Point = list[float]

_BATCHES = (1, 2, 5, 10, 20, 50, 100, 200)
_LOADS = (500, 1_000, 2_000, 5_000, 10_000, 20_000, 40_000)
_SEGMENTS = (10, 100, 1_000, 10_000, 50_000)
_DEVICES = (100, 1_000, 3_000, 10_000)
_PACED_READINGS = 50
_SAMPLE_S = 0.25


def throughput_by_batch(folder: Path, seconds: float, batches: tuple[int, ...]) -> list[Point]:
    """[readings per publish, readings/s, CPU us per reading] at full rate."""
    points = []
    for each in batches:
        with _running_agent(folder, f"batch{each}.db") as (pid, port, totals):
            outcome = load(port, totals, seconds=seconds, per_publish=each, watch_pid=pid)
        readings = outcome.publishes_per_s * each
        cpu_us = outcome.watched_cpu_s / outcome.watched_publishes / each * 1e6
        say(f"{each} readings per publish: {readings:,.0f} readings/s, {cpu_us:.2f} us of CPU each")
        points.append([each, readings, cpu_us])
    return points


def latency_by_load(folder: Path, seconds: float, loads: tuple[int, ...]) -> list[Point]:
    """[publishes/s asked, publishes/s had, p50 ms, p99 ms] from when a publish was due to its PUBACK."""
    points = []
    with _running_agent(folder, "latency.db") as (_, port, totals):
        for per_s in loads:
            outcome = load(port, totals, seconds=seconds, paced_per_s=float(per_s))
            p50, p99 = outcome.latency_ms["p50"], outcome.latency_ms["p99"]
            say(f"at {per_s:,} publishes/s: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
            points.append([per_s, outcome.publishes_per_s, p50, p99])
    return points


def bytes_by_segment(sizes: tuple[int, ...]) -> dict[str, list[Point]]:
    """By form, [readings together, bytes per reading]: the same readings in blocks and in what others
    send.
    """
    origin_us = backlog.ORIGIN_US
    most = max(sizes)
    everything = filling.readings(0, -(-most // filling.SERIES), origin_us=origin_us)
    curves: dict[str, list[Point]] = {}
    for rows in sizes:
        for form, size in bytes_per_reading(everything, rows).items():
            curves.setdefault(form, []).append([rows, size])
    for form, points in curves.items():
        say(f"{form}: " + ", ".join(f"{size:.2f} B at {rows:,.0f}" for rows, size in points))
    return curves


def memory_over_time(folder: Path, seconds: float) -> list[Point]:
    """[seconds, readings spooled so far, resident MB] at 100,000 readings/s into a spool that nobody
    empties.
    """
    points: list[Point] = []
    per_s = 100_000 / _PACED_READINGS
    with _running_agent(folder, "memory.db") as (pid, port, totals):
        started_s, running = time.monotonic(), threading.Event()

        def sample() -> None:
            while not running.wait(_SAMPLE_S):
                elapsed_s = time.monotonic() - started_s
                points.append([elapsed_s, elapsed_s * 100_000, processes.rss_mb(pid)])

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            load(port, totals, seconds=seconds, per_publish=_PACED_READINGS, paced_per_s=per_s)
        finally:
            running.set()
            sampler.join()
    if points:
        say(
            f"memory at 100,000 readings/s: {points[0][2]:.0f} MB at first, {points[-1][2]:.0f} MB at the end"
        )
    return points


def cost_by_devices(folder: Path, seconds: float, counts: tuple[int, ...]) -> list[Point]:
    """[devices, resident MB of the agent, kB a device, CPU % of one core] with 1,000 publishes/s among
    them.
    """
    points = []
    _raise_open_files_limit(max(counts) + 500)
    with _running_agent(folder, "idle.db") as (pid, _, _):
        empty_mb = processes.rss_mb(pid)
    for count in counts:
        with _running_agent(folder, f"devices{count}.db") as (pid, port, totals):
            outcome = _with_devices(port, totals, pid, count, seconds)
            highest_mb = processes.rss_mb(pid, peak=True)
        cpu = outcome.watched_cpu_s / outcome.counted_s * 100
        each_kb = (highest_mb - empty_mb) / count * 1e3
        say(f"{count:,} devices: {highest_mb:.0f} MB, {each_kb:.1f} kB each, {cpu:.0f} % of a core")
        points.append([count, highest_mb, each_kb, cpu])
    return points


def _with_devices(port: int, totals: LoadTotals, pid: int, count: int, seconds: float) -> Outcome:
    return load(
        port, totals, connections=count, seconds=seconds, paced_per_s=1_000.0, watch_pid=pid, warm_up_s=1.0
    )


@contextmanager
def _running_agent(folder: Path, spool: str) -> Iterator[tuple[int, int, LoadTotals]]:
    """A gateway on a spool of its own; afterwards what is in there must be what was acknowledged."""
    totals = LoadTotals()
    with processes.gateway(folder, spool=spool) as (pid, port):
        yield pid, port, totals
    found = stored(folder / spool)
    if found != (totals.readings, totals.seq_sum):
        raise SystemExit(f"FAILED: {totals.readings} readings were acknowledged, {spool} holds {found[0]}")
    for path in folder.glob(f"{spool}*"):
        path.unlink()


def _raise_open_files_limit(needed: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.sweeps", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each point")
    parser.add_argument("--small", action="store_true", help="few points, to see that it works")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the spools are, on a real disk")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    small, seconds = options.small, options.seconds
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="sweeps-") as name:
        folder = Path(name)
        found = {
            "throughput_by_batch": throughput_by_batch(folder, seconds, (1, 50) if small else _BATCHES),
            "latency_by_load": latency_by_load(folder, seconds, (1_000, 5_000) if small else _LOADS),
            "bytes_by_segment": bytes_by_segment((10, 1_000) if small else _SEGMENTS),
            "memory_over_time": memory_over_time(folder, seconds if small else max(seconds, 30.0)),
            "cost_by_devices": cost_by_devices(folder, seconds, (100, 500) if small else _DEVICES),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
