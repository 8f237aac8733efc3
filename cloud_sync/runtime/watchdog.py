"""systemd: readiness, watchdog, restart backoff, and the progress that each stage reports.

The watchdog (`WatchdogSec=`, sd_watchdog_enabled(3)) is fed from the event loop and only while no stage
is late, so a blocked loop and a hanging stage both starve it. A long start is extended while the process
works. Failed starts in a row wait longer each time, counted in `RuntimeDirectory=` (systemd before 254
cannot).
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


def notify_systemd(state: str) -> None:
    """Send a state such as "READY=1" or "STATUS=...", one assignment a line. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(state.encode(), address)
        except OSError:
            return


STEADY_S = 60.0
_MAX_START_WAIT_S = 60.0


class FailedStarts:
    """Starts that failed in a row."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        self._file = Path(folder) / "failed-starts" if folder else None

    def begin(self, sleep: Callable[[float], None] = time.sleep) -> float:
        """Count this start and wait for what the failures before it ask for; returns the seconds waited."""
        if self._file is None:
            return 0.0
        failed = self._failed()
        with suppress(OSError):
            self._file.write_text(f"{failed + 1}\n", encoding="ascii")
        wait_s = min(_MAX_START_WAIT_S, 2.0 ** (failed - 1)) if failed > 1 else 0.0
        if wait_s:
            notify_systemd(f"EXTEND_TIMEOUT_USEC={round((wait_s + 60) * 1e6)}")
            notify_systemd(f"STATUS=waits {wait_s:.0f} s after {failed} failed starts in a row")
            sleep(wait_s)
        return wait_s

    def succeeded(self) -> None:
        """This start was a good one."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _failed(self) -> int:
        assert self._file is not None
        try:
            return min(int(self._file.read_text(encoding="ascii")), 1000)
        except (OSError, ValueError):
            return 0


@dataclass(slots=True, eq=False)
class StageProgress:
    """One stage, by its own word. Times are seconds of `clock`, which is monotonic."""

    name: str
    clock: Callable[[], float] = time.monotonic
    steps: int = 0
    reported_at: float = field(default=0.0)
    due_at: float = field(default=math.inf)

    def works(self, within_s: float) -> None:
        """A step begins that takes at most `within_s`, waits with a known end included."""
        self.steps += 1
        self.reported_at = self.clock()
        self.due_at = self.reported_at + within_s

    def rests(self) -> None:
        """There is nothing to do until something comes in, however long that takes, or ever again."""
        self.reported_at = self.clock()
        self.due_at = math.inf

    def late_s(self) -> float:
        """Seconds since it should have been heard of, 0 when it is as it should be."""
        return max(0.0, self.clock() - self.due_at)


@dataclass(frozen=True, slots=True)
class LateStage:
    """A stage that did not keep its word."""

    name: str
    silent_s: float
    allowed_s: float

    def __str__(self) -> str:
        return f"{self.name} has been silent for {self.silent_s:.0f} s, {self.allowed_s:.0f} s are allowed"


def find_late_stages(stages: Iterable[StageProgress]) -> list[LateStage]:
    """The stages that hang."""
    return [
        LateStage(stage.name, stage.clock() - stage.reported_at, stage.due_at - stage.reported_at)
        for stage in stages
        if stage.late_s() > 0
    ]


_log = logging.getLogger(__name__)
STATUS_EVERY_S = 10.0
_START_EXTENSION_S = 60.0


class Watchdog:
    """Tells systemd how one program is doing. `tell_once` is the step, `run` the loop."""

    def __init__(
        self,
        stages: Callable[[], Iterable[StageProgress]],
        text: Callable[[], str],
        *,
        tell: Callable[[str], None] = notify_systemd,
        period_s: float = STATUS_EVERY_S,
    ) -> None:
        self.phase: Literal["starting", "ready", "stopping"] = "starting"
        self._stages = stages
        self._text = text
        self._tell = tell
        self._period_s = period_s
        self._work = _resource_usage()
        self._late: set[str] = set()
        self._steady_at = math.inf
        self._restarts = FailedStarts()

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            self.feed_once()
            await asyncio.sleep(self._period_s)

    def ready(self) -> None:
        """The program is of use from now on."""
        self.phase = "ready"
        self._steady_at = time.monotonic() + STEADY_S
        self._tell(f"READY=1\nSTATUS={_one_line(self._text())}")

    def reloading(self) -> None:
        """The program takes over another configuration; `ready` says when it has (sd_notify(3))."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def restarting(self) -> None:
        """The program stops in order, to begin anew in the same process."""
        self.phase = "stopping"
        self._restarts.succeeded()
        self.reloading()

    def stopping(self) -> None:
        """The program has been told to stop."""
        self.phase = "stopping"
        self._restarts.succeeded()
        self._tell("STOPPING=1\nSTATUS=stopping: committing what was read, finishing what is on its way")

    def feed_once(self) -> list[LateStage]:
        """Feed the watchdog unless a stage is late; returns the late ones."""
        if self.phase == "starting":
            work, self._work = self._work, _resource_usage()
            if work != self._work:
                self._tell(f"EXTEND_TIMEOUT_USEC={round((self._period_s + _START_EXTENSION_S) * 1e6)}")
            return []
        late = find_late_stages(self._stages())
        if time.monotonic() > self._steady_at and not late:
            self._restarts.succeeded()
            self._steady_at = math.inf
        if late:
            self._tell("STATUS=" + _one_line("stuck: " + "; ".join(map(str, late))))
        elif self.phase == "ready":
            self._tell(f"WATCHDOG=1\nSTATUS={_one_line(self._text())}")
        else:
            self._tell("WATCHDOG=1")
        for stage in late:
            if stage.name not in self._late:
                _log.error("%s: the watchdog is not fed any more", stage)
        self._late = {stage.name for stage in late}
        return late


def watchdog_period_s(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float:
    """How often to feed: three times within what systemd allows, and at least as often as the text changes.

    Source: sd_watchdog_enabled(3).
    """
    meant_for = environ.get("WATCHDOG_PID", "")
    allowed = environ.get("WATCHDOG_USEC", "")
    if not allowed.isdigit() or int(allowed) == 0 or meant_for not in ("", str(pid or os.getpid())):
        return STATUS_EVERY_S
    return min(STATUS_EVERY_S, int(allowed) / 1e6 / 3)


def _resource_usage() -> tuple[float, int, int]:
    """What this process has done so far: tenths of a second on the processor, blocks read and written."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return round(used.ru_utime + used.ru_stime, 1), used.ru_inblock, used.ru_oublock


def _one_line(text: str) -> str:
    """As one assignment: a line break would begin another."""
    return " ".join(text.split())
