"""Readings that wait for the clock: durable and acknowledged, but not yet part of the commit log.

They were stamped by a gateway that did not know the time. A row holds one group's, with the anchor that tells
their true times once the clock is right; then they are committed like others, and the row goes, in one
transaction. So nothing that was committed, rolled up or delivered is ever rewritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cloud_sync import columns
from gateway.spool.database import SQL

if TYPE_CHECKING:
    import sqlite3

    from cloud_sync.records import Readings


class Parked(NamedTuple):
    """One row. `boot_id` and `base_us` are those of the anchor, `since_boot_us` when it was parked."""

    number: int
    boot_id: str
    base_us: int
    since_boot_us: int
    block: bytes

    def readings(self) -> Readings:
        """What waits, its times as they were stamped.

        Raises:
            FormatError: the row is damaged.
        """
        return columns.decode(self.block)


def park(
    connection: sqlite3.Connection, anchor: tuple[str, int], since_boot_us: int, rows: int, block: bytes
) -> None:
    """Keep a group's readings, inside the transaction that is acknowledged."""
    connection.execute(SQL["park"], (*anchor, since_boot_us, rows, block))


def oldest(connection: sqlite3.Connection) -> Parked | None:
    """The row that waits longest."""
    row = connection.execute(SQL["oldest_parked"]).fetchone()
    return None if row is None else Parked(*row)


def take_out(connection: sqlite3.Connection, number: int) -> None:
    """Forget a row whose readings are committed."""
    connection.execute(SQL["unpark"], (number,))


def parked_rows(connection: sqlite3.Connection) -> int:
    """How many readings wait."""
    rows: int = connection.execute(SQL["parked_rows"]).fetchone()[0]
    return rows
