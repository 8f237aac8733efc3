"""What was given up before a destination had it: the edge's side of the ledger (promise 5).

A loss is noted here in the transaction in which its records leave the spool, together with the declaration
that tells the destination. Losses that follow one another for the same reason are one row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.notices import Declarations
from cloud_sync.records import RecordClass
from gateway.spool import claims, ranges
from gateway.spool.claims import Queue
from gateway.spool.database import SQL
from gateway.spool.ranges import Range

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

    from gateway.spool.segments import Stored


class Loss(NamedTuple):
    """Commits that a destination will not get.

    Attributes:
        destination: its name; "" where there is no destination and the records were only kept here.
        rows: records in those commits.
        from_us, to_us: earliest and latest time among them, microseconds since 1970.
    """

    destination: str
    record_class: RecordClass
    commits: Range
    rows: int
    from_us: int
    to_us: int


class LossTotal(NamedTuple):
    """All that one destination lost of one class for one reason, and the coarser form that is left."""

    destination: str
    record_class: RecordClass
    reason: str
    survives: str
    rows: int
    from_us: int
    to_us: int
    declared_at_us: int


def losses_by(
    connection: sqlite3.Connection,
    destinations: Sequence[str],
    record_class: RecordClass,
    run: Sequence[Stored],
) -> list[Loss]:
    """What each destination would lose if a run of contiguous segments left the spool now."""
    found = []
    first, last = run[0].first_commit, run[-1].last_commit
    for destination in destinations or ("",):
        delivered = claims.delivered_ranges(connection, Queue(destination, record_class))
        for gap in ranges.gaps(delivered, first, last):
            inside = [s for s in run if gap.first <= s.first_commit and s.last_commit <= gap.last]
            if inside:
                found.append(
                    Loss(
                        destination,
                        record_class,
                        Range(inside[0].first_commit, inside[-1].last_commit),
                        sum(s.rows for s in inside),
                        min(s.min_time_us for s in inside),
                        max(s.max_time_us for s in inside),
                    )
                )
    return found


def note(
    connection: sqlite3.Connection, losses: Sequence[Loss], reason: str, survives: str, now_us: int
) -> None:
    """Enter losses, and take their commits off what is to be delivered; inside a transaction."""
    for loss in losses:
        first, last = loss.commits
        key = (loss.destination, loss.record_class)
        grown = connection.execute(
            SQL["grow_loss"],
            (last, loss.rows, loss.from_us, loss.to_us, now_us, *key, first - 1, reason, survives),
        )
        if not grown.rowcount:
            connection.execute(
                SQL["add_loss"],
                (*key, first, last, loss.rows, loss.from_us, loss.to_us, reason, survives, now_us),
            )
        if loss.destination:
            claims.add_delivered(connection, Queue(*key), loss.commits)


def declared(losses: Sequence[Loss], reason: str, survives: str, now_us: int) -> Declarations:
    """The declarations that tell of losses, in canonical order."""
    count = len(losses)

    def texts(words: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.object_]]:
        column = np.empty(count, np.object_)
        column[:] = words
        return column

    return Declarations(
        time_us=np.full(count, now_us, np.int64),
        of_class=np.array([loss.record_class for loss in losses], np.int32),
        first_commit=np.array([loss.commits.first for loss in losses], np.int64),
        last_commit=np.array([loss.commits.last for loss in losses], np.int64),
        lost=np.array([loss.rows for loss in losses], np.int64),
        from_us=np.array([loss.from_us for loss in losses], np.int64),
        to_us=np.array([loss.to_us for loss in losses], np.int64),
        destination=texts([loss.destination for loss in losses]),
        reason=texts([reason] * count),
        survives=texts([survives] * count),
    ).in_order()


def totals(connection: sqlite3.Connection) -> list[LossTotal]:
    """Everything that was given up, by destination, class and reason."""
    return [
        LossTotal(destination, RecordClass(number), *rest)
        for destination, number, *rest in connection.execute(SQL["loss_totals"])
    ]
