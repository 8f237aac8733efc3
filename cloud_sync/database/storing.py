"""Readings into the `reading` table, inside the caller's transaction, each series and time once.

They enter by binary COPY. When one of them is there already, the COPY is undone to a savepoint and the
readings go through a staging table instead, which tells duplicates (same value) from conflicts (another
value: the first stays, the other goes to `reading_conflict`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import asyncpg

from cloud_sync.database import copying, statements
from cloud_sync.records import Readings, Receipt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from uuid import UUID

    import numpy as np
    from numpy.typing import NDArray

_SQL = statements.named("regional.sql")


class Source(NamedTuple):
    """Who brought the readings, noted with conflicts; only a gateway's have an epoch and commits."""

    name: str
    epoch: UUID | None = None
    first_commit: int | None = None


async def store(
    connection: asyncpg.Connection[Any], readings: Readings, series_no: NDArray[np.int32], source: Source
) -> Receipt:
    """Write the readings, by COPY if all are new and through the staging table otherwise."""
    if readings.rows == 0:
        return Receipt(0, 0)
    try:
        async with connection.transaction():
            await _copy(connection, "reading", copying.COLUMNS, copying.body(readings, series_no))
    except asyncpg.UniqueViolationError:
        pass
    else:
        return Receipt(rows=readings.rows, stored=readings.rows)
    await _stage(connection, readings, series_no)
    stored = _count(await connection.execute(_SQL["insert_staged"]))
    conflicts = _count(await connection.execute(_SQL["note_conflicts"], *source))
    await connection.execute(_SQL["drop_staging"])
    return Receipt(readings.rows, stored, readings.rows - stored - conflicts, conflicts)


async def recognise(
    connection: asyncpg.Connection[Any], readings: Readings, series_no: NDArray[np.int32]
) -> Receipt | None:
    """The receipt of readings that were stored before; None when one of them was not. Nothing is written."""
    if readings.rows == 0:
        return Receipt(0, 0, applied_before=True)
    await _stage(connection, readings, series_no)
    present, conflicts = await connection.fetchrow(_SQL["count_staged_in_reading"])
    await connection.execute(_SQL["drop_staging"])
    if present < readings.rows:
        return None
    return Receipt(readings.rows, 0, readings.rows - conflicts, conflicts, applied_before=True)


async def _stage(
    connection: asyncpg.Connection[Any], readings: Readings, series_no: NDArray[np.int32]
) -> None:
    await connection.execute(_SQL["make_staging"])
    body = copying.body(readings, series_no, ordinal=True)
    await _copy(connection, "reading_staging", (*copying.COLUMNS, copying.ORDINAL), body)


async def _copy(
    connection: asyncpg.Connection[Any], table: str, columns: tuple[str, ...], body: Iterable[bytearray]
) -> None:
    async def pieces() -> AsyncIterator[bytearray]:
        for piece in body:
            yield piece

    await connection.copy_to_table(table, source=pieces(), columns=list(columns), format="binary")


def _count(status: str) -> int:
    """Rows of a command tag, e.g. "INSERT 0 42"."""
    return int(status.rpartition(" ")[2])
