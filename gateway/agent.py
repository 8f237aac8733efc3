"""The gateway process: starts the tasks of its components and stops them in data-flow order.

A task that fails stops the program; systemd restarts it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cloud_sync.runtime.watchdog import Watchdog, watchdog_period_s
from gateway.build import build_runtime
from gateway.malloc import trim_periodically
from gateway.reload import Reloader
from gateway.spool.database import Database
from gateway.status.active_config import ActiveConfig
from gateway.status.certificates import CertificateMonitor
from gateway.status.collector import StatusCollector, format_service_status

if TYPE_CHECKING:
    from gateway.runtime import Control, Runtime
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.web.endpoint import StatusEndpoint

_log = logging.getLogger(__name__)
_ENCODER_THREADS = 2


async def run_gateway(settings: GatewaySettings, control: Control) -> None:
    """Run a gateway until `control.stop` is set, then stop it within `settings.stop_within_s`.

    Raises SpoolError when the spool cannot be used, OSError when an address cannot be bound.
    """
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_ENCODER_THREADS, "encoder"))
    running: list[Runtime] = []
    watchdog = Watchdog(
        lambda: (stage for runtime in running for stage in runtime.stages()),
        lambda: format_service_status(running[0]),
        period_s=watchdog_period_s(),
    )
    watching = asyncio.create_task(watchdog.run(), name="watchdog")
    try:
        database = await Database.open(settings.spool.path)
        try:
            running.append(await build_runtime(settings, database))
            await _run_tasks(running[0], control, watchdog)
        finally:
            await database.close()
    finally:
        watching.cancel()


async def _run_tasks(runtime: Runtime, control: Control, watchdog: Watchdog) -> None:
    active_config = ActiveConfig(str(control.config or ""), time.time_ns() // 1000)
    certificates = CertificateMonitor(lambda: runtime.settings)
    collector = StatusCollector(runtime, certificates)
    endpoint = _build_endpoint(runtime, collector, active_config)
    reloader = Reloader(runtime, control, watchdog, active_config)
    stop_clock, stop_processing, stop_background = asyncio.Event(), asyncio.Event(), asyncio.Event()
    background = {
        "compaction": runtime.spool.compaction.run,
        "retention": runtime.retention.run,
        "status collector": collector.run,
        "certificates": certificates.run,
        "malloc": trim_periodically,
    }
    if endpoint is not None:
        await endpoint.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            committing = tasks.create_task(runtime.committer.run(), name="committer")
            for source in runtime.sources:
                await source.start(tasks)
            correcting = tasks.create_task(runtime.clock_corrector.run(stop_clock), name="clock")
            processing = tasks.create_task(runtime.commit_consumer.run(stop_processing), name="processing")
            runtime.shipping.start(tasks)
            runtime.notifying.start(tasks)
            reloading = tasks.create_task(reloader.run(), name="reloader")
            in_background = [
                tasks.create_task(run(stop_background), name=name) for name, run in background.items()
            ]
            _log_startup(runtime)
            watchdog.ready()
            await control.stop.wait()
            deadline = asyncio.get_running_loop().time() + runtime.settings.stop_within_s
            watchdog.restarting() if control.again else watchdog.stopping()
            _log.info("stopping, to start again" if control.again else "stopping")
            await _wait_or_cancel(deadline, [reloading], "the old configuration")
            stop_clock.set()
            stop_background.set()
            notifying = runtime.notifying.stop()
            await _wait_or_cancel(deadline, [correcting], "readings that wait for the clock in the spool")
            shipping = runtime.shipping.stop()
            for source in runtime.sources:
                source.stop_reading()
            runtime.committer.finish()
            await _wait_or_cancel(
                deadline, [committing], "unacknowledged readings, which their devices will send again"
            )
            for source in runtime.sources:
                await source.close()
            await _wait_or_cancel(deadline, shipping, "a batch without a receipt, which will be sent again")
            stop_processing.set()
            await _wait_or_cancel(deadline, [processing], "commits to process at the next start")
            await _wait_or_cancel(deadline, notifying, "a message that may be sent twice")
            await _wait_or_cancel(deadline, in_background, "its current step undone")
    finally:
        for source in runtime.sources:
            await source.close()
        await runtime.shipping.aclose()
        await runtime.notifying.aclose()
        await runtime.commit_consumer.aclose()
        if endpoint is not None:
            await endpoint.stop()


def _build_endpoint(
    runtime: Runtime, collector: StatusCollector, active_config: ActiveConfig
) -> StatusEndpoint | None:
    if not runtime.settings.status.enabled:
        return None
    from gateway.web.endpoint import StatusEndpoint  # noqa: PLC0415 - brings a web server

    return StatusEndpoint(runtime, collector, active_config)


async def _wait_or_cancel(deadline: float, tasks: list[asyncio.Task[None]], left: str) -> None:
    """Wait for tasks until `deadline` (loop time), then cancel them and log what is left behind."""
    if not tasks:
        return
    remaining_s = max(0.0, deadline - asyncio.get_running_loop().time())
    _, late = await asyncio.wait(tasks, timeout=remaining_s)
    for task in late:
        _log.warning("%s did not stop in time; it leaves %s", task.get_name(), left)
        task.cancel()


def _log_startup(runtime: Runtime) -> None:
    settings = runtime.settings
    _log.info(
        "gateway %s listens on %s://%s:%d, spool %s, destinations: %s",
        settings.gateway_id,
        "mqtt" if settings.ingress.listen.tls_files is None else "mqtts",
        settings.ingress.listen.host,
        runtime.listener.port,
        settings.spool.path,
        ", ".join(d.name for d in settings.destinations) or "none",
    )
