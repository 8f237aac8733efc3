"""Builds the status document: of a running gateway from its components, of a stopped one from its spool.

`build_status` is the only place where a `Status` is made. Rates and flash wear need samples over time, which
`StatusCollector` takes while the gateway runs. It only reads.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from cloud_sync.delivery.batch_sender import ShipperCounters
from cloud_sync.model.records import AlertState, RecordClass, Severity
from cloud_sync.runtime.waits import sleep_or_stop
from gateway.humanize import format_count
from gateway.ingress.http import HttpStatus
from gateway.mqtt.broker_session import SubscribeStatus
from gateway.mqtt.context import ListenStatus
from gateway.rollups.roller import RollerCounters
from gateway.spool import eviction
from gateway.spool.database import (
    SQL,
    file_size_bytes,
    open_spool_read_only,
    read_meta,
    reject_development_version,
)
from gateway.spool.deliveries import Backlog, read_backlog
from gateway.spool.errors import SpoolError
from gateway.spool.processing_state import count_pending_rows, outbox_totals
from gateway.spool.quarantine_items import ReasonCount, StoredQuarantineItem
from gateway.spool.segment_reader import count_kept_rows
from gateway.spool.segments import read_commit_counter
from gateway.status.advice import STATE_TEXTS, build_advice
from gateway.status.document import (
    Alert,
    AlertsStatus,
    CertificateStatus,
    ChannelStatus,
    ClockStatus,
    DestinationStatus,
    DevicesStatus,
    FlashWearStatus,
    IngressStatus,
    InputsStatus,
    LaneStatus,
    Loss,
    LossesStatus,
    ProcessingStatus,
    QuarantineReasonStatus,
    QuarantineStatus,
    RateHistoryStatus,
    SilentDevice,
    SpoolStatus,
    Status,
)
from gateway.status.samplers import FlashWear, RateHistory

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from gateway.alerts.evaluator import AlertEvaluator
    from gateway.ingress.source import Source
    from gateway.processing.commit_consumer import CommitConsumer
    from gateway.rollups.roller import Roller
    from gateway.runtime import Runtime
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.spool.duplicates import LastReceived
    from gateway.spool.series_catalog import SeriesCatalog
    from gateway.status.certificates import CertificateMonitor

_log = logging.getLogger(__name__)
_SAMPLE_INTERVAL_S = 5.0
_CACHE_S = 0.5
_RECORDS_CACHE_S = 5.0
_MIN_AVERAGE_SAMPLES = 15
_MAX_BYTES_PER_READING = 200.0
"""What a reading costs in a commit of its own; an almost empty file would seem to cost more."""
_ALERTS_MAX = 20
_LOSSES_MAX = 20
_SILENT_DEVICES_MAX = 100
_MAX_QUARANTINE_NO = (1 << 63) - 1
_EXAMPLE_MAX_CHARS = 200
_ERROR_MAX_CHARS = 80


class SpoolSnapshot(NamedTuple):
    """What a spool itself says: `kinds` and `backlogs` by destination, `notices` by alert channel;
    `pending_rows` wait for the correct time.
    """

    spool: SpoolStatus
    pending_rows: int
    notices: dict[str, int]
    kinds: dict[str, str]
    backlogs: dict[str, Backlog]


class RecordsStatus(NamedTuple):
    """What was not stored, or not kept."""

    quarantine: QuarantineStatus
    losses: LossesStatus


class LiveStatus(NamedTuple):
    """What only a running gateway knows."""

    runtime: Runtime
    certificates: list[CertificateStatus]
    room_bytes: int
    recent: RateHistoryStatus
    wear: FlashWearStatus


class StatusCollector:
    """The document of a running gateway, built twice a second at most however many ask for it."""

    def __init__(self, runtime: Runtime, certificates: CertificateMonitor) -> None:
        self._runtime, self._certificates = runtime, certificates
        spool = runtime.settings.spool
        self._wear = FlashWear(spool.path.parent, spool.flash_endurance_tb)
        self._recent = RateHistory()
        self._lock = asyncio.Lock()
        self._document: Status | None = None
        self._records: RecordsStatus | None = None
        self._document_built_s = self._records_read_s = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        """Sample until `stop` is set."""
        while not stop.is_set():
            try:
                await self.sample_once(time.monotonic())
            except SpoolError as fault:
                _log.warning("the status cannot be sampled: %s", fault)
            await sleep_or_stop(stop, _SAMPLE_INTERVAL_S)

    async def sample_once(self, now_s: float) -> None:
        """Take the samples that are due; `now_s` is monotonic seconds."""
        self._wear.add(self._wear.read(self._runtime.spool.segments.appended_bytes, now_s))
        if self._recent.is_due(now_s):
            snapshot = await self._read_snapshot()
            self._recent.add(
                self._runtime.committer.counters.rate.per_s(now_s),
                {name: backlog.readings for name, backlog in snapshot.backlogs.items()},
                now_us=time.time_ns() // 1000,
                now_s=now_s,
            )

    async def status(self) -> Status:
        """The whole document. Raises SpoolError."""
        async with self._lock:
            now_s = time.monotonic()
            if self._document is None or now_s - self._document_built_s >= _CACHE_S:
                self._document = await self._collect(now_s)
                self._document_built_s = now_s
            return self._document

    async def _collect(self, now_s: float) -> Status:
        runtime = self._runtime
        if self._records is None or now_s - self._records_read_s >= _RECORDS_CACHE_S:
            self._records = await runtime.spool.database.read(read_records_status)
            self._records_read_s = now_s
        snapshot = await self._read_snapshot()
        live = LiveStatus(
            runtime,
            self._certificates.newest,
            (await runtime.spool.capacity.measure(runtime.spool.database)).room,
            self._recent.status(),
            self._wear.status(self._wear.read(runtime.spool.segments.appended_bytes, now_s)),
        )
        return build_status(runtime.settings, snapshot, self._records, live)

    async def _read_snapshot(self) -> SpoolSnapshot:
        destinations = self._runtime.settings.destinations
        receivers = [d.name for d in destinations if RecordClass.READING in d.classes]
        path = self._runtime.settings.spool.path
        return await self._runtime.spool.database.read(lambda c: read_spool_snapshot(c, path, receivers))


def read_stopped_status(settings: GatewaySettings) -> Status:
    """The document of a gateway that does not run, as far as its spool knows. Raises SpoolError."""
    path = settings.spool.path
    with open_spool_read_only(path) as connection:
        reject_development_version(connection, path)
        return build_status(settings, read_spool_snapshot(connection, path), read_records_status(connection))


def read_spool_snapshot(
    connection: sqlite3.Connection, path: Path, receivers: Collection[str] | None = None
) -> SpoolSnapshot:
    """What an open spool says, with the backlogs of these destinations; None for all that it knows."""
    commit, rows_ever = read_commit_counter(connection, RecordClass.READING)
    kinds = {name: kind for name, kind, _ in connection.execute(SQL["destinations"])}
    notices, _ = outbox_totals(connection)
    return SpoolSnapshot(
        spool=SpoolStatus(
            path=str(path),
            epoch=str(read_meta(connection, "epoch", "")),
            readings_ever=rows_ever,
            newest_commit=commit,
            size_bytes=file_size_bytes(path),
            free_bytes=shutil.disk_usage(path.parent).free,
            room_days=None,
            readings_kept=count_kept_rows(connection),
            damaged_readings=connection.execute(SQL["damaged_totals"]).fetchone()[1],
        ),
        pending_rows=count_pending_rows(connection),
        notices=notices,
        kinds=kinds,
        backlogs={
            name: read_backlog(connection, name, RecordClass.READING, commit)
            for name in (kinds if receivers is None else receivers)
        },
    )


def read_records_status(connection: sqlite3.Connection) -> RecordsStatus:
    """Quarantine and loss ledger of an open spool; both are bounded."""
    counts = [ReasonCount(*row) for row in connection.execute(SQL["quarantine_by_reason"])]
    reasons = []
    for count in counts:
        newest = (_MAX_QUARANTINE_NO, count.reason, count.reason, 1)
        item = StoredQuarantineItem(*connection.execute(SQL["quarantine_items"], newest).fetchone())
        topic, detail = item.topic[:_EXAMPLE_MAX_CHARS], item.detail[:_EXAMPLE_MAX_CHARS]
        reasons.append(QuarantineReasonStatus(*count, item.source, topic, detail))
    ever = connection.execute(SQL["quarantine_ever"]).fetchone()
    totals = sorted(eviction.read_loss_totals(connection), key=lambda total: -total.declared_at_us)
    return RecordsStatus(
        QuarantineStatus(sum(count.items for count in counts), 0 if ever is None else ever[0], reasons),
        LossesStatus(
            entries=len(totals),
            readings=sum(total.rows for total in totals if total.record_class is RecordClass.READING),
            newest=[
                Loss(
                    declared_at_us=total.declared_at_us,
                    destination=total.destination,
                    what=total.record_class.name.lower(),
                    records=total.rows,
                    reason=total.reason,
                    remains=total.survives,
                    from_us=total.from_us,
                    to_us=total.to_us,
                )
                for total in totals[:_LOSSES_MAX]
            ],
        ),
    )


def build_status(
    settings: GatewaySettings, snapshot: SpoolSnapshot, records: RecordsStatus, live: LiveStatus | None = None
) -> Status:
    """The document as of now; `live` is None for a gateway that does not run."""
    now_us, now_s = time.time_ns() // 1000, time.monotonic()
    spool, kept = snapshot.spool, snapshot.spool.readings_kept
    bytes_per_reading = min(spool.size_bytes / kept, _MAX_BYTES_PER_READING) if kept else 0.0
    ingress = IngressStatus() if live is None else _ingress_status(live.runtime, now_s)
    if live is None:
        rows = {name: spool.readings_ever - backlog.readings for name, backlog in snapshot.backlogs.items()}
        counted = [(d, kind, ShipperCounters("stopped", rows=rows[d])) for d, kind in snapshot.kinds.items()]
    else:
        counted = [(shipper.name, shipper.kind, shipper.counters) for shipper in live.runtime.shippers]
    destinations = []
    for name, kind, counters in counted:
        backlog = snapshot.backlogs.get(name, Backlog(0, None))
        destinations.append(
            _destination_status(
                name,
                kind,
                counters,
                backlog,
                backlog_bytes=round(backlog.readings * bytes_per_reading),
                incoming_per_s=ingress.readings_per_s,
                now_us=now_us,
            )
        )
    room_bytes, room_days = 0, None
    if live is not None:
        room_bytes = live.room_bytes
        if destinations:  # what is delivered makes room when it is needed
            delivered = kept - min(kept, max(d.backlog_readings for d in destinations))
            room_bytes += round(delivered * bytes_per_reading)
        rates = live.recent.readings_per_s
        usual_per_s = (
            sum(rates) / len(rates) if len(rates) >= _MIN_AVERAGE_SAMPLES else ingress.readings_per_s
        )
        growth_per_s = usual_per_s * bytes_per_reading
        room_days = room_bytes / growth_per_s / 86_400 if growth_per_s > 0 else None
    status = Status(
        gateway_id=settings.gateway_id,
        version=version("tidegate"),
        running=live is not None,
        at_us=now_us,
        uptime_s=0.0 if live is None else now_s - live.runtime.started_at,
        ingress=ingress,
        spool=msgspec.structs.replace(spool, room_bytes=room_bytes, room_days=room_days),
        destinations=destinations,
        quarantine=records.quarantine,
        losses=records.losses,
    )
    if live is not None:
        runtime = live.runtime
        clock, corrected = runtime.clock_corrector.clock, runtime.clock_corrector.counters
        heard = runtime.spool.appender.device_activity.last_received(runtime.spool.duplicates, now_us)
        status = msgspec.structs.replace(
            status,
            devices=build_devices_status(heard, now_us, settings.status.silent_after_s),
            alerts=None if runtime.alerts is None else _alerts_status(runtime.alerts, runtime.spool.catalog),
            wear=live.wear,
            recent=live.recent,
            processing=_processing_status(runtime.commit_consumer, runtime.roller),
            ways_in=_inputs_status(runtime.sources),
            channels=[
                ChannelStatus(
                    name=notifier.channel.name,
                    waiting=snapshot.notices.get(notifier.channel.name, 0),
                    **dataclasses.asdict(notifier.counters),
                )
                for notifier in runtime.notifiers
            ],
            certificates=live.certificates,
            clock=ClockStatus(
                clock.trusted, clock.why, snapshot.pending_rows, corrected.restamped, corrected.in_doubt
            ),
        )
    return msgspec.structs.replace(status, remarks=build_advice(status))


def _destination_status(
    name: str,
    kind: str,
    counters: ShipperCounters,
    backlog: Backlog,
    *,
    backlog_bytes: int,
    incoming_per_s: float,
    now_us: int,
) -> DestinationStatus:
    now_s = time.monotonic()
    oldest_us = backlog.oldest_written_at_us
    delivered_per_s = counters.delivered.per_s(now_s)
    drain_s = 0.0 if backlog.readings == 0 else None
    if backlog.readings and counters.state in ("idle", "sending") and delivered_per_s > incoming_per_s:
        drain_s = backlog.readings / (delivered_per_s - incoming_per_s)
    return DestinationStatus(
        name=name,
        kind=kind,
        state=counters.state,
        last_error=counters.last_error,
        delivered=counters.rows,
        delivered_per_s=delivered_per_s,
        duplicates=counters.duplicates,
        conflicts=counters.conflicts,
        wire_bytes=counters.wire_bytes,
        last_receipt_at_us=counters.last_receipt_at_us,
        backlog_readings=backlog.readings,
        backlog_bytes=backlog_bytes,
        backlog_oldest_s=None if oldest_us is None else max(0.0, (now_us - oldest_us) / 1e6),
        drain_s=drain_s,
        refused=counters.refused,
        failures=counters.failures,
        lanes={
            name: LaneStatus(lane.batches, lane.rows, lane.wire_bytes, lane.delivered.per_s(now_s))
            for name, lane in counters.lanes.items()
        },
    )


def _ingress_status(runtime: Runtime, now_s: float) -> IngressStatus:
    committer = runtime.committer.counters
    return IngressStatus(
        connections=runtime.listener.context.counters.connections,
        publishes=committer.publishes,
        acknowledged=committer.acknowledged_publishes,
        readings=committer.readings,
        readings_per_s=committer.rate.per_s(now_s),
        duplicates=committer.duplicates,
        quarantined=committer.quarantined,
        holding_since_us=committer.holding_since_us,
        holding_reason=committer.holding_reason,
    )


def build_devices_status(heard: LastReceived, now_us: int, silent_after_s: float) -> DevicesStatus:
    """The devices as of `now_us`; all silent ones are counted, the latest are named."""
    silent = np.flatnonzero(heard.received_us < now_us - round(silent_after_s * 1e6))
    latest = silent[np.argsort(-heard.received_us[silent], kind="stable")][:_SILENT_DEVICES_MAX]
    return DevicesStatus(
        known=len(heard.sensor_ids),
        heard=len(heard.sensor_ids) - len(silent),
        silent=len(silent),
        silent_after_s=silent_after_s,
        silent_devices=[
            SilentDevice(heard.sensor_ids[at], max(0, int(heard.received_us[at])), int(heard.series[at]))
            for at in latest.tolist()
        ],
    )


def _alerts_status(evaluator: AlertEvaluator, catalog: SeriesCatalog) -> AlertsStatus:
    """Firing alerts first, the critical ones before others, then the latest."""
    shown: dict[tuple[str, int], Alert] = {}
    changes = [
        (event.rule, event.series, event.detail, event.at_us, event.state is AlertState.FIRING)
        for event in reversed(evaluator.recent)
    ]
    firing_alerts = evaluator.firing_alerts()
    changes += [(rule, series, "", at_us, True) for rule, series, at_us in firing_alerts[:_ALERTS_MAX]]
    for rule, series, text, since_us, firing in changes:
        subject = "/".join(catalog[series][:2])
        alert = Alert(rule.name, rule.severity.name.lower(), subject, text, since_us, firing)
        shown.setdefault((rule.name, series), alert)

    def order(alert: Alert) -> tuple[bool, bool, int]:
        return not alert.firing, alert.firing and alert.severity != "critical", -alert.since_us

    return AlertsStatus(
        firing=len(firing_alerts),
        critical=sum(rule.severity is Severity.CRITICAL for rule, *_ in firing_alerts),
        newest=sorted(shown.values(), key=order)[:_ALERTS_MAX],
    )


def _processing_status(consumer: CommitConsumer, roller: Roller | None) -> ProcessingStatus:
    rolled = RollerCounters() if roller is None else roller.counters
    return ProcessingStatus(
        lag_commits=consumer.lag_commits,
        lag_s=consumer.counters.lag_s,
        readings=consumer.counters.readings,
        damaged_readings=consumer.counters.damaged_rows,
        windows_open=0 if roller is None else roller.open_windows,
        rollups=rolled.rollups,
        revisions=rolled.revisions,
        late_unrolled=rolled.late_unrolled,
        last_error=consumer.counters.last_error,
    )


def _inputs_status(sources: Sequence[Source]) -> InputsStatus:
    statuses = [source.status() for source in sources]
    return InputsStatus(
        listen=next(status for status in statuses if isinstance(status, ListenStatus)),
        subscribe=[status for status in statuses if isinstance(status, SubscribeStatus)],
        http=next((status for status in statuses if isinstance(status, HttpStatus)), None),
    )


def format_service_status(runtime: Runtime) -> str:
    """One line for systemd: where it listens, what comes in, whether it holds, how each destination does."""
    listen, counters = runtime.settings.ingress.listen, runtime.committer.counters
    readings_per_s = format_count(counters.rate.per_s(time.monotonic()))
    parts = [f"HOLDING: {counters.holding_reason}"] if counters.holding_reason else []
    parts += [
        f"listening on {listen.host}:{runtime.listener.port}",
        f"{readings_per_s} readings/s from {runtime.listener.context.counters.connections} connections",
    ]
    for shipper in runtime.shippers:
        error = shipper.counters.last_error[:_ERROR_MAX_CHARS]
        state = STATE_TEXTS[shipper.counters.state]
        parts.append(f"{shipper.name} {state}" + (f" ({error})" if error else ""))
    return "; ".join(parts)
