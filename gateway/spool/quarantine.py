"""Quarantine: bad input kept with its reason, bounded, for a person to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gateway.spool.database import SQL

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Sequence

KEPT_PAYLOAD_BYTES = 4096
KEPT_ITEMS = 10_000


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
    def of(
        cls, *, received_at_us: int, source: str, topic: str, reason: str, detail: str, payload: bytes
    ) -> QuarantineItem:
        """An item that keeps the first bytes of `payload` and how many there were."""
        return cls(
            received_at_us, source, topic, reason, detail, bytes(payload[:KEPT_PAYLOAD_BYTES]), len(payload)
        )


def write_items(connection: sqlite3.Connection, items: Sequence[QuarantineItem]) -> None:
    """Add items inside a transaction; the oldest beyond `KEPT_ITEMS` make room.

    `quarantine_no` only rises, so the items ever quarantined and those dropped can both be read off it.
    """
    connection.executemany(SQL["add_quarantine"], items)
    first, last = connection.execute(SQL["quarantine_range"]).fetchone()
    if last - first >= KEPT_ITEMS:
        connection.execute(SQL["drop_quarantine_below"], (last - KEPT_ITEMS + 1,))
