"""Ranges of commits by destination: delivered, open for sending, and what is sent next.

Functions on a connection over the tables `delivered`, `batch` and `part`; run inside a transaction where
they write.

The tail is what lies above everything delivered or open: the live lane takes from there. When the tail
covers more than `LIVE_MAX_LAG_US` and does not fit a batch, it takes the newest end and leaves a gap. The
backfill lane takes the gaps, oldest first, and never the tail. There are at most `MAX_GAPS` gaps: beyond
that a destination is served in order. Batches follow segments: no edge of a batch lies inside one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.codec.wire import MAX_PARTS
from cloud_sync.delivery.lanes import ClaimRequest, Lane
from cloud_sync.model.errors import StoreError
from gateway.spool.database import SQL
from gateway.spool.segments import (
    StoredSegment,
    first_commit_at,
    position_span,
    read_segments,
    record_class_at,
)

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Iterator

    from cloud_sync.model.records import BatchRange, RecordClass


class CommitRange(NamedTuple):
    """Commits first..last, both inclusive."""

    first: int
    last: int


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[CommitRange]:
    """The same commits in as few ranges as possible, sorted."""
    result: list[CommitRange] = []
    for first, last in sorted(ranges):
        if result and first <= result[-1].last + 1:
            result[-1] = CommitRange(result[-1].first, max(result[-1].last, last))
        else:
            result.append(CommitRange(first, last))
    return result


def find_gaps(ranges: Iterable[tuple[int, int]], first: int, last: int) -> Iterator[CommitRange]:
    """The ranges of first..last that `ranges` (merged) leave out, oldest first."""
    at = first
    for covered_first, covered_last in ranges:
        if at > last:
            return
        if covered_first > at:
            yield CommitRange(at, min(covered_first - 1, last))
        at = max(at, covered_last + 1)
    if at <= last:
        yield CommitRange(at, last)


LIVE_MAX_LAG_US = 2_000_000
"""The live lane leaves a gap rather than be further behind, in microseconds of what was committed."""
MAX_GAPS = 500
_LOOK_AHEAD = 4096


class BatchPart(NamedTuple):
    """A part of an open batch, and the rows of the batch that its destination refused."""

    part: int
    parts: int
    refused: tuple[int, ...] = ()


WHOLE_BATCH = BatchPart(1, 1)


class Claim(NamedTuple):
    """An open batch: its commits, and the part of them that is to be sent next."""

    range: CommitRange
    part: BatchPart = WHOLE_BATCH


class DeliveryQueue(NamedTuple):
    """The progress of one destination in one class of records."""

    destination: str
    record_class: RecordClass


def find_open_batch(
    connection: sqlite3.Connection, queue: DeliveryQueue, request: ClaimRequest
) -> Claim | None:
    """The open batch that a lane sends (again) first; None when every one is in flight.

    The live lane has the one above all that is delivered, the backfill lane the others.
    """
    open_ = read_open(connection, queue)
    if not open_:
        return None
    top = max((r.last for r in read_delivered(connection, queue)), default=0)
    live = open_[-1] if open_[-1].first > top else None
    in_flight = {
        CommitRange(b.first_commit, b.last_commit)
        for b in request.busy
        if b.record_class is queue.record_class
    }
    for candidate in reversed(open_) if request.lane is Lane.LIVE else open_:
        if candidate in in_flight:
            continue
        if request.lane is None or (request.lane is Lane.LIVE) == (candidate == live):
            parts = read_open_parts(connection, queue, candidate.first)
            return Claim(candidate, parts[0] if parts else WHOLE_BATCH)
    return None


def find_next_range(
    connection: sqlite3.Connection,
    queue: DeliveryQueue,
    request: ClaimRequest,
    *,
    newest: int,
    rows_ever: int,
) -> CommitRange | None:
    """The commits that a lane sends next, neither delivered nor open; None when there are none."""
    covered = merge_ranges([*read_delivered(connection, queue), *read_open(connection, queue)])
    missing = list(find_gaps(covered, 1, newest))
    if not missing:
        return None
    if request.lane is None:
        return _oldest_missing(connection, queue, missing, request.max_rows)
    tail = missing.pop() if missing[-1].last == newest else None
    if request.lane is Lane.BACKFILL:
        return _oldest_missing(connection, queue, missing, request.max_rows)
    if tail is None:
        return None
    return _newest_of_tail(
        connection, queue, tail, request.max_rows, rows_ever, may_jump=len(missing) < MAX_GAPS
    )


def _oldest_missing(
    connection: sqlite3.Connection, queue: DeliveryQueue, missing: Iterable[CommitRange], max_rows: int
) -> CommitRange | None:
    for gap in missing:
        found, total = None, 0
        span = (*position_span(queue.record_class, *gap), _LOOK_AHEAD)
        for position, last_commit, rows in connection.execute(SQL["segment_sizes_from"], span):
            total += rows
            if found is None:
                found = CommitRange(first_commit_at(position), last_commit)
            elif total > max_rows:
                break
            found = found._replace(last=last_commit)
        if found is not None:
            return found
    return None


def _newest_of_tail(
    connection: sqlite3.Connection,
    queue: DeliveryQueue,
    tail: CommitRange,
    max_rows: int,
    rows_ever: int,
    *,
    may_jump: bool,
) -> CommitRange | None:
    span = position_span(queue.record_class, *tail)
    oldest = connection.execute(SQL["first_segment_from"], span).fetchone()
    if oldest is None:
        return None
    _, rows_before, oldest_us, _ = oldest
    back = read_segments(connection, span, _LOOK_AHEAD, newest_first=True)
    newest_us = back[0].written_at_us
    behind = abs(newest_us - oldest_us) > LIVE_MAX_LAG_US
    if rows_ever - rows_before <= max_rows or not behind or not may_jump:
        return _oldest_missing(connection, queue, [tail], max_rows)
    rows, first = 0, back[0].first_commit
    for segment in back:
        rows += segment.rows
        if segment is not back[0] and (
            rows > max_rows or abs(newest_us - segment.written_at_us) > LIVE_MAX_LAG_US
        ):
            break
        first = segment.first_commit
    return CommitRange(first, back[0].last_commit)


def read_delivered(connection: sqlite3.Connection, queue: DeliveryQueue) -> list[CommitRange]:
    """The ranges that need not be sent any more, merged."""
    return [CommitRange(*row) for row in connection.execute(SQL["delivered"], queue)]


def destinations_lacking(connection: sqlite3.Connection, position: int) -> list[str]:
    """The destinations without a receipt for the segment at `position`."""
    record_class, commit = record_class_at(position), first_commit_at(position)
    found = []
    for name, *_ in connection.execute(SQL["destinations"]).fetchall():
        delivered = read_delivered(connection, DeliveryQueue(name, record_class))
        if not any(r.first <= commit <= r.last for r in delivered):
            found.append(name)
    return found


def open_batch(
    connection: sqlite3.Connection, queue: DeliveryQueue, new: CommitRange, request: ClaimRequest
) -> Claim:
    """Open a batch, inside a transaction. One that is far larger than a lane asked for travels in parts."""
    connection.execute(SQL["add_batch"], (*queue, *new, request.now_us))
    rows = count_rows(connection, queue.record_class, new)
    if request.lane is None or rows <= 2 * request.max_rows:
        return Claim(new)
    parts = 1 << min(rows // request.max_rows, rows // 2, MAX_PARTS // 2).bit_length()
    for number in range(1, parts + 1):
        save_part(connection, queue, new.first, BatchPart(number, parts))
    return Claim(new, BatchPart(1, parts))


def count_rows(connection: sqlite3.Connection, record_class: RecordClass, commits: CommitRange) -> int:
    """Rows of a range of commits."""
    span = (*position_span(record_class, *commits), commits.last - commits.first + 1)
    return sum(rows for _, _, rows in connection.execute(SQL["segment_sizes_from"], span))


def read_open(connection: sqlite3.Connection, queue: DeliveryQueue) -> list[CommitRange]:
    """The open batches, in order."""
    return [CommitRange(*row) for row in connection.execute(SQL["open_batches"], queue)]


def read_open_everywhere(connection: sqlite3.Connection, record_class: RecordClass) -> list[CommitRange]:
    """The commits of a class that any destination's open batch covers."""
    return [CommitRange(*row) for row in connection.execute(SQL["open_everywhere"], (record_class,))]


