"""The state of processing in the spool: how far it has come, and what its stages have to remember.

Nothing that processing has not been over durably is merged or pruned: it may have to read it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.spool.database import SQL, value_of

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping

PROGRESS = "follower/progress"
NO_LIMIT = 1 << 62


def processed_through(connection: sqlite3.Connection) -> int:
    """The commit of readings up to which processing is durable; `NO_LIMIT` where there is none."""
    return int(value_of(connection.execute(SQL["processed_through"]).fetchone(), NO_LIMIT))


def read_state(connection: sqlite3.Connection) -> dict[str, bytes]:
    """Everything that was remembered."""
    return {key: bytes(value) for key, value in connection.execute(SQL["processing_state"])}


def write_state(connection: sqlite3.Connection, changes: Mapping[str, bytes | None]) -> None:
    """Write keys, or delete those that are None; to be called inside a transaction."""
    for key, value in changes.items():
        if value is None:
            connection.execute(SQL["delete_processing_state"], (key,))
        else:
            connection.execute(SQL["set_processing_state"], (key, value))
