"""Whether the system clock can be trusted, and correction of readings stamped while it could not.

The clock is trusted once it is synchronised or, where no time service runs, once it is past the newest time
known to have been. Until then time is counted by the monotonic clock since boot from a base, so that one
difference corrects everything stamped meanwhile. Such readings are held in the spool, then committed with
corrected times and the flag RESTAMPED; those of an earlier boot, or held longer than `wait_max_s`, are
committed unchanged with the flag CLOCK_IN_DOUBT.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import subprocess
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from cloud_sync.codec import columns
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import Flag, Readings
from cloud_sync.runtime.watchdog import StageProgress
from gateway.spool import processing_state
from gateway.spool.database import SQL, read_meta, write_meta
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable

    from numpy.typing import NDArray

    from gateway.spool.database import Database

RELEASE_TIME_US = 1_788_220_800_000_000
"""A time before this release was made, 2026-09-01: no clock that is right shows an earlier one."""
_TOLERANCE_US = 5_000_000
_STA_UNSYNC, _TIME_ERROR = 0x0040, 5  # adjtimex(2)
_TIMEX_STATUS_OFFSET, _TIMEX_BYTES = (
    40,
    512,
)  # where `status` is in struct timex on 64 bits; more room than it takes
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
    """What the system says of its clock."""

    YES = "it is, or was since the start, synchronised"
    NO = "it is not synchronised yet"
    NOBODY = "nothing here synchronises it"


def read_sync_status() -> SyncStatus:
    """What the kernel says, or the time services that leave a trace, where the kernel may not be asked."""
    if _kernel_is_synchronised() or _TIMESYNCD_MARKER.exists():
        return SyncStatus.YES
    return SyncStatus.NO if any(path.exists() for path in _TIME_SERVICE_PATHS) else SyncStatus.NOBODY


def query_timedatectl() -> bool:
    """What systemd says of the clock, which may ask the kernel where we may not. Takes up to seconds."""
    asked = ("timedatectl", "show", "--property=NTPSynchronized", "--value")
    try:
        said = subprocess.run(  # noqa: S603 - a fixed command
            asked, capture_output=True, timeout=_TIMEDATECTL_TIMEOUT_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return said.stdout.strip() == b"yes"


def _kernel_is_synchronised() -> bool:
    """adjtimex(2) without changing anything; False as well where it is not allowed."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (AttributeError, OSError):
        return False
    status = int.from_bytes(timex.raw[_TIMEX_STATUS_OFFSET : _TIMEX_STATUS_OFFSET + 4], "little")
    return 0 <= state < _TIME_ERROR and not status & _STA_UNSYNC


def read_boot_id() -> str:
    """What tells this boot of the machine from others; "" where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def read_time_since_boot_us() -> int:
    """Microseconds since boot, sleep included; nobody sets this clock."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


class ClockAnchor(NamedTuple):
    """How to understand what was stamped in doubt: its time less `base_us` is the time since that boot."""

    boot_id: str
    base_us: int


@dataclass(frozen=True, slots=True)
class ClockSources:
    """Where the time comes from; tests put their own here."""

    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000
    boot_us: Callable[[], int] = read_time_since_boot_us
    sync: Callable[[], SyncStatus] = read_sync_status
    ask: Callable[[], bool] = query_timedatectl
    boot_id: str = ""


