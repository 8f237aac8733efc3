"""A lock per key that lasts until what was begun under it is durable, also when its request is cancelled."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Hashable

K = TypeVar("K", bound="Hashable")


class Lease:
    """A lock that is held; `until` a future is done when one is set, else to the end of the block."""

    until: asyncio.Future[Any] | None = None


class KeyedLocks(Generic[K]):
    """Locks by key, forgotten when nobody holds or waits for them."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[K, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def hold(self, key: K) -> AsyncIterator[Lease]:
        """Hold the lock of `key`."""
        lock = self._locks.setdefault(key, asyncio.Lock())
        await lock.acquire()
        lease = Lease()
        try:
            yield lease
        finally:
            if lease.until is None:
                lock.release()
            else:
                lease.until.add_done_callback(lambda _: lock.release())
