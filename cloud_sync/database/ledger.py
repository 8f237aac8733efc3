"""Which ranges have been applied: promise 4 in SQL. One row a range; ranges never overlap.

Every function runs inside the transaction that holds the gateway's lock, except `applied_ranges`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.database import statements
from cloud_sync.errors import Refused
from cloud_sync.records import Batch, BatchRange, Receipt, RecordClass

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    import asyncpg

_SQL = statements.named("regional.sql")


class RangeConflict(Refused):
    """A range that cannot be applied: part of it was, or it was with other contents.

    `reason` is range_overlap or range_mismatch.
    """


class AppliedRange(NamedTuple):
    """Adjacent applied ranges of one gateway, epoch and class as one, and what became of their rows."""

    range: BatchRange
    rows: int
    stored: int
    duplicates: int
    conflicts: int


class Seen(NamedTuple):
    """When a gateway first and last delivered, by the database's clock."""

    first: datetime
    last: datetime


async def lock(connection: asyncpg.Connection[Any], gateway_id: str) -> None:
    """Wait until no other transaction applies a batch of this gateway; held until the transaction ends."""
    await connection.execute(_SQL["lock_gateway"], gateway_id)


async def earlier_receipt(connection: asyncpg.Connection[Any], batch: Batch) -> Receipt | None:
    """The receipt of an earlier application of the same range, None when it is new.

    Raises:
        RangeConflict: the range, or a part of it, was applied with other contents.
    """
    wanted = batch.range
    found = await connection.fetchrow(
        _SQL["newest_range_up_to"], wanted.gateway_id, wanted.epoch, wanted.record_class, wanted.last_commit
    )
    if found is None or found["last_commit"] < wanted.first_commit:
        return None
    if (found["first_commit"], found["last_commit"]) != (wanted.first_commit, wanted.last_commit):
        applied = f"{found['first_commit']}..{found['last_commit']}"
        raise RangeConflict(f"{wanted}: {applied} was applied before", "range_overlap")
    contents = (batch.rows, *_time_range_us(batch))
    if (found["rows"], found["min_time_us"], found["max_time_us"]) != contents:
        raise RangeConflict(f"{wanted}: was applied before with other readings", "range_mismatch")
    return Receipt(
        found["rows"], found["stored"], found["duplicates"], found["conflicts"], applied_before=True
    )


async def enter(connection: asyncpg.Connection[Any], batch: Batch, receipt: Receipt) -> None:
    """Record that a range is applied."""
    await connection.execute(
        _SQL["enter_range"],
        *batch.range,
        receipt.rows,
        receipt.stored,
        receipt.duplicates,
        receipt.conflicts,
        *_time_range_us(batch),
    )


async def applied_ranges(
    connection: asyncpg.Connection[Any], gateway_id: str, epoch: UUID | None = None
) -> tuple[Seen | None, list[AppliedRange]]:
    """When a gateway was seen, and its applied ranges in order, of one epoch or of all."""
    seen = await connection.fetchrow(_SQL["gateway_seen"], gateway_id)
    rows = await connection.fetch(_SQL["applied_ranges"], gateway_id, epoch)
    ranges = [
        AppliedRange(
            BatchRange(
                gateway_id, row["epoch"], RecordClass(row["class"]), row["first_commit"], row["last_commit"]
            ),
            row["rows"],
            row["stored"],
            row["duplicates"],
            row["conflicts"],
        )
        for row in rows
    ]
    return (Seen(*seen) if seen else None), ranges


def _time_range_us(batch: Batch) -> tuple[int, int]:
    times = batch.readings.time_us
    return int(times.min()), int(times.max())
