"""What was received before: batches of other gateways, and requests with an Idempotency-Key (promise 4).

An entry is written by the transaction that stores its rows. Of one gateway, epoch and class the newest
`KEPT_ENTRIES` stay apart, at least; older adjacent ones are merged. A batch that comes again inside a merged
entry is recognised by its rows, as the region does (docs/decisions/009-merged-ledger.md). Answers to requests
with an Idempotency-Key are kept for a day.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    from collections.abc import Callable, Iterable, Iterator

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


@dataclass(slots=True)
class _AdjacentEntries:
    """Entries of adjacent ranges, merged into one."""

    entries: list[_LedgerEntry] = field(default_factory=list)
    complete: bool = True

    @property
    def last_commit(self) -> int:
        return self.entries[-1].last_commit if self.entries else -1

    def merged(self) -> _LedgerEntry:
        e = self.entries
        least = (x.min_time_us for x in e if x.min_time_us is not None)
        most = (x.max_time_us for x in e if x.max_time_us is not None)
        return _LedgerEntry(
            first_commit=e[0].first_commit,
            last_commit=self.last_commit,
            part=1,
            parts=1,
            rows=sum(x.rows for x in e),
            stored=sum(x.stored for x in e),
            duplicates=sum(x.duplicates for x in e),
            conflicts=sum(x.conflicts for x in e),
            refused=sum(x.refused for x in e),
            min_time_us=min(least, default=None),
            max_time_us=max(most, default=None),
            first_at_us=min(x.first_at_us for x in e),
            last_at_us=max(x.last_at_us for x in e),
        )


class ReceivedLedger:
    """The batches that one spool has received from other gateways."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def earlier(self, batch: Batch) -> Receipt | Covered | None:
        """The receipt that the same batch got before; None when it is new.

        Raises:
            RangeConflict: some of the range was taken and some was not, or it was with other contents.
            SpoolError: the spool cannot be read.
        """
        return await self._database.read(lambda c: _find_receipt(c, batch))

    def note(self, batch: Batch, now_us: int) -> CommitNote:
        """What enters a batch into the ledger, inside the transaction that stores its rows."""

        def enter(connection: sqlite3.Connection, taken: AppendResult) -> None:
            r = batch.range
            key = (r.gateway_id, r.epoch.bytes, int(r.record_class))
            connection.execute(
                SQL["enter_received"],
                (
                    *key,
                    *(r.first_commit, r.last_commit, r.part, r.parts),
                    *(batch.rows, taken.stored, taken.duplicates, taken.conflicts, batch.refused),
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
            ranges += [
                _to_applied_range(named, i) for i in _group_adjacent_entries(entry for _, _, entry in group)
            ]
        first = min(entry.first_at_us for _, _, entry in rows)
        last = max(entry.last_at_us for _, _, entry in rows)
        return GatewayProgress(gateway_id, _datetime_from_us(first), _datetime_from_us(last), ranges, ())

    async def gateways(self) -> list[str]:
        """Every gateway that has delivered here."""
        return await self._database.read(
            lambda c: [row[0] for row in c.execute(SQL["gateways_received_from"])]
        )


def _find_receipt(connection: sqlite3.Connection, batch: Batch) -> Receipt | Covered | None:
    wanted = batch.range
    key = (wanted.gateway_id, wanted.epoch.bytes, int(wanted.record_class))
    found = connection.execute(SQL["received_up_to"], (*key, wanted.last_commit)).fetchone()
    if found is None:
        return None
    first, last, parts = found
    known = ledger_rules.compare_range(wanted, first, last, in_parts=parts > 1)
    if known != "same":
        return known
    entries = connection.execute(
        SQL["received_parts_reaching_into"], (*key, wanted.first_commit, wanted.part, wanted.parts)
    )
    return ledger_rules.find_part_receipt(batch, [AppliedPart(*row) for row in entries])


def _merge_old_entries(connection: sqlite3.Connection, key: tuple[str, bytes, int]) -> None:
    """Merge entries older than the newest `KEPT_ENTRIES`, once there are twice as many."""
    count = fetch_scalar(connection, "received_count", key)
    if count < 2 * KEPT_ENTRIES or count % _MERGED_EVERY:
        return
    until_us = fetch_scalar(connection, "received_newer_than_newest", (*key, KEPT_ENTRIES))
    entries = [_LedgerEntry(*row) for row in connection.execute(SQL["received_of_class"], (*key, until_us))]
    for island in _group_adjacent_entries(entries):
        if not island.complete or len(island.entries) == 1:
            continue
        firsts = {entry.first_commit for entry in island.entries}
        connection.executemany(SQL["drop_received"], [(*key, first) for first in firsts])
        connection.execute(SQL["enter_received"], (*key, *island.merged()))


def _group_adjacent_entries(entries: Iterable[_LedgerEntry]) -> Iterator[_AdjacentEntries]:
    """Group adjacent complete ranges, in order of commits; an incomplete one is a group by itself."""
    island = _AdjacentEntries()
    for _, group in groupby(entries, key=lambda entry: entry.first_commit):
        parts = list(group)
        whole = sum(Fraction(1, entry.parts) for entry in parts) == 1
        joins = whole and island.complete and parts[0].first_commit == island.last_commit + 1
        if island.entries and not joins:
            yield island
            island = _AdjacentEntries()
        island.entries += parts
        island.complete = whole
    if island.entries:
        yield island


def _to_applied_range(named: tuple[str, UUID, RecordClass], island: _AdjacentEntries) -> AppliedRange:
    one = island.merged()
    return AppliedRange(
        BatchRange(*named, one.first_commit, one.last_commit),
        *(one.rows, one.stored, one.duplicates, one.conflicts, one.refused),
        complete=island.complete,
    )


def _datetime_from_us(at_us: int) -> datetime:
    return _EPOCH + timedelta(microseconds=at_us)


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

    async def earlier(self, asked: KeyedRequest, now_us: int) -> tuple[bytes, str] | None:
        """The hash of the body that came with the key within the last day, and its answer.

        Raises:
            SpoolError: the spool cannot be read.
        """
        wanted = (asked.client, asked.key, now_us - KEY_LIFETIME_US)
        return await self._database.read(lambda c: c.execute(SQL["earlier_answer"], wanted).fetchone())

    def note(self, asked: KeyedRequest, worded: Callable[[AppendResult], str], now_us: int) -> CommitNote:
        """What keeps the answer to a request, inside the transaction that stores what it brought."""

        def keep(connection: sqlite3.Connection, taken: AppendResult) -> None:
            connection.execute(SQL["keep_answer"], (*asked, worded(taken), now_us))
            connection.execute(SQL["forget_answers"], (now_us - KEY_LIFETIME_US, MAX_KEPT_ANSWERS))

        return keep
