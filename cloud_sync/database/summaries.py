"""Rollups, alerts and declarations into their tables, inside the caller's transaction.

Each statement may run again with the same rows: of rollups the newest revision stays, an alert or a
declaration that is there already stays as it is.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from cloud_sync.database import statements
from cloud_sync.notices import Alerts, Declarations
from cloud_sync.records import Receipt
from cloud_sync.summaries import Rollups

if TYPE_CHECKING:
    from collections.abc import Iterable

    import asyncpg
    import numpy as np
    from numpy.typing import NDArray

    from cloud_sync.records import Batch

_SQL = statements.named("regional.sql")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIMES_US = (-62_135_596_800_000_000, 253_402_300_799_999_999)
"""From the beginning of the year 1 to the end of 9999: what every client can read. Of rollups and notices."""
_STAGED = (
    "series_no",
    "window_s",
    "time",
    "revision",
    "count",
    "mean",
    "m2",
    "minimum",
    "maximum",
    "first",
    "first_at",
    "last",
    "last_at",
    "flagged",
    "excluded",
    "suppressed",
)


async def store(connection: asyncpg.Connection[Any], batch: Batch, series_no: NDArray[np.int32]) -> Receipt:
    """Write the records of a batch that is not of readings.

    Args:
        connection: inside a transaction.
        batch: of any other class.
        series_no: of each series of the batch.
    """
    records = batch.records
    if records.rows == 0:
        return Receipt(0, 0)
    if isinstance(records, Declarations):
        stored = await _store_declarations(connection, batch, records)
    else:
        gateway_no = await connection.fetchval(_SQL["gateway_no"], batch.range.gateway_id)
        numbers = series_no[records.series].tolist()
        if isinstance(records, Rollups):
            stored = await _store_rollups(connection, records, numbers, gateway_no)
        else:
            assert isinstance(records, Alerts)
            stored = await _store_alerts(connection, records, numbers, gateway_no)
    return Receipt(records.rows, stored, records.rows - stored)


async def forget_rollups(connection: asyncpg.Connection[Any], window_s: int, older_than: timedelta) -> None:
    """Delete rollups of windows of one length that began that long ago."""
    await connection.execute(_SQL["forget_rollups"], window_s, older_than)


async def _store_rollups(
    connection: asyncpg.Connection[Any], rollups: Rollups, numbers: list[int], gateway_no: int
) -> int:
    columns = (
        numbers,
        rollups.window_s.tolist(),
        _moments(rollups.time_us),
        rollups.revision.tolist(),
        rollups.count.tolist(),
        *map(_present, (rollups.mean, rollups.m2, rollups.minimum, rollups.maximum, rollups.first)),
        _moments(rollups.first_at_us),
        _present(rollups.last),
        _moments(rollups.last_at_us),
        rollups.flagged.tolist(),
        rollups.excluded.tolist(),
        rollups.suppressed.tolist(),
    )
    await connection.execute(_SQL["make_rollup_staging"])
    await connection.copy_records_to_table(
        "rollup_staging", records=zip(*columns, strict=True), columns=list(_STAGED)
    )
    stored = _count(await connection.execute(_SQL["store_rollups"], gateway_no))
    await connection.execute(_SQL["drop_rollup_staging"])
    return stored


async def _store_alerts(
    connection: asyncpg.Connection[Any], alerts: Alerts, numbers: list[int], gateway_no: int
) -> int:
    status = await connection.execute(
        _SQL["store_alerts"],
        gateway_no,
        numbers,
        alerts.rule.tolist(),
        _moments(alerts.time_us),
        alerts.state.tolist(),
        alerts.severity.tolist(),
        _present(alerts.value),
        _present(alerts.threshold),
        alerts.count.tolist(),
        alerts.detail.tolist(),
    )
    return _count(status)


async def _store_declarations(
    connection: asyncpg.Connection[Any], batch: Batch, declared: Declarations
) -> int:
    status = await connection.execute(
        _SQL["store_declarations"],
        batch.range.gateway_id,
        batch.range.epoch,
        declared.of_class.tolist(),
        declared.first_commit.tolist(),
        declared.last_commit.tolist(),
        declared.lost.tolist(),
        declared.reason.tolist(),
        declared.survives.tolist(),
        _moments(declared.time_us),
        _moments(declared.from_us),
        _moments(declared.to_us),
    )
    return _count(status)


def _moments(times_us: Iterable[np.int64]) -> list[datetime]:
    """Times of a batch that was checked: PostgreSQL holds them, and so does datetime."""
    return [_EPOCH + timedelta(microseconds=int(time_us)) for time_us in times_us]


def _present(column: NDArray[np.float64]) -> list[float | None]:
    """Values with None for NaN."""
    return [None if math.isnan(value) else value for value in column.tolist()]


def _count(status: str) -> int:
    """Rows of a command tag, e.g. "INSERT 0 42"."""
    return int(status.rpartition(" ")[2])
