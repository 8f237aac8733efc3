"""The status document: what the operator reads (promise 12).

Served at `/status`, printed by `tidegate status --json` and shown as text by `tidegate status`. Units end
the names; None means not known. Strings that devices chose are in it as they are: escape them before
printing.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cloud_sync.model.records import AlertState, RecordClass, Severity
from gateway.rollups.roller import RollerCounters
from gateway.spool import eviction, processing_state
from gateway.spool.database import SQL
from gateway.spool.processing_state import count_pending_rows
from gateway.spool.quarantine_items import ReasonCount, StoredQuarantineItem
from gateway.spool.segment_reader import count_kept_rows
from gateway.status.advice import Advice  # noqa: TC001 - msgspec reads the annotations
from gateway.status.certificates import CertificateStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.status.samplers import (
    FlashWearStatus,  # noqa: TC001 - msgspec reads the annotations
    RateHistoryStatus,  # noqa: TC001 - msgspec reads the annotations
)

if TYPE_CHECKING:
    import sqlite3

    from cloud_sync.delivery.shipper import ShipperCounters
    from gateway.alerts.evaluator import AlertEvaluator
    from gateway.alerts.notifier import AlertNotifier
    from gateway.ingress.http.server import HttpSource
    from gateway.mqtt.server import MqttServer
    from gateway.mqtt.subscriber import Subscriber
    from gateway.processing.clock import ClockCorrector
    from gateway.processing.commit_consumer import CommitConsumer
    from gateway.rollups.roller import Roller
    from gateway.runtime import Runtime
    from gateway.spool.duplicates import LastReceived
    from gateway.spool.series_catalog import SeriesCatalog


class Loss(msgspec.Struct):
    """What one destination lost of one class of records for one reason.

    Attributes:
        destination: "" where there is none and the records were only kept here.
        what: the class: reading, rollup.
        reason: machine-readable: no_room, max_age, damaged.
        remains: the coarser form that is left, "" for none.
        from_us, to_us: earliest and latest time among the records.
        declared_at_us: when the newest of them was declared.
    """

    declared_at_us: int
    destination: str
    what: str
    records: int
    reason: str
    remains: str
    from_us: int
    to_us: int


class LossesStatus(msgspec.Struct):
    """The loss ledger: readings given up in all (once for each destination), and the newest losses."""

    entries: int
    readings: int
    newest: list[Loss]


class Alert(msgspec.Struct):
    """An alert as it stands. `subject` is what it is about: text of strangers."""

    rule: str
    severity: str
    subject: str
    text: str
    since_us: int
    firing: bool


class AlertsStatus(msgspec.Struct):
    """Alerts that are firing, the critical ones among them, and the newest, resolved ones included."""

    firing: int
    critical: int
    newest: list[Alert]


_ALERTS_MAX = 20


class ChannelStatus(msgspec.Struct):
    """One channel. `waiting` counts notices in its outbox, `given_up` those dropped unsent since start."""

    name: str
    sent: int
    failed: int
    given_up: int
    waiting: int
    last_error: str
    last_sent_at_us: int | None


def build_alerts_status(stage: AlertEvaluator | None, catalog: SeriesCatalog) -> AlertsStatus | None:
    """The alerts of a running gateway; None when there are none to be."""
    if stage is None:
        return None
    shown: dict[tuple[str, int], Alert] = {}
    for event in reversed(stage.recent):
        key = (event.rule.name, event.series)
        if key not in shown:
            shown[key] = Alert(
                rule=event.rule.name,
                severity=event.rule.severity.name.lower(),
                subject=_alert_subject(catalog, event.series),
                text=event.detail,
                since_us=event.change.at_us,
                firing=event.change.state is AlertState.FIRING,
            )
    for rule, series, fired_us in stage.firing_alerts(_ALERTS_MAX):
        shown.setdefault(
            (rule.name, series),
            Alert(
                rule.name,
                rule.severity.name.lower(),
                _alert_subject(catalog, series),
                "",
                fired_us,
                firing=True,
            ),
        )
    newest = sorted(shown.values(), key=_alert_order)
    counts = stage.firing
    return AlertsStatus(
        firing=sum(counts.values()), critical=counts.get(Severity.CRITICAL, 0), newest=newest[:_ALERTS_MAX]
    )


def build_channel_statuses(
    notifiers: tuple[AlertNotifier, ...], waiting: dict[str, int]
) -> list[ChannelStatus]:
    """How every channel does."""
    return [
        ChannelStatus(
            name=notifier.channel.name,
            sent=notifier.counters.sent,
            failed=notifier.counters.failed,
            given_up=notifier.counters.given_up,
            waiting=waiting.get(notifier.channel.name, 0),
            last_error=notifier.counters.last_error,
            last_sent_at_us=notifier.counters.last_sent_at_us,
        )
        for notifier in notifiers
    ]


def _alert_order(alert: Alert) -> tuple[bool, bool, int]:
    """What fires first, of that what is critical, then the latest."""
    return not alert.firing, alert.firing and alert.severity != "critical", -alert.since_us


def _alert_subject(catalog: SeriesCatalog, series: int) -> str:
    return "/".join(catalog[series][:2])


class ClockStatus(msgspec.Struct):
    """Whether the clock is relied on, and what became of readings stamped while it was not.

    `waiting` readings are in the spool without their times; `restamped` got them since the start, `in_doubt`
    were committed as they were stamped.
    """

    trusted: bool
    why: str
    waiting: int
    restamped: int
    in_doubt: int


def build_clock_status(clock_corrector: ClockCorrector, waiting: int) -> ClockStatus:
    """The clock of a running gateway."""
    return ClockStatus(
        trusted=clock_corrector.clock.trusted,
        why=clock_corrector.clock.why,
        waiting=waiting,
        restamped=clock_corrector.counters.restamped,
        in_doubt=clock_corrector.counters.in_doubt,
    )


SILENT_DEVICES_MAX = 100
"""Silent devices that are named; all are counted."""


class SilentDevice(msgspec.Struct):
    """A device that says nothing any more."""

    sensor_id: str
    heard_at_us: int
    series: int


class DevicesStatus(msgspec.Struct):
    """Devices by when they were last heard.

    Attributes:
        known: devices that have a reading in the catalog of series.
        heard: those heard within `silent_after_s`.
        silent: the others; `silent_devices` names those that fell silent last.
    """

    known: int
    heard: int
    silent: int
    silent_after_s: float
    silent_devices: list[SilentDevice]


def build_devices_status(heard: LastReceived, now_us: int, silent_after_s: float) -> DevicesStatus:
    """The devices as of `now_us`."""
    silent = np.flatnonzero(heard.received_us < now_us - round(silent_after_s * 1e6))
    latest = silent[np.argsort(-heard.received_us[silent], kind="stable")][:SILENT_DEVICES_MAX]
    return DevicesStatus(
        known=len(heard.sensor_ids),
        heard=len(heard.sensor_ids) - len(silent),
        silent=len(silent),
        silent_after_s=silent_after_s,
        silent_devices=[
            SilentDevice(
                sensor_id=heard.sensor_ids[at],
                heard_at_us=max(0, int(heard.received_us[at])),
                series=int(heard.series[at]),
            )
            for at in latest.tolist()
        ],
    )


class ProcessingStatus(msgspec.Struct):
    """What becomes of readings once they are committed.

    `late_unrolled` counts late readings' windows whose rollups are gone from the spool: they get no revision.
    """

    lag_commits: int
    lag_s: float
    readings: int
    damaged_readings: int
    windows_open: int
    rollups: int
    revisions: int
    late_unrolled: int
    last_error: str


def build_processing_status(commit_consumer: CommitConsumer, roller: Roller | None) -> ProcessingStatus:
    """What a running gateway makes of its readings."""
    rolled = RollerCounters() if roller is None else roller.counters
    return ProcessingStatus(
        lag_commits=commit_consumer.lag_commits,
        lag_s=commit_consumer.counters.lag_s,
        readings=commit_consumer.counters.readings,
        damaged_readings=commit_consumer.counters.damaged_rows,
        windows_open=0 if roller is None else roller.open_windows,
        rollups=rolled.rollups,
        revisions=rolled.revisions,
        late_unrolled=rolled.late_unrolled,
        last_error=commit_consumer.counters.last_error,
    )


_LOSSES_MAX = 20


def read_losses_status(connection: sqlite3.Connection) -> LossesStatus:
    """The ledger of an open spool; it has one row for each run of losses, and few kinds of them."""
    totals = sorted(eviction.read_loss_totals(connection), key=lambda total: -total.declared_at_us)
    return LossesStatus(
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
    )


_MAX_QUARANTINE_NO = (1 << 63) - 1
_EXAMPLE_MAX_CHARS = 200


class QuarantineReasonStatus(msgspec.Struct):
    """Items of one reason, and the newest of them. `topic` and `detail` hold text of strangers: escape it."""

    reason: str
    items: int
    newest_at_us: int
    source: str
    topic: str
    detail: str


class QuarantineStatus(msgspec.Struct):
    """What is in quarantine. `ever` counts also what was retried, dropped or had to make room."""

    items: int
    ever: int
    reasons: list[QuarantineReasonStatus]


def read_quarantine_status(connection: sqlite3.Connection) -> QuarantineStatus:
    """The quarantine of an open spool, which is bounded to some thousand items."""
    counts = [ReasonCount(*row) for row in connection.execute(SQL["quarantine_by_reason"])]
    reasons = []
    for count in counts:
        row = connection.execute(
            SQL["quarantine_items"], (_MAX_QUARANTINE_NO, count.reason, count.reason, 1)
        ).fetchone()
        item = StoredQuarantineItem(*row)
        reasons.append(
            QuarantineReasonStatus(
                reason=count.reason,
                items=count.items,
                newest_at_us=count.newest_at_us,
                source=item.source,
                topic=item.topic[:_EXAMPLE_MAX_CHARS],
                detail=item.detail[:_EXAMPLE_MAX_CHARS],
            )
        )
    ever = connection.execute(SQL["quarantine_ever"]).fetchone()
    return QuarantineStatus(
        items=sum(count.items for count in counts), ever=0 if ever is None else ever[0], reasons=reasons
    )


class ListenStatus(msgspec.Struct):
    """The gateway's own MQTT server."""

    connections: int
    connections_ever: int
    publishes: int
    wills: int
    bytes_in: int
    protocol_faults: dict[str, int]
    refused: dict[str, int]
    closed: dict[str, int]


