"""Builds a gateway's components from its settings and connects them; nothing is started."""

from __future__ import annotations

import time
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING

from cloud_sync.model.records import RecordClass
from gateway.alerts.evaluator import AlertEvaluator
from gateway.alerts.notifier import AlertNotifier, build_notices
from gateway.ingress.committer import Committer, CommitterHooks
from gateway.ingress.publish_decoder import PublishDecoder, SeriesResolver
from gateway.mqtt.server import MqttServer
from gateway.mqtt.subscriber import Subscriber
from gateway.payloads.decoder_registry import encode_rebirth_command
from gateway.payloads.formats.sparkplug_births import RebirthRequester
from gateway.processing.checks import ReadingChecker
from gateway.processing.clock import ClockCorrector, GatewayClock, read_clock_floor, read_time_since_boot_us
from gateway.processing.commit_consumer import CommitConsumer
from gateway.processing.deadband import Deadband
from gateway.rollups.roller import Roller
from gateway.runtime import ReplaceableTasks, Runtime
from gateway.settings.schema import SourceContext, to_microseconds
from gateway.spool import processing_state
from gateway.spool.appender import Capacity
from gateway.spool.database import open_read_only
from gateway.spool.eviction import RetentionPolicy
from gateway.spool.retention import Retention
from gateway.spool.segment_reader import CommitLogReader, StoredRollups
from gateway.spool.spool import build_spool

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Sequence

    from cloud_sync.model.records import Readings
    from gateway.alerts.alert_state import AlertEvent
    from gateway.ingress.source import Source
    from gateway.settings.destinations import AnyDestination
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.spool.database import Database
    from gateway.spool.deliveries import Deliveries
    from gateway.spool.series_catalog import SeriesCatalog
    from gateway.spool.spool import Spool

    Check = Callable[[Readings, int], Readings]

_DAY_S = 86_400
_SHIPPER_STOP_TIMEOUT_S = 10.0
_NOTIFIER_STOP_TIMEOUT_S = 5.0
_MAX_WAL_BYTES = 16 << 20


async def build_runtime(settings: GatewaySettings, database: Database) -> Runtime:
    """Every component of a gateway, on an open spool.

    Raises SpoolError, and OSError when a file that the settings name cannot be used.
    """
    capacity = Capacity(settings.spool.max_bytes, settings.spool.min_free_bytes)
    spool = await build_spool(
        database, settings.gateway_id, max_series=settings.spool.max_series, capacity=capacity
    )
    await limit_wal_size(database, settings.spool.max_bytes)
    clock = GatewayClock(
        await database.read(read_clock_floor), settings.clock.trust, wait_max_s=settings.clock.wait_max_s
    )
    roller, alerts, consumer = await build_commit_consumer(settings, spool, clock)
    sources: list[Source] = []
    committer, corrector = build_committer(settings, spool, clock, sources, consumer.wake)
    sources += settings.ingress.build_sources(
        SourceContext(
            settings.gateway_id, committer, committer.decoder.rules, spool, clock, settings.stop_within_s
        )
    )
    await register_destinations(spool.deliveries, settings.destinations)
    await drop_removed_channels(settings, database)
    policy = build_retention_policy(settings)
    spool.compaction.rollup_receivers = policy.receivers[RecordClass.ROLLUP]
    return Runtime(
        settings=settings,
        version=version("tidegate"),
        started_at=time.monotonic(),
        sources=tuple(sources),
        committer=committer,
        clock_corrector=corrector,
        spool=spool,
        commit_consumer=consumer,
        roller=roller,
        alerts=alerts,
        notifying=ReplaceableTasks(
            "channel", build_notifiers(settings, database), stop_timeout_s=_NOTIFIER_STOP_TIMEOUT_S
        ),
        retention=Retention(database, spool.segments, spool.capacity, policy),
        shipping=ReplaceableTasks(
            "shipper",
            {d.name: d.build_shipper(spool.deliveries) for d in settings.destinations},
            stop_timeout_s=_SHIPPER_STOP_TIMEOUT_S,
        ),
    )


def build_committer(
    settings: GatewaySettings,
    spool: Spool,
    clock: GatewayClock,
    sources: Sequence[Source],
    on_commit: Callable[[], None],
) -> tuple[Committer, ClockCorrector]:
    """The committer, and what commits readings again once their time is known.

    `sources` are those that it pauses and that rebirth commands are sent through; they may be added later.
    """

    def set_pressure(pressed: bool) -> None:  # noqa: FBT001 - the committer's hook
        for source in sources:
            source.pause() if pressed else source.resume()

    def publish_command(topic: bytes, payload: bytes) -> bool:
        publishers = [source for source in sources if isinstance(source, MqttServer | Subscriber)]
        delivered = [publisher.publish(topic, payload) for publisher in publishers]
        return any(delivered)

    def submit_corrected(readings: Readings, note: Callable[[sqlite3.Connection], None]) -> Awaitable[object]:
        return committer.submit_readings(readings, note=lambda connection, _: note(connection))

    rules = settings.ingress.rules
    rebirths = RebirthRequester(rules.births, encode_rebirth_command, [publish_command])
    corrector = ClockCorrector(
        clock, spool.database, submit_corrected, read_time_since_boot_us, wait_max_s=settings.clock.wait_max_s
    )
    committer = Committer(
        spool.appender,
        PublishDecoder(rules, SeriesResolver(spool.catalog), rebirths.send_requests),
        settings.spool.committer_options,
        CommitterHooks(
            check=build_check(settings, spool.catalog, clock),
            hold=corrector.park,
            on_pressure=set_pressure,
            on_commit=on_commit,
        ),
        clock_us=clock.now_us,
    )
    return committer, corrector


