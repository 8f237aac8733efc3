"""The gateway process: builds the components, starts their tasks, stops them in data-flow order.

A task that fails stops the program; systemd restarts it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING

from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.watchdog import Watchdog, watchdog_period_s
from gateway.build import (
    build_check,
    build_commit_consumer,
    build_committer_options,
    build_notifiers,
    build_retention_policy,
    drop_removed_channels,
    limit_wal_size,
)
from gateway.ingress.committer import Committer, CommitterHooks
from gateway.ingress.publish_decoder import PublishDecoder
from gateway.ingress.series_resolver import SeriesResolver
from gateway.malloc import trim_periodically
from gateway.payloads.decoder_registry import encode_rebirth_command
from gateway.payloads.formats.sparkplug_births import RebirthRequester
from gateway.processing.clock import ClockCorrector, GatewayClock, read_clock_floor, read_time_since_boot_us
from gateway.reload import DeliverySupervisor, NotifierSupervisor, Reloader, register_destination
from gateway.runtime import Runtime
from gateway.settings.schema import SourceContext
from gateway.spool.appender import Capacity
from gateway.spool.database import Database
from gateway.spool.retention import Retention
from gateway.spool.spool import build_spool
from gateway.status.active_config import ActiveConfig
from gateway.status.certificates import CertificateMonitor
from gateway.status.collector import StatusCollector, format_service_status

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.ingress.source import Pausable
    from gateway.runtime import Control
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.web.endpoint import StatusEndpoint

_log = logging.getLogger(__name__)
_ENCODER_THREADS = 2


async def run_gateway(settings: GatewaySettings, control: Control) -> None:
    """Run a gateway until it is told to stop, then stop it within `settings.stop_within_s`.

    Raises:
        SpoolError: the spool cannot be used.
        OSError: an address cannot be bound.
    """
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_ENCODER_THREADS, "encoder"))
    running: list[Runtime] = []
    watchdog = Watchdog(
        lambda: (stage for parts in running for stage in parts.stages()),
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


async def build_runtime(settings: GatewaySettings, database: Database) -> Runtime:
    """Make every part of a gateway on an open spool. Nothing is started."""
    spool = await build_spool(
        database,
        settings.gateway_id,
        max_series=settings.spool.max_series,
        capacity=Capacity(settings.spool.max_bytes, settings.spool.min_free_bytes),
    )
    catalog, appender, deliveries = spool.catalog, spool.appender, spool.deliveries
    clock = GatewayClock(
        await database.read(read_clock_floor), settings.clock.trust, wait_max_s=settings.clock.wait_max_s
    )
    rules = settings.ingress.rules
    gates: list[Pausable] = []
    publishers: list[Callable[[bytes, bytes], bool]] = []
    rebirths = RebirthRequester(rules.births, encode_rebirth_command, publishers)

    def set_pressure(pressed: bool) -> None:  # noqa: FBT001 - the committer's hook
        for gate in gates:
            gate.pause() if pressed else gate.resume()

    await limit_wal_size(database, settings.spool.max_bytes)
    commit_consumer, roller, alerts = await build_commit_consumer(
        settings, database, spool.segments, catalog, clock
    )
    clock_corrector = ClockCorrector(
        clock,
        database,
        lambda readings, note: committer.submit_readings(readings, note=lambda c, _: note(c)),
        read_time_since_boot_us,
        wait_max_s=settings.clock.wait_max_s,
    )
    committer = Committer(
        appender,
        PublishDecoder(rules, SeriesResolver(catalog), rebirths.send_requests),
        build_committer_options(settings.spool),
        CommitterHooks(
            check=build_check(settings, catalog, clock),
            hold=clock_corrector.park,
            on_pressure=set_pressure,
            on_commit=commit_consumer.wake,
        ),
        clock_us=clock.now_us,
    )
    context = SourceContext(
        gateway_id=settings.gateway_id,
        committer=committer,
        rules=rules,
        database=database,
        appender=appender,
        catalog=catalog,
        clock=clock,
        disk=settings.spool.path.parent,
        stop_within_s=settings.stop_within_s,
    )
    listener = settings.ingress.listen.build_source(context)
    subscribers = tuple(table.build_source(context) for table in settings.ingress.subscribe)
    publishers += [listener.publish, *(subscriber.publish for subscriber in subscribers)]
    for d in settings.destinations:
        await register_destination(deliveries, d)
    await drop_removed_channels(settings, database)
    policy = build_retention_policy(settings)
    spool.compaction.rollup_receivers = policy.receivers[RecordClass.ROLLUP]
    parts = Runtime(
        settings=settings,
        version=version("tidegate"),
        started_at=time.monotonic(),
        listener=listener,
        subscribers=subscribers,
        host=settings.ingress.host.build_source(context) if settings.ingress.host.enabled else None,
        http=settings.ingress.http.build_source(context) if settings.ingress.http.enabled else None,
        committer=committer,
        clock_corrector=clock_corrector,
        spool=spool,
        commit_consumer=commit_consumer,
        roller=roller,
        alerts=alerts,
        notifiers=build_notifiers(settings, database),
        retention=Retention(database, spool.segments, spool.capacity, policy),
        shippers=tuple(d.build_shipper(deliveries) for d in settings.destinations),
    )
    gates += parts.gates
    return parts


def _build_endpoint(
    parts: Runtime, collector: StatusCollector, active_config: ActiveConfig
) -> StatusEndpoint | None:
    if not parts.settings.status.enabled:
        return None
    from gateway.web.endpoint import StatusEndpoint  # noqa: PLC0415 - brings a web server

    return StatusEndpoint(parts, collector, active_config)


async def _run_tasks(parts: Runtime, control: Control, watchdog: Watchdog) -> None:
    active_config = ActiveConfig(str(control.config or ""), time.time_ns() // 1000)
    certificates = CertificateMonitor(lambda: parts.settings)
    collector = StatusCollector(parts, certificates)
    endpoint = _build_endpoint(parts, collector, active_config)
    stop_input, stop_processing, stop_output = asyncio.Event(), asyncio.Event(), asyncio.Event()
    shipping, notifier_supervisor = DeliverySupervisor(parts), NotifierSupervisor(parts)
    if endpoint is not None:
        await endpoint.start()
    try:
        async with asyncio.TaskGroup() as stages:
            committing = stages.create_task(parts.committer.run(), name="committer")
            await parts.listener.start(stages)
            if parts.http is not None:
                await parts.http.start(stages)
            for subscriber in parts.subscribers:
                await subscriber.start(stages)
            if parts.host is not None:
                await parts.host.start(stages)
            restamping = stages.create_task(parts.clock_corrector.run(stop_input), name="clock")
            following = stages.create_task(parts.commit_consumer.run(stop_processing), name="processing")
            shipping.start(stages)
            notifier_supervisor.start(stages)
            reloading = stages.create_task(
                Reloader(
                    parts, shipping, notifier_supervisor, control, watchdog, active_config=active_config
                ).run(),
                name="reloader",
            )
            upkeep = [
                stages.create_task(parts.spool.compaction.run(stop_output), name="compaction"),
                stages.create_task(parts.retention.run(stop_output), name="retention"),
                stages.create_task(collector.run(stop_output), name="status collector"),
                stages.create_task(certificates.run(stop_output), name="certificates"),
                stages.create_task(trim_periodically(stop_output), name="heap"),
            ]
            _log_startup(parts)
            watchdog.ready()
            await control.stop.wait()
            deadline = asyncio.get_running_loop().time() + parts.settings.stop_within_s
            watchdog.restarting() if control.again else watchdog.stopping()
            _log.info("stopping, to start again" if control.again else "stopping")
            await _wait_or_cancel(deadline, [reloading], "the configuration as it was")
            stop_input.set()
            stop_output.set()
            told = notifier_supervisor.stop()
            await _wait_or_cancel(deadline, [restamping], "readings that wait for the clock in the spool")
            await _stop_in_order(parts, deadline, committing, shipping.stop())
            stop_processing.set()
            await _wait_or_cancel(deadline, [following], "commits that it reads at the next start")
            await _wait_or_cancel(deadline, told, "a message that may be told twice")
            await _wait_or_cancel(deadline, upkeep, "its step undone")
    finally:
        await parts.listener.close()
        if parts.http is not None:
            await parts.http.close()
        for subscriber in parts.subscribers:
            await subscriber.close()
        for shipper in parts.shippers:
            await shipper.aclose()
        for notifier in parts.notifiers:
            await notifier.aclose()
        await parts.commit_consumer.aclose()
        if endpoint is not None:
            await endpoint.stop()


async def _stop_in_order(
    parts: Runtime,
    deadline: float,
    committing: asyncio.Task[None],
    shipping: list[asyncio.Task[None]],
) -> None:
    """Stop reading, commit and acknowledge what was read, then let batches on their way come to an end."""
    for gate in parts.gates:
        gate.stop_reading()
    parts.committer.finish()
    await _wait_or_cancel(
        deadline, [committing], "readings that were not acknowledged; their devices will send them again"
    )
    await parts.listener.close()
    if parts.http is not None:
        await parts.http.close()
    for subscriber in parts.subscribers:
        await subscriber.close()
    await _wait_or_cancel(deadline, shipping, "a batch without its receipt; it will be sent again")


async def _wait_or_cancel(deadline: float, tasks: list[asyncio.Task[None]], left: str) -> None:
    """Wait for tasks until `deadline` (loop time), then cancel them and say what is left behind."""
    if not tasks:
        return
    remaining_s = max(0.0, deadline - asyncio.get_running_loop().time())
    _, late = await asyncio.wait(tasks, timeout=remaining_s)
    for task in late:
        _log.warning("%s did not stop in time; it leaves %s", task.get_name(), left)
        task.cancel()


def _log_startup(parts: Runtime) -> None:
    listen = parts.settings.ingress.listen
    _log.info(
        "gateway %s listens on %s://%s:%d, spool %s, destinations: %s",
        parts.settings.gateway_id,
        "mqtt" if listen.tls_files is None else "mqtts",
        listen.host,
        parts.listener.port,
        parts.settings.spool.path,
        ", ".join(s.name for s in parts.shippers) or "none",
    )