class SubscribeStatus(msgspec.Struct):
    """One broker. `last_fault` stays after it has passed; `refused_filters` are not served now, and why."""

    name: str
    state: str
    connects: int
    sessions_lost: int
    publishes: int
    again: int
    acknowledged: int
    bytes_in: int
    refused: dict[str, int]
    protocol_faults: dict[str, int]
    faults: dict[str, int]
    last_fault: str
    refused_filters: dict[str, str]
    concerns: list[str]


class HttpStatus(msgspec.Struct):
    """The gateway's own HTTP server; `batches_again` had been taken before."""

    requests: int
    batches: int
    batches_again: int
    rejections: dict[str, int]


class InputsStatus(msgspec.Struct):
    """All of them; None for one that is not in use."""

    listen: ListenStatus
    subscribe: list[SubscribeStatus]
    http: HttpStatus | None


def build_inputs_status(parts: Runtime) -> InputsStatus:
    """How the ways in of a running gateway are doing."""
    http = None if parts.http is None else _http_status(parts.http)
    return InputsStatus(
        _listener_status(parts.listener), [_subscriber_status(one) for one in parts.subscribers], http
    )


def _listener_status(listener: MqttServer) -> ListenStatus:
    counters = listener.counters
    return ListenStatus(
        connections=counters.connections_open,
        connections_ever=counters.connections_total,
        publishes=counters.publishes_total,
        wills=counters.wills_total,
        bytes_in=counters.bytes_in_total,
        protocol_faults=dict(counters.protocol_faults_total),
        refused=dict(counters.refused_total),
        closed=dict(counters.closed_total),
    )


