"""How full the spool may get: a cap on its own size, and a floor under the free space of its disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gateway.spool.errors import SpoolFull

if TYPE_CHECKING:
    from gateway.spool.database import Database


_SOMETHING_ELSE = (
    ". Something else fills the disk: the spool has given up half of what it held, "
    "and gives up no more for that"
)


class Shortage(NamedTuple):
    """Bytes beyond nine tenths of the cap, bytes missing to eleven tenths of the floor, bytes in use.

    The log is not among those in use. `ample` says that twice the floor is free.
    """

    over_cap: int
    under_floor: int
    used: int
    ample: bool


@dataclass(slots=True)
class Capacity:
    """Limits in bytes; `max_bytes` None means as much as the floor allows.

    Room that was freed inside the file counts as room: SQLite uses it before the file grows.
    `floor_out_of_reach` is set while something else keeps the disk full, and giving up has done what it may.
    """

    max_bytes: int | None = None
    min_free_bytes: int = 0
    floor_out_of_reach: bool = False

    async def room_bytes(self, database: Database) -> int:
        """Bytes that may still be used, never below zero."""
        used, spare = await database.room()
        room = shutil.disk_usage(database.path.parent).free + spare - self.min_free_bytes
        if self.max_bytes is not None:
            room = min(room, self.max_bytes - used)
        return max(0, room)

    async def excess_bytes(self, database: Database) -> int:
        """How far a spool is beyond nine tenths of its cap, or below eleven tenths of the floor; 0 or more.

        Readings are taken until the limits themselves; what is between is room for rollups, alerts and
        declarations, and time to give something up.
        """
        shortage = await self.shortage(database)
        return max(shortage.over_cap, shortage.under_floor)

    async def shortage(self, database: Database) -> Shortage:
        """The same by limit, with what the spool uses."""
        used, spare = await database.room()
        over = 0 if self.max_bytes is None else used - self.max_bytes * 9 // 10
        free = shutil.disk_usage(database.path.parent).free + spare
        return Shortage(
            max(0, over),
            max(0, self.min_free_bytes * 11 // 10 - free),
            used - database.log_bytes,
            ample=free >= 2 * self.min_free_bytes,
        )

    def retune(self, max_bytes: int | None, min_free_bytes: int) -> None:
        """Go on with other limits, for everyone who shares these."""
        self.max_bytes, self.min_free_bytes = max_bytes, min_free_bytes

    async def require(self, database: Database) -> None:
        """Do nothing while there is room.

        Raises:
            SpoolFull: with the limit that was reached, in words.
        """
        used, spare = await database.room()
        if self.max_bytes is not None and used > self.max_bytes:
            raise SpoolFull(f"{database.path}: {used} bytes are used; spool.max_bytes is {self.max_bytes}")
        free = shutil.disk_usage(database.path.parent).free
        if free + spare < self.min_free_bytes:
            raise SpoolFull(
                f"{database.path}: {free} bytes are free on its disk; "
                f"spool.min_free_bytes is {self.min_free_bytes}"
                + (_SOMETHING_ELSE if self.floor_out_of_reach else "")
            )
