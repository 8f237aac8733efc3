"""The checker's look at every destination's progress: ranges delivered and batches open."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.records import RecordClass
from gateway.operate.spool_walk import SQL
from gateway.spool.database import SQL as SPOOL_SQL
from gateway.spool.segments import commit_of, newest_of, span_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator


def check_progress(connection: sqlite3.Connection, add: Callable[[str, str], None]) -> None:
    """Hold delivered ranges and open batches against what was ever committed.

    `add` is told the place and the words of each problem.
    """
    connection.execute("BEGIN")
    try:
        newest = {k: _newest_ever(connection, k) for k in RecordClass}
        known = {name for name, _, _ in connection.execute(SPOOL_SQL["destinations"])}
        delivered = connection.execute(SQL["all_delivered"]).fetchall()
        batches = connection.execute(SQL["all_batches"]).fetchall()
        for kind, rows in (("delivered", delivered), ("open batch", batches)):
            before: tuple[str, int, int] = ("", 0, 0)
            for destination, number, first, last in rows:
                where = f"destination {destination!r}, {kind} {_class_name(number)} {first}..{last}"
                if destination not in known:
                    add(where, "the spool does not know the destination")
                if number not in newest:
                    add(where, f"{number} is no class of records")
                    continue
                if not 0 < first <= last:
                    add(where, "it is no range of commits")
                if last > newest[number]:
                    add(where, f"it reaches beyond the newest commit ever, {newest[number]}")
                if before[:2] == (destination, number) and first <= before[2]:
                    add(where, f"it overlaps the one before it, which ends at {before[2]}")
                before = (destination, number, last)
                for what in _edges_crossed(connection, RecordClass(number), first, last):
                    add(where, what)
        _check_apart(delivered, batches, add)
    finally:
        connection.execute("COMMIT")


def _newest_ever(connection: sqlite3.Connection, record_class: RecordClass) -> int:
    """The newest commit of a class, set aside ones included."""
    aside = connection.execute(SQL["damaged_between"], span_of(record_class)).fetchall()
    newest: int = max(newest_of(connection, record_class).commit, *(row[1] for row in aside), 0)
    return newest


def _edges_crossed(
    connection: sqlite3.Connection, record_class: RecordClass, first: int, last: int
) -> Iterator[str]:
    """No segment may lie across an edge of progress (promise 3): those that do, in words."""
    for outer in (first - 1, last):
        row = connection.execute(SQL["covering"], span_of(record_class, 0, outer)).fetchone()
        if row is not None and row[1] > outer >= commit_of(row[0]):
            yield f"the segment {commit_of(row[0])}..{row[1]} lies across its edge"


def _check_apart(
    delivered: list[tuple[str, int, int, int]],
    batches: list[tuple[str, int, int, int]],
    add: Callable[[str, str], None],
) -> None:
    """An open batch has not been delivered. Both lists are sorted; batches are few."""
    for destination, number, first, last in batches:
        for other, other_number, done_first, done_last in delivered:
            if (other, other_number) == (destination, number) and done_first <= last and first <= done_last:
                add(
                    f"destination {destination!r}, open batch {_class_name(number)} {first}..{last}",
                    f"{max(first, done_first)}..{min(last, done_last)} of it is delivered already",
                )


def _class_name(number: int) -> str:
    return RecordClass(number).name.lower() if number in set(RecordClass) else f"class {number}"