def _subscriber_status(subscriber: Subscriber) -> SubscribeStatus:
    counters = subscriber.counters
    return SubscribeStatus(
        name=subscriber.settings.name,
        state=counters.state,
        connects=counters.connects_total,
        sessions_lost=counters.sessions_lost_total,
        publishes=counters.publishes_total,
        again=counters.redelivered_total,
        acknowledged=counters.acknowledged_total,
        bytes_in=counters.bytes_in_total,
        refused=dict(counters.refused_total),
        protocol_faults=dict(counters.protocol_faults_total),
        faults=dict(counters.faults_total),
        last_fault=counters.last_fault,
        refused_filters=dict(counters.refused_filters),
        concerns=list(counters.concerns),
    )


def _http_status(http: HttpSource) -> HttpStatus:
    counters = http.counters
    return HttpStatus(counters.requests, counters.batches, counters.batches_again, dict(counters.rejections))


MAX_BYTES_PER_READING = 200.0
"""What a reading costs in a commit of its own; an almost empty file would seem to cost more."""


class IngressStatus(msgspec.Struct):
    """What comes in."""

    connections: int
    publishes: int
    acknowledged: int
    readings: int
    readings_per_s: float
    duplicates: int
    quarantined: int
    holding_since_us: int | None
    holding_reason: str


