"""Whether the system clock can be trusted, and correction of readings stamped while it could not.

The clock is trusted once it is synchronised or, where no time service runs, once it is past the newest time
known to have been. Until then time is counted by the monotonic clock since boot from a base, so that one
difference corrects everything stamped meanwhile. Such readings are held in the spool, then committed with
corrected times and the flag RESTAMPED; those of an earlier boot, or held longer than `wait_max_s`, are
committed unchanged with the flag CLOCK_IN_DOUBT.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import subprocess
import time
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import Flag, Readings
from cloud_sync.runtime.waits import sleep_or_stop
from cloud_sync.runtime.watchdog import StageProgress
from gateway.humanize import format_time
from gateway.spool import processing_state
from gateway.spool.database import SQL, read_meta, write_meta
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

    from gateway.spool.database import Database

RELEASE_TIME_US = 1_788_220_800_000_000
"""2026-09-01, before this release was built: a correct clock shows no earlier time."""
CLOCK_TOLERANCE_US = 5_000_000
_STA_UNSYNC, _TIME_ERROR = 0x0040, 5  # adjtimex(2)
_TIMEX_STATUS_OFFSET, _TIMEX_BYTES = 40, 512  # of struct timex on 64 bits; its size is at most 208
_TIMESYNCD_MARKER = Path("/run/systemd/timesync/synchronized")
_TIME_SERVICE_PATHS = (
    Path("/run/systemd/timesync"),
    Path("/run/chrony"),
    Path("/run/chronyd.pid"),
    Path("/run/ntpd.pid"),
    Path("/run/openntpd.sock"),
)
_TIMEDATECTL_TIMEOUT_S = 5.0
ClockTrust = Literal["auto", "synchronised", "always"]


class SyncStatus(Enum):
    """Whether a time service keeps the clock right; the value is the explanation shown to people."""

    YES = "it has been synchronised since the start"
    NO = "it is not synchronised yet"
    NOBODY = "no time service was found"


def read_sync_status() -> SyncStatus:
    """Ask the kernel; where it may not be asked, look for the run-time files of time services."""
    if read_kernel_sync() or _TIMESYNCD_MARKER.exists():
        return SyncStatus.YES
    return SyncStatus.NO if any(path.exists() for path in _TIME_SERVICE_PATHS) else SyncStatus.NOBODY


def query_timedatectl() -> bool:
    """Whether systemd reports the clock as synchronised. Blocks for up to some seconds."""
    argv = ("timedatectl", "show", "--property=NTPSynchronized", "--value")
    try:
        result = subprocess.run(  # noqa: S603 - a fixed command
            argv, capture_output=True, timeout=_TIMEDATECTL_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return result.stdout.strip() == b"yes"


def read_kernel_sync() -> bool | None:
    """Whether the kernel reports the clock as synchronised (adjtimex(2)); None where it may not be asked."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (AttributeError, OSError):
        return None
    status = int.from_bytes(timex.raw[_TIMEX_STATUS_OFFSET : _TIMEX_STATUS_OFFSET + 4], "little")
    return None if state < 0 else state < _TIME_ERROR and not status & _STA_UNSYNC


def is_before_release(time_us: int) -> bool:
    """Whether a clock that shows `time_us` is certainly wrong."""
    return time_us < RELEASE_TIME_US - CLOCK_TOLERANCE_US


def read_boot_id() -> str:
    """The id of this boot of the machine; "" where the kernel does not provide one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def read_time_since_boot_us() -> int:
    """Microseconds since boot, including suspend; never set."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


class ClockAnchor(NamedTuple):
    """Base of times stamped by an untrusted clock: such a time less `base_us` is the time since that boot."""

    boot_id: str
    base_us: int


@dataclass(frozen=True, slots=True)
class ClockSources:
    """Where the time comes from; replaced in tests."""

    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000
    boot_us: Callable[[], int] = read_time_since_boot_us
    sync: Callable[[], SyncStatus] = read_sync_status
    query_sync: Callable[[], bool] = query_timedatectl
    boot_id: str = ""


