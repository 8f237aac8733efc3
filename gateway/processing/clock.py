"""Whether the gateway's clock can be relied on, and what to stamp with while it cannot.

A gateway without a battery clock starts in 1970, or where it was when it lost power, until its clock is set.
The clock is trusted once it is synchronised; and where nothing is there to synchronise it, as long as it is
past the newest time that is known for certain. Once synchronised it stays trusted until the program ends: a
clock that nobody corrects any more drifts by seconds a day, not by years.

While it is in doubt, time is counted from a base by the monotonic clock since boot, so that whatever is
stamped meanwhile can be moved by one difference as soon as the clock is right, whatever steps it made.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

RELEASED_US = 1_788_220_800_000_000
"""A time before this release was made, 2026-09-01: no clock that is right shows an earlier one."""
_TOLERANCE_US = 5_000_000
_STA_UNSYNC, _TIME_ERROR = 0x0040, 5  # adjtimex(2)
_STATUS_AT, _TIMEX_BYTES = 40, 512  # where `status` is in struct timex on 64 bits; more room than it takes
_SAID_BY_TIMESYNCD = Path("/run/systemd/timesync/synchronized")
_KEEPERS = (
    Path("/run/systemd/timesync"),
    Path("/run/chrony"),
    Path("/run/chronyd.pid"),
    Path("/run/ntpd.pid"),
    Path("/run/openntpd.sock"),
)
_ASK_S = 5.0
Trust = Literal["auto", "synchronised", "always"]


class Sync(Enum):
    """What the system says of its clock."""

    YES = "it is, or was since the start, synchronised"
    NO = "it is not synchronised yet"
    NOBODY = "nothing here synchronises it"


def system_sync() -> Sync:
    """What the kernel says, or the time services that leave a trace, where the kernel may not be asked."""
    if _kernel_says_synchronised() or _SAID_BY_TIMESYNCD.exists():
        return Sync.YES
    return Sync.NO if any(path.exists() for path in _KEEPERS) else Sync.NOBODY


def timedated_says() -> bool:
    """What systemd says of the clock, which may ask the kernel where we may not. Takes up to seconds."""
    asked = ("timedatectl", "show", "--property=NTPSynchronized", "--value")
    try:
        said = subprocess.run(  # noqa: S603 - a fixed command
            asked, capture_output=True, timeout=_ASK_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return said.stdout.strip() == b"yes"


def _kernel_says_synchronised() -> bool:
    """adjtimex(2) without changing anything; False as well where it is not allowed."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (AttributeError, OSError):
        return False
    status = int.from_bytes(timex.raw[_STATUS_AT : _STATUS_AT + 4], "little")
    return 0 <= state < _TIME_ERROR and not status & _STA_UNSYNC


def boot_id() -> str:
    """What tells this boot of the machine from others; "" where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def since_boot_us() -> int:
    """Microseconds since boot, sleep included; nobody sets this clock."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000


class Anchor(NamedTuple):
    """How to understand what was stamped in doubt: its time less `base_us` is the time since that boot."""

    boot_id: str
    base_us: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the time comes from; tests put their own here."""

    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000
    boot_us: Callable[[], int] = since_boot_us
    sync: Callable[[], Sync] = system_sync
    ask: Callable[[], bool] = timedated_says
    boot_id: str = ""


class Clock:
    """The gateway's clock. `look_once` judges it again; `now_us` is what to stamp with.

    Args:
        floor_us: the newest time that is known to have been.
        trust: "auto" as the module says; "synchronised" where nothing less will do; "always" as it is.
        wait_max_s: for how long at most what is stamped in doubt is worth holding back.
    """

    def __init__(
        self,
        floor_us: int,
        trust: Trust = "auto",
        *,
        wait_max_s: float = 600.0,
        sources: Sources = Sources(),
    ) -> None:
        self.floor_us = max(floor_us, RELEASED_US)
        self._trust: Trust = trust
        self._wait_max_us = round(wait_max_s * 1e6)
        self._sources = sources
        self._was_synchronised = False
        self._started_us = sources.boot_us()
        self.anchor = Anchor(sources.boot_id or boot_id(), self._base_us())
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

    def correction_us(self, anchor: Anchor) -> int | None:
        """What to add to times stamped under an anchor; None when that cannot be told (yet)."""
        if not self.trusted or anchor.boot_id != self.anchor.boot_id or not anchor.boot_id:
            return None
        return self._sources.wall_us() - self._sources.boot_us() - anchor.base_us

    def ask_once(self) -> None:
        """Ask those who take long to answer; for a thread, while the clock is in doubt."""
        if self._sources.ask():
            self._was_synchronised = True

    def look_once(self) -> bool:
        """Judge the clock again; whether it has become trusted by this."""
        before = self.trusted
        self.trusted, self.why = self._judged()
        if before and not self.trusted:
            self.anchor = self.anchor._replace(base_us=self._base_us())
        return self.trusted and not before

    def _judged(self) -> tuple[bool, str]:
        wall_us = self._sources.wall_us()
        if self._trust == "always":
            return True, "the configuration says so"
        sync = Sync.YES if self._was_synchronised else self._sources.sync()
        self._was_synchronised = sync is Sync.YES
        if wall_us < RELEASED_US - _TOLERANCE_US:
            return False, f"it says {_text(wall_us)}, before this release was made"
        if sync is Sync.YES:
            return True, sync.value
        if self._trust == "synchronised" or sync is Sync.NO:
            return False, sync.value
        if wall_us < self.floor_us - _TOLERANCE_US:
            return False, f"it says {_text(wall_us)}, but {_text(self.floor_us)} has been"
        return True, f"{sync.value}, and it is past what has been"

    def _base_us(self) -> int:
        """Where to count from: the clock, but not before what has been."""
        return max(self._sources.wall_us(), self.floor_us) - self._sources.boot_us()


def _text(time_us: int) -> str:
    try:
        return datetime.fromtimestamp(time_us // 1_000_000, UTC).isoformat().replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return f"{time_us} us"
