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

from cloud_sync.runtime import logs
from cloud_sync.runtime.settings_file import InvalidSettingsError
from cloud_sync.runtime.watchdog import FailedStarts
from gateway import agent, malloc
from gateway.commands.exit_errors import fail
from gateway.reload import revert_trial
from gateway.runtime import Control
from gateway.settings import config_changes, gateway_settings
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTROL_SIGNALS = (signal.SIGHUP, signal.SIGUSR1)
app = typer.Typer(add_completion=False)


@app.command()
def gateway(
    config: Annotated[Path, typer.Option("--config", "-c", help="The gateway's TOML file.")],
) -> None:
    """Run the gateway agent until SIGTERM or SIGINT. SIGHUP reloads the configuration, SIGUSR1 starts again.

    Takes readings over MQTT, acknowledges each once it is fsynced in the spool, and delivers to every
    destination of the configuration.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _CONTROL_SIGNALS)  # until there is somebody to take them
    FailedStarts().begin()
    control = Control(config)
    given = _load_settings(config)
    logs.configure_logging(given.log_level, given.log_format)
    faulthandler.enable()  # systemd's watchdog ends a process that hangs with SIGABRT: say where it hung
    malloc.use_one_arena()
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # its command line, with rich and pygments: 6 MB
    told: list[str] = []
    try:
        uvloop.run(_run(given, control))
    except* (SpoolError, OSError) as faults:
        told += map(str, _flatten_group(faults))
    if told and config_changes.trial_time_left_s(config) is not None:
        typer.echo(f"tidegate: {'; '.join(told)}: going back to the configuration before", err=True)
        control.again = revert_trial(config)
    if control.again:
        signal.pthread_sigmask(signal.SIG_BLOCK, _CONTROL_SIGNALS)  # what comes now is for the next one
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program, with its own arguments
    if told:  # not inside `except*`, which would wrap the exit in a group
        fail("; ".join(told))


def _load_settings(config: Path) -> gateway_settings.GatewaySettings:
    """The settings to run with: those before, when a configuration on trial is overdue or of no use."""
    chosen = config_changes.active_config_path(config)
    if chosen != config:
        typer.echo(f"tidegate: {config} was not confirmed in time: going back to {chosen}", err=True)
        revert_trial(config)
    try:
        return gateway_settings.load_settings(config_changes.active_config_path(config))
    except InvalidSettingsError as fault:
        if config_changes.trial_time_left_s(config) is None:
            fail(str(fault))
        typer.echo(
            f"tidegate: {fault}: going back to {config_changes.previous_config_path(config)}", err=True
        )
    revert_trial(config)
    try:
        return gateway_settings.load_settings(config_changes.previous_config_path(config))
    except InvalidSettingsError as fault:
        fail(str(fault))


def _flatten_group(group: BaseExceptionGroup[Exception]) -> Iterator[BaseException]:
    """The faults in a group, however deep."""
    for fault in group.exceptions:
        if isinstance(fault, BaseExceptionGroup):
            yield from _flatten_group(fault)
        else:
            yield fault


async def _run(given: gateway_settings.GatewaySettings, control: Control) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, control.request_stop)
    loop.add_signal_handler(signal.SIGINT, control.request_stop)
    loop.add_signal_handler(signal.SIGHUP, control.reload)
    loop.add_signal_handler(signal.SIGUSR1, control.request_restart)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _CONTROL_SIGNALS)
    await agent.run_gateway(given, control)
