"""The gateway: builds its parts, starts them, stops them in the order the data flows.

The only module that knows every part. A stage that dies stops the program; systemd starts it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING

from cloud_sync.records import RecordClass
from cloud_sync.watchdog import Watchdog, period_of
from gateway.alerting import desks_of, forget_channels_but
from gateway.checking import check_of
from gateway.destinations import shipper_of
from gateway.following import follower_of
from gateway.heap import keep_small
from gateway.ingress.committer import Committer
from gateway.ingress.host import HostIngress
from gateway.ingress.rebirths import Rebirths
from gateway.keeping import giving_up_of, limit_log, pruned_for, retentions_of
from gateway.listening import listener_of
from gateway.operate.expiry import ExpiryWatch
from gateway.operate.observer import Observer
from gateway.operate.service_text import service_text
from gateway.parts import Parts
from gateway.processing.clock import Clock, since_boot_us
from gateway.processing.restamp import Restamper, floor_of
from gateway.reloading import Reloader
from gateway.shipping import Shipping, register
from gateway.spool.appender import Appender
from gateway.spool.capacity import Capacity
from gateway.spool.compaction import Compaction
from gateway.spool.database import Database
from gateway.spool.deliveries import Deliveries
from gateway.spool.duplicates import Duplicates
from gateway.spool.retention import Retention
from gateway.spool.segments import Segments
from gateway.spool.series import SeriesBook
from gateway.subscribing import subscriber_of
from gateway.telling import Telling

if TYPE_CHECKING:
    from gateway.ingress.http.server import HttpIngress
    from gateway.operate.endpoint import Endpoint
    from gateway.orders import Orders
    from gateway.settings import GatewaySettings

_log = logging.getLogger(__name__)
_ENCODERS = 2


async def run(settings: GatewaySettings, orders: Orders) -> None:
    """Run a gateway until it is told to stop, then stop it within `settings.stop_within_s`.

    Raises:
        SpoolError: the spool cannot be used.
        OSError: an address cannot be bound.
    """
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_ENCODERS, "encoder"))
    running: list[Parts] = []
    watchdog = Watchdog(
        lambda: (stage for parts in running for stage in parts.stages()),
        lambda: service_text(running[0]),
        period_s=period_of(),
    )
    watching = asyncio.create_task(watchdog.run(), name="watchdog")
    try:
        database = await Database.open(settings.spool.path)
        try:
            running.append(await build(settings, database))
            running[0].in_force.path = str(orders.config or "")
            await _run_parts(running[0], orders, watchdog)
        finally:
            await database.close()
    finally:
        watching.cancel()


async def build(settings: GatewaySettings, database: Database) -> Parts:
    """Make every part of a gateway on an open spool. Nothing is started."""
    book = await SeriesBook.load(database, settings.spool.max_series)
    segments = await Segments.load(database, book)
    duplicates = await Duplicates.load(database, book)
    capacity = Capacity(settings.spool.max_bytes, settings.spool.min_free_bytes)
    appender = Appender(database, segments, duplicates, book, capacity)
    deliveries = Deliveries(database, segments, book, settings.gateway_id)
    listen, host = settings.ingress.listen, settings.ingress.host
    clock = Clock(await database.read(floor_of), settings.clock.trust, wait_max_s=settings.clock.wait_max_s)
    committer = Committer(
        appender,
        book,
        settings.ingress.rules,
        refuse_when_full=settings.spool.on_full == "refuse",
        interval_s=settings.spool.commit_interval_ms / 1000,
        max_pending_bytes=settings.spool.max_pending_bytes,
        check=check_of(settings, book, clock),
        clock_us=clock.now_us,
    )
    listener = listener_of(listen, committer, committer.rules)
    subscribers = tuple(
        subscriber_of(table, settings.gateway_id, committer) for table in settings.ingress.subscribe
    )
    ways = [listener.served.publish, *(subscriber.publish for subscriber in subscribers)]
    committer.on_rebirths = Rebirths(committer.rules.births, ways).ask

    await limit_log(database, settings.spool.max_bytes)
    follower, roller, alerts = await follower_of(settings, database, segments, book, clock)
    committer.on_commit = follower.wake
    restamper = Restamper(
        clock,
        database,
        lambda readings, note: committer.bring(readings, note=lambda c, _: note(c)),
        since_boot_us,
        wait_max_s=settings.clock.wait_max_s,
    )
    committer.park = restamper.park
    for d in settings.destinations:
        await register(deliveries, d)
    await forget_channels_but(settings, database)
    rolled_for = pruned_for(settings.destinations, RecordClass.ROLLUP)
    summary_retentions = retentions_of(settings, database, capacity)
    parts = Parts(
        settings=settings,
        version=version("tidegate"),
        started_at=time.monotonic(),
        listener=listener,
        subscribers=subscribers,
        host=HostIngress(
            committer,
            settings.gateway_id,
            settings.spool.path.parent,
            period_s=host.period_s,
            clock_us=lambda: clock.now_us() if clock.trusted else None,
        )
        if host.enabled
        else None,
        http=_http_of(settings, database, committer, appender, book),
        committer=committer,
        restamper=restamper,
        book=book,
        duplicates=duplicates,
        appender=appender,
        capacity=capacity,
        database=database,
        segments=segments,
        follower=follower,
        roller=roller,
        alerts=alerts,
        desks=desks_of(settings, database),
        compaction=Compaction(database, book, duplicates, rollups_wanted_by=rolled_for),
        retention=Retention(
            database,
            pruned_for(settings.destinations),
            keep_s=settings.spool.keep_delivered_h * 3600,
            capacity=capacity,
            giving_up=giving_up_of(settings, database, segments, capacity),
            before=summary_retentions,
            configured=[d.name for d in settings.destinations],
        ),
        summary_retentions=summary_retentions,
        deliveries=deliveries,
        shippers=tuple(shipper_of(d, deliveries) for d in settings.destinations),
    )

    def press(pressed: bool) -> None:  # noqa: FBT001 - the committer's callback
        for gate in parts.gates:
            gate.pause() if pressed else gate.resume()

    committer.on_pressure = press
    return parts


def _http_of(
    settings: GatewaySettings, database: Database, committer: Committer, appender: Appender, book: SeriesBook
) -> HttpIngress | None:
    if not settings.ingress.http.enabled:
        return None
    from gateway.serving import http_of  # noqa: PLC0415 - brings a web server

    return http_of(settings, database, committer, appender, book)


def _endpoint_of(parts: Parts, observer: Observer) -> Endpoint | None:
    if not parts.settings.status.enabled:
        return None
    from gateway.operate.endpoint import Endpoint  # noqa: PLC0415 - brings a web server

    return Endpoint(parts, observer)


async def _run_parts(parts: Parts, orders: Orders, watchdog: Watchdog) -> None:
    observer = Observer(parts)
    endpoint = _endpoint_of(parts, observer)
    stop_input, stop_processing, stop_output = asyncio.Event(), asyncio.Event(), asyncio.Event()
    shipping, telling = Shipping(parts), Telling(parts)
    parts.in_force.taken([])
    parts.expiry = ExpiryWatch(lambda: parts.settings)
    if endpoint is not None:
        await endpoint.start()
    try:
        async with asyncio.TaskGroup() as stages:
            committing = stages.create_task(parts.committer.run(), name="committer")
            await parts.listener.start()
            if parts.http is not None:
                await parts.http.start()
            for subscriber in parts.subscribers:
                stages.create_task(subscriber.run(stop_input), name=f"subscriber {subscriber.settings.name}")
            if parts.host is not None:
                stages.create_task(parts.host.run(stop_input), name="host ingress")
            restamping = stages.create_task(parts.restamper.run(stop_input), name="clock")
            following = stages.create_task(parts.follower.run(stop_processing), name="processing")
            shipping.start(stages)
            telling.start(stages)
            reloading = stages.create_task(
                Reloader(parts, shipping, telling, orders, watchdog).run(), name="reloader"
            )
            upkeep = [
                stages.create_task(parts.compaction.run(stop_output), name="compaction"),
                stages.create_task(parts.retention.run(stop_output), name="retention"),
                *(
                    stages.create_task(retention.run(stop_output), name=retention.stage.name)
                    for retention in parts.summary_retentions
                ),
                stages.create_task(observer.run(stop_output), name="observer"),
                stages.create_task(parts.expiry.run(stop_output), name="expiry"),
                stages.create_task(keep_small(stop_output), name="heap"),
            ]
            _announce(parts)
            watchdog.ready()
            await orders.stop.wait()
            deadline = asyncio.get_running_loop().time() + parts.settings.stop_within_s
            watchdog.starting_again() if orders.again else watchdog.stopping()
            _log.info("stopping, to start again" if orders.again else "stopping")
            await _by(deadline, [reloading], "the configuration as it was")
            stop_input.set()
            stop_output.set()
            told = telling.stop()
            await _by(deadline, [restamping], "readings that wait for the clock in the spool")
            await _stop_in_order(parts, deadline, committing, shipping.stop())
            stop_processing.set()
            await _by(deadline, [following], "commits that it reads at the next start")
            await _by(deadline, told, "a message that may be told twice")
            await _by(deadline, upkeep, "its step undone")
    finally:
        await parts.listener.close()
        if parts.http is not None:
            await parts.http.close()
        for subscriber in parts.subscribers:
            await subscriber.close()
        for shipper in parts.shippers:
            await shipper.aclose()
        for desk in parts.desks:
            await desk.aclose()
        await parts.follower.aclose()
        if endpoint is not None:
            await endpoint.stop()


async def _stop_in_order(
    parts: Parts,
    deadline: float,
    committing: asyncio.Task[None],
    shipping: list[asyncio.Task[None]],
) -> None:
    """Stop reading, commit and acknowledge what was read, then let batches on their way come to an end."""
    for gate in parts.gates:
        gate.stop_reading()
    parts.committer.finish()
    await _by(
        deadline, [committing], "readings that were not acknowledged; their devices will send them again"
    )
    await parts.listener.close()
    if parts.http is not None:
        await parts.http.close()
    for subscriber in parts.subscribers:
        await subscriber.close()
    await _by(deadline, shipping, "a batch without its receipt; it will be sent again")


async def _by(deadline: float, tasks: list[asyncio.Task[None]], left: str) -> None:
    """Wait for tasks until `deadline` (loop time), then cancel them and say what is left behind."""
    if not tasks:
        return
    remaining_s = max(0.0, deadline - asyncio.get_running_loop().time())
    _, late = await asyncio.wait(tasks, timeout=remaining_s)
    for task in late:
        _log.warning("%s did not stop in time; it leaves %s", task.get_name(), left)
        task.cancel()


def _announce(parts: Parts) -> None:
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
