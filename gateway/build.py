"""Builds components from settings: ingress, checks, processing, alerts, retention, delivery.

Optional and heavy packages are imported inside the builder that needs them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cloud_sync.model.records import RecordClass
from gateway.alerts.evaluator import AlertEvaluator
from gateway.alerts.notifier import AlertNotifier, build_notices
from gateway.ingress.committer import CommitterOptions
from gateway.processing.checks import ReadingChecker
from gateway.processing.commit_consumer import CommitConsumer
from gateway.processing.deadband import Deadband
from gateway.rollups.roller import Roller
from gateway.spool import processing_state
from gateway.spool.database import open_read_only
from gateway.spool.eviction import RetentionPolicy
from gateway.spool.segment_reader import CommitLogReader, StoredRollups

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud_sync.model.records import Readings
    from gateway.processing.clock import GatewayClock
    from gateway.settings.gateway_settings import GatewaySettings, SpoolSettings
    from gateway.spool.series_catalog import SeriesCatalog

    Check = Callable[[Readings, int], Readings]
    import sqlite3
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from gateway.alerts.alert_state import AlertEvent
    from gateway.processing.stage import ProcessingStage
    from gateway.runtime import Runtime
    from gateway.settings.destinations import AnyDestination
    from gateway.spool.database import Database
    from gateway.spool.segments import SegmentWriter

_log = logging.getLogger(__name__)


def build_committer_options(spool: SpoolSettings) -> CommitterOptions:
    """What a reload may change of the committer."""
    return CommitterOptions(
        interval_s=spool.commit_interval_ms / 1000,
        max_pending_bytes=spool.max_pending_bytes,
        refuse_when_full=spool.on_full == "refuse",
    )


def build_check(
    settings: GatewaySettings, catalog: SeriesCatalog, clock: GatewayClock | None = None
) -> Check:
    """The committer's check: sets the flags of a group, given its readings and the gateway's clock."""

    def name_of(number: int) -> tuple[str, str]:
        return catalog[number][:2]

    check: Check = lambda readings, _: readings  # noqa: E731 - as short as it says
    if settings.checks.enabled:
        checks = ReadingChecker(
            name_of,
            catalog.identities,
            base=settings.checks.base,
            rules=settings.checks.rules,
            plausible=settings.checks.plausible,
        )

        def check(readings: Readings, now_us: int) -> Readings:
            trusted = clock is None or clock.trusted
            return checks.check(readings, now_us if trusted else None)

    if not settings.report_by_exception:
        return check
    mark = Deadband(name_of, catalog.identities, [r.to_rule() for r in settings.report_by_exception]).mark
    return lambda readings, now_us: mark(check(readings, now_us))


def build_alert_stage(settings: GatewaySettings, catalog: SeriesCatalog) -> AlertEvaluator | None:
    """The stage that raises alerts; None when there are to be none."""
    if not settings.alerts.enabled:
        return None

    def name_of(number: int) -> tuple[str, str]:
        return catalog[number][:2]

    def expected() -> NDArray[np.int32]:
        return catalog.list_identities()

    def tell(connection: sqlite3.Connection, events: Sequence[AlertEvent], now_us: int) -> None:
        for channels, notice in build_notices(events, name_of):
            processing_state.queue_notice(connection, channels, notice, now_us)

    stale_us = min(round(settings.alerts.stale_s * 1e6), 1 << 60)
    return AlertEvaluator(settings.alerts.rules, name_of, expected, tell, stale_us=stale_us)


def build_notifiers(settings: GatewaySettings, database: Database) -> tuple[AlertNotifier, ...]:
    """A desk for each channel.

    Raises:
        OSError: a file that a channel names cannot be used.
    """
    alerts = settings.alerts
    if not alerts.enabled:
        return ()
    return tuple(
        AlertNotifier(channel, database, settings.gateway_id, alerts.notifier_options)
        for channel in alerts.build_channels()
    )


async def drop_removed_channels(settings: GatewaySettings, database: Database) -> None:
    """Forget what is still queued for channels that are gone."""
    alerts = settings.alerts
    await database.write(
        lambda c: processing_state.delete_other_channels(c, alerts.channel_names if alerts.enabled else ())
    )


async def build_commit_consumer(
    settings: GatewaySettings,
    database: Database,
    segments: SegmentWriter,
    catalog: SeriesCatalog,
    clock: GatewayClock,
) -> tuple[CommitConsumer, Roller | None, AlertEvaluator | None]:
    """The follower of an open spool with its stages, where it left off; and those among them that roll up and
    raise alerts.

    Raises:
        SpoolError: the spool cannot be read or written.
    """
    connection = open_read_only(database.path)  # of the follower's own thread
    stages: list[ProcessingStage] = []
    roller = None
    if settings.rollups.enabled:
        roller = Roller(StoredRollups(connection), settings.rollups.roller_options)
        stages.append(roller)
    alerts = build_alert_stage(settings, catalog)
    if alerts is not None:
        stages.append(alerts)
    commit_consumer = CommitConsumer(
        database,
        segments,
        CommitLogReader(connection, catalog),
        stages,
        settings.processing.consumer_options,
        clock_us=clock.now_us,
        clock_trusted=lambda: clock.trusted,
    )
    await commit_consumer.load()
    return commit_consumer, roller, alerts


async def reconfigure_processing(settings: GatewaySettings, parts: Runtime) -> None:
    """Have processing go on as other settings want it, from its next step on; its state stays.

    Raises:
        SpoolError: the spool cannot be read; nothing was changed.
    """
    roller, before = parts.roller, parts.alerts
    alerts = before
    if settings.alerts != parts.settings.alerts:
        alerts = build_alert_stage(settings, parts.spool.catalog)

    def hand_over() -> None:
        if roller is not None:
            roller.reconfigure(settings.rollups.roller_options)
        if alerts is not None and before is not None and alerts is not before:
            alerts.take_over(before)

    stages: list[ProcessingStage] = [stage for stage in (roller, alerts) if stage is not None]
    await parts.commit_consumer.reconfigure(settings.processing.consumer_options, stages, hand_over)
    parts.alerts = alerts


def build_receivers(destinations: Sequence[AnyDestination]) -> dict[RecordClass, tuple[str, ...]]:
    """Names of the destinations that get each class of records."""
    return {
        record_class: tuple(d.name for d in destinations if record_class in d.classes)
        for record_class in RecordClass
    }


def build_retention_policy(settings: GatewaySettings) -> RetentionPolicy:
    """What the spool keeps, for whom, and what may be evicted."""
    spool, keep_s = settings.spool, settings.rollups.keep_d * 86_400
    return RetentionPolicy(
        receivers=build_receivers(settings.destinations),
        keep_s={
            RecordClass.READING: spool.keep_delivered_h * 3600,
            RecordClass.ROLLUP: keep_s,
            RecordClass.ALERT: keep_s,
            RecordClass.DECLARATION: keep_s,
        },
        configured=[d.name for d in settings.destinations],
        evicts=spool.give_up,
        windows_s=settings.rollups.windows_s if settings.rollups.enabled else (),
        max_age_s=None if spool.max_age_d is None else spool.max_age_d * 86_400,
    )


async def limit_wal_size(database: Database, max_bytes: int | None) -> None:
    """Keep the write-ahead log small where the spool has a cap."""
    if max_bytes is not None:
        await database.limit_wal(min(16 << 20, max_bytes // 8))
