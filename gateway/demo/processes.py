"""The demo's child processes: each in a session of its own, ended by the pid it was started with."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_PR_SET_PDEATHSIG = 1
_TIDEGATE = (sys.executable, "-m", "gateway")


class DemoFailed(Exception):  # noqa: N818 - it says what happened
    """The demo cannot go on; the message says why and where to look."""


@dataclass(slots=True)
class Processes:
    """Children by name, with their logs in `folder`."""

    folder: Path
    outlive: bool = False
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def tidegate(self, name: str, *arguments: str) -> None:
        """Start a `tidegate` command."""
        self.start(name, (*_TIDEGATE, *arguments))

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a child; what it prints goes to its log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(  # noqa: S603 - commands made by the demo itself
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=None if self.outlive else _die_with_parent,  # noqa: PLW1509 - one prctl call
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )

    def pids(self) -> dict[str, int]:
        """The pid of every child that runs."""
        return {name: child.pid for name, child in self._running.items() if child.poll() is None}

    def kill(self, name: str) -> None:
        """SIGKILL, as a power cut would have it."""
        child = self._running.pop(name)
        child.kill()
        child.wait()

    def stop(self, name: str, within_s: float = 15.0) -> int:
        """SIGTERM, then SIGKILL when it takes too long; returns the exit code."""
        child = self._running.pop(name, None)
        if child is None:
            return 0
        child.terminate()
        try:
            return child.wait(within_s)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def stop_all(self) -> None:
        """Stop every child, the newest first."""
        for name in reversed(list(self._running)):
            self.stop(name, within_s=5.0)

    def until(self, what: str, name: str, true: Callable[[], bool], within_s: float = 30.0) -> None:
        """Wait until `true()`; fail when the child ends or time runs out."""
        deadline = time.monotonic() + within_s
        while not true():
            if self._running[name].poll() is not None:
                self.fail(name, f"{name} ended while waiting until {what}")
            if time.monotonic() > deadline:
                self.fail(name, f"{name}: not {what} after {within_s:.0f} s")
            time.sleep(0.05)

    def fail(self, name: str, message: str) -> NoReturn:
        """Raise with the last lines of a child's log."""
        log = self.folder / f"{name}.log"
        tail = log.read_text(errors="replace").splitlines()[-8:] if log.exists() else []
        raise DemoFailed("\n".join([message, *(f"  {line}" for line in tail), f"  (log: {log})"]))


def stop_pids(pids: dict[str, int]) -> None:
    """Stop processes of an earlier demo that were left running."""
    for pid in pids.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
