"""A backlog for the delivery benchmark: readings as columns, and a spool that the real appender filled.

Readings as `traffic` draws them, their jittered times in milliseconds, as devices stamp them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import traffic
from cloud_sync.model.records import Batch, BatchRange, Readings, RecordClass, Series
from gateway.spool.spool import open_spool

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

SERIES = 1000
ROUND = 50
"""Readings of each series in one group: a group is one commit of SERIES x ROUND readings."""
ORIGIN_US = 1_760_000_000_000_000

_ATTRIBUTES = (("location", "hall-07"), ("unit", "degC"))


def series() -> list[Series]:
    """The series, by the number that `groups` has for them."""
    names = (traffic.series_topic(number).decode().split("/")[1:] for number in range(SERIES))
    return [Series(sensor_id, sensor_type, _ATTRIBUTES) for sensor_id, sensor_type in names]


def groups(readings: int) -> Iterator[Readings]:
    """`readings` readings, or a few more, in groups: all series with `ROUND` jittered seconds each."""
    numbers = np.arange(SERIES)
    for first in range(0, -(-readings // SERIES), ROUND):
        drawn = traffic.draw(numbers, first, ROUND, origin_us=ORIGIN_US)
        size = SERIES * ROUND
        yield Readings(
            np.repeat(numbers, ROUND).astype(np.int32),
            drawn.time_us.reshape(size) // 1000 * 1000,
            drawn.value_hundredths.reshape(size) / 100,
            drawn.quality.reshape(size).astype(np.float32),
            np.broadcast_to(drawn.battery_level, drawn.time_us.shape).reshape(size).astype(np.float32),
            -drawn.signal.reshape(size).astype(np.float32),
            drawn.seq.reshape(size).astype(np.int64),
            np.zeros(size, np.int32),
        )


def batches(readings: int, epoch: UUID) -> Iterator[Batch]:
    """The same readings as batches, one a group."""
    known = tuple(series())
    for commit, group in enumerate(groups(readings), start=1):
        yield Batch(BatchRange("bench", epoch, RecordClass.READING, commit, commit), known, group)


async def fill(path: Path, readings: int) -> int:
    """Append them to a new spool, durably; returns how many."""
    async with open_spool(path) as spool:
        numbers = np.array([spool.catalog.assign_number(each) for each in series()], np.int32)
        stored = 0
        for group in groups(readings):
            renumbered = group.with_series(numbers[group.series])
            done = await spool.appender.append(renumbered, [], now_us=time.time_ns() // 1000)
            stored += done.stored
        return stored