class GatewayClock:
    """The gateway's clock: `evaluate_once` decides whether it is trusted, `now_us` stamps readings.

    `floor_us` is the newest time known to have passed; readings are held for at most `wait_max_s`.
    """

    def __init__(
        self,
        floor_us: int,
        trust: ClockTrust = "auto",
        *,
        wait_max_s: float = 600.0,
        sources: ClockSources = ClockSources(),
    ) -> None:
        self.floor_us = max(floor_us, RELEASE_TIME_US)
        self._trust: ClockTrust = trust
        self._wait_max_us = round(wait_max_s * 1e6)
        self._sources = sources
        self._was_synchronised = False
        self._started_us = sources.boot_us()
        self.anchor = ClockAnchor(sources.boot_id or read_boot_id(), self._base_us())
        self.trusted = False
        self.why = ""
        self.evaluate_once()

    def now_us(self) -> int:
        """The wall time while it is trusted, else the base plus the time since boot."""
        if self.trusted:
            return self._sources.wall_us()
        return self.anchor.base_us + self._sources.boot_us()

    @property
    def is_waiting(self) -> bool:
        """Whether readings that the gateway stamps now are held until the clock is right."""
        return not self.trusted and self._sources.boot_us() - self._started_us < self._wait_max_us

    def correction_us(self, anchor: ClockAnchor) -> int | None:
        """What to add to times stamped under an anchor; None while that is unknown."""
        if not self.trusted or anchor.boot_id != self.anchor.boot_id or not anchor.boot_id:
            return None
        return self._sources.wall_us() - self._sources.boot_us() - anchor.base_us

    def query_sync_once(self) -> None:
        """Query the slow sources; in a thread, while the clock is not trusted."""
        if self._sources.query_sync():
            self._was_synchronised = True

    def evaluate_once(self) -> bool:
        """Decide again whether the clock is trusted; returns whether it has just become so."""
        before = self.trusted
        self.trusted, self.why = self._evaluate()
        if before and not self.trusted:
            self.anchor = self.anchor._replace(base_us=self._base_us())
        return self.trusted and not before

    def _evaluate(self) -> tuple[bool, str]:
        wall_us = self._sources.wall_us()
        if self._trust == "always":
            return True, 'clock.trust is "always"'
        sync = SyncStatus.YES if self._was_synchronised else self._sources.sync()
        self._was_synchronised = sync is SyncStatus.YES
        if is_before_release(wall_us):
            return False, f"it shows {format_time(wall_us)}, before this release was built"
        if sync is SyncStatus.YES:
            return True, sync.value
        if self._trust == "synchronised" or sync is SyncStatus.NO:
            return False, sync.value
        if wall_us < self.floor_us - CLOCK_TOLERANCE_US:
            return False, f"it shows {format_time(wall_us)}, but {format_time(self.floor_us)} has passed"
        return True, f"{sync.value}, and no later time is known"

    def _base_us(self) -> int:
        return max(self._sources.wall_us(), self.floor_us) - self._sources.boot_us()


_log = logging.getLogger(__name__)
_CHECK_EVERY_S = 1.0
_QUERY_SYNC_EVERY_US = 10_000_000
_SAVE_FLOOR_EVERY_S = 3600.0
_STEP_WITHIN_S = 120.0
_TIME_ASSIGNED = np.int32(Flag.TIME_ASSIGNED)
CLOCK_FLOOR_KEY = "clock_floor_us"
"""Key in `meta` of the newest time shown by a trusted clock."""


class HeldReadings(NamedTuple):
    """Readings removed from a group: which rows, and what stores them in the group's transaction."""

    rows: NDArray[np.bool_]
    note: Callable[[sqlite3.Connection], None]


@dataclass(slots=True)
class ClockCorrectionCounters:
    """Readings since start; `damaged` counts groups."""

    parked: int = 0
    restamped: int = 0
    in_doubt: int = 0
    damaged: int = 0