def build_check(
    settings: GatewaySettings, catalog: SeriesCatalog, clock: GatewayClock | None = None
) -> Check:
    """The committer's check: sets the flags of a group, given its readings and the gateway's clock."""
    checks = settings.checks
    names = partial(_series_name, catalog)
    checker = ReadingChecker(
        names, catalog.identities, base=checks.base, rules=checks.rules, plausible=checks.plausible
    )
    deadband = Deadband(names, catalog.identities, [r.to_rule() for r in settings.report_by_exception])

    def check(readings: Readings, now_us: int) -> Readings:
        if checks.enabled:
            readings = checker.check(readings, now_us if clock is None or clock.trusted else None)
        return deadband.mark(readings) if settings.report_by_exception else readings

    return check


def _series_name(catalog: SeriesCatalog, number: int) -> tuple[str, str]:
    return catalog[number][:2]


async def build_commit_consumer(
    settings: GatewaySettings, spool: Spool, clock: GatewayClock
) -> tuple[Roller | None, AlertEvaluator | None, CommitConsumer]:
    """The stages of processing, and what runs them from where the spool says that processing was."""
    connection = open_read_only(spool.database.path)  # of the consumer's own thread
    roller = (
        Roller(StoredRollups(connection), settings.rollups.roller_options)
        if settings.rollups.enabled
        else None
    )
    alerts = build_alert_stage(settings, spool.catalog)
    consumer = CommitConsumer(
        spool.database,
        spool.segments,
        CommitLogReader(connection, spool.catalog),
        [stage for stage in (roller, alerts) if stage is not None],
        settings.processing.consumer_options,
        clock_us=clock.now_us,
        clock_trusted=lambda: clock.trusted,
    )
    await consumer.restore()
    return roller, alerts, consumer


def build_alert_stage(settings: GatewaySettings, catalog: SeriesCatalog) -> AlertEvaluator | None:
    """The stage that raises alerts; None without alerts."""
    alerts = settings.alerts
    if not alerts.enabled:
        return None
    names = partial(_series_name, catalog)

    def queue_notices(connection: sqlite3.Connection, events: Sequence[AlertEvent], now_us: int) -> None:
        for channels, notice in build_notices(events, names):
            processing_state.queue_notice(connection, channels, notice, now_us)

    return AlertEvaluator(
        alerts.rules, names, catalog.list_identities, queue_notices, stale_us=to_microseconds(alerts.stale_s)
    )


def build_notifiers(settings: GatewaySettings, database: Database) -> dict[str, AlertNotifier]:
    """The notifier of each alert channel; OSError if a file that a channel names cannot be used."""
    options = settings.alerts.notifier_options
    return {
        channel.name: AlertNotifier(channel, database, settings.gateway_id, options)
        for channel in settings.alerts.build_channels()
    }


async def drop_removed_channels(settings: GatewaySettings, database: Database) -> None:
    """Delete messages to channels that are not configured any more."""
    names = settings.alerts.channel_names if settings.alerts.enabled else ()
    await database.write(lambda c: processing_state.delete_other_channels(c, names))


async def register_destinations(deliveries: Deliveries, destinations: Sequence[AnyDestination]) -> None:
    """Make destinations known to the spool; those that were known keep their progress."""
    now_us = time.time_ns() // 1000
    for d in destinations:
        await deliveries.register(d.name, d.kind, now_us=now_us, since_us=d.since_us, classes=d.classes)


def build_retention_policy(settings: GatewaySettings) -> RetentionPolicy:
    """What the spool keeps, for whom, and what may be evicted."""
    spool, keep_s = settings.spool, settings.rollups.keep_d * _DAY_S
    return RetentionPolicy(
        receivers={
            record_class: tuple(d.name for d in settings.destinations if record_class in d.classes)
            for record_class in RecordClass
        },
        keep_s={
            RecordClass.READING: spool.keep_delivered_h * 3600,
            RecordClass.ROLLUP: keep_s,
            RecordClass.ALERT: keep_s,
            RecordClass.DECLARATION: keep_s,
        },
        evicts=spool.give_up,
        configured=[d.name for d in settings.destinations],
        windows_s=settings.rollups.windows_s if settings.rollups.enabled else (),
        max_age_s=None if spool.max_age_d is None else spool.max_age_d * _DAY_S,
    )


async def limit_wal_size(database: Database, max_bytes: int | None) -> None:
    """Keep the write-ahead log small if the spool's size is limited."""
    if max_bytes is not None:
        await database.limit_wal(min(_MAX_WAL_BYTES, max_bytes // 8))
