"""Small batches by hand. Imports nothing of the tests, so that child processes can use it."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

import numpy as np

from cloud_sync.model.records import SEQ_ABSENT, Batch, BatchRange, Readings, RecordClass, Series

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = tuple[str, str, int, float]
"""sensor_id, sensor_type, time_us, value."""


def batch_of(
    rows: Sequence[Row],
    *,
    first: int = 1,
    last: int = 1,
    gateway_id: str = "gw-1",
    epoch: UUID | None = None,
    attributes: tuple[tuple[str, str], ...] = (),
) -> Batch:
    """A batch of these rows in canonical order, nothing but the value known of each."""
    names = sorted({row[:2] for row in rows})
    series = {name: index for index, name in enumerate(names)}
    count = len(rows)
    absent = np.full(count, np.nan, np.float32)
    readings = Readings(
        series=np.array([series[row[:2]] for row in rows], np.int32),
        time_us=np.array([row[2] for row in rows], np.int64),
        value=np.array([row[3] for row in rows], np.float64),
        quality=absent,
        battery_level=absent,
        signal_strength=absent,
        seq=np.full(count, SEQ_ABSENT, np.int64),
        flags=np.zeros(count, np.int32),
    )
    return Batch(
        BatchRange(gateway_id, epoch or UUID(int=0x7D << 96), RecordClass.READING, first, last),
        tuple(Series(*name, attributes) for name in names),
        readings.in_order(),
    )
