"""Tasks for what is started and closed by fixtures, whose two halves run in different tasks."""

from __future__ import annotations

import asyncio


class LooseTasks(asyncio.TaskGroup):
    """A task group that is not entered: its tasks end when what started them is closed."""

    def create_task(self, coro, *, name=None, context=None):
        return asyncio.get_running_loop().create_task(coro, name=name, context=context)
