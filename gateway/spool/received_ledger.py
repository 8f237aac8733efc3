"""What was received before: batches of other gateways, and requests with an Idempotency-Key (promise 4).

An entry is written by the transaction that stores its rows. Of one gateway, epoch and class the newest
`KEPT_ENTRIES` stay apart, at least; older adjacent ones are merged. A batch that comes again inside a merged
entry is recognised by its rows, as the region does (docs/decisions/009-merged-ledger.md). Answers to requests
with an Idempotency-Key are kept for a day.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from cloud_sync.model import ledger_rules
from cloud_sync.model.ledger_rules import AppliedPart, AppliedRange, GatewayProgress
from cloud_sync.model.records import BatchRange, RecordClass
from gateway.spool.database import SQL, fetch_scalar

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from cloud_sync.model.ledger_rules import Covered
    from cloud_sync.model.records import Batch, Receipt
    from gateway.spool.database import Database
    from gateway.spool.segments import AppendResult, CommitNote

KEPT_ENTRIES = 1000
_MERGED_EVERY = 250
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _LedgerEntry(NamedTuple):
    """A row of the table without its gateway, epoch and class."""

    first_commit: int
    last_commit: int
    part: int
    parts: int
    rows: int
    stored: int
    duplicates: int
    conflicts: int
    refused: int
    min_time_us: int | None
    max_time_us: int | None
    first_at_us: int
    last_at_us: int


def _merge_entries(entries: Sequence[_LedgerEntry]) -> _LedgerEntry:
    """One entry for adjacent ones, in order of commits."""
    times = [t for e in entries for t in (e.min_time_us, e.max_time_us) if t is not None]
    return _LedgerEntry(
        first_commit=entries[0].first_commit,
        last_commit=entries[-1].last_commit,
        part=1,
        parts=1,
        rows=sum(e.rows for e in entries),
        stored=sum(e.stored for e in entries),
        duplicates=sum(e.duplicates for e in entries),
        conflicts=sum(e.conflicts for e in entries),
        refused=sum(e.refused for e in entries),
        min_time_us=min(times, default=None),
        max_time_us=max(times, default=None),
        first_at_us=min(e.first_at_us for e in entries),
        last_at_us=max(e.last_at_us for e in entries),
    )


class ReceivedLedger:
    """The batches that one spool has received from other gateways."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find_receipt(self, batch: Batch) -> Receipt | Covered | None:
        """The receipt that the same batch got before; None when it is new.

        Raises RangeConflictError when only some of the range was stored, or with other contents.
        """
        return await self._database.read(lambda c: _find_receipt(c, batch))

    def build_note(self, batch: Batch, now_us: int) -> CommitNote:
        """What enters a batch into the ledger, inside the transaction that stores its rows."""

        def enter(connection: sqlite3.Connection, result: AppendResult) -> None:
            r = batch.range
            key = (r.gateway_id, r.epoch.bytes, int(r.record_class))
            connection.execute(
                SQL["enter_received"],
                (
                    *key,
                    *(r.first_commit, r.last_commit, r.part, r.parts),
                    *(batch.rows, result.stored, result.duplicates, result.conflicts, batch.refused),
                    *ledger_rules.time_range_us(batch),
                    *(now_us, now_us),
                ),
            )
            _merge_old_entries(connection, key)

        return enter

    async def progress(self, gateway_id: str, epoch: UUID | None = None) -> GatewayProgress | None:
        """What was received from one gateway, in one epoch or all; None when it never delivered here."""
        raw = None if epoch is None else epoch.bytes

        def look(connection: sqlite3.Connection) -> list[tuple[bytes, int, _LedgerEntry]]:
            found = connection.execute(SQL["received_of"], (gateway_id, raw))
            return [(row[0], row[1], _LedgerEntry(*row[2:])) for row in found]

        rows = await self._database.read(look)
        if not rows:
            return None
        ranges = []
        for (raw_epoch, number), group in groupby(rows, key=lambda row: row[:2]):
            named = (gateway_id, UUID(bytes=raw_epoch), RecordClass(number))
            for entries, complete in _group_adjacent_entries(entry for _, _, entry in group):
                merged = _merge_entries(entries)
                commits = BatchRange(*named, merged.first_commit, merged.last_commit)
                counts = merged.rows, merged.stored, merged.duplicates, merged.conflicts, merged.refused
                ranges.append(AppliedRange(commits, *counts, complete=complete))
        first = _EPOCH + timedelta(microseconds=min(entry.first_at_us for _, _, entry in rows))
        last = _EPOCH + timedelta(microseconds=max(entry.last_at_us for _, _, entry in rows))
        return GatewayProgress(gateway_id, first, last, ranges, ())

    async def gateways(self) -> list[str]:
        """Every gateway that has delivered here."""
        return await self._database.read(
            lambda c: [row[0] for row in c.execute(SQL["gateways_received_from"])]
        )


