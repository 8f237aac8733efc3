"""A region in memory that keeps a ledger as the real one does, and does what a test tells it to."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from cloud_sync.codec import wire
from cloud_sync.destinations import EncodedBatch
from cloud_sync.model.errors import DeliveryError, RefusedError, RetryLaterError, TooLargeError
from cloud_sync.model.records import Batch, BatchRange, Credit, Receipt, RecordClass

if TYPE_CHECKING:
    from collections.abc import Callable
    from uuid import UUID

Row = tuple[str, int, float]
"""sensor_id, time_us, value."""

LOST = "lost"
"""An outcome: the batch is applied, its receipt never arrives."""


@dataclass
class MemoryRegion:
    """Destination and region in one.

    Attributes:
        outcomes: one for each send to come: an error to raise, LOST, or None; then None for ever.
        is_bad: rows for which a batch is refused.
        tells_rows: whether a refusal says which rows.
        applied: how often each row was applied; effectively once means once each.
        sent: the batches in the order they came.
        others: batches of other classes than readings, each range once.
    """

    name: str = "region"
    outcomes: deque[DeliveryError | str | None] = field(default_factory=deque)
    is_bad: Callable[[Row], bool] = lambda _: False
    tells_rows: bool = False
    reason: str = "http_400"
    most_rows: int = 10**9
    credit: Credit | None = None
    applied: Counter[Row] = field(default_factory=Counter)
    sent: list[BatchRange] = field(default_factory=list)
    rows_sent: int = 0
    others: list[Batch] = field(default_factory=list)
    ledger: dict[tuple[UUID, int, int], dict[tuple[int, int], Receipt]] = field(default_factory=dict)

    def encode(self, batch: Batch) -> EncodedBatch:
        return EncodedBatch(batch.range, batch.rows, (wire.encode(batch),))

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        batch = wire.decode(encoded_batch.bodies[0])
        self.sent.append(batch.range)
        self.rows_sent += batch.rows
        outcome = self.outcomes.popleft() if self.outcomes else None
        if isinstance(outcome, DeliveryError):
            raise outcome
        receipt = self._apply(batch)
        if outcome == LOST:
            raise ConnectionLostError
        return receipt

    async def aclose(self) -> None:
        return

    def _apply(self, batch: Batch) -> Receipt:
        if batch.range.record_class is not RecordClass.READING:
            if batch.range not in [other.range for other in self.others]:
                self.others.append(batch)
            return Receipt(batch.rows, batch.rows)
        if batch.rows > self.most_rows:
            raise TooLargeError("too many rows")
        rows = rows_of(batch)
        bad = [at for at, row in enumerate(rows) if self.is_bad(row)]
        if bad:
            told = bad if self.tells_rows else ()
            raise RefusedError(f"{len(bad)} rows are bad", self.reason, of_rows=True, rows=told)
        wanted = batch.range
        key, part = (wanted.epoch, wanted.first_commit, wanted.last_commit), (wanted.part, wanted.parts)
        if self._covered(wanted):
            assert all(row in self.applied for row in rows), f"{wanted}: sent again with other rows"
            return Receipt(batch.rows, batch.rows, applied_before=True)
        for epoch, first, last in self.ledger:
            apart = epoch != wanted.epoch or last < wanted.first_commit or wanted.last_commit < first
            if not apart and (first, last) != key[1:]:
                raise RefusedError(f"{wanted} overlaps {first}..{last}", "range_overlap")
        parts = self.ledger.setdefault(key, {})
        if any(_overlap(part, other) for other in parts):
            raise RefusedError(f"{wanted} overlaps a part", "range_overlap")
        self.applied.update(rows)
        parts[part] = Receipt(batch.rows, batch.rows, credit=self.credit)
        return parts[part]

    def _covered(self, wanted: BatchRange) -> bool:
        """Whether all of a batch was applied, if in larger pieces, as when a size limit has come down."""
        begin, end = Fraction(wanted.part - 1, wanted.parts), Fraction(wanted.part, wanted.parts)
        for (epoch, first, last), parts in self.ledger.items():
            if epoch != wanted.epoch:
                continue
            whole = sum(Fraction(1, n) for _, n in parts) == 1
            if first <= wanted.first_commit and wanted.last_commit <= last and whole:
                return True
            if (first, last) == (wanted.first_commit, wanted.last_commit):
                held = (min(end, Fraction(k, n)) - max(begin, Fraction(k - 1, n)) for k, n in parts)
                if sum(h for h in held if h > 0) == end - begin:
                    return True
        return False

    def commits(self, epoch: UUID) -> list[tuple[int, int]]:
        """The ranges of an epoch that are complete, in order."""
        return sorted(
            (first, last)
            for (of, first, last), parts in self.ledger.items()
            if of == epoch and sum(Fraction(1, n) for _, n in parts) == 1
        )


class ConnectionLostError(RetryLaterError):
    """The receipt did not arrive."""

    def __init__(self) -> None:
        super().__init__("the connection was lost")


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    (a, n), (b, m) = one, other
    return Fraction(a - 1, n) < Fraction(b, m) and Fraction(b - 1, m) < Fraction(a, n)


def rows_of(batch: Batch) -> list[Row]:
    readings = batch.readings
    ids = [batch.series[number].sensor_id for number in readings.series.tolist()]
    return list(zip(ids, readings.time_us.tolist(), readings.value.tolist(), strict=True))
