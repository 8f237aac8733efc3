"""`make bench NAME=process`: what checks, rollups and alerts cost, and what they take from ingress.

The stages run in this process on readings in memory: each series once a second, ten minutes of event time, so
that windows of 1 and 5 minutes close within it; encoding what they give is in the figure, writing it is not.
The share of ingress is taken from the real agent at full rate, with processing and without, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
import time
import tracemalloc
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks import processes
from benchmarks.figures import Figures, say
from benchmarks.ingress import FOLDER, READINGS_PER_PUBLISH, LoadTotals, load
from cloud_sync.model.records import Readings, Rollups, Series
from gateway.build import build_alert_stage, build_check
from gateway.processing.stage import StageInput
from gateway.query.series_query import SeriesQuery, find_series, run_query
from gateway.rollups.roller import Roller
from gateway.settings import gateway_settings
from gateway.spool.database import Database, open_read_only, open_spool_read_only
from gateway.spool.segment_reader import StoredRollups
from gateway.spool.segments import SegmentWriter, encode_segments
from gateway.spool.series_catalog import SeriesCatalog
from gateway.spooltools.reading_selection import ReadingFilter

if TYPE_CHECKING:
    from collections.abc import Callable
    from sqlite3 import Connection

    from gateway.alerts.evaluator import AlertEvaluator

_START_US = 1_790_000_000_000_000 // 86_400_000_000 * 86_400_000_000
_SECOND_US = 1_000_000
_EVENT_S = 600
_QUERIED_SERIES = 1_000
_OFF = "[checks]\nenabled = false\n[rollups]\nenabled = false\n[alerts]\nenabled = false\n"


class Bench(NamedTuple):
    """What processes the readings of so many series."""

    series: int
    check: Callable[[Readings, int], Readings]
    roller: Roller
    alerts: AlertEvaluator


class CpuCost(NamedTuple):
    """Seconds by stage, and over how many readings."""

    check_s: float
    roll_s: float
    alert_s: float
    readings: int

    @property
    def us_per_reading(self) -> float:
        """All stages together."""
        return (self.check_s + self.roll_s + self.alert_s) / self.readings * 1e6


def build_readings(series: int, rows: int, first: int, chance: np.random.Generator) -> Readings:
    """Readings `first` .. of all series in turn, a second apart in each; plausible ones."""
    at = first + np.arange(rows)
    number = at % series
    return Readings(
        (number + 1).astype(np.int32),
        _START_US + at // series * _SECOND_US + number * (_SECOND_US // series),
        20 + chance.normal(0, 1, rows),
        np.full(rows, 95, np.float32),
        np.full(rows, 80, np.float32),
        np.full(rows, -60, np.float32),
        at,
        np.zeros(rows, np.int32),
    ).in_order()


def build_bench(series: int, folder: Path, connection: Connection) -> Bench:
    """The stages as an agent with its default settings has them, over so many temperatures."""
    config = folder / "gateway.toml"
    config.write_text('gateway_id = "bench"\n[spool]\npath = "stages.db"\n', encoding="utf-8")
    settings = gateway_settings.load_settings(config)
    catalog = SeriesCatalog()
    for number in range(series):
        catalog.assign_number(Series(f"sensor-{number}", "temperature"))
    alerts = build_alert_stage(settings, catalog)
    assert alerts is not None
    return Bench(
        series,
        build_check(settings, catalog),
        Roller(StoredRollups(connection), settings.rollups.roller_options),
        alerts,
    )


def run(bench: Bench, batch: int, event_s: int = _EVENT_S) -> CpuCost:
    """Batches of readings through every stage; what they give is encoded and accepted."""
    chance = np.random.default_rng(5)
    check_s = roll_s = alert_s = 0.0
    total = bench.series * event_s // batch * batch
    for first in range(0, total, batch):
        readings = build_readings(bench.series, batch, first, chance)
        now_us = int(readings.time_us.max())
        started = time.perf_counter()
        readings = bench.check(readings, now_us)
        checked = time.perf_counter()
        rolled = bench.roller.step(StageInput(readings, now_us=now_us))
        closed = [records for records in rolled.records if isinstance(records, Rollups)]
        if rolled.records:
            assert rolled.snapshot is not None
            rolled.snapshot()
            for records in rolled.records:
                encode_segments(records)
        bench.roller.accept(rolled, durable=bool(rolled.records))
        done = time.perf_counter()
        rollups = Rollups.concat(closed) if closed else Rollups.empty()
        alerted = bench.alerts.step(StageInput(readings, rollups, now_us))
        bench.alerts.accept(alerted, durable=bool(alerted.records))
        alert_s += time.perf_counter() - done
        roll_s += done - checked
        check_s += checked - started
    return CpuCost(check_s, roll_s, alert_s, total)


def bytes_per_series(folder: Path, connection: Connection, series: int) -> float:
    """What the stages hold in memory when every series has open windows of every length, per series."""
    tracemalloc.start()
    try:
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        bench = build_bench(series, folder, connection)
        empty, _ = tracemalloc.get_traced_memory()
        run(bench, series * 5, event_s=100)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    say(f"the catalog of {series:,} series alone takes {(empty - before) / series:,.0f} bytes each")
    return (after - empty) / series


def stages(folder: Path, connection: Connection, figures: Figures, rounds: int) -> None:
    """CPU of the stages for batches and numbers of series as on a small and a large site."""
    for series, batch, mark, event_s in (
        (1_000, 5_000, "", _EVENT_S),
        (1_000, 500, "_500", _EVENT_S),
        (10_000, 5_000, "_10k_series", _EVENT_S // 3),
    ):
        spent = [run(build_bench(series, folder, connection), batch, event_s) for _ in range(rounds)]
        what = f"us per reading, check + rollups + alerts, batches of {batch:,}, {series:,} series"
        figures.add_runs(
            f"us_per_reading{mark}", [s.us_per_reading for s in spent], what, "<= 1.0", low_is_good=True
        )
        for name, seconds in (
            ("check", [s.check_s for s in spent]),
            ("roll", [s.roll_s for s in spent]),
            ("alert", [s.alert_s for s in spent]),
        ):
            each = [second / s.readings * 1e6 for second, s in zip(seconds, spent, strict=True)]
            figures.add_hidden(f"us_per_reading_{name}{mark}", float(f"{median(each):.5g}"))
        say(f"{what}: {median(s.us_per_reading for s in spent):.2f}")
    large = [run(build_bench(10_000, folder, connection), 50_000, _EVENT_S // 3) for _ in range(rounds)]
    figures.add_runs(
        "roll_readings_per_s",
        [s.readings / s.roll_s for s in large],
        "readings per second rolled up, chunks of 50,000, 10,000 series",
        ">= 500,000",
    )
    held = bytes_per_series(folder, connection, 10_000)
    figures.add("bytes_per_series", held, "bytes in memory per series, all stages, 10,000 series")


def ingress_share_lost(folder: Path, figures: Figures, seconds: float, rounds: int) -> None:
    """Readings per second at full rate with checks, rollups and alerts, against the same without."""
    rates: dict[str, list[float]] = {"on": [], "off": []}
    for number in range(rounds):
        for name, extra in (("off", _OFF), ("on", "")):
            with processes.gateway(folder, spool=f"{name}{number}.db", extra=extra) as (_, port):
                outcome = load(port, LoadTotals(), seconds=seconds, per_publish=READINGS_PER_PUBLISH)
            rates[name].append(outcome.publishes_per_s * READINGS_PER_PUBLISH)
            say(f"round {number + 1}: {rates[name][-1]:,.0f} readings/s with processing {name}")
    lost = [1 - on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    figures.add_runs(
        "ingress_share_lost", lost, "share of ingress that processing takes", "<= 0.3", low_is_good=True
    )
    figures.add_runs("readings_per_s_processed", rates["on"], "readings per second at full rate, processed")


async def query_day(folder: Path, figures: Figures, rounds: int) -> None:
    """A day of one series in windows of a minute, out of the rollups of `_QUERIED_SERIES`."""
    path = folder / "day.db"
    database = await Database.open(path)
    try:
        catalog = await SeriesCatalog.read(database)
        segments = await SegmentWriter.open(database, catalog)
        numbers = [
            catalog.assign_number(Series(f"sensor-{n}", "temperature")) for n in range(_QUERIED_SERIES)
        ]
        series = np.array(numbers, np.int32)
        chance = np.random.default_rng(5)
        for minute in range(0, 1440, 60):
            hour = [_build_minute(series, minute + n, chance) for n in range(60)]
            sealed = encode_segments(Rollups.concat(hour).in_order(), level=8)
            await segments.append(sealed, now_us=_START_US + minute * 60 * _SECOND_US)
    finally:
        await database.close()
    question = SeriesQuery(_START_US, _START_US + 86_400 * _SECOND_US, 60)
    took = []
    for _ in range(3 * rounds):
        started = time.perf_counter()
        with open_spool_read_only(path) as connection:
            (known,) = find_series(connection, ReadingFilter(patterns=("sensor-7/temperature",)))
            found = run_query(connection, known, question)
        took.append((time.perf_counter() - started) * 1e3)
        assert found.rows == 1440
    what = f"a day of one series of {_QUERIED_SERIES:,} by minutes, from its rollups, ms"
    figures.add_runs("query_day_ms", took, what, "<= 100", low_is_good=True)


def _build_minute(series: np.ndarray, minute: int, chance: np.random.Generator) -> Rollups:
    n, start = len(series), _START_US + minute * 60 * _SECOND_US
    mean = 20 + chance.normal(0, 1, n)
    none = np.zeros(n, np.int32)
    return Rollups(
        series=series,
        time_us=np.full(n, start),
        window_s=none + 60,
        revision=none + 1,
        count=none + 60,
        mean=mean,
        m2=mean * 3,
        minimum=mean - 1,
        maximum=mean + 1,
        first=mean,
        first_at_us=np.full(n, start),
        last=mean,
        last_at_us=np.full(n, start + 59 * _SECOND_US),
        flagged=none,
        excluded=none,
        suppressed=none,
    )


async def _empty_spool(path: Path) -> None:
    await (await Database.open(path)).close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.process", description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run at full rate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the spools are, on a real disk")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    kind = processes.file_system_type(options.folder)
    figures = Figures(f"processing; spool on {kind}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="process-") as name:
        folder = Path(name)
        asyncio.run(_empty_spool(folder / "stages.db"))
        connection = open_read_only(folder / "stages.db")
        stages(folder, connection, figures, options.rounds)
        connection.close()
        asyncio.run(query_day(folder, figures, options.rounds))
        ingress_share_lost(folder, figures, options.seconds, options.rounds)
    figures.add_hidden("file_system", kind)
    figures.print()


if __name__ == "__main__":
    main()
