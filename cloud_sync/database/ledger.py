"""Which ranges have been applied: promise 4 in SQL. One row a batch; ranges never overlap, nor parts of one.

A range may be applied in parts (`records.BatchRange`). Rows of old ranges that lie side by side are merged
into one, which remembers their sums only; `docs/decisions/009-merged-ledger.md` says what a resend then gets.

Every function runs inside the transaction that holds the gateway's lock, except `progress`.
"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cloud_sync.database import statements
from cloud_sync.errors import Refused
from cloud_sync.records import Batch, BatchRange, Receipt, RecordClass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    import asyncpg

_SQL = statements.named("regional.sql")

Covered = Literal["covered"]
"""The range lies inside what was applied, but was applied in other pieces: only its rows can tell."""


class RangeConflict(Refused):
    """A range that cannot be applied: part of it was, or it was with other contents.

    `reason` is range_overlap or range_mismatch.
    """


class AppliedRange(NamedTuple):
    """Adjacent applied ranges of one gateway, epoch and class as one, and what became of their rows.

    `complete` is False for a single range of which parts are still missing.
    """

    range: BatchRange
    rows: int
    stored: int
    duplicates: int
    conflicts: int
    refused: int
    complete: bool


class DeclaredLoss(NamedTuple):
    """Rows that a gateway gave up, why, and in which coarser form they survive ("" for none)."""

    range: BatchRange
    rows: int
    reason: str
    survives: str
    declared_at: datetime


class Progress(NamedTuple):
    """What is known of one gateway; when it first and last delivered, by the database's clock."""

    gateway_id: str
    first_seen: datetime
    last_seen: datetime
    ranges: Sequence[AppliedRange]
    declared: Sequence[DeclaredLoss]


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
    if found is None or found["last_commit"] < wanted.first_commit:
        return None
    if (found["first_commit"], found["last_commit"]) == (wanted.first_commit, wanted.last_commit):
        return await _earlier_part(connection, batch)
    if found["first_commit"] <= wanted.first_commit and wanted.last_commit <= found["last_commit"]:
        if found["parts"] == 1:
            return "covered"
        raise RangeConflict(f"{wanted}: a longer range was applied in parts before", "range_overlap")
    applied = f"{found['first_commit']}..{found['last_commit']}"
    raise RangeConflict(f"{wanted}: {applied} was applied before", "range_overlap")


async def _earlier_part(connection: asyncpg.Connection[Any], batch: Batch) -> Receipt | Covered | None:
    """As `earlier_receipt`, for a range that was applied as a whole or in parts."""
    wanted = batch.range
    entries = await connection.fetch(
        _SQL["entries_reaching_into_part"], *wanted[:4], wanted.part, wanted.parts
    )
    if not entries:
        return None
    same = next((e for e in entries if (e["part"], e["parts"]) == (wanted.part, wanted.parts)), None)
    if same is None:
        if _covered(wanted, [(e["part"], e["parts"]) for e in entries]):
            return "covered"
        raise RangeConflict(f"{wanted}: was applied in other parts before", "range_overlap")
    if (same["rows"], same["min_time_us"], same["max_time_us"]) != (batch.rows, *_time_range_us(batch)):
        raise RangeConflict(f"{wanted}: was applied before with other readings", "range_mismatch")
    return Receipt(same["rows"], same["stored"], same["duplicates"], same["conflicts"], applied_before=True)


def _covered(wanted: BatchRange, entries: list[tuple[int, int]]) -> bool:
    """Whether parts that do not overlap each other leave nothing of the wanted part out."""
    begin, end = Fraction(wanted.part - 1, wanted.parts), Fraction(wanted.part, wanted.parts)
    held = (
        min(end, Fraction(part, parts)) - max(begin, Fraction(part - 1, parts)) for part, parts in entries
    )
    return sum(held) == end - begin


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
        *_time_range_us(batch),
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
        words = (row[name] for name in ("rows", "reason", "survives", "declared_at"))
        declared[row["gateway_id"]].append(DeclaredLoss(_range_of(row), *words))
    return [Progress(name, first, last, ranges[name], declared[name]) for name, first, last in seen]


def _range_of(row: Any) -> BatchRange:
    return BatchRange(
        row["gateway_id"], row["epoch"], RecordClass(row["class"]), row["first_commit"], row["last_commit"]
    )


def _time_range_us(batch: Batch) -> tuple[int | None, int | None]:
    times = batch.readings.time_us
    return (int(times.min()), int(times.max())) if len(times) else (None, None)
