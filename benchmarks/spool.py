"""`make bench NAME=spool`: what a reading costs on disk, and what a large spool costs to open.

Bytes on disk and commit times come from the spool's own parts in this process; bytes written, opening and
memory from the real agent. A large spool is opened by the agent, takes readings, and is drained for a while.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import socket
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import filling, processes
from benchmarks.figures import Figures, say
from benchmarks.ingress import FOLDER, LoadTotals, load
from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import RecordClass
from gateway.spool.database import Database
from gateway.spool.spool import build_spool, open_spool

if TYPE_CHECKING:
    from cloud_sync.model.records import Readings

_GB = 10**9
_SPARE_BYTES = 3 * _GB // 2
_DRAINED_BATCHES = 40
_ROWS_A_COMMIT = 50  # 10,000 readings/s at the default interval of 5 ms
"""Rows of the commits that fresh bytes and commit times are taken with."""


async def on_disk(folder: Path, figures: Figures, commits: int) -> None:
    """Bytes per reading, fresh and compacted, and what a commit takes."""
    for rows, count, tick_us, mark in (
        (_ROWS_A_COMMIT, commits, 1_000, ""),
        (1_000, commits // 16, 1_000, "_of_1000"),
        (1_000, commits // 16, 1, "_us_clock"),
    ):
        path = folder / f"disk{rows}-{tick_us}.db"
        origin_us = time.time_ns() // 1000 - 86_400_000_000
        seconds = -(-rows * count // filling.SERIES)
        everything = filling.readings(0, seconds, origin_us=origin_us, tick_us=tick_us)
        took_s, merged_s = await _append_commits(path, everything, rows, count)
        fresh = path.with_suffix(".fresh").stat().st_size / (rows * count)
        compacted = path.stat().st_size / (rows * count)
        clock = "1 ms" if tick_us > 1 else "1 us"
        what, goal = f"bytes per reading, commits of {rows:,}, clocks of {clock}", "<= 2.5"
        figures.add(f"bytes_per_reading_fresh{mark}", fresh, f"{what}, fresh")
        figures.add(f"bytes_per_reading_compacted{mark}", compacted, f"{what}, compacted", goal)
        if tick_us == 1:
            continue
        for name, point in (("p50", 50), ("p99", 99)):
            figures.add(
                f"commit_{name}_ms{mark}",
                float(np.percentile(took_s, point)) * 1e3,
                f"one commit of {rows:,}, fsync included, {name}, ms",
            )
        figures.add(
            f"compaction_us_per_reading{mark}",
            merged_s / (rows * count) * 1e6,
            f"compaction, us per reading, commits of {rows:,}",
        )


async def _append_commits(
    path: Path, everything: Readings, rows: int, count: int
) -> tuple[list[float], float]:
    """Append `count` commits of `rows` readings, copy the file, compact; seconds of each and of that."""
    database = await Database.open(path)
    spool = await build_spool(database)
    for _, series in filling.numbered_series():
        spool.catalog.assign_number(series)
    took_s = []
    for number in range(count):
        part = everything.select(np.arange(number * rows, (number + 1) * rows))
        started = time.perf_counter()
        appended = await spool.appender.append(part, [], now_us=time.time_ns() // 1000)
        took_s.append(time.perf_counter() - started)
        assert appended.stored == rows
    await _checkpoint(database)
    shutil.copyfile(path, path.with_suffix(".fresh"))
    started = time.perf_counter()
    while await spool.compaction.compact_once(everything=True):
        pass
    merged_s = time.perf_counter() - started
    await database.reclaim(1 << 20)
    await _checkpoint(database)
    await database.close()
    with closing(sqlite3.connect(path)) as connection:
        (kept,) = connection.execute("SELECT sum(rows) FROM segment").fetchone()
    if kept != rows * count:
        raise SystemExit(f"FAILED: {rows * count} readings were appended, {kept} are left after compaction")
    return took_s, merged_s


async def _checkpoint(database: Database) -> None:
    def work(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    await asyncio.to_thread(work, database.path)


def physical_writes(folder: Path, figures: Figures, seconds: float) -> None:
    """Bytes the agent writes to storage for each reading: log, checkpoints and compaction."""
    for rate, key, share in (
        (10_000, "physical_bytes_written_per_reading", 1.0),
        (100, "physical_bytes_written_per_reading_at_100", 0.5),
    ):
        totals = LoadTotals()
        with processes.gateway(folder, spool=f"written{rate}.db") as (pid, port):
            before = processes.written_bytes(pid)
            load(port, totals, seconds=seconds * share, warm_up_s=0.0, paced_per_s=rate)
            time.sleep(2.5)  # compaction looks once a second
            written = processes.written_bytes(pid) - before
        figures.add(
            key, written / totals.readings, f"bytes written per reading at {rate:,} readings/s, 1 a publish"
        )


def opening(folder: Path, figures: Figures, sizes_gb: list[int], seconds: float) -> None:
    """Build large spools; start the agent on each; drain a part of it."""
    for size_gb in sizes_gb:
        path = folder / f"{size_gb}gb.db"
        started = time.perf_counter()
        rows = asyncio.run(filling.fill(path, size_gb * _GB))
        say(f"built {size_gb} GB, {rows:,} readings, in {time.perf_counter() - started:.0f} s")
        filling.forget_cached(path)
        totals = LoadTotals(next_first=10**6)
        opened_s, peak_mb = measure_opening(folder, path, totals, seconds)
        largest = size_gb == max(sizes_gb)
        key = "open_s_1gb" if size_gb == 1 else "open_s"
        figures.add(key, opened_s, f"start of the agent on {size_gb} GB to its first PUBACK, s", "<= 1")
        if largest:
            what = f"agent's memory with {size_gb} GB spooled, taking 10,000/s, highest, MB"
            figures.add("rss_mb", peak_mb, what, "<= 100")
            figures.add_hidden("spooled_gb", size_gb)
            figures.add_hidden("spooled_readings", rows)
        drained, took_s = asyncio.run(_wait_until_drained(path, rows + totals.readings + 1))
        if largest:
            figures.add(
                "drain_load_readings_per_s",
                drained / took_s,
                "claimed, loaded and settled, readings per second",
            )
        path.unlink()
    if 1 in sizes_gb and len(sizes_gb) == 1:
        figures.add("open_s", None, "start of the agent on 10 GB to its first PUBACK, s", "<= 1")


def measure_opening(folder: Path, path: Path, totals: LoadTotals, seconds: float) -> tuple[float, float]:
    """Seconds from the start of the program to the first PUBACK; the agent's highest memory under load."""
    started = time.perf_counter()
    with processes.gateway(folder, spool=path.name) as (pid, port):
        publish_one(port)
        took_s = time.perf_counter() - started
        load(port, totals, seconds=seconds, paced_per_s=10_000.0)
        return took_s, processes.rss_mb(pid, peak=True)