class ClockCorrector:
    """Holds readings while the clock is not trusted, then corrects and commits them.

    `submit_readings` commits readings in one transaction with what its callable writes, and returns once that
    is durable.
    """

    def __init__(
        self,
        clock: GatewayClock,
        database: Database,
        submit_readings: Callable[[Readings, Callable[[sqlite3.Connection], None]], Awaitable[object]],
        boot_us: Callable[[], int],
        *,
        wait_max_s: float = 600.0,
    ) -> None:
        self.clock = clock
        self.counters = ClockCorrectionCounters()
        self.stage = StageProgress("clock")
        self._database = database
        self._submit_readings = submit_readings
        self._boot_us = boot_us
        self._wait_max_us = round(wait_max_s * 1e6)
        self._floor_saved_at_us: int | None = None

    def park(self, readings: Readings, first: int = 0) -> HeldReadings | None:
        """The readings of a group that must wait for the clock; None when none must.

        Readings before `first` stay in: they belong to requests whose answer covers each reading.
        """
        if not self.clock.is_waiting:
            return None
        rows = readings.flags & _TIME_ASSIGNED != 0
        rows[:first] = False
        if not rows.any():
            return None
        held = readings.select(rows).in_order()
        block = columns.encode(held)
        self.counters.parked += held.rows
        anchor, boot_us = self.clock.anchor, self._boot_us()
        return HeldReadings(
            rows, lambda c: processing_state.add_pending(c, anchor, boot_us, held.rows, block)
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Evaluate the clock every second and release what may be released, until `stop` is set."""
        query_at_us = 0
        while not stop.is_set():
            self.stage.begin_step(_STEP_WITHIN_S)
            if not self.clock.trusted and self._boot_us() >= query_at_us:
                await asyncio.to_thread(self.clock.query_sync_once)
                query_at_us = self._boot_us() + _QUERY_SYNC_EVERY_US
            if self.clock.evaluate_once():
                _log.info("the clock is trusted: %s", self.clock.why)
            try:
                await self._save_floor()
                while await self.release_once() and not stop.is_set():
                    self.stage.begin_step(_STEP_WITHIN_S)
            except SpoolError as fault:
                _log.warning("readings that wait for the clock cannot be committed: %s", fault)
            await sleep_or_stop(stop, _CHECK_EVERY_S)
        self.stage.set_idle()

    async def release_once(self) -> int:
        """Commit the oldest held group if it can be corrected or is overdue; returns its readings."""
        row = await self._database.read(processing_state.find_oldest_pending)
        if row is None:
            return 0
        correction_us = self.clock.correction_us(ClockAnchor(row.boot_id, row.base_us))
        if (
            correction_us is None
            and not self.clock.trusted
            and row.boot_id == self.clock.anchor.boot_id
            and self._boot_us() - row.since_boot_us < self._wait_max_us
        ):
            return 0
        try:
            readings = row.readings()
        except FormatError as fault:
            _log.error("a group of readings that waited for the clock is damaged and was dropped: %s", fault)
            self.counters.damaged += 1
            await self._database.write(lambda c: processing_state.delete_pending(c, row.number))
            return 1
        if correction_us is None:
            corrected = replace(readings, flags=readings.flags | np.int32(Flag.CLOCK_IN_DOUBT))
            self.counters.in_doubt += readings.rows
        else:
            corrected = replace(
                readings,
                time_us=readings.time_us + correction_us,
                flags=readings.flags | np.int32(Flag.RESTAMPED),
            )
            self.counters.restamped += readings.rows
        self.stage.set_idle()  # a full spool may hold it for days
        await self._submit_readings(corrected, lambda c: processing_state.delete_pending(c, row.number))
        self.stage.begin_step(_STEP_WITHIN_S)
        return readings.rows

    async def _save_floor(self) -> None:
        """Store the time once an hour, as the floor of the next start."""
        now_us = self._boot_us()
        due = self._floor_saved_at_us is None or now_us - self._floor_saved_at_us >= _SAVE_FLOOR_EVERY_S * 1e6
        if self.clock.trusted and due:
            floor_us = self.clock.now_us()
            await self._database.write(lambda c: write_meta(c, CLOCK_FLOOR_KEY, floor_us))
            self._floor_saved_at_us = now_us


def read_clock_floor(connection: sqlite3.Connection) -> int:
    """The newest time known to the spool; 0 when it is empty."""
    written = connection.execute(SQL["newest_written"]).fetchone()
    return max(0 if written is None else int(written[0]), int(read_meta(connection, CLOCK_FLOOR_KEY)))
