"""Quarantine: invalid input kept with its reason; written, listed, dropped. Bounded to the newest items.

Dropping is one short transaction for at most `_AT_ONCE` items, so it may run beside a gateway, which keeps
nothing of the quarantine in memory.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from gateway.spool.database import SQL, connect, open_spool_read_only, transaction
from gateway.spool.errors import SpoolAccessError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_PAYLOAD_BYTES = 4096
MAX_ITEMS = 10_000


class QuarantineItem(NamedTuple):
    """One bad input. `reason` is machine-readable, `detail` is for a person."""

    received_at_us: int
    source: str
    topic: str
    reason: str
    detail: str
    payload: bytes
    payload_bytes: int

    @classmethod
    def from_payload(
        cls, *, received_at_us: int, source: str, topic: str, reason: str, detail: str, payload: bytes
    ) -> QuarantineItem:
        """An item that keeps the first bytes of `payload` and its length."""
        return cls(
            received_at_us, source, topic, reason, detail, bytes(payload[:MAX_PAYLOAD_BYTES]), len(payload)
        )


def write_quarantine_items(connection: sqlite3.Connection, items: Sequence[QuarantineItem]) -> None:
    """Add items inside a transaction; the oldest beyond `MAX_ITEMS` are deleted.

    `quarantine_no` only rises, so the items ever quarantined and those deleted can both be read off it.
    """
    connection.executemany(SQL["add_quarantine"], items)
    first, last = connection.execute(SQL["quarantine_range"]).fetchone()
    if last - first >= MAX_ITEMS:
        connection.execute(SQL["drop_quarantine_below"], (last - MAX_ITEMS + 1,))


_AT_ONCE = 500
_NEWEST_NUMBER = (1 << 63) - 1


class StoredQuarantineItem(NamedTuple):
    """One row of the quarantine. `payload` is cut where it is shorter than `payload_bytes`."""

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
        """Whether only the first bytes of the payload were kept."""
        return len(self.payload) < self.payload_bytes


class ReasonCount(NamedTuple):
    """The items of one reason."""

    reason: str
    items: int
    newest_at_us: int


def list_items(path: Path, *, reason: str | None = None, limit: int = 50) -> list[StoredQuarantineItem]:
    """The newest items first. Raises SpoolError, as all functions here."""
    with open_spool_read_only(path) as connection:
        rows = connection.execute(SQL["quarantine_items"], (_NEWEST_NUMBER, reason, reason, limit))
        return [StoredQuarantineItem(*row) for row in rows]


def find_item(path: Path, number: int) -> StoredQuarantineItem | None:
    """One item, None when there is none of that number."""
    with open_spool_read_only(path) as connection:
        row = connection.execute(SQL["quarantine_item"], (number,)).fetchone()
        return None if row is None else StoredQuarantineItem(*row)


def count_items_by_reason(path: Path) -> list[ReasonCount]:
    """Items by reason, the most frequent first."""
    with open_spool_read_only(path) as connection:
        return [ReasonCount(*row) for row in connection.execute(SQL["quarantine_by_reason"])]


def list_item_numbers(path: Path, *, reason: str | None = None) -> list[int]:
    """The numbers of all items, or of those of one reason, oldest first."""
    with open_spool_read_only(path) as connection:
        return [row[0] for row in connection.execute(SQL["quarantine_numbers"], (reason, reason))]


def drop_items(path: Path, numbers: Sequence[int]) -> int:
    """Delete items; returns how many there were."""
    with open_spool_read_only(path):
        pass
    gone = 0
    try:
        with closing(connect(path, "mode=rw")) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            for start in range(0, len(numbers), _AT_ONCE):
                with transaction(connection):
                    for number in numbers[start : start + _AT_ONCE]:
                        gone += connection.execute(SQL["drop_quarantine"], (number,)).rowcount
    except sqlite3.Error as fault:
        raise SpoolAccessError(f"{path}: {fault}; nothing more was dropped") from fault
    return gone
