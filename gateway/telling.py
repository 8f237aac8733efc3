"""The desks of a running gateway, each with its task: channels come, change and go without a restart.

What waits for a channel is in the spool, so a desk that is replaced leaves nothing behind: its successor goes
on with what its name has in the outbox. A message that was on its way may be told twice.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.alerting import desks_of, forget_channels_but

if TYPE_CHECKING:
    from gateway.parts import Parts
    from gateway.processing.notify import ChannelDesk
    from gateway.settings import GatewaySettings

_LAST_MESSAGE_S: Final = 5.0


class _Running(NamedTuple):
    desk: ChannelDesk
    stop: asyncio.Event
    task: asyncio.Task[None]


class Telling:
    """Owns the desks' tasks, and keeps `parts.desks` in line with them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._group: asyncio.TaskGroup | None = None
        self._running: list[_Running] = []

    def start(self, group: asyncio.TaskGroup) -> None:
        """Begin every desk in the program's own group of tasks."""
        self._group = group
        self._begin()

    def stop(self) -> list[asyncio.Task[None]]:
        """Let messages on their way come to an end; returns the tasks that are to be waited for."""
        for running in self._running:
            running.stop.set()
        return [running.task for running in self._running]

    def made(self, wanted: GatewaySettings) -> tuple[ChannelDesk, ...] | None:
        """New desks, None where those that run will do. Nothing is started.

        Raises:
            OSError: a file that a channel names cannot be used.
        """
        if wanted.alerts == self._parts.settings.alerts:
            return None
        return desks_of(wanted, self._parts.database)

    async def change(self, wanted: GatewaySettings, made: tuple[ChannelDesk, ...] | None) -> None:
        """Put desks in the place of those that run."""
        if made is None:
            return
        tasks = self.stop()
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_LAST_MESSAGE_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)
        for running in self._running:
            await running.desk.aclose()
        await forget_channels_but(wanted, self._parts.database)
        self._parts.desks = made
        self._begin()

    def _begin(self) -> None:
        assert self._group is not None
        self._running = []
        for desk in self._parts.desks:
            stop = asyncio.Event()
            task = self._group.create_task(desk.run(stop), name=f"channel {desk.channel.name}")
            self._running.append(_Running(desk, stop, task))
