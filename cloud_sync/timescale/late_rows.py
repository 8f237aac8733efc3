"""Late readings for compressed chunks of TimescaleDB.

A row for a compressed chunk costs several times what a row for an open chunk does. Once as many have come
as a twentieth of its rows, the chunk is decompressed; the compression policy compresses it again. Batches
for a chunk that is being decompressed are rejected for now: each would hold a connection while it waits.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.model.errors import RetryLaterError
from cloud_sync.timescale import SQL

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cloud_sync.model.records import Readings
    from cloud_sync.timescale import Connection

    Work = Callable[[Connection], Awaitable[Any]]
    Transact = Callable[[Work], Awaitable[Any]]

_log = logging.getLogger(__name__)
_CHUNKS_CACHED_S = 30.0
_OPEN_AT_FRACTION = 0.05
_OPEN_AT_ROWS = 20_000
_OPEN_WAIT_S = 10.0
_DECOMPRESS_TIMEOUT_S = 3600.0


class CompressedChunk(NamedTuple):
    """A compressed chunk: its name, its times in microseconds since 1970 (the end not included), its rows."""

    name: str
    start_us: int
    end_us: int
    rows: int


class LateRowTracker:
    """Counts late rows by chunk, and decompresses the chunks that get many."""

    def __init__(self) -> None:
        self._chunks: list[CompressedChunk] = []
        self._known_until = 0.0
        self._came: dict[str, int] = {}
        self._opening: dict[str, asyncio.Task[None]] = {}

    async def open_chunks(self, readings: Readings, transact: Transact) -> None:
        """Decompress the chunks for which these readings are one batch too many.

        RetryLaterError while one of theirs is being decompressed.
        """
        if readings.rows == 0:
            return
        if time.monotonic() >= self._known_until:
            rows_found = await transact(lambda connection: connection.fetch(SQL["compressed_chunks"]))
            self._chunks = [CompressedChunk(*row) for row in rows_found]
            self._known_until = time.monotonic() + _CHUNKS_CACHED_S
            self._came = {c.name: self._came.get(c.name, 0) for c in self._chunks}
        times = readings.time_us
        for chunk in self._chunks:
            rows = int(((times >= chunk.start_us) & (times < chunk.end_us)).sum())
            if rows == 0:
                continue
            came = self._came[chunk.name] = self._came.get(chunk.name, 0) + rows
            if chunk.name in self._opening or came >= max(_OPEN_AT_ROWS, _OPEN_AT_FRACTION * chunk.rows):
                await self._open(chunk, transact)

    async def _open(self, chunk: CompressedChunk, transact: Transact) -> None:
        task = self._opening.get(chunk.name)
        if task is None:
            task = asyncio.create_task(self._open_now(chunk, transact), name=f"open {chunk.name}")
            self._opening[chunk.name] = task
            task.add_done_callback(lambda _: self._opening.pop(chunk.name, None))
            await asyncio.wait([task], timeout=_OPEN_WAIT_S)
        if not task.done():
            raise RetryLaterError(f"{chunk.name} is being decompressed for late readings", _OPEN_WAIT_S)

    async def _open_now(self, chunk: CompressedChunk, transact: Transact) -> None:
        """Decompress; when it fails, the rows go in as they are and it is tried again later."""
        begun = time.monotonic()
        try:
            await transact(lambda connection: _decompress_chunk(connection, chunk.name))
        except Exception as fault:  # noqa: BLE001 - whatever it is, late rows can go in without it
            _log.warning("%s cannot be decompressed for late readings: %s", chunk.name, fault)
        else:
            _log.info("%s decompressed for late readings in %.1f s", chunk.name, time.monotonic() - begun)
        self._came[chunk.name] = 0
        self._chunks = [c for c in self._chunks if c.name != chunk.name]


async def _decompress_chunk(connection: Connection, name: str) -> None:
    async with connection.transaction():
        await connection.execute(SQL["no_timeout"])
        await connection.execute(SQL["open_chunk"], name, timeout=_DECOMPRESS_TIMEOUT_S)
