"""Builds components from settings: ingress, checks, processing, alerts, retention, delivery.

Optional and heavy packages are imported inside the builder that needs them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cloud_sync.delivery.batch_sender import DeliveryOptions, DeliveryState, Spool
from cloud_sync.delivery.shipper import Shipper
from cloud_sync.destinations.http_client import HttpOptions, build_client_tls_context
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.secret_files import read_secret
from cloud_sync.runtime.server_sockets import raise_fd_limit
from gateway.alerts.evaluator import AlertEvaluator
from gateway.alerts.notifier import AlertNotifier, LogChannel, build_notices
from gateway.auth.authenticator import AnonymousAuthenticator, AuthenticationPolicy, CredentialsAuthenticator
from gateway.auth.tls import ReloadingServerContext
from gateway.mqtt.broker_session import SubscriberOptions, parse_broker_url
from gateway.mqtt.server import MqttServer, MqttServerOptions
from gateway.mqtt.session_state import CommandSubscriptions
from gateway.mqtt.subscriber import Subscriber
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.topics import TopicTemplate
from gateway.processing.checks import ReadingChecker
from gateway.processing.commit_consumer import CommitConsumer
from gateway.processing.deadband import Deadband
from gateway.rollups.roller import Roller
from gateway.settings import destinations as destination_settings
from gateway.settings.alerts import AnyChannel, WebhookSettings
from gateway.spool import processing_state
from gateway.spool.appender import Capacity
from gateway.spool.database import open_read_only
from gateway.spool.eviction import Evictor
from gateway.spool.retention import Retention
from gateway.spool.segment_reader import CommitLogReader, StoredRollups

if TYPE_CHECKING:
    from collections.abc import Callable

    from cloud_sync.model.records import Readings
    from gateway.auth.authenticator import Authenticator
    from gateway.ingress.source import PublishSink
    from gateway.payloads.topics import TopicResolver
    from gateway.processing.clock import GatewayClock
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.settings.listeners import DeviceListener, Listen
    from gateway.settings.sources import Subscribe
    from gateway.spool.series_catalog import SeriesCatalog

    Check = Callable[[Readings, int], Readings]
    import sqlite3
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from cloud_sync.destinations import Destination
    from gateway.alerts.evaluator import AlertEvent
    from gateway.alerts.notifier import AlertChannel
    from gateway.processing.stage import ProcessingStage
    from gateway.runtime import Runtime
    from gateway.settings.destinations import AnyDestination
    from gateway.spool.database import Database
    from gateway.spool.segments import SegmentWriter

_log = logging.getLogger(__name__)


def build_listener(listen: Listen, intake: PublishSink, naming: TopicResolver | None = None) -> MqttServer:
    """Make the listener; nothing is bound yet. Raises the soft limit of open files to what it needs.

    Raises:
        TlsFault: a certificate or key cannot be used.
        CredentialsFault: the password file cannot be used.
    """
    files = listen.tls_files
    if listen.passwords_file is not None and files is None and not listen.is_loopback:
        _log.warning(
            "passwords cross the network readable: %s:%d has no TLS (tls_cert_file, tls_key_file)",
            listen.host,
            listen.port,
        )
    return MqttServer(
        MqttServerOptions(
            host=listen.host,
            port=listen.port,
            max_connections=raise_fd_limit(listen.max_connections),
            max_packet_bytes=listen.max_packet_bytes,
            ssl=None if files is None else ReloadingServerContext(files).context,
        ),
        intake,
        build_authenticator(listen, naming or TopicTemplate(listen.topic)),
        CommandSubscriptions(naming) if isinstance(naming, RuleSet) else None,
    )


def build_authenticator(door: DeviceListener, naming: TopicResolver) -> Authenticator:
    """Who decides on everyone that comes to a door; `naming` knows whose readings topics carry.

    Raises:
        CredentialsFault: the password file cannot be used.
    """
    if not door.authenticates:
        return AnonymousAuthenticator()
    policy = AuthenticationPolicy(
        identity=door.named_by,
        allow_anonymous=door.allows_anonymous,
        publish_as_self=door.own_only,
        both=door.passwords_file is not None and door.client_certificate == "required",
    )
    return CredentialsAuthenticator(policy, naming, door.passwords_file)


def build_subscriber(table: Subscribe, gateway_id: str, intake: PublishSink) -> Subscriber:
    """The subscriber of one broker; its session there is called after the gateway."""
    return Subscriber(
        SubscriberOptions(
            name=table.name or parse_broker_url(table.url).host,
            url=table.url,
            client_id=table.client_id or f"tidegate-{gateway_id}",
            filters=tuple(table.filters),
            unsubscribe=tuple(table.unsubscribe),
            qos=table.qos,
            retained=table.retained,
            username=table.username,
            password_file=table.password_file,
            ca_file=table.ca_file,
            cert_file=table.cert_file,
            key_file=table.key_file,
            server_name=table.server_name,
            receive_maximum=table.receive_maximum,
            session_expiry_s=table.session_expiry_s,
            keep_alive_s=table.keep_alive_s,
            max_packet_bytes=table.max_packet_bytes,
            broker_reviewed=table.broker_reviewed,
        ),
        intake,
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
    channels: list[AlertChannel] = [LogChannel(), *map(_build_channel, alerts.channel)]
    return tuple(AlertNotifier(channel, database, settings.gateway_id, alerts.terms) for channel in channels)


async def drop_removed_channels(settings: GatewaySettings, database: Database) -> None:
    """Forget what is still queued for channels that are gone."""
    alerts = settings.alerts
    await database.write(
        lambda c: processing_state.delete_other_channels(c, alerts.channel_names if alerts.enabled else ())
    )


def _build_channel(channel: AnyChannel) -> AlertChannel:
    tls = None if channel.ca_file is None else build_client_tls_context(channel.ca_file)
    if isinstance(channel, WebhookSettings):
        from gateway.alerts.channels import WebhookChannel  # noqa: PLC0415 - brings httpx

        url = read_secret(channel.url_file) if channel.url_file is not None else channel.url
        assert url is not None
        return WebhookChannel(
            channel.name,
            url,
            form=channel.form,
            token="" if channel.token_file is None else read_secret(channel.token_file),
            options=HttpOptions(tls, connections=1),
            timeout_s=channel.timeout_s,
        )
    from gateway.alerts.channels import MailChannel, MailServer  # noqa: PLC0415 - brings aiosmtplib

    server = MailServer(
        channel.host,
        channel.port,
        channel.tls,
        channel.username or "",
        "" if channel.password_file is None else read_secret(channel.password_file),
        tls,
        channel.timeout_s,
    )
    return MailChannel(channel.name, server, channel.sender, tuple(channel.to))


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
        roller = Roller(StoredRollups(connection), settings.rollups.terms)
        stages.append(roller)
    alerts = build_alert_stage(settings, catalog)
    if alerts is not None:
        stages.append(alerts)
    commit_consumer = CommitConsumer(
        database,
        segments,
        CommitLogReader(connection, catalog),
        stages,
        settings.processing.terms,
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
            roller.reconfigure(settings.rollups.terms)
        if alerts is not None and before is not None and alerts is not before:
            alerts.take_over(before)

    stages: list[ProcessingStage] = [stage for stage in (roller, alerts) if stage is not None]
    await parts.commit_consumer.change(settings.processing.terms, stages, hand_over)
    parts.alerts = alerts


def destinations_receiving(
    destinations: Sequence[AnyDestination], record_class: RecordClass = RecordClass.READING
) -> tuple[str, ...]:
    """Whose receipts are waited for before records of a class are pruned."""
    return tuple(d.name for d in destinations if record_class in d.classes)


def build_eviction(
    settings: GatewaySettings, database: Database, segments: SegmentWriter, capacity: Capacity
) -> Evictor:
    """What goes when there is no room, or too old; within no limits nothing but damage is declared."""
    spool = settings.spool
    return Evictor(
        database,
        segments,
        capacity=capacity if spool.give_up else Capacity(),
        wanted_by={
            record_class: [d.name for d in settings.destinations if record_class in d.classes]
            for record_class in RecordClass
        },
        configured=[d.name for d in settings.destinations],
        windows_s=settings.rollups.windows_s if settings.rollups.enabled else (),
        max_age_s=None if spool.max_age_d is None else spool.max_age_d * 86_400,
    )


def build_record_retentions(
    settings: GatewaySettings, database: Database, capacity: Capacity
) -> tuple[Retention, ...]:
    """What prunes everything but readings once it is delivered; one for each class."""
    return tuple(
        Retention(
            database,
            destinations_receiving(settings.destinations, record_class),
            keep_s=settings.rollups.keep_d * 86_400,
            capacity=capacity,
            record_class=record_class,
        )
        for record_class in (RecordClass.ROLLUP, RecordClass.ALERT, RecordClass.DECLARATION)
    )


async def limit_wal_size(database: Database, max_bytes: int | None) -> None:
    """Keep the write-ahead log small where the spool has a cap."""
    if max_bytes is not None:
        await database.limit_wal(min(16 << 20, max_bytes // 8))


def build_destination(d: AnyDestination) -> Destination:
    """The destination that `d` describes; its secrets are read now."""
    match d:
        case destination_settings.IngestDestination():
            from cloud_sync.destinations.ingest_client import IngestClient  # noqa: PLC0415 - see the module

            return IngestClient(
                d.name,
                d.url,
                _read_optional_secret(d.token_file),
                timeout_s=d.timeout_s,
                options=d.http_options(),
            )
        case destination_settings.InfluxDestination():
            from cloud_sync.destinations.influxdb.destination import InfluxDestination  # noqa: PLC0415 - see the module

            options = d.http_options()
            return InfluxDestination(
                d.name,
                d.url,
                api=d.api,
                org=d.org or "",
                bucket=d.bucket or "",
                token=_read_optional_secret(d.token_file),
                database=d.database or "",
                retention_policy=d.retention_policy or "",
                username=d.username or "",
                password=_read_optional_secret(d.password_file),
                timeout_s=d.timeout_s,
                tls=options.tls,
                proxy=options.proxy,
            )
        case destination_settings.FileDestination():
            from cloud_sync.destinations.file.destination import FileDestination  # noqa: PLC0415 - see the module

            return FileDestination(
                d.name,
                d.directory,
                form=d.format,
                compress=d.compress,
                create=d.create,
                rotate_bytes=d.rotate_bytes,
                rotate_s=d.rotate_s,
                min_free_bytes=d.min_free_bytes,
            )


def build_shipper(d: AnyDestination, spool: Spool) -> Shipper:
    """The shipper that serves the destination that `d` describes."""
    is_file = isinstance(d, destination_settings.FileDestination)
    options = DeliveryOptions(
        kind=d.kind,
        concurrency=1 if isinstance(d, destination_settings.FileDestination) else d.concurrency,
        in_order=is_file,
        keeps_ledger=d.kind == "ingest",
        max_batch_rows=d.max_batch_rows,
        max_batch_bytes=d.max_batch_bytes,
        target_s=d.target_s,
        flush_s=d.flush_s,
        max_bytes_per_s=d.max_bytes_per_s,
        schedule=d.schedule,
        schedule_for=d.windows_for,
        urgent=d.urgent,
    )
    return Shipper(DeliveryState(spool, build_destination(d), options))


def _read_optional_secret(path: Path | None) -> str:
    return "" if path is None else read_secret(path)
