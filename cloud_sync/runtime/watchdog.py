"""systemd: readiness, watchdog, restart backoff, and the progress that each stage reports.

The watchdog (`WatchdogSec=`, sd_watchdog_enabled(3)) is fed from the event loop and only while no stage
is late, so a blocked loop and a hanging stage both starve it. The timeout of a long start is extended
while the process works. Failed starts in a row wait longer each time, counted in `RuntimeDirectory=`.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cloud_sync.runtime.logs import notify_systemd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping


STEADY_S = 60.0
_MAX_START_WAIT_S = 60.0


class FailedStarts:
    """Counts starts that failed in a row; systemd before 254 cannot (`RestartSteps=`)."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        folder = environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
        self._file = Path(folder) / "failed-starts" if folder else None

    def begin(self, sleep: Callable[[float], None] = time.sleep) -> float:
        """Count this start, and wait the longer the more failed before it; returns the seconds waited."""
        if self._file is None:
            return 0.0
        try:
            failed = min(int(self._file.read_text(encoding="ascii")), 1000)
        except (OSError, ValueError):
            failed = 0
        with suppress(OSError):
            self._file.write_text(f"{failed + 1}\n", encoding="ascii")
        wait_s = min(_MAX_START_WAIT_S, 2.0 ** (failed - 1)) if failed > 1 else 0.0
        if wait_s:
            notify_systemd(f"EXTEND_TIMEOUT_USEC={round((wait_s + 60) * 1e6)}")
            notify_systemd(f"STATUS=waits {wait_s:.0f} s after {failed} failed starts in a row")
            sleep(wait_s)
        return wait_s

    def succeeded(self) -> None:
        """The program runs, so the next start is the first."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)


@dataclass(slots=True, eq=False)
class StageProgress:
    """What one stage reports; `due_at` is when its next report is due. Times are monotonic."""

    name: str
    clock: Callable[[], float] = time.monotonic
    steps: int = 0
    reported_at: float = field(default=0.0)
    due_at: float = field(default=math.inf)

    def begin_step(self, within_s: float) -> None:
        """A step begins that takes at most `within_s`, known waits included."""
        self.steps += 1
        self.reported_at = self.clock()
        self.due_at = self.reported_at + within_s

    def set_idle(self) -> None:
        """The stage waits for input, however long that takes, or has ended."""
        self.reported_at = self.clock()
        self.due_at = math.inf

    def late_s(self) -> float:
        """Seconds since a report was due, 0 when none is."""
        return max(0.0, self.clock() - self.due_at)


@dataclass(frozen=True, slots=True)
class LateStage:
    """A stage whose report is overdue."""

    name: str
    silent_s: float
    allowed_s: float

    def __str__(self) -> str:
        return f"{self.name} has been silent for {self.silent_s:.0f} s, {self.allowed_s:.0f} s are allowed"


def find_late_stages(stages: Iterable[StageProgress]) -> list[LateStage]:
    """The stages whose reports are overdue."""
    return [
        LateStage(stage.name, stage.clock() - stage.reported_at, stage.due_at - stage.reported_at)
        for stage in stages
        if stage.late_s() > 0
    ]


_log = logging.getLogger(__name__)
STATUS_EVERY_S = 10.0
_START_EXTENSION_S = 60.0


class Watchdog:
    """Reports the state of one program to systemd. `feed_once` is the step, `run` the loop."""

    def __init__(
        self,
        stages: Callable[[], Iterable[StageProgress]],
        text: Callable[[], str],
        *,
        notify: Callable[[str], None] = notify_systemd,
        period_s: float = STATUS_EVERY_S,
    ) -> None:
        self.phase: Literal["starting", "ready", "stopping"] = "starting"
        self._stages = stages
        self._text = text
        self._notify = notify
        self._period_s = period_s
        self._work = _resource_usage()
        self._late: set[str] = set()
        self._steady_at = math.inf
        self._restarts = FailedStarts()

    async def run(self) -> None:
        """Feed until cancelled."""
        while True:
            self.feed_once()
            await asyncio.sleep(self._period_s)

    def ready(self) -> None:
        """The program serves from now on."""
        self.phase = "ready"
        self._steady_at = time.monotonic() + STEADY_S
        self._notify(f"READY=1\nSTATUS={_one_line(self._text())}")

    def reloading(self) -> None:
        """The program loads another configuration, until `ready` (sd_notify(3))."""
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def restarting(self) -> None:
        """The program stops, to start again in the same process."""
        self.phase = "stopping"
        self._restarts.succeeded()
        self.reloading()

    def stopping(self) -> None:
        """The program stops for good."""
        self.phase = "stopping"
        self._restarts.succeeded()
        self._notify("STOPPING=1\nSTATUS=stopping: committing what was read, finishing deliveries")

    def feed_once(self) -> list[LateStage]:
        """Feed the watchdog unless a stage is late; returns the late ones."""
        if self.phase == "starting":
            work, self._work = self._work, _resource_usage()
            if work != self._work:
                self._notify(f"EXTEND_TIMEOUT_USEC={round((self._period_s + _START_EXTENSION_S) * 1e6)}")
            return []
        late = find_late_stages(self._stages())
        if time.monotonic() > self._steady_at and not late:
            self._restarts.succeeded()
            self._steady_at = math.inf
        if late:
            self._notify("STATUS=" + _one_line("stuck: " + "; ".join(map(str, late))))
        elif self.phase == "ready":
            self._notify(f"WATCHDOG=1\nSTATUS={_one_line(self._text())}")
        else:
            self._notify("WATCHDOG=1")
        for stage in late:
            if stage.name not in self._late:
                _log.error("%s: the watchdog is not fed any more", stage)
        self._late = {stage.name for stage in late}
        return late


def watchdog_period_s(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float:
    """How often to feed: three times within what systemd allows, and at least every 10 seconds."""
    meant_for = environ.get("WATCHDOG_PID", "")
    allowed = environ.get("WATCHDOG_USEC", "")
    if not allowed.isdigit() or int(allowed) == 0 or meant_for not in ("", str(pid or os.getpid())):
        return STATUS_EVERY_S
    return min(STATUS_EVERY_S, int(allowed) / 1e6 / 3)


def _resource_usage() -> tuple[float, int, int]:
    """Tenths of a second of processor time, blocks read and written."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return round(used.ru_utime + used.ru_stime, 1), used.ru_inblock, used.ru_oublock


def _one_line(text: str) -> str:
    """A line break would begin another assignment."""
    return " ".join(text.split())