def is_covered(segment: StoredSegment, ranges: Iterable[CommitRange]) -> bool:
    """Whether any of the ranges has a commit of the segment."""
    return any(segment.overlaps(*commits) for commits in ranges)


def add_delivered(connection: sqlite3.Connection, queue: DeliveryQueue, new: CommitRange) -> None:
    """Add a range and merge it with its neighbours."""
    span = (*queue, new.last + 1, new.first - 1)
    touching = connection.execute(SQL["delivered_touching"], span).fetchall()
    for first, _ in touching:
        connection.execute(SQL["delete_delivered"], (*queue, first))
    for whole in merge_ranges([*touching, new]):
        connection.execute(SQL["add_delivered"], (*queue, *whole))


def read_open_parts(
    connection: sqlite3.Connection, queue: DeliveryQueue, first_commit: int
) -> list[BatchPart]:
    """The open parts of a batch, in the order of their rows; none when it travels whole."""
    rows = connection.execute(SQL["parts"], (*queue, first_commit)).fetchall()
    parts = [BatchPart(part, parts, tuple(json.loads(refused))) for part, parts, refused in rows]
    return sorted(parts, key=lambda p: (p.part - 1) / p.parts)


def find_open_part(
    connection: sqlite3.Connection, queue: DeliveryQueue, sent: BatchRange
) -> BatchPart | None:
    """The open part that a claimed batch is; `WHOLE_BATCH` when it travels whole, None when it is neither."""
    parts = read_open_parts(connection, queue, sent.first_commit) or [WHOLE_BATCH]
    return next((p for p in parts if (p.part, p.parts) == (sent.part, sent.parts)), None)


