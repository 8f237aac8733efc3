"""Batches for tests of the regional tier."""

from __future__ import annotations

from uuid import UUID

import numpy as np

from cloud_sync.model.records import SEQ_ABSENT, Batch, BatchRange, Readings, Records, Series

EPOCH = UUID("0190c1a2-0000-7000-8000-000000000001")
START_US = 1_750_000_000_000_000
SECOND_US = 1_000_000


def readings(rows: int = 12, series: int = 3, *, start_us: int = START_US, seed: int = 1) -> Readings:
    """Rows spread over series, one a second in each, some attributes absent."""
    random = np.random.default_rng(seed)
    positions = np.sort(np.arange(rows, dtype=np.int32) % series)
    within = np.arange(rows) - np.searchsorted(positions, positions)
    quality = random.integers(0, 101, rows).astype(np.float32)
    quality[::5] = np.nan
    seq = np.arange(rows, dtype=np.int64)
    seq[::4] = SEQ_ABSENT
    return Readings(
        positions.astype(np.int32),
        (start_us + within * SECOND_US).astype(np.int64),
        random.normal(20, 5, rows),
        quality,
        np.full(rows, np.nan, np.float32),
        random.integers(-90, -30, rows).astype(np.float32),
        seq,
        random.integers(0, 8, rows).astype(np.int32),
    )


def from_rows(*rows: tuple[int, int, float]) -> Readings:
    """Readings of (series, time_us, value), nothing else present."""
    count = len(rows)
    absent = np.full(count, np.nan, np.float32)
    series, times, values = zip(*rows, strict=True)
    return Readings(
        np.array(series, np.int32),
        np.array(times, np.int64),
        np.array(values, np.float64),
        absent,
        absent,
        absent,
        np.full(count, SEQ_ABSENT, np.int64),
        np.zeros(count, np.int32),
    )


def series(count: int = 3, attributes: dict[str, str] | None = None) -> tuple[Series, ...]:
    """Series of one type, one for each sensor."""
    pairs = tuple(sorted((attributes or {}).items()))
    return tuple(Series(f"sensor-{n}", "temperature", pairs) for n in range(count))


def batch(
    first: int = 1,
    last: int | None = None,
    *,
    gateway_id: str = "gw-1",
    epoch: UUID = EPOCH,
    content: Records | None = None,
    of: tuple[Series, ...] | None = None,
) -> Batch:
    """A batch of commits first..last."""
    content = readings() if content is None else content
    if of is None:
        of = series(int(content.series.max()) + 1) if content.has_series else ()
    range_ = BatchRange(gateway_id, epoch, content.record_class, first, first if last is None else last)
    return Batch(range_, of, content)
