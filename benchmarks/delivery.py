"""Draining a backlog through the real gateway and the real ingest service into PostgreSQL.

    python -m benchmarks.delivery            about 5 minutes; `make bench NAME=delivery` is the same

Everything runs on one machine and shares its cores: the gateway, the ingest service, PostgreSQL. In the
same run the same rows enter an equal table by a bare asyncpg binary COPY, half of them before the drain and
half after, so that what the machine does meanwhile is in both figures. COPY bodies are built before their
clock runs, and every 50,000 rows are one transaction, as a batch is. Latencies are of single publishes, from
when each was due until a query sees its row; the live lane is tuned for it (`flush_s = 0.02`), and with the
default (1 s) they are printed above the result.

The last line is one flat JSON object. BENCH_READINGS and BENCH_LATENCY_S make it smaller.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen
from uuid import uuid4

import asyncpg
import numpy as np

from benchmarks import backlog, processes, region
from cloud_sync.codec import line_protocol
from cloud_sync.model.records import RecordClass
from cloud_sync.timescale import row_store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from cloud_sync.model.records import Batch

READINGS = int(os.environ.get("BENCH_READINGS", "5000000"))
LATENCY_S = float(os.environ.get("BENCH_LATENCY_S", "10"))

_TUNED_FLUSH_S = 0.02
_SAMPLE_BATCHES = 4
_LINES_PER_BODY = 5000
_DRAIN_WITHIN_S = 900
_SETTLE_WITHIN_S = 30
_WARM_UP = 0.1


async def run(folder: Path) -> dict[str, float]:
    """Measure everything; the result's keys are the benchmark's."""
    epoch = uuid4()
    with region.postgres() as dsn:
        connection = await asyncpg.connect(dsn)
        stored = await backlog.fill(folder / "spool.db", READINGS)
        _print_line(
            f"{stored} readings in a spool of {(folder / 'spool.db').stat().st_size / stored:.2f} B each"
        )
        with region.ingest(folder, dsn) as ingest:
            await _prepare_database(connection)
            await connection.execute("CREATE TABLE copied (LIKE reading INCLUDING ALL)")
            half = list(backlog.batches(stored, epoch))
            first_s = await _copy(connection, half[: len(half) // 2])
            drain_s, agent, service = await _drain(folder, ingest, connection, stored)
            second_s = await _copy(connection, half[len(half) // 2 :])
            wire_bytes = _body_bytes(ingest.port)
            text_bytes = _gzip_bytes(half[:: max(1, len(half) // _SAMPLE_BATCHES)])
            del half
            await connection.execute("DROP TABLE copied")
            latency = await _latencies(folder, ingest, connection)
        await connection.close()
    drained, copied = stored / drain_s, stored / (first_s + second_s)
    return {
        "drain_readings_per_s": round(drained),
        "copy_rows_per_s": round(copied),
        "ratio": round(drained / copied, 3),
        "wire_bytes_per_reading": round(wire_bytes / stored, 3),
        "gzip_line_protocol_bytes_per_reading": round(text_bytes, 3),
        "agent_rss_mb": round(agent[0], 1),
        "ingest_rss_mb": round(service[0], 1),
        "agent_cpu_s_per_million": round(agent[1] / stored * 1e6, 3),
        "ingest_cpu_s_per_million": round(service[1] / stored * 1e6, 3),
        "row_latency_p99_ms_1k": round(latency[1000], 1),
        "row_latency_p99_ms_10k": round(latency[10_000], 1),
    }


async def _prepare_database(connection: asyncpg.Connection[Any]) -> None:
    deadline = time.monotonic() + _SETTLE_WITHIN_S
    while await connection.fetchval("SELECT to_regclass('loaded_file')") is None:
        if time.monotonic() > deadline:
            raise SystemExit("the ingest service did not prepare the database")
        await asyncio.sleep(0.05)


async def _copy(connection: asyncpg.Connection[Any], batches: Iterable[Batch]) -> float:
    """Seconds that a bare binary COPY of these rows takes."""
    spent_s = 0.0
    numbers = np.arange(backlog.SERIES, dtype=np.int32) + 1
    for batch in batches:
        body = list(row_store.encode_copy(batch.readings, numbers))

        async def pieces(body: list[bytearray] = body) -> AsyncIterator[bytearray]:
            for piece in body:
                yield piece

        begin = time.monotonic()
        await connection.copy_to_table(
            "copied", source=pieces(), columns=list(row_store.COPY_COLUMNS), format="binary"
        )
        spent_s += time.monotonic() - begin
    return spent_s


async def _drain(
    folder: Path, ingest: region.Region, connection: asyncpg.Connection[Any], readings: int
) -> tuple[float, tuple[float, float], tuple[float, float]]:
    """Seconds until the last row is there; (peak MB, CPU s) of the gateway and of the ingest service."""
    before_s = processes.cpu_s(ingest.pid)
    with region.gateway(folder, ingest) as (pid, _):
        begin = time.monotonic()
        while (applied := await _count_applied(connection)) < readings:
            if time.monotonic() - begin > _DRAIN_WITHIN_S:
                raise SystemExit(f"only {applied} of {readings} readings after {_DRAIN_WITHIN_S} s")
            await asyncio.sleep(0.05)
        spent_s = time.monotonic() - begin
        agent = processes.rss_mb(pid, peak=True), processes.cpu_s(pid)
    stored = await connection.fetchval("SELECT count(*) FROM reading")
    if stored != readings:
        raise SystemExit(f"{stored} rows of {readings}")
    service = processes.rss_mb(ingest.pid, peak=True), processes.cpu_s(ingest.pid) - before_s
    return spent_s, agent, service


async def _count_applied(connection: asyncpg.Connection[Any]) -> int:
    """Readings that a query can see: ledger and rows are committed together."""
    return int(
        await connection.fetchval(
            "SELECT coalesce(sum(rows), 0)::int8 FROM ingest_ledger WHERE class = $1", RecordClass.READING
        )
    )


def _body_bytes(port: int) -> float:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    line = next(x for x in page.splitlines() if x.startswith("tidegate_ingest_body_bytes_total"))
    return float(line.split()[1])


def _gzip_bytes(batches: list[Batch]) -> float:
    """Bytes a reading of the same readings as gzipped line protocol, in bodies of 5,000 lines."""
    size = rows = 0
    for batch in batches:
        lines = line_protocol.encode_lines(batch, precision="us")
        for body in line_protocol.split_into_bodies(lines, max_lines=_LINES_PER_BODY, max_bytes=1 << 30):
            size += len(gzip.compress(body, 6))
        rows += batch.rows
    return size / rows


async def _latencies(
    folder: Path, ingest: region.Region, connection: asyncpg.Connection[Any]
) -> dict[int, float]:
    """p99 in milliseconds by publishes per second, with the live lane tuned."""
    await connection.execute("TRUNCATE reading, ingest_ledger")
    found = {}
    for number, (flush_s, per_s) in enumerate(itertools.product((0.8, _TUNED_FLUSH_S), (1000, 10_000))):
        own = folder / f"latency-{number}"
        own.mkdir()
        with region.gateway(own, ingest, flush_s=flush_s) as (_, port):
            latency = await _row_latency(connection, port, per_s)
        words = ", ".join(f"p{p} {v:.1f} ms" for p, v in zip((50, 99, 100), latency, strict=True))
        _print_line(f"publish to row visible, {per_s}/s, flush_s = {flush_s:g}: {words}")
        found[per_s] = latency[1]
        await connection.execute("TRUNCATE reading, ingest_ledger")
    return found


async def _row_latency(connection: asyncpg.Connection[Any], port: int, per_s: int) -> list[float]:
    """p50, p99 and maximum: publishes arrive in order, so the k-th is visible once k rows are."""
    total = int(per_s * LATENCY_S)
    command = [sys.executable, "-m", "benchmarks.pacing", str(port), str(per_s), str(LATENCY_S)]
    publisher = await asyncio.create_subprocess_exec(*command, cwd=processes.ROOT, stdout=subprocess.PIPE)
    visible_at = np.zeros(total)
    seen, deadline = 0, time.monotonic() + LATENCY_S + _SETTLE_WITHIN_S + 10
    while seen < total:
        now_seen = await _count_applied(connection)
        now = time.monotonic()
        visible_at[seen:now_seen] = now
        seen = now_seen
        if now > deadline:
            raise SystemExit(f"{seen} of {total} publishes are visible")
        await asyncio.sleep(0.002)
    start = float((await publisher.communicate())[0])
    spent = visible_at - (start + np.arange(total) / per_s)
    return [float(p) * 1e3 for p in np.percentile(spent[int(total * _WARM_UP) :], (50, 99, 100))]


def _print_line(words: str) -> None:
    print(words, flush=True)


def main() -> None:
    """Run in a folder of its own and print the result."""
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        _print_line(f"{os.cpu_count()} cores, spool on {processes.file_system_type(Path(folder))}")
        print(json.dumps(asyncio.run(run(Path(folder)))))


if __name__ == "__main__":
    main()
