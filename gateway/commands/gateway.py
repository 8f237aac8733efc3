"""`tidegate gateway --config FILE`."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from cloud_sync.runtime import logs
from cloud_sync.runtime.settings_file import InvalidSettingsError
from cloud_sync.runtime.watchdog import FailedStarts
from gateway import agent, malloc
from gateway.commands.exit_errors import fail
from gateway.reload import revert_trial
from gateway.runtime import Control
from gateway.settings import config_changes
from gateway.settings.gateway_settings import GatewaySettings, load_settings
from gateway.spool.errors import SpoolError

_CONTROL_SIGNALS = (signal.SIGHUP, signal.SIGUSR1)
app = typer.Typer(add_completion=False)


@app.command()
def gateway(config: Annotated[Path, typer.Option("--config", "-c", help="The gateway's TOML file.")]) -> None:
    """Run the gateway agent until SIGTERM or SIGINT. SIGHUP reloads the configuration, SIGUSR1 restarts it.

    Receives readings over MQTT, acknowledges each once it is fsynced in the spool, and delivers to every
    destination of the configuration.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _CONTROL_SIGNALS)  # until handlers are installed
    FailedStarts().begin()
    control = Control(config)
    settings = _load_settings(config)
    logs.configure_logging(settings.log_level, settings.log_format)
    faulthandler.enable()  # systemd's watchdog ends a process that hangs with SIGABRT: log where it hung
    malloc.use_one_arena()
    sys.modules["httpx._main"] = None  # type: ignore[assignment]  # its command line, with rich and pygments: 6 MB
    errors: list[str] = []
    try:
        uvloop.run(_run(settings, control))
    except* (SpoolError, OSError) as group:
        errors += map(str, _flatten_group(group))
    if errors and config_changes.trial_time_left_s(config) is not None:
        typer.echo(f"tidegate: {'; '.join(errors)}: restoring the previous configuration", err=True)
        control.again = revert_trial(config)
    if control.again:
        signal.pthread_sigmask(signal.SIG_BLOCK, _CONTROL_SIGNALS)  # later signals are for the new process
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - this very program, with its own arguments
    if errors:  # not inside `except*`, which would wrap the exit in a group
        fail("; ".join(errors))


def _load_settings(config: Path) -> GatewaySettings:
    """The settings to run with: the previous ones when a trial was not confirmed in time or is invalid."""
    active = config_changes.active_config_path(config)
    if active != config:
        typer.echo(f"tidegate: {config} was not confirmed in time: restoring {active}", err=True)
        revert_trial(config)
    try:
        return load_settings(config_changes.active_config_path(config))
    except InvalidSettingsError as error:
        if config_changes.trial_time_left_s(config) is None:
            fail(str(error))
        previous = config_changes.previous_config_path(config)
        typer.echo(f"tidegate: {error}: restoring {previous}", err=True)
    revert_trial(config)
    try:
        return load_settings(previous)
    except InvalidSettingsError as error:
        fail(str(error))


def _flatten_group(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for inner in error.exceptions:
        yield from _flatten_group(inner)


async def _run(settings: GatewaySettings, control: Control) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, control.request_stop)
    loop.add_signal_handler(signal.SIGINT, control.request_stop)
    loop.add_signal_handler(signal.SIGHUP, control.reload)
    loop.add_signal_handler(signal.SIGUSR1, control.request_restart)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _CONTROL_SIGNALS)
    await agent.run_gateway(settings, control)