def require_open_part(connection: sqlite3.Connection, queue: DeliveryQueue, sent: BatchRange) -> BatchPart:
    """The same; raises StoreError when it is not open."""
    part = find_open_part(connection, queue, sent)
    if part is None:
        raise StoreError(f"{sent}: is not an open part any more; it will be claimed again")
    return part


def save_part(
    connection: sqlite3.Connection, queue: DeliveryQueue, first_commit: int, part: BatchPart
) -> None:
    """Save an open part, with the rows refused so far."""
    refused = json.dumps(part.refused)
    connection.execute(SQL["add_part"], (*queue, first_commit, part.part, part.parts, refused))


def close_part(connection: sqlite3.Connection, queue: DeliveryQueue, sent: BatchRange) -> bool:
    """Close one part of an open batch; True when that was the last one."""
    first = sent.first_commit
    left = read_open_parts(connection, queue, first)
    if find_open_part(connection, queue, sent) is None:
        return False
    connection.execute(SQL["delete_part"], (*queue, first, sent.part, sent.parts))
    if len(left) > 1:
        return False
    connection.execute(SQL["delete_batch"], (*queue, first, sent.last_commit))
    return True


def split_part(connection: sqlite3.Connection, queue: DeliveryQueue, sent: BatchRange, rows: int) -> None:
    """Replace a part of a batch of `rows` rows by its two halves."""
    first = sent.first_commit
    whole = require_open_part(connection, queue, sent)
    connection.execute(SQL["delete_part"], (*queue, first, whole.part, whole.parts))
    for number in (2 * whole.part - 1, 2 * whole.part):
        half = sent._replace(part=number, parts=2 * whole.parts)
        inside = half.rows_of_part(rows)
        refused = tuple(row for row in whole.refused if inside.start <= row < inside.stop)
        save_part(connection, queue, first, BatchPart(half.part, half.parts, refused))
