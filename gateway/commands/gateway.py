"""`tidegate gateway --config FILE`."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import uvloop

from cloud_sync import logs
from cloud_sync.restarts import Restarts
from cloud_sync.settings_file import SettingsFault
from gateway import agent, heap, settings
from gateway.commands.failures import fail
from gateway.orders import Orders
from gateway.reloading import give_up
from gateway.settings import pending
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

_ORDERS = (signal.SIGHUP, signal.SIGUSR1)
app = typer.Typer(add_completion=False)


@app.command()
def gateway(
    config: Annotated[Path, typer.Option("--config", "-c", help="The gateway's TOML file.")],
) -> None:
    """Run the gateway agent until SIGTERM or SIGINT. SIGHUP reloads the configuration, SIGUSR1 starts again.

    Takes readings over MQTT, acknowledges each once it is fsynced in the spool, and delivers to every
    destination of the configuration.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _ORDERS)  # until there is somebody to take them
    Restarts().begin()
    orders = Orders(config)
    given = _in_force(config)
    logs.set_up(given.log_level, given.log_format)
    faulthandler.enable()  # systemd's watchdog ends a process that hangs with SIGABRT: say where it hung
    heap.share_one()
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # its command line, with rich and pygments: 6 MB
    told: list[str] = []
    try:
        uvloop.run(_run(given, orders))
    except* (SpoolError, OSError) as faults:
        told += map(str, _leaves(faults))
    if told and pending.left_s(config) is not None:
        typer.echo(f"tidegate: {'; '.join(told)}: going back to the configuration before", err=True)
        orders.again = give_up(config)
    if orders.again:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ORDERS)  # what comes now is for the next one
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program, with its own arguments
    if told:  # not inside `except*`, which would wrap the exit in a group
        fail("; ".join(told))


def _in_force(config: Path) -> settings.GatewaySettings:
    """The settings to run with: those before, when a configuration on trial is overdue or of no use."""
    chosen = pending.chosen(config)
    if chosen != config:
        typer.echo(f"tidegate: {config} was not confirmed in time: going back to {chosen}", err=True)
        give_up(config)
    try:
        return settings.load(pending.chosen(config))
    except SettingsFault as fault:
        if pending.left_s(config) is None:
            fail(str(fault))
        typer.echo(f"tidegate: {fault}: going back to {pending.previous_of(config)}", err=True)
    give_up(config)
    try:
        return settings.load(pending.previous_of(config))
    except SettingsFault as fault:
        fail(str(fault))


def _leaves(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """The faults in a group, however deep."""
    for fault in group.exceptions:
        if isinstance(fault, BaseExceptionGroup):
            yield from _leaves(fault)
        else:
            yield fault


async def _run(given: settings.GatewaySettings, orders: Orders) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, orders.stop_now)
    loop.add_signal_handler(signal.SIGINT, orders.stop_now)
    loop.add_signal_handler(signal.SIGHUP, orders.reload)
    loop.add_signal_handler(signal.SIGUSR1, orders.start_again)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ORDERS)
    await agent.run(given, orders)
