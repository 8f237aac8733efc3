"""How far files have been loaded, by their contents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.database import statements

if TYPE_CHECKING:
    import asyncpg

    from cloud_sync.records import Receipt

_SQL = statements.named("regional.sql")


class Loaded(NamedTuple):
    """How far one file has been loaded, and what became of its readings."""

    lines: int = 0
    stored: int = 0
    duplicates: int = 0
    conflicts: int = 0
    rejected: int = 0
    complete: bool = False


async def loaded(connection: asyncpg.Connection[Any], sha256: bytes) -> Loaded:
    """How far the file with these contents has been loaded."""
    found = await connection.fetchrow(_SQL["loaded_file"], sha256)
    return Loaded() if found is None else Loaded(*found)


class FileMemory:
    """Loads one piece of a file once, from line `before.lines` on; a `Memory` of the sink."""

    def __init__(
        self, sha256: bytes, name: str, before: Loaded, *, lines: int, rejected: int, complete: bool
    ) -> None:
        self._sha256 = sha256
        self._name = name
        self._before = before
        self._lines = lines
        self._rejected = rejected
        self._complete = complete

    async def earlier(self, connection: asyncpg.Connection[Any]) -> Loaded | None:
        """How far it is, when somebody else has loaded this piece meanwhile."""
        await connection.execute(_SQL["lock_file"], self._sha256)
        now = await loaded(connection, self._sha256)
        return None if now.lines <= self._before.lines and not now.complete else now

    async def enter(self, connection: asyncpg.Connection[Any], receipt: Receipt) -> Loaded:
        """Note that the piece is loaded."""
        before = self._before
        after = Loaded(
            before.lines + self._lines,
            before.stored + receipt.stored,
            before.duplicates + receipt.duplicates,
            before.conflicts + receipt.conflicts,
            before.rejected + self._rejected,
            self._complete,
        )
        await connection.execute(_SQL["enter_loaded"], self._sha256, self._name, *after)
        return after
