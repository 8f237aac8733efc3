"""`make bench NAME=ingress`: the way from the socket to the fsync and back.

The real agent, as an operator runs it, with its spool on a disk; the load from a process of its own. What was
acknowledged is compared with what is stored at the end: a run that lost a reading prints no figures.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from benchmarks import processes, traffic
from benchmarks.figures import Figures, say
from benchmarks.load import LoadOptions, Outcome
from cloud_sync.codec import columns
from cloud_sync.model.records import RecordClass
from gateway.mqtt.codec.packets import V5, TopicCache
from gateway.mqtt.codec.parser import PacketParser
from gateway.payloads.formats import json_reading
from gateway.spool.database import open_read_only

FOLDER = processes.ROOT / ".build" / "bench"
CONNECTIONS = 100
WINDOW = 50
PACED_PER_S = 10_000
READINGS_PER_PUBLISH = 50
_RECEIVED = 60_000
_READING_BLOCKS = (
    f"SELECT block FROM segment WHERE position >> 56 = {int(RecordClass.READING)} ORDER BY position"
)
_GENERATOR_LIMIT = 0.85


@dataclass(slots=True)
class LoadTotals:
    """What one spool must hold at the end, and where the next run of readings begins.

    Attributes:
        origin_us: time of reading 0 of every series.
    """

    readings: int = 0
    seq_sum: int = 0
    next_first: int = 0
    origin_us: int = field(default_factory=lambda: (time.time_ns() // 1000) - 30 * 86_400_000_000)

    def add(self, outcome: Outcome) -> None:
        """Add what a run had acknowledged."""
        self.readings += outcome.total_readings
        self.seq_sum += outcome.seq_sum
        self.next_first = outcome.next_first


def load(port: int, totals: LoadTotals, **options: float) -> Outcome:
    """Run the generator against `port` and wait for it."""
    given = msgspec.convert(
        {
            "port": port,
            "connections": CONNECTIONS,
            "window": WINDOW,
            "first": totals.next_first,
            "origin_us": totals.origin_us,
            **options,
        },
        LoadOptions,
    )
    command = [sys.executable, "-m", "benchmarks.load", msgspec.json.encode(given).decode()]
    done = subprocess.run(command, cwd=processes.ROOT, stdout=subprocess.PIPE, check=False, timeout=300)
    if done.returncode:
        raise SystemExit("the load generator failed")
    outcome = msgspec.json.decode(done.stdout, type=Outcome)
    totals.add(outcome)
    return outcome


def stored(spool: Path) -> tuple[int, int]:
    """Readings in a spool, every block decoded, and the sum of their seq."""
    readings = seq_sum = 0
    with closing(open_read_only(spool)) as connection:
        for (block,) in connection.execute(_READING_BLOCKS):
            (seq,) = columns.decode_columns(block, ("seq",))
            readings += len(seq)
            seq_sum += int(seq.sum())
    return readings, seq_sum


def at_full_rate(folder: Path, figures: Figures, seconds: float, rounds: int) -> LoadTotals:
    """Publishes and readings per second, CPU, and the generator's share."""
    totals, single, many = LoadTotals(), [], []
    with processes.gateway(folder) as (pid, port):
        for number in range(1, rounds + 1):
            single.append(load(port, totals, seconds=seconds, watch_pid=pid))
            many.append(load(port, totals, seconds=seconds, watch_pid=pid, per_publish=READINGS_PER_PUBLISH))
            say(
                f"round {number}: {single[-1].publishes_per_s:,.0f} publishes/s of 1 reading; "
                f"{many[-1].publishes_per_s * READINGS_PER_PUBLISH:,.0f} readings/s in publishes of 50"
            )
        peak_mb = processes.rss_mb(pid, peak=True)
    figures.add_runs(
        "publishes_per_s",
        [o.publishes_per_s for o in single],
        "publishes per second, 1 reading each",
        ">= 100,000",
    )
    figures.add_runs(
        "readings_per_s",
        [o.publishes_per_s * READINGS_PER_PUBLISH for o in many],
        "readings per second, 50 per publish",
        ">= 500,000",
    )
    figures.add_runs(
        "cpu_us_per_publish", [_cpu_us(o) for o in single], "CPU us per publish of 1", low_is_good=True
    )
    figures.add_runs(
        "cpu_us_per_reading",
        [_cpu_us(o) / READINGS_PER_PUBLISH for o in many],
        "CPU us per reading, 50 per publish",
        low_is_good=True,
    )
    figures.add("rss_full_rate_mb", peak_mb, "agent's memory at full rate, highest, MB")
    share = max(o.generator_cpu_share for o in (*single, *many))
    figures.add("generator_cpu_share", share, "the generator's own CPU, of one core", "< 1")
    if share > _GENERATOR_LIMIT:
        say("NOTE: the load generator was the limit; the agent may be faster than this")
    if any(o.ran_dry for o in (*single, *many)):
        say("the encoded publishes were used up before the time was: those runs are shorter")
    return totals