class SpoolStatus(msgspec.Struct):
    """What is kept.

    Attributes:
        room_bytes: what may still be written, within the disk, `min_free_bytes` and `max_bytes`.
        room_days: until that is full at the present rate, if nothing were delivered.
    """

    path: str
    epoch: str
    readings_ever: int
    newest_commit: int
    size_bytes: int
    free_bytes: int
    room_days: float | None
    room_bytes: int = 0
    readings_kept: int = 0
    damaged_readings: int = 0


class LaneStatus(msgspec.Struct):
    """What one lane of a destination has delivered since start."""

    batches: int
    rows: int
    wire_bytes: int
    delivered_per_s: float


class DestinationStatus(msgspec.Struct):
    """How one destination is doing.

    Attributes:
        refused: rows it refused since start, which went to quarantine.
        failures: attempts since start that came to nothing.
        lanes: by name: live, backfill, or "in order".
    """

    name: str
    kind: str
    state: str
    last_error: str
    delivered: int
    delivered_per_s: float
    duplicates: int
    conflicts: int
    wire_bytes: int
    last_receipt_at_us: int | None
    backlog_readings: int
    backlog_bytes: int
    backlog_oldest_s: float | None
    drain_s: float | None
    refused: int = 0
    failures: int = 0
    lanes: dict[str, LaneStatus] = {}


class Status(msgspec.Struct):
    """The whole document."""

    gateway_id: str
    version: str
    running: bool
    at_us: int
    uptime_s: float
    ingress: IngressStatus
    spool: SpoolStatus
    destinations: list[DestinationStatus]
    remarks: list[Advice] = []
    devices: DevicesStatus | None = None
    quarantine: QuarantineStatus | None = None
    losses: LossesStatus | None = None
    alerts: AlertsStatus | None = None
    wear: FlashWearStatus | None = None
    recent: RateHistoryStatus | None = None
    processing: ProcessingStatus | None = None
    ways_in: InputsStatus | None = None
    channels: list[ChannelStatus] = []
    certificates: list[CertificateStatus] = []
    clock: ClockStatus | None = None