class GatewayClock:
    """The gateway's clock. `look_once` judges it again; `now_us` is what to stamp with.

    Args:
        floor_us: the newest time that is known to have been.
        trust: "auto" as the module says; "synchronised" where nothing less will do; "always" as it is.
        wait_max_s: for how long at most what is stamped in doubt is worth holding back.
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
        self.look_once()

    def now_us(self) -> int:
        """The time: of the clock while it is trusted, else counted on from the base since boot."""
        if self.trusted:
            return self._sources.wall_us()
        return self.anchor.base_us + self._sources.boot_us()

    @property
    def is_waiting(self) -> bool:
        """Whether what is stamped now is better held back until the clock is right."""
        return not self.trusted and self._sources.boot_us() - self._started_us < self._wait_max_us

    def correction_us(self, anchor: ClockAnchor) -> int | None:
        """What to add to times stamped under an anchor; None when that cannot be told (yet)."""
        if not self.trusted or anchor.boot_id != self.anchor.boot_id or not anchor.boot_id:
            return None
        return self._sources.wall_us() - self._sources.boot_us() - anchor.base_us

    def query_sync_once(self) -> None:
        """Ask those who take long to answer; for a thread, while the clock is in doubt."""
        if self._sources.ask():
            self._was_synchronised = True

    def look_once(self) -> bool:
        """Judge the clock again; whether it has become trusted by this."""
        before = self.trusted
        self.trusted, self.why = self._evaluate()
        if before and not self.trusted:
            self.anchor = self.anchor._replace(base_us=self._base_us())
        return self.trusted and not before

    def _evaluate(self) -> tuple[bool, str]:
        wall_us = self._sources.wall_us()
        if self._trust == "always":
            return True, "the configuration says so"
        sync = SyncStatus.YES if self._was_synchronised else self._sources.sync()
        self._was_synchronised = sync is SyncStatus.YES
        if wall_us < RELEASE_TIME_US - _TOLERANCE_US:
            return False, f"it says {_format_time(wall_us)}, before this release was made"
        if sync is SyncStatus.YES:
            return True, sync.value
        if self._trust == "synchronised" or sync is SyncStatus.NO:
            return False, sync.value
        if wall_us < self.floor_us - _TOLERANCE_US:
            return False, f"it says {_format_time(wall_us)}, but {_format_time(self.floor_us)} has been"
        return True, f"{sync.value}, and it is past what has been"

    def _base_us(self) -> int:
        """Where to count from: the clock, but not before what has been."""
        return max(self._sources.wall_us(), self.floor_us) - self._sources.boot_us()


def _format_time(time_us: int) -> str:
    try:
        return datetime.fromtimestamp(time_us // 1_000_000, UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return f"{time_us} us"


_log = logging.getLogger(__name__)
_CHECK_EVERY_S = 1.0
_QUERY_SYNC_EVERY_US = 10_000_000
_SAVE_FLOOR_EVERY_S = 3600.0
_STEP_WITHIN_S = 120.0
_TIME_ASSIGNED = np.int32(Flag.TIME_ASSIGNED)
CLOCK_FLOOR_KEY = "clock_floor_us"
"""The key in `meta` of a time that was, by a clock that was trusted."""


class HeldReadings(NamedTuple):
    """Readings taken out of a group. `rows` is where they were; `note` keeps them, in its transaction."""

    rows: NDArray[np.bool_]
    note: Callable[[sqlite3.Connection], None]


@dataclass(slots=True)
class ClockCorrectionCounters:
    """What has happened since start."""

    parked: int = 0
    restamped: int = 0
    in_doubt: int = 0
    damaged: int = 0


class ClockCorrector:
    """Parks and releases. `run` is its loop.

    Args:
        bring: commits readings together with what a note writes; returns once that is durable.
        boot_us: microseconds since boot.
        wait_max_s: after so long a parked group is committed as it is.
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
        """What of a group waits for the clock; None when nothing does, as nearly always.

        Readings before `first` are left in: they belong to requests that are told what became of each.
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
        note = partial(_insert_pending, self.clock.anchor, self._boot_us(), held.rows, block)
        return HeldReadings(rows, note)

    async def run(self, stop: asyncio.Event) -> None:
        """Look at the clock every second and release what may go, until `stop` is set."""
        ask_at_us = 0
        while not stop.is_set():
            self.stage.begin_step(_STEP_WITHIN_S)
            if not self.clock.trusted and self._boot_us() >= ask_at_us:
                await asyncio.to_thread(self.clock.query_sync_once)
                ask_at_us = self._boot_us() + _QUERY_SYNC_EVERY_US
            if self.clock.look_once():
                _log.info("the clock is trusted: %s", self.clock.why)
            try:
                await self._save_floor()
                while await self.release_once() and not stop.is_set():
                    self.stage.begin_step(_STEP_WITHIN_S)
            except SpoolError as fault:
                _log.warning("readings that wait for the clock cannot be committed: %s", fault)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CHECK_EVERY_S):
                    await stop.wait()
        self.stage.set_idle()

    async def release_once(self) -> int:
        """Commit the oldest parked group, if its time has come; returns its readings.

        Raises:
            SpoolError: nothing has happened.
        """
        row = await self._database.read(processing_state.find_oldest_pending)
        if row is None:
            return 0
        difference_us = self.clock.correction_us(ClockAnchor(row.boot_id, row.base_us))
        if difference_us is None and self._may_still_be_corrected(row):
            return 0
        try:
            readings = row.readings()
        except FormatError as fault:
            _log.error("readings that waited for the clock cannot be read and are dropped: %s", fault)
            self.counters.damaged += 1
            await self._database.write(lambda c: processing_state.delete_pending(c, row.number))
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
        self.stage.set_idle()  # a full spool may hold it for days
        await self._submit_readings(moved, partial(_delete_pending, row.number))
        self.stage.begin_step(_STEP_WITHIN_S)
        return readings.rows

    def _may_still_be_corrected(self, row: processing_state.PendingReadings) -> bool:
        """Whether a group is still worth waiting for: of this boot, and not for too long."""
        return (
            row.boot_id == self.clock.anchor.boot_id
            and not self.clock.trusted
            and self._boot_us() - row.since_boot_us < self._wait_max_us
        )

    async def _save_floor(self) -> None:
        """Remember once in a while that a time has been, for the next start."""
        now_us = self._boot_us()
        due = self._floor_saved_at_us is None or now_us - self._floor_saved_at_us >= _SAVE_FLOOR_EVERY_S * 1e6
        if self.clock.trusted and due:
            floor_us = self.clock.now_us()
            await self._database.write(lambda c: write_meta(c, CLOCK_FLOOR_KEY, floor_us))
            self._floor_saved_at_us = now_us


def read_clock_floor(connection: sqlite3.Connection) -> int:
    """The newest time that the spool knows to have been; 0 when it knows of none."""
    written = connection.execute(SQL["newest_written"]).fetchone()
    return max(0 if written is None else int(written[0]), int(read_meta(connection, CLOCK_FLOOR_KEY)))


def _insert_pending(
    anchor: ClockAnchor, since_boot_us: int, rows: int, block: bytes, connection: sqlite3.Connection
) -> None:
    processing_state.add_pending(connection, anchor, since_boot_us, rows, block)


def _delete_pending(number: int, connection: sqlite3.Connection) -> None:
    processing_state.delete_pending(connection, number)
