"""What was applied before: ranges of gateways (promise 4), Idempotency-Keys of clients, imported files.

One row a batch; ranges never overlap, nor parts of one. Old adjacent ranges are merged, keeping their
sums only (`docs/decisions/009-merged-ledger.md`). Functions on ranges run in the transaction that holds
the gateway's lock, except `load_progress`. No import of asyncpg at run time: the gateway loads this
module.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.model import ledger_rules
from cloud_sync.model.errors import RefusedError
from cloud_sync.model.ledger_rules import AppliedPart, AppliedRange, DeclaredLoss, GatewayProgress
from cloud_sync.model.records import Batch, BatchRange, Receipt, RecordClass
from cloud_sync.timescale import SQL

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

    from cloud_sync.model.ledger_rules import Covered
    from cloud_sync.timescale import Connection


async def lock_gateway(connection: Connection, gateway_id: str) -> None:
    """Wait until no other transaction applies a batch of this gateway; held until the transaction ends."""
    await connection.execute(SQL["lock_gateway"], gateway_id)


async def find_receipt(connection: Connection, batch: Batch) -> Receipt | Covered | None:
    """The receipt of an earlier application of the same batch; None when it is new.

    RangeConflictError when only some of the range was applied, or with other contents.
    """
    sent = batch.range
    found = await connection.fetchrow(
        SQL["newest_range_up_to"], sent.gateway_id, sent.epoch, sent.record_class, sent.last_commit
    )
    if found is None:
        return None
    first, last = found["first_commit"], found["last_commit"]
    known = ledger_rules.compare_range(sent, first, last, in_parts=found["parts"] > 1)
    if known != "same":
        return known
    entries = await connection.fetch(SQL["entries_reaching_into_part"], *sent[:4], sent.part, sent.parts)
    return ledger_rules.find_part_receipt(
        batch, [AppliedPart(*(e[name] for name in AppliedPart._fields)) for e in entries]
    )


async def record_batch(connection: Connection, batch: Batch, receipt: Receipt) -> None:
    """Record that a batch is applied."""
    await connection.execute(
        SQL["enter_range"],
        *batch.range,
        receipt.rows,
        receipt.stored,
        receipt.duplicates,
        receipt.conflicts,
        batch.refused,
        *ledger_rules.time_range_us(batch),
    )


async def load_progress(
    connection: Connection, gateway_id: str | None = None, epoch: UUID | None = None
) -> list[GatewayProgress]:
    """What is known of one gateway or of all, of one epoch or of all; a gateway never seen is left out."""
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        seen = await connection.fetch(SQL["gateways_seen"], gateway_id)
        rows = await connection.fetch(SQL["applied_ranges"], gateway_id, epoch)
        losses = await connection.fetch(SQL["declared_losses"], gateway_id, epoch)
    ranges: dict[str, list[AppliedRange]] = defaultdict(list)
    for row in rows:
        counts = (row[name] for name in ("rows", "stored", "duplicates", "conflicts", "refused", "complete"))
        ranges[row["gateway_id"]].append(AppliedRange(_range_from_row(row), *counts))
    declared: dict[str, list[DeclaredLoss]] = defaultdict(list)
    for row in losses:
        words = (row[name] for name in ("rows", "reason", "survives", "declared_at", "from_time", "to_time"))
        declared[row["gateway_id"]].append(DeclaredLoss(_range_from_row(row), *words))
    return [GatewayProgress(name, first, last, ranges[name], declared[name]) for name, first, last in seen]


def _range_from_row(row: Any) -> BatchRange:
    return BatchRange(
        row["gateway_id"], row["epoch"], RecordClass(row["class"]), row["first_commit"], row["last_commit"]
    )


ANSWER_RETENTION = timedelta(days=1)


class KeyReusedError(RefusedError):
    """The Idempotency-Key came before with another body."""


@dataclass(frozen=True, slots=True)
class ClientIdempotency:
    """An `Idempotency` of one client's request: the answer is kept for its Idempotency-Key, "" for none."""

    client: str
    key: str
    body_hash: bytes
    make_answer: Callable[[Receipt], str]

    async def find_answer(self, connection: Connection) -> str | None:
        """The answer that the key got within the last day; KeyReusedError when that was for another body."""
        if not self.key:
            return None
        await connection.execute(SQL["lock_key"], self.client, self.key)
        found = await connection.fetchrow(SQL["earlier_answer"], self.client, self.key, ANSWER_RETENTION)
        if found is None:
            return None
        if found["body_hash"] != self.body_hash:
            message = f"the Idempotency-Key {self.key} came before with another body"
            raise KeyReusedError(message, "key_reused")
        return str(found["answer"])

    async def record_answer(self, connection: Connection, receipt: Receipt) -> str:
        """Keep the answer for the key, if there is one."""
        answer = self.make_answer(receipt)
        if self.key:
            await connection.execute(SQL["keep_answer"], self.client, self.key, self.body_hash, answer)
        return answer


async def delete_old_answers(connection: Connection) -> None:
    """Delete the answers whose keys are no longer remembered."""
    await connection.execute(SQL["forget_answers"], ANSWER_RETENTION)


class ImportProgress(NamedTuple):
    """How far one file has been imported, and what became of its readings."""

    lines: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    rejected: int = 0
    complete: bool = False

    def add(self, after: ImportProgress, before: ImportProgress) -> ImportProgress:
        """These counts and what another file gained between two moments."""
        lines, stored, duplicates, conflicts, rejected = (
            total + now - then for total, now, then in zip(self[:5], after[:5], before[:5], strict=True)
        )
        return ImportProgress(lines, stored, duplicates, conflicts, rejected)


async def find_import_progress(connection: Connection, sha256: bytes) -> ImportProgress:
    """How far the file with these contents has been imported."""
    found = await connection.fetchrow(SQL["loaded_file"], sha256)
    return ImportProgress() if found is None else ImportProgress(*found)


@dataclass(frozen=True, slots=True)
class FileIdempotency:
    """An `Idempotency` of one piece of a file, which begins at line `before.lines`."""

    sha256: bytes
    name: str
    before: ImportProgress
    lines: int
    rejected: int
    complete: bool

    async def find_answer(self, connection: Connection) -> ImportProgress | None:
        """How far it is, when another process has imported this piece meanwhile."""
        await connection.execute(SQL["lock_file"], self.sha256)
        now = await find_import_progress(connection, self.sha256)
        return None if now.lines <= self.before.lines and not now.complete else now

    async def record_answer(self, connection: Connection, receipt: Receipt) -> ImportProgress:
        """Record that the piece is imported."""
        before = self.before
        after = ImportProgress(
            before.lines + self.lines,
            before.stored + receipt.stored,
            before.duplicates + receipt.duplicates,
            before.conflicts + receipt.conflicts,
            before.rejected + self.rejected,
            self.complete,
        )
        await connection.execute(SQL["enter_loaded"], self.sha256, self.name, *after)
        return after
