"""Answers kept for requests with an Idempotency-Key, for a day: the same request gets the same answer.

An answer is written by the transaction that stores what the request brought.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gateway.spool.database import SQL

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable

    from gateway.spool.database import Database
    from gateway.spool.lots import Appended, Note

KEPT_US = 86_400_000_000
KEPT_ANSWERS = 10_000


class Asked(NamedTuple):
    """A request: whose, its Idempotency-Key, and the hash of what it holds."""

    client: str
    key: str
    body_hash: bytes


class Answers:
    """The answers of one spool."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def earlier(self, asked: Asked, now_us: int) -> tuple[bytes, str] | None:
        """The hash of the body that came with the key within the last day, and its answer.

        Raises:
            SpoolError: the spool cannot be read.
        """
        wanted = (asked.client, asked.key, now_us - KEPT_US)
        return await self._database.read(lambda c: c.execute(SQL["earlier_answer"], wanted).fetchone())

    def note(self, asked: Asked, worded: Callable[[Appended], str], now_us: int) -> Note:
        """What keeps the answer to a request, inside the transaction that stores what it brought."""

        def keep(connection: sqlite3.Connection, taken: Appended) -> None:
            connection.execute(SQL["keep_answer"], (*asked, worded(taken), now_us))
            connection.execute(SQL["forget_answers"], (now_us - KEPT_US, KEPT_ANSWERS))

        return keep
