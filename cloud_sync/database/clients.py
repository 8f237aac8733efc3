"""What clients that are no gateways were answered: an Idempotency-Key, and the answer it stands for."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.database import statements
from cloud_sync.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    import asyncpg

    from cloud_sync.records import Receipt

_SQL = statements.named("regional.sql")
KEPT = timedelta(days=1)


class KeyReused(Refused):
    """The key came before with another body."""


class Asked(NamedTuple):
    """A request: whose, its Idempotency-Key ("" for none), and the hash of what it holds."""

    client: str
    key: str
    body_hash: bytes


class AnswerMemory:
    """Answers one request; a `Memory` of the sink. The answer is text that `worded` makes of the receipt."""

    def __init__(self, asked: Asked, worded: Callable[[Receipt], str]) -> None:
        self._asked = asked
        self._worded = worded

    async def earlier(self, connection: asyncpg.Connection[Any]) -> str | None:
        """The answer that the key got within the last day.

        Raises:
            KeyReused: it was for another body.
        """
        client, key, body_hash = self._asked
        if not key:
            return None
        await connection.execute(_SQL["lock_key"], client, key)
        found = await connection.fetchrow(_SQL["earlier_answer"], client, key, KEPT)
        if found is None:
            return None
        if found["body_hash"] != body_hash:
            raise KeyReused(f"the Idempotency-Key {key} came before with another body", "key_reused")
        answer: str = found["answer"]
        return answer

    async def enter(self, connection: asyncpg.Connection[Any], receipt: Receipt) -> str:
        """Keep the answer for the key, if there is one."""
        answer = self._worded(receipt)
        if self._asked.key:
            await connection.execute(_SQL["keep_answer"], *self._asked, answer)
        return answer


async def forget_answers(connection: asyncpg.Connection[Any]) -> None:
    """Drop the answers that are old."""
    await connection.execute(_SQL["forget_answers"], KEPT)
