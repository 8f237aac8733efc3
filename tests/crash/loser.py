"""A program that fills a spool and gives up what it has no room for, until it is killed at a named point."""

from __future__ import annotations

import asyncio
import functools
import sys
from pathlib import Path

import numpy as np

from cloud_sync.model.records import RecordClass
from gateway.spool.appender import Capacity
from gateway.spool.eviction import Evictor, RetentionPolicy
from gateway.spool.processing_state import PROGRESS_KEY, write_processing_state
from tests.crash.spools import OpenSpool

COMMITS = 600
ROOM_BYTES = 1_500_000


async def lose(path: Path) -> None:
    """Commit and evict in turns, everything being processed at once."""
    spool = await OpenSpool.opened(path)
    try:
        await spool.database.limit_wal(100_000)
        policy = RetentionPolicy(dict.fromkeys(RecordClass, ("up",)), evicts=True, windows_s=(60,))
        means = Evictor(spool.database, spool.segments, Capacity(max_bytes=ROOM_BYTES), policy)
        for number in range(spool.newest + 1, COMMITS + 1):
            await spool.append(np.arange(number * 400, number * 400 + 400))
            state: dict[str, bytes | None] = {PROGRESS_KEY: str(spool.newest).encode()}
            await spool.database.write(functools.partial(write_processing_state, changes=state))
            while await means.evict_once(number):
                pass
    finally:
        await spool.database.close()


if __name__ == "__main__":
    asyncio.run(lose(Path(sys.argv[1])))
