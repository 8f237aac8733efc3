"""`tidegate gateway --config FILE`."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvloop

from cloud_sync import logs
from cloud_sync.restarts import Restarts
from cloud_sync.settings_file import SettingsFault
from gateway import agent, settings
from gateway.commands.failures import fail
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

_M_ARENA_MAX = -8
app = typer.Typer(add_completion=False)


@app.command()
def gateway(
    config: Annotated[Path, typer.Option("--config", "-c", help="The gateway's TOML file.")],
) -> None:
    """Run the gateway agent until SIGTERM or SIGINT.

    Takes readings over MQTT, acknowledges each once it is fsynced in the spool, and delivers to every
    destination of the configuration.
    """
    Restarts().begin()
    try:
        given = settings.load(config)
    except SettingsFault as fault:
        fail(str(fault))
    logs.set_up(given.log_level, given.log_format)
    faulthandler.enable()  # systemd's watchdog ends a process that hangs with SIGABRT: say where it hung
    _one_heap()
    told: list[str] = []
    try:
        uvloop.run(_run(given))
    except* (SpoolError, OSError) as faults:
        told += map(str, _leaves(faults))
    if told:  # not inside `except*`, which would wrap the exit in a group
        fail("; ".join(told))


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """The faults in a group, however deep."""
    for fault in group.exceptions:
        if isinstance(fault, BaseExceptionGroup):
            yield from _leaves(fault)
        else:
            yield fault


def _one_heap() -> None:
    """Have all threads share one heap (mallopt(3)): it saves megabytes and costs no speed that was seen."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


async def _run(given: settings.GatewaySettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await agent.run(given, stop)
