"""Readings the gateway had to stamp without knowing the time: parked, then committed with their true times.

`park` takes them out of a group before it is appended; `release_once` commits the oldest parked group once
the clock is trusted, its times moved by one difference and flagged RESTAMPED. What was stamped in an earlier
boot, or has waited `wait_max_s`, is committed as it was stamped, flagged CLOCK_IN_DOUBT.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync import columns
from cloud_sync.errors import FormatError
from cloud_sync.progress import Stage
from cloud_sync.records import Flag, Readings
from gateway.processing.clock import Anchor
from gateway.spool import parked
from gateway.spool.database import SQL
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

    from gateway.processing.clock import Clock
    from gateway.spool.database import Database

_log = logging.getLogger(__name__)
_LOOK_S = 1.0
_ASK_EVERY_US = 10_000_000
_NOTE_FLOOR_S = 3600.0
_STEP_WITHIN_S = 120.0
_ASSIGNED = np.int32(Flag.TIME_ASSIGNED)
FLOOR_KEY = "clock_floor_us"
"""The key in `meta` of a time that was, by a clock that was trusted."""


class Parking(NamedTuple):
    """Readings taken out of a group. `rows` is where they were; `note` keeps them, in its transaction."""

    rows: NDArray[np.bool_]
    note: Callable[[sqlite3.Connection], None]


@dataclass(slots=True)
class RestampCounters:
    """What has happened since start."""

    parked: int = 0
    restamped: int = 0
    in_doubt: int = 0
    damaged: int = 0


class Restamper:
    """Parks and releases. `run` is its loop.

    Args:
        bring: commits readings together with what a note writes; returns once that is durable.
        boot_us: microseconds since boot.
        wait_max_s: after so long a parked group is committed as it is.
    """

    def __init__(
        self,
        clock: Clock,
        database: Database,
        bring: Callable[[Readings, Callable[[sqlite3.Connection], None]], Awaitable[object]],
        boot_us: Callable[[], int],
        *,
        wait_max_s: float = 600.0,
    ) -> None:
        self.clock = clock
        self.counters = RestampCounters()
        self.stage = Stage("clock")
        self._database = database
        self._bring = bring
        self._boot_us = boot_us
        self._wait_max_us = round(wait_max_s * 1e6)
        self._noted_floor_at_us: int | None = None

    def park(self, readings: Readings, first: int = 0) -> Parking | None:
        """What of a group waits for the clock; None when nothing does, as nearly always.

        Readings before `first` are left in: they belong to requests that are told what became of each.
        """
        if not self.clock.is_waiting:
            return None
        rows = readings.flags & _ASSIGNED != 0
        rows[:first] = False
        if not rows.any():
            return None
        held = readings.take(rows).in_order()
        block = columns.encode(held)
        self.counters.parked += held.rows
        note = partial(_park, self.clock.anchor, self._boot_us(), held.rows, block)
        return Parking(rows, note)

    async def run(self, stop: asyncio.Event) -> None:
        """Look at the clock every second and release what may go, until `stop` is set."""
        ask_at_us = 0
        while not stop.is_set():
            self.stage.works(_STEP_WITHIN_S)
            if not self.clock.trusted and self._boot_us() >= ask_at_us:
                await asyncio.to_thread(self.clock.ask_once)
                ask_at_us = self._boot_us() + _ASK_EVERY_US
            if self.clock.look_once():
                _log.info("the clock is trusted: %s", self.clock.why)
            try:
                await self._note_floor()
                while await self.release_once() and not stop.is_set():
                    self.stage.works(_STEP_WITHIN_S)
            except SpoolError as fault:
                _log.warning("readings that wait for the clock cannot be committed: %s", fault)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await stop.wait()
        self.stage.rests()

    async def release_once(self) -> int:
        """Commit the oldest parked group, if its time has come; returns its readings.

        Raises:
            SpoolError: nothing has happened.
        """
        row = await self._database.read(parked.oldest)
        if row is None:
            return 0
        difference_us = self.clock.correction_us(Anchor(row.boot_id, row.base_us))
        if difference_us is None and self._may_become_true(row):
            return 0
        try:
            readings = row.readings()
        except FormatError as fault:
            _log.error("readings that waited for the clock cannot be read and are dropped: %s", fault)
            self.counters.damaged += 1
            await self._database.write(lambda c: parked.take_out(c, row.number))
            return 1
        if difference_us is None:
            moved = replace(readings, flags=readings.flags | np.int32(Flag.CLOCK_IN_DOUBT))
            self.counters.in_doubt += readings.rows
        else:
            moved = replace(
                readings,
                time_us=readings.time_us + difference_us,
                flags=readings.flags | np.int32(Flag.RESTAMPED),
            )
            self.counters.restamped += readings.rows
        self.stage.rests()  # a full spool may hold it for days
        await self._bring(moved, partial(_take_out, row.number))
        self.stage.works(_STEP_WITHIN_S)
        return readings.rows

    def _may_become_true(self, row: parked.Parked) -> bool:
        """Whether a group is still worth waiting for: of this boot, and not for too long."""
        return (
            row.boot_id == self.clock.anchor.boot_id
            and not self.clock.trusted
            and self._boot_us() - row.since_boot_us < self._wait_max_us
        )

    async def _note_floor(self) -> None:
        """Remember once in a while that a time has been, for the next start."""
        now_us = self._boot_us()
        due = self._noted_floor_at_us is None or now_us - self._noted_floor_at_us >= _NOTE_FLOOR_S * 1e6
        if self.clock.trusted and due:
            floor_us = self.clock.now_us()
            await self._database.write(lambda c: c.execute(SQL["set_meta"], (FLOOR_KEY, floor_us)))
            self._noted_floor_at_us = now_us


def floor_of(connection: sqlite3.Connection) -> int:
    """The newest time that the spool knows to have been; 0 when it knows of none."""
    written = connection.execute(SQL["newest_written"]).fetchone()
    noted = connection.execute(SQL["meta"], (FLOOR_KEY,)).fetchone()
    return max(0 if row is None else int(row[0]) for row in (written, noted))


def _park(
    anchor: Anchor, since_boot_us: int, rows: int, block: bytes, connection: sqlite3.Connection
) -> None:
    parked.park(connection, anchor, since_boot_us, rows, block)


def _take_out(number: int, connection: sqlite3.Connection) -> None:
    parked.take_out(connection, number)
