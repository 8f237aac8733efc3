"""Spools made for damage: a known number of commits, closed in order or left as a kill leaves them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import SEQ_ABSENT, Readings, RecordClass, Series
from gateway.spool.database import Database
from gateway.spool.spool import build_spool
from tests.support.open_spool import build_retention

if TYPE_CHECKING:
    from pathlib import Path

    from gateway.spool.appender import Appender
    from gateway.spool.compaction import Compaction
    from gateway.spool.deliveries import Deliveries
    from gateway.spool.retention import Retention
    from gateway.spool.segments import SegmentWriter
    from gateway.spool.series_catalog import SeriesCatalog

ROWS = 400
"""Readings of each commit; commit k holds the times (k - 1) * ROWS .. k * ROWS - 1."""
SERIES = [Series(f"boiler-{number}", "temperature") for number in range(4)]


@dataclass
class OpenSpool:
    """An open spool with its parts, one destination called "up"."""

    database: Database
    catalog: SeriesCatalog
    segments: SegmentWriter
    appender: Appender
    deliveries: Deliveries
    compaction: Compaction
    retention: Retention

    @classmethod
    async def opened(cls, path: Path) -> OpenSpool:
        database = await Database.open(path)
        try:
            spool = await build_spool(database, "g1")
            await spool.deliveries.register("up", "file", now_us=1)
        except BaseException:
            await database.close()
            raise
        return cls(
            database,
            spool.catalog,
            spool.segments,
            spool.appender,
            spool.deliveries,
            spool.compaction,
            build_retention(database, spool.segments, "up"),
        )

    @property
    def newest(self) -> int:
        return self.segments.newest_commit(RecordClass.READING)

    async def append(self, times) -> None:
        """One commit of readings at these times (int64, all different), spread over the series."""
        times = np.asarray(times, np.int64)
        rows = len(times)
        numbers = np.array([self.catalog.assign_number(series) for series in SERIES], np.int32)
        absent = np.full(rows, np.nan, np.float32)
        await self.appender.append(
            Readings(
                numbers[times % len(SERIES)],
                times,
                np.random.default_rng(int(times[0])).random(rows),
                absent,
                absent,
                absent,
                np.full(rows, SEQ_ABSENT, np.int64),
                np.zeros(rows, np.int32),
            ),
            [],
            now_us=int(times[0]) + 1,
        )

    async def append_commit(self, number: int) -> None:
        await self.append(np.arange((number - 1) * ROWS, number * ROWS))

    async def drained(self, max_rows: int = 10 * ROWS) -> set[int]:
        """Deliver everything there is; returns the times delivered."""
        times: list[int] = []
        while (
            claimed := await self.deliveries.claim("up", ClaimRequest(now_us=2, max_rows=max_rows))
        ) is not None:
            batch = await self.deliveries.read_batch(claimed)
            if batch is not None:
                times += batch.readings.time_us.tolist()
            await self.deliveries.settle("up", claimed)
        assert len(times) == len(set(times))
        return set(times)


async def made(path: Path, commits: int, *, killed: bool) -> None:
    """A spool of this many commits at `path`; `killed` leaves -wal and -shm with the last half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    live = path if not killed else path.parent / "live" / path.name
    live.parent.mkdir(exist_ok=True)
    spool = await OpenSpool.opened(live)
    for number in range(1, commits + 1):
        await spool.append_commit(number)
        if killed and number == commits // 2:
            await spool.database._writer.run(lambda c: c.execute("PRAGMA wal_checkpoint").fetchall())
    if killed:
        for source in live.parent.iterdir():
            if not source.name.endswith(".lock"):
                shutil.copyfile(source, path.parent / source.name)
    await spool.database.close()
    if killed:
        shutil.rmtree(live.parent)
