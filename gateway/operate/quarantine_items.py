"""Quarantine as a person deals with it: listed, shown, dropped. Retrying is `quarantine_retry`'s.

Dropping is one short transaction of its own for at most `_AT_ONCE` items: SQLite lets it wait for, and be
waited for by, a gateway that is running, and the gateway keeps nothing of the quarantine in memory.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from gateway.operate.spool_file import opened
from gateway.operate.spool_walk import SQL
from gateway.spool.database import SQL as SPOOL_SQL
from gateway.spool.errors import SpoolFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_AT_ONCE = 500
_BUSY_TIMEOUT_S = 30.0
_NEWEST = (1 << 63) - 1


class Item(NamedTuple):
    """One row of the quarantine. `payload` may be the first bytes only of `payload_bytes`."""

    quarantine_no: int
    received_at_us: int
    source: str
    topic: str
    reason: str
    detail: str
    payload: bytes
    payload_bytes: int

    @property
    def is_cut(self) -> bool:
        """Whether the payload is not kept as a whole."""
        return len(self.payload) < self.payload_bytes


class ReasonCount(NamedTuple):
    """How many items there are of one reason."""

    reason: str
    items: int
    newest_at_us: int


def items_of(path: Path, *, reason: str | None = None, limit: int = 50) -> list[Item]:
    """The newest items first.

    Raises:
        SpoolError: as for the other functions here.
    """
    with opened(path) as connection:
        rows = connection.execute(SQL["quarantine_items"], (_NEWEST, reason, reason, limit))
        return [Item(*row) for row in rows]


def item_of(path: Path, number: int) -> Item | None:
    """One item, None when there is none of that number."""
    with opened(path) as connection:
        row = connection.execute(SQL["quarantine_item"], (number,)).fetchone()
        return None if row is None else Item(*row)


def reasons_of(path: Path) -> list[ReasonCount]:
    """Items by reason, the most frequent first."""
    with opened(path) as connection:
        return [ReasonCount(*row) for row in connection.execute(SPOOL_SQL["quarantine_by_reason"])]


def numbers_of(path: Path, *, reason: str | None = None) -> list[int]:
    """The numbers of all items, or of those of one reason, oldest first; the quarantine is bounded."""
    with opened(path) as connection:
        return [row[0] for row in connection.execute(SQL["quarantine_numbers"], (reason, reason))]


def drop(path: Path, numbers: Sequence[int]) -> int:
    """Delete items for good; returns how many were there.

    Raises:
        SpoolFailed: there is no spool, it cannot be written, or it stayed busy.
    """
    with opened(path):
        pass
    try:
        with closing(_writable(path)) as connection:
            return sum(
                _drop_some(connection, numbers[start : start + _AT_ONCE])
                for start in range(0, len(numbers), _AT_ONCE)
            )
    except sqlite3.Error as fault:
        raise SpoolFailed(f"{path}: {fault}; nothing more was dropped") from fault


def _writable(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=_BUSY_TIMEOUT_S
    )
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _drop_some(connection: sqlite3.Connection, numbers: Iterable[int]) -> int:
    connection.execute("BEGIN IMMEDIATE")
    try:
        gone = sum(connection.execute(SQL["drop_quarantine"], (number,)).rowcount for number in numbers)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    return gone
