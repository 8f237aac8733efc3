"""How a batch relates to the ledger of applied ones (promise 4), and what a ledger covers. Pure.

The region keeps its ledger in PostgreSQL, a gateway that others deliver to keeps one in its spool; both fetch
the entries that matter and decide here. Ranges never overlap in a ledger, nor do parts of one range.
"""

from __future__ import annotations

from fractions import Fraction
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from cloud_sync.model.errors import RefusedError
from cloud_sync.model.records import Batch, BatchRange, Receipt, RecordClass

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from uuid import UUID

Covered = Literal["covered"]
"""The range lies inside what was applied, but was applied in other pieces: only its rows can tell."""


class RangeConflictError(RefusedError):
    """Part of a range was applied, or all with other contents; `reason`: range_overlap or range_mismatch."""


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


class Coverage(NamedTuple):
    """What is applied of one epoch and class of a gateway. Spans are of commits, inclusive.

    All is applied up to `complete_through` (0 for nothing); `gaps` count from commit 1 on; parts of `partial`
    ranges are still missing.
    """

    gateway_id: str
    epoch: UUID
    record_class: RecordClass
    complete_through: int
    spans: list[tuple[int, int]]
    gaps: list[tuple[int, int]]
    partial: list[tuple[int, int]]
    ranges: list[AppliedRange]

    def sum(self, count: str) -> int:
        """The sum of a count of `AppliedRange`."""
        return sum(getattr(applied, count) for applied in self.ranges)


def find_coverage(ranges: Sequence[AppliedRange]) -> list[Coverage]:
    """The coverage of each epoch and class, from its applied ranges in order."""
    found = []
    for (gateway_id, epoch, record_class), group in groupby(ranges, key=lambda applied: applied.range[:3]):
        applied = list(group)
        spans = [(a.range.first_commit, a.range.last_commit) for a in applied if a.complete]
        partial = [(a.range.first_commit, a.range.last_commit) for a in applied if not a.complete]
        gaps = [
            (end + 1, first - 1) for (_, end), (first, _) in pairwise([(0, 0), *spans]) if end + 1 < first
        ]
        end = spans[-1][1] if spans else 0
        if partial and partial[-1][1] > end:
            gaps.append((end + 1, partial[-1][1]))
        through = spans[0][1] if spans and spans[0][0] == 1 else 0
        found.append(Coverage(gateway_id, epoch, record_class, through, spans, gaps, partial, applied))
    return found


class DeclaredLoss(NamedTuple):
    """Rows that a gateway gave up, why, and in which coarser form they survive ("" for none).

    The earliest and the latest time among them are None where they are not known.
    """

    range: BatchRange
    rows: int
    reason: str
    survives: str
    declared_at: datetime
    from_time: datetime | None = None
    to_time: datetime | None = None


class GatewayProgress(NamedTuple):
    """What is known of one gateway; when it first and last delivered, by the ledger's clock."""

    gateway_id: str
    first_seen: datetime
    last_seen: datetime
    ranges: Sequence[AppliedRange]
    declared: Sequence[DeclaredLoss]


class AppliedPart(NamedTuple):
    """A ledger entry: a part of a known range and what became of its rows; no times when all were refused."""

    part: int
    parts: int
    rows: int
    stored: int
    duplicates: int
    conflicts: int
    min_time_us: int | None
    max_time_us: int | None


def compare_range(
    sent: BatchRange, first_commit: int, last_commit: int, *, in_parts: bool
) -> Literal["same"] | Covered | None:
    """How a range relates to the entry that starts last at or before its end: the same, inside it, or apart.

    RangeConflictError when some of it was applied and some was not.
    """
    if last_commit < sent.first_commit:
        return None
    if (first_commit, last_commit) == (sent.first_commit, sent.last_commit):
        return "same"
    if first_commit <= sent.first_commit and sent.last_commit <= last_commit:
        if not in_parts:
            return "covered"
        raise RangeConflictError(f"{sent}: a longer range was applied in parts before", "range_overlap")
    raise RangeConflictError(f"{sent}: {first_commit}..{last_commit} was applied before", "range_overlap")


def find_part_receipt(batch: Batch, entries: Sequence[AppliedPart]) -> Receipt | Covered | None:
    """The receipt of a batch whose range is in the ledger, None when this part of it is new.

    RangeConflictError when only some of the part was applied, or with other contents.
    """
    sent = batch.range
    if not entries:
        return None
    same = next((e for e in entries if e[:2] == (sent.part, sent.parts)), None)
    if same is None:
        if _is_covered(sent, entries):
            return "covered"
        raise RangeConflictError(f"{sent}: was applied in other parts before", "range_overlap")
    if (same.rows, same.min_time_us, same.max_time_us) != (batch.rows, *time_range_us(batch)):
        raise RangeConflictError(f"{sent}: was applied before with other readings", "range_mismatch")
    return Receipt(same.rows, same.stored, same.duplicates, same.conflicts, applied_before=True)


def time_range_us(batch: Batch) -> tuple[int | None, int | None]:
    """The smallest and largest time of a batch, None each when it has no rows."""
    times = batch.records.time_us
    return (int(times.min()), int(times.max())) if len(times) else (None, None)


def _is_covered(sent: BatchRange, entries: Sequence[AppliedPart]) -> bool:
    """Whether parts that do not overlap each other leave nothing of the sent part out."""
    begin, end = Fraction(sent.part - 1, sent.parts), Fraction(sent.part, sent.parts)
    held = (min(end, Fraction(e.part, e.parts)) - max(begin, Fraction(e.part - 1, e.parts)) for e in entries)
    return sum(held) == end - begin
