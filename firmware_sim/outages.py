"""Services that a scenario's outages stop and start: a process that is paused, or a command that is run."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from dataclasses import dataclass

from firmware_sim.errors import SimError


@dataclass(slots=True)
class ServiceSwitch:
    """One of them. `up` and `down` may be called twice.

    Attributes:
        pid: paused with SIGSTOP and continued with SIGCONT; 0: there is a command.
        command: run with `down` or `up` as its last argument.
    """

    name: str
    pid: int = 0
    command: tuple[str, ...] = ()
    is_down: bool = False

    async def switch(self, *, down: bool) -> None:
        """Take it away or bring it back.

        Raises:
            SimError: the process is not there, or the command failed.
        """
        if down == self.is_down:
            return
        self.is_down = down
        if self.pid:
            try:
                os.kill(self.pid, signal.SIGSTOP if down else signal.SIGCONT)
            except OSError as fault:
                raise SimError(f"--service {self.name}={self.pid}: {fault.strerror}") from fault
            return
        process = await asyncio.create_subprocess_exec(*self.command, "down" if down else "up")
        if await process.wait():
            raise SimError(
                f"--service {self.name}: {shlex.join(self.command)} ended with {process.returncode}"
            )


def parse_service(text: str) -> ServiceSwitch:
    """NAME=PID or NAME=COMMAND.

    Raises:
        SimError: it is neither.
    """
    name, _, what = text.partition("=")
    if name and what.isdigit() and int(what) > 1:
        return ServiceSwitch(name, pid=int(what))
    command = tuple(shlex.split(what))
    if not name or not command or what.isdigit():
        raise SimError(f"--service {text}: expected NAME=PID of a process, or NAME=COMMAND")
    return ServiceSwitch(name, command=command)
