"""What is sent next, and what has been sent: the rows of `delivered`, `batch` and `part` of one destination.

Functions on a connection, to be run inside a transaction where they write.

The tail is what lies above everything delivered or open: the live lane takes from there, and when the tail
covers more time than `BEHIND_US` and does not fit a batch, it takes the newest end of it and leaves a gap.
The backfill lane takes the gaps, oldest first, and never the tail. There are never more than `GAPS_MAX` gaps:
a destination that cannot keep up at all is served in order beyond that. Batches follow segments: no edge of a
batch lies inside one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.lanes import Lane, Wanted
from cloud_sync.records import RecordClass
from cloud_sync.wire import PARTS_MAX
from gateway.spool import ranges
from gateway.spool.database import SQL
from gateway.spool.ranges import Range
from gateway.spool.segments import CLASS_SHIFT, Stored, commit_of, span_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable

    from cloud_sync.records import BatchRange

BEHIND_US = 2_000_000
"""The live lane leaves a gap rather than be further behind, in microseconds of what was committed."""
GAPS_MAX = 500
_LOOK_AHEAD = 4096


class Part(NamedTuple):
    """A part of an open batch, and the rows of the batch that its destination refused."""

    part: int
    parts: int
    refused: tuple[int, ...] = ()


WHOLE = Part(1, 1)


class Claim(NamedTuple):
    """An open batch: its commits, and the part of them that is to be sent next."""

    range: Range
    part: Part = WHOLE


class Queue(NamedTuple):
    """One destination and class of records: whose progress is looked at."""

    destination: str
    record_class: RecordClass


def open_claim(connection: sqlite3.Connection, queue: Queue, wanted: Wanted) -> Claim | None:
    """The open batch that a lane sends (again) first; None when there is none that nobody carries.

    The live lane has the one above all that is delivered, the backfill lane the others.
    """
    open_ = open_ranges(connection, queue)
    if not open_:
        return None
    top = max((r.last for r in delivered_ranges(connection, queue)), default=0)
    live = open_[-1] if open_[-1].first > top else None
    carried = {
        Range(b.first_commit, b.last_commit) for b in wanted.busy if b.record_class is queue.record_class
    }
    for candidate in reversed(open_) if wanted.lane is Lane.LIVE else open_:
        if candidate in carried:
            continue
        if wanted.lane is None or (wanted.lane is Lane.LIVE) == (candidate == live):
            return Claim(candidate, first_part(connection, queue, candidate))
    return None


def next_range(
    connection: sqlite3.Connection, queue: Queue, wanted: Wanted, *, newest: int, rows_ever: int
) -> Range | None:
    """The commits that a lane takes next, none of them delivered or open; None when it has nothing to do."""
    covered = ranges.merged([*delivered_ranges(connection, queue), *open_ranges(connection, queue)])
    missing = list(ranges.gaps(covered, 1, newest))
    if not missing:
        return None
    if wanted.lane is None:
        return _oldest(connection, queue, missing, wanted.max_rows)
    tail = missing.pop() if missing[-1].last == newest else None
    if wanted.lane is Lane.BACKFILL:
        return _oldest(connection, queue, missing, wanted.max_rows)
    if tail is None:
        return None
    return _newest(connection, queue, tail, wanted.max_rows, rows_ever, may_jump=len(missing) < GAPS_MAX)


def _oldest(
    connection: sqlite3.Connection, queue: Queue, missing: Iterable[Range], max_rows: int
) -> Range | None:
    for gap in missing:
        found, total = None, 0
        span = (*span_of(queue.record_class, *gap), _LOOK_AHEAD)
        for position, last_commit, rows in connection.execute(SQL["segment_sizes_from"], span):
            total += rows
            if found is None:
                found = Range(commit_of(position), last_commit)
            elif total > max_rows:
                break
            found = found._replace(last=last_commit)
        if found is not None:
            return found
    return None


def _newest(
    connection: sqlite3.Connection,
    queue: Queue,
    tail: Range,
    max_rows: int,
    rows_ever: int,
    *,
    may_jump: bool,
) -> Range | None:
    span = span_of(queue.record_class, *tail)
    oldest = connection.execute(SQL["first_segment_from"], span).fetchone()
    if oldest is None:
        return None
    _, rows_before, oldest_us, _ = oldest
    back = [Stored(*row) for row in connection.execute(SQL["segments_back_from"], (*span, _LOOK_AHEAD))]
    newest_us = back[0].written_at_us
    behind = abs(newest_us - oldest_us) > BEHIND_US
    if rows_ever - rows_before <= max_rows or not behind or not may_jump:
        return _oldest(connection, queue, [tail], max_rows)
    rows, first = 0, back[0].first_commit
    for segment in back:
        rows += segment.rows
        if segment is not back[0] and (rows > max_rows or abs(newest_us - segment.written_at_us) > BEHIND_US):
            break
        first = segment.first_commit
    return Range(first, back[0].last_commit)


def delivered_ranges(connection: sqlite3.Connection, queue: Queue) -> list[Range]:
    """What need not be sent any more, merged."""
    return [Range(*row) for row in connection.execute(SQL["delivered"], queue)]


def lacking(connection: sqlite3.Connection, position: int) -> list[str]:
    """The destinations that have no receipt for the segment at `position`."""
    record_class, commit = RecordClass(position >> CLASS_SHIFT), commit_of(position)
    found = []
    for name, *_ in connection.execute(SQL["destinations"]).fetchall():
        delivered = delivered_ranges(connection, Queue(name, record_class))
        if not any(r.first <= commit <= r.last for r in delivered):
            found.append(name)
    return found


def orphans(connection: sqlite3.Connection, configured: Collection[str]) -> list[str]:
    """Destinations of the spool that are configured no longer, and that nobody has dropped."""
    return [name for name, *_ in connection.execute(SQL["destinations"]) if name not in configured]


def fix(connection: sqlite3.Connection, queue: Queue, new: Range, wanted: Wanted) -> Claim:
    """Open a batch, inside a transaction. A lane's that is far larger than wanted travels in parts."""
    connection.execute(SQL["add_batch"], (*queue, *new, wanted.now_us))
    rows = rows_between(connection, queue.record_class, new)
    if wanted.lane is None or rows <= 2 * wanted.max_rows:
        return Claim(new)
    parts = 1 << min(rows // wanted.max_rows, rows // 2, PARTS_MAX // 2).bit_length()
    for number in range(1, parts + 1):
        keep_part(connection, queue, new.first, Part(number, parts))
    return Claim(new, Part(1, parts))


def rows_between(connection: sqlite3.Connection, record_class: RecordClass, commits: Range) -> int:
    """Rows of a range of commits."""
    span = (*span_of(record_class, *commits), commits.last - commits.first + 1)
    return sum(rows for _, _, rows in connection.execute(SQL["segment_sizes_from"], span))


def open_ranges(connection: sqlite3.Connection, queue: Queue) -> list[Range]:
    """What is fixed for sending, in order."""
    return [Range(*row) for row in connection.execute(SQL["open_batches"], queue)]


def add_delivered(connection: sqlite3.Connection, queue: Queue, new: Range) -> None:
    """Add a range and merge it with its neighbours."""
    touching = [
        Range(*row)
        for row in connection.execute(SQL["delivered_touching"], (*queue, new.last + 1, new.first - 1))
    ]
    for old in touching:
        connection.execute(SQL["delete_delivered"], (*queue, old.first))
    for whole in ranges.merged([*touching, new]):
        connection.execute(SQL["add_delivered"], (*queue, *whole))


def open_parts(connection: sqlite3.Connection, queue: Queue, first_commit: int) -> list[Part]:
    """The parts of a batch still to be sent, in the order of their rows; none when it travels whole."""
    rows = connection.execute(SQL["parts"], (*queue, first_commit)).fetchall()
    parts = [Part(part, parts, tuple(json.loads(refused))) for part, parts, refused in rows]
    return sorted(parts, key=lambda p: (p.part - 1) / p.parts)


def first_part(connection: sqlite3.Connection, queue: Queue, batch: Range) -> Part:
    """What of a batch is to be sent next."""
    return next(iter(open_parts(connection, queue, batch.first)), WHOLE)


def keep_part(connection: sqlite3.Connection, queue: Queue, first_commit: int, part: Part) -> None:
    """Note a part that is still to be sent, or what was refused of it."""
    refused = json.dumps(part.refused)
    connection.execute(SQL["add_part"], (*queue, first_commit, part.part, part.parts, refused))


def close_part(connection: sqlite3.Connection, queue: Queue, sent: BatchRange) -> bool:
    """Take one part off an open batch; True when nothing of the batch is left to be sent."""
    first = sent.first_commit
    left = open_parts(connection, queue, first)
    if (sent.part, sent.parts) not in [(p.part, p.parts) for p in left or [WHOLE]]:
        return False
    connection.execute(SQL["delete_part"], (*queue, first, sent.part, sent.parts))
    if len(left) > 1:
        return False
    connection.execute(SQL["delete_batch"], (*queue, first, sent.last_commit))
    return True


def halve_part(connection: sqlite3.Connection, queue: Queue, sent: BatchRange, rows: int) -> None:
    """Put two halves in the place of a part of a batch of `rows` rows."""
    first = sent.first_commit
    parts = open_parts(connection, queue, first) or [WHOLE]
    whole = next(p for p in parts if (p.part, p.parts) == (sent.part, sent.parts))
    connection.execute(SQL["delete_part"], (*queue, first, whole.part, whole.parts))
    for number in (2 * whole.part - 1, 2 * whole.part):
        half = sent._replace(part=number, parts=2 * whole.parts)
        held = half.rows_of_part(rows)
        refused = tuple(row for row in whole.refused if held.start <= row < held.stop)
        keep_part(connection, queue, first, Part(half.part, half.parts, refused))


def refuse_rows(
    connection: sqlite3.Connection, queue: Queue, sent: BatchRange, rows: Collection[int]
) -> None:
    """Leave more rows out of an open part; positions among the rows of the whole batch."""
    parts = open_parts(connection, queue, sent.first_commit) or [WHOLE]
    part = next(p for p in parts if (p.part, p.parts) == (sent.part, sent.parts))
    refused = tuple(sorted({*part.refused, *rows}))
    keep_part(connection, queue, sent.first_commit, part._replace(refused=refused))
