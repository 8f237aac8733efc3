"""`tidegate gateway --config FILE`."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from cloud_sync.settings_file import SettingsFault
from gateway import agent, settings
from gateway.commands.failures import fail
from gateway.spool.errors import SpoolError

app = typer.Typer(add_completion=False)


@app.command()
def gateway(
    config: Annotated[Path, typer.Option("--config", "-c", help="The gateway's TOML file.")],
) -> None:
    """Run the gateway agent until SIGTERM or SIGINT.

    Takes readings over MQTT, acknowledges each once it is fsynced in the spool, and delivers to every
    destination of the configuration.
    """
    try:
        given = settings.load(config)
    except SettingsFault as fault:
        fail(str(fault))
    logging.basicConfig(
        level=given.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        uvloop.run(_run(given))
    except* (SpoolError, OSError) as faults:
        fail("; ".join(str(fault) for fault in faults.exceptions))


async def _run(given: settings.GatewaySettings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await agent.run(given, stop)