def paced(folder: Path, figures: Figures, seconds: float, rounds: int) -> LoadTotals:
    """Latency at a steady 10,000 publishes a second, and memory at 100,000 readings a second."""
    totals, outcomes = LoadTotals(), []
    with processes.gateway(folder, spool="paced.db") as (pid, port):
        for number in range(1, rounds + 1):
            outcome = load(port, totals, seconds=seconds, watch_pid=pid, paced_per_s=PACED_PER_S)
            outcomes.append(outcome)
            say(
                f"round {number}: at {PACED_PER_S:,} publishes/s acknowledged after "
                f"{outcome.latency_ms['p50']:.1f} ms (p50), {outcome.latency_ms['p99']:.1f} ms (p99); "
                f"the generator itself was late by up to {outcome.behind_ms:.1f} ms"
            )
        rate = 100_000 / READINGS_PER_PUBLISH
        load(port, totals, seconds=seconds, per_publish=READINGS_PER_PUBLISH, paced_per_s=rate)
        peak_mb = processes.rss_mb(pid, peak=True)
    for name, goal in (("p50", ""), ("p99", "<= 10")):
        figures.add_runs(
            f"ack_{name}_ms",
            [o.latency_ms[name] for o in outcomes],
            f"publish to PUBACK at 10,000/s, {name}, ms",
            goal,
            low_is_good=True,
        )
    figures.add_runs(
        "cpu_us_per_publish_paced",
        [_cpu_us(o) for o in outcomes],
        "CPU us per publish at 10,000/s",
        low_is_good=True,
    )
    figures.add("rss_mb", peak_mb, "agent's memory at 100,000 readings/s, highest, MB", "<= 100")
    return totals


def parse_only(figures: Figures, rounds: int) -> None:
    """Our parser and the JSON decoder on the same bytes, in this process, nothing stored."""
    streams = [
        traffic.build_stream(n, publishes=2_000, per_publish=1, first=0, origin_us=traffic.ORIGIN_US)
        for n in range(50)
    ]
    chunks = [
        stream.packets[at : at + WINDOW].tobytes() for at in range(0, 2_000, WINDOW) for stream in streams
    ]
    publishes = sum(len(stream.packets) for stream in streams)
    rates = []
    for _ in range(rounds):
        parser = PacketParser(max_packet_bytes=1 << 20, topics=TopicCache(), client=True, version=V5)
        started, readings = time.perf_counter(), 0
        for chunk in chunks:
            for run in parser.feed(chunk):
                assert isinstance(run, list)
                for publish in run:
                    json_reading.decode_reading(publish.payload)  # as the gateway decodes one reading
                    readings += 1
        rates.append(publishes / (time.perf_counter() - started))
        assert readings == publishes
    figures.add_runs("parse_only_per_s", rates, "parse and decode alone, publishes per second")


def receive_with_aiomqtt(folder: Path, figures: Figures, rounds: int) -> None:
    """How fast an aiomqtt client merely receives the same publishes from a mosquitto."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")
    what = "aiomqtt merely receiving, messages per second"
    if program is None:
        say("mosquitto is not installed: no comparison with aiomqtt")
        figures.add("aiomqtt_receive_per_s", None, what)
        return
    rates = []
    for number in range(rounds):
        port = processes.free_port()
        config = folder / "mosquitto.conf"
        config.write_text(
            f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\nlog_type error\n"
            "max_inflight_messages 0\nmax_queued_messages 0\nset_tcp_nodelay true\n",
            encoding="utf-8",
        )
        with processes.running(
            [program, "-c", str(config)], port=port, log=folder / f"mosquitto{number}.log"
        ):
            rates.append(_received_per_s(port))
    figures.add_runs("aiomqtt_receive_per_s", rates, what)
    publishes, aiomqtt = figures["publishes_per_s"], figures["aiomqtt_receive_per_s"]
    assert isinstance(publishes, float)
    assert isinstance(aiomqtt, float)
    figures.add("times_aiomqtt", publishes / aiomqtt, "publishes per second over aiomqtt's", ">= 5")


def _received_per_s(port: int) -> float:
    command = [sys.executable, "-m", "benchmarks.receiver", str(port), str(_RECEIVED)]
    with subprocess.Popen(command, cwd=processes.ROOT, stdout=subprocess.PIPE, text=True) as receiver:
        try:
            assert receiver.stdout is not None
            if receiver.stdout.readline() != "ready\n":
                raise SystemExit("the aiomqtt receiver did not start")
            load(port, LoadTotals(), publishes=_RECEIVED)
            return float(receiver.stdout.readline())
        finally:
            receiver.kill()


def _cpu_us(outcome: Outcome) -> float:
    return outcome.watched_cpu_s / outcome.watched_publishes * 1e6


def _verify(spool: Path, totals: LoadTotals) -> int:
    found = stored(spool)
    if found != (totals.readings, totals.seq_sum):
        raise SystemExit(
            f"FAILED: {totals.readings} readings were acknowledged (seq sum {totals.seq_sum}); "
            f"the spool holds {found[0]} (seq sum {found[1]}). The figures mean nothing."
        )
    return found[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.ingress", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the spools are, on a real disk")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kind = processes.file_system_type(options.folder)
    figures = Figures(f"ingress: QoS 1, {CONNECTIONS} connections, window {WINDOW}; spool on {kind}")
    if kind == "tmpfs":
        say(f"NOTE: {options.folder} is in memory (tmpfs); an fsync costs nothing there. Use --folder")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="ingress-") as name:
        folder = Path(name)
        full = at_full_rate(folder, figures, options.seconds, options.rounds)
        steady = paced(folder, figures, options.seconds, options.rounds)
        say("comparing what was acknowledged with what is stored")
        held = _verify(folder / "spool.db", full) + _verify(folder / "paced.db", steady)
        parse_only(figures, options.rounds)
        receive_with_aiomqtt(folder, figures, max(1, options.rounds - 1))
    figures.add_hidden("readings_acknowledged", full.readings + steady.readings)
    figures.add_hidden("readings_stored", held)
    figures.add_hidden("file_system", kind)
    figures.print()


if __name__ == "__main__":
    main()