def _find_receipt(connection: sqlite3.Connection, batch: Batch) -> Receipt | Covered | None:
    sent = batch.range
    key = (sent.gateway_id, sent.epoch.bytes, int(sent.record_class))
    found = connection.execute(SQL["received_up_to"], (*key, sent.last_commit)).fetchone()
    if found is None:
        return None
    first, last, parts = found
    known = ledger_rules.compare_range(sent, first, last, in_parts=parts > 1)
    if known != "same":
        return known
    entries = connection.execute(
        SQL["received_parts_reaching_into"], (*key, sent.first_commit, sent.part, sent.parts)
    )
    return ledger_rules.find_part_receipt(batch, [AppliedPart(*row) for row in entries])


def _merge_old_entries(connection: sqlite3.Connection, key: tuple[str, bytes, int]) -> None:
    """Merge entries older than the newest `KEPT_ENTRIES`, once there are twice as many."""
    count = fetch_scalar(connection, "received_count", key)
    if count < 2 * KEPT_ENTRIES or count % _MERGED_EVERY:
        return
    until_us = fetch_scalar(connection, "received_newer_than_newest", (*key, KEPT_ENTRIES))
    entries = [_LedgerEntry(*row) for row in connection.execute(SQL["received_of_class"], (*key, until_us))]
    for adjacent, complete in _group_adjacent_entries(entries):
        if complete and len(adjacent) > 1:
            firsts = {entry.first_commit for entry in adjacent}
            connection.executemany(SQL["drop_received"], [(*key, first) for first in firsts])
            connection.execute(SQL["enter_received"], (*key, *_merge_entries(adjacent)))


def _group_adjacent_entries(entries: Iterable[_LedgerEntry]) -> Iterator[tuple[list[_LedgerEntry], bool]]:
    """Group adjacent complete ranges, in order of commits; an incomplete one (False) is a group by itself."""
    adjacent: list[_LedgerEntry] = []
    complete = True
    for first_commit, group in groupby(entries, key=lambda entry: entry.first_commit):
        parts = list(group)
        is_whole = sum(Fraction(1, entry.parts) for entry in parts) == 1
        if adjacent and not (is_whole and complete and first_commit == adjacent[-1].last_commit + 1):
            yield adjacent, complete
            adjacent = []
        adjacent += parts
        complete = is_whole
    if adjacent:
        yield adjacent, complete


KEY_LIFETIME_US = 86_400_000_000
MAX_KEPT_ANSWERS = 10_000


class KeyedRequest(NamedTuple):
    """The client of a request, its Idempotency-Key, and the hash of its body."""

    client: str
    key: str
    body_hash: bytes


class IdempotencyKeys:
    """Answers to requests by their Idempotency-Key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def find_answer(self, request: KeyedRequest, now_us: int) -> tuple[bytes, str] | None:
        """The hash of the body that came with the key within the last day, and its answer."""
        parameters = (request.client, request.key, now_us - KEY_LIFETIME_US)
        return await self._database.read(lambda c: c.execute(SQL["earlier_answer"], parameters).fetchone())

    def build_note(
        self, request: KeyedRequest, format_answer: Callable[[AppendResult], str], now_us: int
    ) -> CommitNote:
        """What keeps the answer to a request, inside the transaction that stores what it brought."""

        def keep(connection: sqlite3.Connection, result: AppendResult) -> None:
            connection.execute(SQL["keep_answer"], (*request, format_answer(result), now_us))
            connection.execute(SQL["forget_answers"], (now_us - KEY_LIFETIME_US, MAX_KEPT_ANSWERS))

        return keep
