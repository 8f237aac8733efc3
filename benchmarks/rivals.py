"""`make bench NAME=rivals`: what else could be used, on the same publishes in the same run.

A program written by hand: an aiomqtt client of a mosquitto, rows in SQLite, one commit a second.
The ThingsBoard gateway's storage (PyPI thingsboard-gateway): SQLiteEventStorage, given the same payloads as
fast as it accepts them, unpacked into .build/rivals without what it depends on (docs/benchmarks.md).
For the bytes: gzipped line protocol and zstd of JSON.

A rate counts readings that are committed to the file. The acknowledgements differ: this gateway sends one
after the fsync; a mosquitto before anybody has the reading, and so does the storage, which puts it into a
queue in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import json
import logging
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import filling, processes, traffic
from benchmarks.figures import Figures, say
from benchmarks.ingress import CONNECTIONS, FOLDER, LoadTotals, load, stored
from benchmarks.sizes import bytes_per_reading

RIVALS_FOLDER = processes.ROOT / ".build" / "rivals"
_COMMIT_EVERY_S = 1.0
_WITHIN_S = 120.0
_ROWS_TOGETHER = 10_000


def tidegate(folder: Path, publishes: int) -> dict[str, float]:
    """The agent: readings/s committed, CPU us and bytes per reading."""
    totals = LoadTotals()
    with processes.gateway(folder, spool="tidegate.db") as (pid, port):
        before_s = processes.cpu_s(pid)
        sent = load(port, totals, publishes=publishes)
        cpu_s = processes.cpu_s(pid) - before_s
        rss_mb = processes.rss_mb(pid, peak=True)
    found = stored(folder / "tidegate.db")
    if found != (totals.readings, totals.seq_sum):
        raise SystemExit(f"FAILED: {totals.readings} acknowledged, {found[0]} stored")
    size = (folder / "tidegate.db").stat().st_size
    return {
        "rate": sent.publishes_per_s,
        "cpu_us": cpu_s / found[0] * 1e6,
        "bytes": size / found[0],
        "rss_mb": rss_mb,
    }


def by_hand(folder: Path, publishes: int) -> dict[str, float] | None:
    """mosquitto, aiomqtt and rows in SQLite; None without a mosquitto."""
    program = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        say("mosquitto is not installed: nothing written by hand to compare with")
        return None
    port = processes.free_port()
    config = folder / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_type error\n"
        "max_inflight_messages 0\nmax_queued_messages 0\nset_tcp_nodelay true\n"
    )
    total = (
        -(-publishes // (CONNECTIONS * traffic.SERIES_PER_DEVICE)) * CONNECTIONS * traffic.SERIES_PER_DEVICE
    )
    with processes.running([program, "-c", str(config)], port=port, log=folder / "mosquitto.log"):
        return _run_child(
            ["by_hand", str(port), str(total), str(folder / "rows.db")],
            ready=lambda: _send_load(port, publishes),
        )


def thingsboard(folder: Path, publishes: int) -> dict[str, float] | None:
    """The storage of the ThingsBoard gateway; None when it has not been unpacked."""
    if not (RIVALS_FOLDER / "thingsboard_gateway").is_dir():
        say(f"thingsboard-gateway is not in {RIVALS_FOLDER}: see docs/benchmarks.md")
        return None
    return _run_child(["thingsboard", str(publishes), f"{folder / 'thingsboard'}/"])


def _send_load(port: int, publishes: int) -> None:
    load(port, LoadTotals(), publishes=publishes)


def _run_child(arguments: list[str], ready: Any = None) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.rivals", "--child", *arguments]
    with subprocess.Popen(command, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            if ready is not None:
                if child.stdout.readline() != "ready\n":
                    raise SystemExit(f"{arguments[0]} did not start")
                ready()
            line = child.stdout.readline()
            if not line:
                raise SystemExit(f"{arguments[0]} failed")
            found: dict[str, float] = json.loads(line)
            return found
        finally:
            child.kill()


async def _subscribe(port: int, count: int, path: Path) -> None:
    """The program by hand: receive, decode, insert, commit once a second."""
    import aiomqtt  # noqa: PLC0415 - an extra of the package

    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute(
            "CREATE TABLE readings "
            "(topic TEXT, ts INTEGER, value REAL, quality REAL, battery REAL, signal REAL, seq INTEGER)"
        )
        async with asyncio.timeout(_WITHIN_S), aiomqtt.Client("127.0.0.1", port) as client:
            await client.subscribe("sensors/#", qos=1)
            print("ready", flush=True)
            received, started_s, cpu_s, committed_s = 0, 0.0, 0.0, 0.0
            async for message in client.messages:
                if not received:
                    started_s, cpu_s = time.monotonic(), time.process_time()
                    committed_s = started_s
                reading = json.loads(bytes(message.payload))
                connection.execute(
                    "INSERT INTO readings VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        message.topic.value,
                        reading["ts"],
                        reading["value"],
                        reading["quality"],
                        reading["battery_level"],
                        reading["signal_strength"],
                        reading["seq"],
                    ),
                )
                received += 1
                if time.monotonic() - committed_s >= _COMMIT_EVERY_S:
                    connection.commit()
                    committed_s = time.monotonic()
                if received == count:
                    break
            connection.commit()
            _print_result(started_s, cpu_s, received, path)


def _store(count: int, folder: str) -> None:
    """The storage alone: payloads are put as fast as it accepts them, until all are in the file."""
    sys.path.insert(0, str(RIVALS_FOLDER))
    Path(folder).mkdir()
    logger = logging.getLogger("storage")
    logger.trace = lambda *_: None  # type: ignore[attr-defined]  # the gateway adds this level to its loggers
    storage_class = importlib.import_module(
        "thingsboard_gateway.storage.sqlite.sqlite_event_storage"
    ).SQLiteEventStorage
    stream = traffic.build_stream(0, publishes=count, per_publish=1, first=0, origin_us=traffic.ORIGIN_US)
    size = len(traffic.series_topic(0)) + 7
    payloads = [bytes(packet[size:]).decode("utf-8", "replace") for packet in stream.packets]
    storage = storage_class({"data_file_path": folder}, logger, threading.Event())
    started_s, cpu_s = time.monotonic(), time.process_time()
    for payload in payloads:
        storage.put(payload)
    deadline_s = time.monotonic() + _WITHIN_S
    while time.monotonic() < deadline_s and _rows(Path(folder) / "data.db") < len(payloads):
        time.sleep(0.02)
    _print_result(started_s, cpu_s, len(payloads), Path(folder) / "data.db")
    with contextlib.suppress(Exception):
        storage.stop()


def _rows(path: Path) -> int:
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        return int(connection.execute("SELECT coalesce(max(id), 0) FROM messages").fetchone()[0])


def _print_result(started_s: float, cpu_s: float, readings: int, path: Path) -> None:
    took_s, spent_s = time.monotonic() - started_s, time.process_time() - cpu_s
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    found = {
        "rate": readings / took_s,
        "cpu_us": spent_s / readings * 1e6,
        "bytes": path.stat().st_size / readings,
        "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
    }
    print(json.dumps(found), flush=True)


def show(figures: Figures, name: str, words: str, runs: list[dict[str, float]]) -> None:
    """Four figures of one contender."""
    if not runs:
        figures.add(f"{name}_per_s", None, f"{words}: readings committed per second")
        return
    figures.add_runs(f"{name}_per_s", [r["rate"] for r in runs], f"{words}: readings committed per second")
    figures.add_runs(
        f"{name}_cpu_us", [r["cpu_us"] for r in runs], f"{words}: CPU us per reading", low_is_good=True
    )
    figures.add_runs(
        f"{name}_bytes", [r["bytes"] for r in runs], f"{words}: bytes per reading", low_is_good=True
    )
    figures.add_runs(f"{name}_rss_mb", [r["rss_mb"] for r in runs], f"{words}: memory, MB", low_is_good=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.rivals", description=__doc__.split("\n")[0])
    parser.add_argument("--publishes", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="few publishes, one round, to see that it works")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, *rest = options.child
        if kind == "by_hand":
            asyncio.run(_subscribe(int(rest[0]), int(rest[1]), Path(rest[2])))
        else:
            _store(int(rest[0]), rest[1])
        return
    publishes, rounds = (20_000, 1) if options.small else (options.publishes, options.rounds)
    options.folder.mkdir(parents=True, exist_ok=True)
    figures = Figures(f"rivals: {publishes:,} publishes of one reading, QoS 1, {CONNECTIONS} connections")
    runs: dict[str, list[dict[str, float]]] = {"tidegate": [], "by_hand": [], "thingsboard": []}
    for number in range(1, rounds + 1):
        for name, contend in (("tidegate", tidegate), ("by_hand", by_hand), ("thingsboard", thingsboard)):
            with tempfile.TemporaryDirectory(dir=options.folder, prefix="rivals-") as folder:
                outcome = contend(Path(folder), publishes)
            if outcome is not None:
                runs[name].append(outcome)
                say(f"round {number}: {name}: {outcome['rate']:,.0f} readings/s committed")
    show(figures, "tidegate", "this gateway, acknowledged after the fsync", runs["tidegate"])
    show(figures, "by_hand", "aiomqtt and SQLite rows, a commit a second", runs["by_hand"])
    show(figures, "thingsboard", "ThingsBoard gateway's SQLite storage, no MQTT", runs["thingsboard"])
    everything = filling.readings(0, _ROWS_TOGETHER // filling.SERIES, origin_us=traffic.ORIGIN_US)
    for form, size in bytes_per_reading(everything, _ROWS_TOGETHER).items():
        key = form.replace(" ", "_").lower()
        figures.add(
            f"{key}_bytes_per_reading", size, f"{form}: bytes per reading, {_ROWS_TOGETHER:,} together"
        )
    figures.print()


if __name__ == "__main__":
    main()
