"""What systemd is told: that every stage makes progress, how the program does, that a long start goes on.

systemd kills and restarts a service whose watchdog is not fed (`WatchdogSec=`, sd_watchdog_enabled(3)). Here
it is fed from the event loop, so a blocked loop starves it, and only while no stage is late, so a stage that
hangs starves it as well. A start that takes longer than the unit allows, such as a damaged spool being
salvaged, is given more time for as long as the process works or does input and output.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import resource
import time
from typing import TYPE_CHECKING, Literal

from cloud_sync.progress import late_of
from cloud_sync.restarts import STEADY_S, Restarts
from cloud_sync.service import notify

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cloud_sync.progress import Late, Stage

_log = logging.getLogger(__name__)
STATUS_EVERY_S = 10.0
_START_AGAIN_S = 60.0


class Watchdog:
    """Tells systemd how one program is doing. `tell_once` is the step, `run` the loop.

    Args:
        stages: those of the program as they are now; none before it is ready.
        text: the status text of a program that is ready, one line.
        tell: where the words go.
        period_s: how often; `period_of` knows.
    """

    def __init__(
        self,
        stages: Callable[[], Iterable[Stage]],
        text: Callable[[], str],
        *,
        tell: Callable[[str], None] = notify,
        period_s: float = STATUS_EVERY_S,
    ) -> None:
        self.phase: Literal["starting", "ready", "stopping"] = "starting"
        self._stages = stages
        self._text = text
        self._tell = tell
        self._period_s = period_s
        self._work = _work_done()
        self._late: set[str] = set()
        self._steady_at = math.inf
        self._restarts = Restarts()

    async def run(self) -> None:
        """Tell until cancelled."""
        while True:
            self.tell_once()
            await asyncio.sleep(self._period_s)

    def ready(self) -> None:
        """The program is of use from now on."""
        self.phase = "ready"
        self._steady_at = time.monotonic() + STEADY_S
        self._tell(f"READY=1\nSTATUS={_line(self._text())}")

    def reloading(self) -> None:
        """The program takes over another configuration; `ready` says when it has (sd_notify(3))."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def starting_again(self) -> None:
        """The program stops in order, to begin anew in the same process."""
        self.phase = "stopping"
        self._restarts.succeeded()
        self.reloading()

    def stopping(self) -> None:
        """The program has been told to stop."""
        self.phase = "stopping"
        self._restarts.succeeded()
        self._tell("STOPPING=1\nSTATUS=stopping: committing what was read, finishing what is on its way")

    def tell_once(self) -> list[Late]:
        """Feed the watchdog unless a stage is late; returns the late ones."""
        if self.phase == "starting":
            work, self._work = self._work, _work_done()
            if work != self._work:
                self._tell(f"EXTEND_TIMEOUT_USEC={round((self._period_s + _START_AGAIN_S) * 1e6)}")
            return []
        late = late_of(self._stages())
        if time.monotonic() > self._steady_at and not late:
            self._restarts.succeeded()
            self._steady_at = math.inf
        if late:
            self._tell("STATUS=" + _line("stuck: " + "; ".join(map(str, late))))
        elif self.phase == "ready":
            self._tell(f"WATCHDOG=1\nSTATUS={_line(self._text())}")
        else:
            self._tell("WATCHDOG=1")
        for stage in late:
            if stage.name not in self._late:
                _log.error("%s: the watchdog is not fed any more", stage)
        self._late = {stage.name for stage in late}
        return late


def period_of(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float:
    """How often to feed: three times within what systemd allows, and at least as often as the text changes.

    Source: sd_watchdog_enabled(3).
    """
    meant_for = environ.get("WATCHDOG_PID", "")
    allowed = environ.get("WATCHDOG_USEC", "")
    if not allowed.isdigit() or int(allowed) == 0 or meant_for not in ("", str(pid or os.getpid())):
        return STATUS_EVERY_S
    return min(STATUS_EVERY_S, int(allowed) / 1e6 / 3)


def _work_done() -> tuple[float, int, int]:
    """What this process has done so far: tenths of a second on the processor, blocks read and written."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return round(used.ru_utime + used.ru_stime, 1), used.ru_inblock, used.ru_oublock


def _line(text: str) -> str:
    """As one assignment: a line break would begin another."""
    return " ".join(text.split())