async def build_running_status(parts: Runtime, *, average_per_s: float | None = None) -> Status:
    """The status of a running gateway: what its parts themselves say.

    `usual_per_s`, readings a second over a longer time, tells the room left better than the present rate.
    """
    now_us, now = time.time_ns() // 1000, time.monotonic()
    committer = parts.committer.counters
    incoming_per_s = committer.rate.per_s(now)
    size_bytes = parts.database.size_bytes
    rows_ever = parts.segments.rows_ever(RecordClass.READING)
    kept, damaged = await parts.database.read(_count_kept_and_damaged)
    room_bytes = await parts.capacity.room_bytes(parts.database)
    waiting, _ = await parts.database.read(processing_state.outbox_totals)
    bytes_per_reading = min(size_bytes / kept, MAX_BYTES_PER_READING) if kept else 0.0
    free_bytes = shutil.disk_usage(parts.database.path.parent).free
    growth_per_s = (incoming_per_s if average_per_s is None else average_per_s) * bytes_per_reading
    destinations = []
    for shipper in parts.shippers:
        backlog = await parts.deliveries.backlog(shipper.name)
        oldest_s = None
        if backlog.oldest_written_at_us is not None:
            oldest_s = max(0.0, (now_us - backlog.oldest_written_at_us) / 1e6)
        destinations.append(
            DestinationStatus(
                name=shipper.name,
                kind=shipper.kind,
                state=shipper.counters.state,
                last_error=shipper.counters.last_error,
                delivered=shipper.counters.rows,
                delivered_per_s=shipper.counters.delivered.per_s(now),
                duplicates=shipper.counters.duplicates,
                conflicts=shipper.counters.conflicts,
                wire_bytes=shipper.counters.wire_bytes,
                last_receipt_at_us=shipper.counters.last_receipt_at_us,
                backlog_readings=backlog.readings,
                backlog_bytes=round(backlog.readings * bytes_per_reading),
                backlog_oldest_s=oldest_s,
                drain_s=estimate_drain_s(backlog.readings, shipper.counters, incoming_per_s, now),
                refused=shipper.counters.refused,
                failures=shipper.counters.failures,
                lanes={
                    name: LaneStatus(lane.batches, lane.rows, lane.wire_bytes, lane.delivered.per_s(now))
                    for name, lane in shipper.counters.lanes.items()
                },
            )
        )
    if destinations:  # what is delivered makes room when it is needed
        delivered = kept - min(kept, max(d.backlog_readings for d in destinations))
        room_bytes += round(delivered * bytes_per_reading)
    return Status(
        gateway_id=parts.settings.gateway_id,
        version=parts.version,
        running=True,
        at_us=now_us,
        uptime_s=now - parts.started_at,
        ingress=IngressStatus(
            connections=parts.listener.counters.connections_open,
            publishes=committer.publishes,
            acknowledged=committer.acknowledged_publishes,
            readings=committer.readings,
            readings_per_s=incoming_per_s,
            duplicates=committer.duplicates,
            quarantined=committer.quarantined,
            holding_since_us=committer.holding_since_us,
            holding_reason=committer.holding_reason,
        ),
        spool=SpoolStatus(
            path=str(parts.database.path),
            epoch=str(parts.database.epoch),
            readings_ever=rows_ever,
            newest_commit=parts.segments.newest_commit(RecordClass.READING),
            size_bytes=size_bytes,
            free_bytes=free_bytes,
            room_days=room_bytes / growth_per_s / 86400 if growth_per_s > 0 else None,
            room_bytes=room_bytes,
            readings_kept=kept,
            damaged_readings=damaged,
        ),
        destinations=destinations,
        processing=build_processing_status(parts.commit_consumer, parts.roller),
        ways_in=build_inputs_status(parts),
        certificates=[] if parts.expiry is None else parts.expiry.newest,
        alerts=build_alerts_status(parts.alerts, parts.catalog),
        channels=build_channel_statuses(parts.notifiers, waiting),
        clock=build_clock_status(parts.clock_corrector, await parts.database.read(count_pending_rows)),
    )


def _count_kept_and_damaged(connection: sqlite3.Connection) -> tuple[int, int]:
    """Readings in the spool, and readings in damaged segments that were set aside."""
    damaged = connection.execute(SQL["damaged_totals"]).fetchone()
    return count_kept_rows(connection), damaged[1]


def estimate_drain_s(
    backlog: int, counters: ShipperCounters, incoming_per_s: float, now: float
) -> float | None:
    """Seconds until a backlog is gone at the present rates; None when it is not shrinking."""
    if backlog == 0:
        return 0.0
    if counters.state not in ("idle", "sending"):
        return None
    surplus = counters.delivered.per_s(now) - incoming_per_s
    return backlog / surplus if surplus > 0 else None
