"""Which ranges have been applied: promise 4 in SQL. One row a batch; ranges never overlap, nor parts of one.

A range may be applied in parts (`records.BatchRange`). Rows of old ranges that lie side by side are merged
into one, which remembers their sums only; `docs/decisions/009-merged-ledger.md` says what a resend then gets.

Every function runs inside the transaction that holds the gateway's lock, except `progress`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from cloud_sync import applied
from cloud_sync.applied import AppliedRange, DeclaredLoss, PartEntry, Progress
from cloud_sync.database import statements
from cloud_sync.records import Batch, BatchRange, Receipt, RecordClass

if TYPE_CHECKING:
    from datetime import timedelta
    from uuid import UUID

    import asyncpg

    from cloud_sync.applied import Covered

_SQL = statements.named("regional.sql")


async def lock(connection: asyncpg.Connection[Any], gateway_id: str) -> None:
    """Wait until no other transaction applies a batch of this gateway; held until the transaction ends."""
    await connection.execute(_SQL["lock_gateway"], gateway_id)


async def earlier_receipt(connection: asyncpg.Connection[Any], batch: Batch) -> Receipt | Covered | None:
    """The receipt of an earlier application of the same batch; None when it is new.

    Raises:
        RangeConflict: some of the range was applied and some was not, or it was with other contents.
    """
    wanted = batch.range
    found = await connection.fetchrow(
        _SQL["newest_range_up_to"], wanted.gateway_id, wanted.epoch, wanted.record_class, wanted.last_commit
    )
    if found is None:
        return None
    first, last = found["first_commit"], found["last_commit"]
    known = applied.known_range(wanted, first, last, in_parts=found["parts"] > 1)
    if known != "same":
        return known
    entries = await connection.fetch(
        _SQL["entries_reaching_into_part"], *wanted[:4], wanted.part, wanted.parts
    )
    return applied.known_part(batch, [PartEntry(*(e[name] for name in PartEntry._fields)) for e in entries])


async def enter(connection: asyncpg.Connection[Any], batch: Batch, receipt: Receipt) -> None:
    """Record that a batch is applied."""
    await connection.execute(
        _SQL["enter_range"],
        *batch.range,
        receipt.rows,
        receipt.stored,
        receipt.duplicates,
        receipt.conflicts,
        batch.refused,
        *applied.time_range_us(batch),
    )


async def mergeable(connection: asyncpg.Connection[Any], older_than: timedelta) -> list[str]:
    """Gateways with several entries that old in one epoch and class."""
    rows = await connection.fetch(_SQL["gateways_to_merge"], older_than)
    return [row[0] for row in rows]


async def merge(connection: asyncpg.Connection[Any], gateway_id: str, older_than: timedelta) -> None:
    """Merge a gateway's complete ranges that are old and lie side by side."""
    await connection.execute(_SQL["merge_ledger"], gateway_id, older_than)


async def progress(
    connection: asyncpg.Connection[Any], gateway_id: str | None = None, epoch: UUID | None = None
) -> list[Progress]:
    """What is known of one gateway or of all, of one epoch or of all; a gateway never seen is left out."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        seen = await connection.fetch(_SQL["gateways_seen"], gateway_id)
        rows = await connection.fetch(_SQL["applied_ranges"], gateway_id, epoch)
        losses = await connection.fetch(_SQL["declared_losses"], gateway_id, epoch)
    ranges: dict[str, list[AppliedRange]] = defaultdict(list)
    for row in rows:
        counts = (row[name] for name in ("rows", "stored", "duplicates", "conflicts", "refused", "complete"))
        ranges[row["gateway_id"]].append(AppliedRange(_range_of(row), *counts))
    declared: dict[str, list[DeclaredLoss]] = defaultdict(list)
    for row in losses:
        words = (row[name] for name in ("rows", "reason", "survives", "declared_at", "from_time", "to_time"))
        declared[row["gateway_id"]].append(DeclaredLoss(_range_of(row), *words))
    return [Progress(name, first, last, ranges[name], declared[name]) for name, first, last in seen]


def _range_of(row: Any) -> BatchRange:
    return BatchRange(
        row["gateway_id"], row["epoch"], RecordClass(row["class"]), row["first_commit"], row["last_commit"]
    )