def publish_one(port: int) -> None:
    """Publish one reading and wait for its PUBACK."""
    topic, payload = b"sensors/first/temperature", b'{"value":1.5}'
    publish = b"\x32%c\x00%c%b\x00\x01\x00%b" % (len(topic) + len(payload) + 5, len(topic), topic, payload)
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"\x10\x12\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x05first" + publish)
        received = b""
        while not received.endswith(b"\x40\x02\x00\x01"):
            more = connection.recv(256)
            if not more:
                raise SystemExit("the agent closed the connection before its first PUBACK")
            received += more


async def _wait_until_drained(path: Path, expected: int) -> tuple[int, float]:
    """Claim, load and settle some batches as a shipper does; readings and seconds."""
    async with open_spool(path, "bench") as spool:
        deliveries = spool.deliveries
        await deliveries.register("bench", "file", now_us=0)
        backlog = (await deliveries.backlog("bench")).readings
        if backlog != expected or spool.segments.rows_ever(RecordClass.READING) != expected:
            raise SystemExit(f"FAILED: the backlog is {backlog} readings; {expected} were put in")
        readings, started = 0, time.perf_counter()
        for _ in range(_DRAINED_BATCHES):
            claimed = await deliveries.claim("bench", ClaimRequest(now_us=0))
            if claimed is None:
                break
            batch = await deliveries.read_batch(claimed)
            if batch is None:
                raise SystemExit(f"FAILED: {claimed} cannot be read")
            if batch.range.record_class is RecordClass.READING:
                readings += batch.rows
            await deliveries.settle("bench", claimed)
        took_s = time.perf_counter() - started
        left = (await deliveries.backlog("bench")).readings
        if left != backlog - readings:
            raise SystemExit(
                f"FAILED: {readings} readings were drained; the backlog went {backlog} -> {left}"
            )
    return readings, took_s


def _require_room(folder: Path, largest_gb: int) -> None:
    needed = largest_gb * _GB + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder} has {free / _GB:.1f} GB free; {needed / _GB:.1f} GB are needed. "
            "Use --folder DIR on a larger disk, or --small for 1 GB."
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.spool", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of the paced runs of the agent")
    parser.add_argument("--commits", type=int, default=16_000, help="of 50 readings; a 16th of 1,000")
    parser.add_argument("--small", action="store_true", help="1 GB only")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the spools are, on a real disk")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    sizes_gb = [1] if options.small else [1, 10]
    _require_room(options.folder, max(sizes_gb))
    kind = processes.file_system_type(options.folder)
    figures = Figures(f"spool: 1,000 series, 5 columns; on {kind}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="spool-") as name:
        folder = Path(name)
        say("appending and compacting")
        asyncio.run(on_disk(folder, figures, options.commits))
        say("running the agent at 10,000 and 100 readings a second")
        physical_writes(folder, figures, options.seconds)
        opening(folder, figures, sizes_gb, min(3.0, options.seconds))
    figures.add_hidden("file_system", kind)
    figures.print()


if __name__ == "__main__":
    main()
