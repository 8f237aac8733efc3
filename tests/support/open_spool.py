"""An open spool with everything that writes to and reads from it, for tests."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.delivery.lanes import ClaimRequest
from cloud_sync.model.records import Readings, RecordClass, Series
from gateway.spool import spool
from gateway.spool.appender import Capacity
from gateway.spool.eviction import RetentionPolicy
from gateway.spool.retention import Retention
from gateway.spool.spool import Spool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from gateway.spool.database import Database
    from gateway.spool.segments import SegmentWriter

NOW_US = 1_790_000_000_000_000


class OpenSpool(Spool):
    """With what tests write and read through it."""

    def readings(self, rows: Iterable[tuple[str, int, float]]) -> Readings:
        """Readings of (sensor_id, time_us, value), of type "t"."""
        listed = list(rows)
        numbers = [self.catalog.assign_number(Series(sensor_id, "t")) for sensor_id, _, _ in listed]
        n = len(listed)
        return Readings(
            np.array(numbers, np.int32),
            np.array([t for _, t, _ in listed], np.int64),
            np.array([v for _, _, v in listed], np.float64),
            np.full(n, np.nan, np.float32),
            np.full(n, np.nan, np.float32),
            np.full(n, np.nan, np.float32),
            np.full(n, -1, np.int64),
            np.zeros(n, np.int32),
        )

    async def append(self, rows: Iterable[tuple[str, int, float]]):
        return await self.appender.append(self.readings(rows), [], now_us=NOW_US)

    async def contents(self) -> list[tuple[str, int, float]]:
        """Every reading in the spool, sorted, read back as a destination would."""
        found = []
        name = "contents"
        await self.deliveries.register(name, "file", now_us=NOW_US, classes=[RecordClass.READING])
        while (claimed := await self.deliveries.claim(name, ClaimRequest(now_us=NOW_US))) is not None:
            batch = await self.deliveries.read_batch(claimed)
            if batch is not None:
                found += [
                    (batch.series[s].sensor_id, t, v)
                    for s, t, v in zip(
                        batch.readings.series.tolist(),
                        batch.readings.time_us.tolist(),
                        batch.readings.value.tolist(),
                        strict=True,
                    )
                ]
            await self.deliveries.settle(name, claimed)
        return sorted(found)


def build_retention(
    database: Database,
    segments: SegmentWriter,
    *destinations: str,
    keep_s: float = 0.0,
    record_class: RecordClass = RecordClass.READING,
    capacity: Capacity | None = None,
    **policy,
) -> Retention:
    """What prunes one class of records; `policy` is the rest of a `RetentionPolicy`."""
    chosen = RetentionPolicy(dict.fromkeys(RecordClass, destinations), {record_class: keep_s}, **policy)
    return Retention(database, segments, capacity or Capacity(), chosen)


@asynccontextmanager
async def open_spool(path: Path, *, capacity: Capacity | None = None) -> AsyncIterator[OpenSpool]:
    async with spool.open_spool(path, "gateway-1", capacity=capacity) as opened:
        yield OpenSpool(*(getattr(opened, field.name) for field in fields(opened)))
