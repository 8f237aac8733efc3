"""What the operator reads (promise 12): one document, made from the parts themselves.

The same document is served at `/status`, printed by `tidegate status --json` and shown as text by
`tidegate status`. Units end the names; None means not known.
"""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING

import msgspec

from cloud_sync.records import RecordClass
from gateway.operate.alerts_status import ChannelStatus, alerts_of, channels_of
from gateway.operate.clock_status import ClockStatus, clock_of
from gateway.operate.devices import DevicesStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.operate.expiry import CertificateStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.operate.processing_status import ProcessingStatus, processing_of
from gateway.operate.quarantine_summary import QuarantineStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.operate.recent import RecentStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.operate.records_summary import AlertsStatus, LossesStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.operate.remarks import Remark  # noqa: TC001 - msgspec reads the annotations
from gateway.operate.spool_walk import kept_rows
from gateway.operate.ways_in import WaysIn, ways_in
from gateway.operate.wear import WearStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.spool import outbox
from gateway.spool.database import SQL
from gateway.spool.parked import parked_rows

if TYPE_CHECKING:
    import sqlite3

    from cloud_sync.shipper import ShipperCounters
    from gateway.parts import Parts


LARGEST_READING_BYTES = 200.0
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
    remarks: list[Remark] = []
    devices: DevicesStatus | None = None
    quarantine: QuarantineStatus | None = None
    losses: LossesStatus | None = None
    alerts: AlertsStatus | None = None
    wear: WearStatus | None = None
    recent: RecentStatus | None = None
    processing: ProcessingStatus | None = None
    ways_in: WaysIn | None = None
    channels: list[ChannelStatus] = []
    certificates: list[CertificateStatus] = []
    clock: ClockStatus | None = None


async def status_of(parts: Parts, *, usual_per_s: float | None = None) -> Status:
    """The status of a running gateway: what its parts themselves say.

    `usual_per_s`, readings a second over a longer time, tells the room left better than the present rate.
    """
    now_us, now = time.time_ns() // 1000, time.monotonic()
    committer = parts.committer.counters
    incoming_per_s = committer.rate.per_s(now)
    size_bytes = parts.database.size_bytes
    rows_ever = parts.segments.rows_ever(RecordClass.READING)
    kept, damaged = await parts.database.read(_kept_and_damaged)
    room_bytes = await parts.capacity.room_bytes(parts.database)
    waiting, _ = await parts.database.read(outbox.totals)
    bytes_per_reading = min(size_bytes / kept, LARGEST_READING_BYTES) if kept else 0.0
    free_bytes = shutil.disk_usage(parts.database.path.parent).free
    growth_per_s = (incoming_per_s if usual_per_s is None else usual_per_s) * bytes_per_reading
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
                drain_s=drain_s(backlog.readings, shipper.counters, incoming_per_s, now),
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
        processing=processing_of(parts.follower, parts.roller),
        ways_in=ways_in(parts),
        certificates=[] if parts.expiry is None else parts.expiry.newest,
        alerts=alerts_of(parts.alerts, parts.book),
        channels=channels_of(parts.desks, waiting),
        clock=clock_of(parts.restamper, await parts.database.read(parked_rows)),
    )


def _kept_and_damaged(connection: sqlite3.Connection) -> tuple[int, int]:
    """Readings in the spool, and readings in damaged segments that were set aside."""
    damaged = connection.execute(SQL["damaged_totals"]).fetchone()
    return kept_rows(connection), damaged[1]


def drain_s(backlog: int, counters: ShipperCounters, incoming_per_s: float, now: float) -> float | None:
    """Seconds until a backlog is gone at the present rates; None when it is not shrinking."""
    if backlog == 0:
        return 0.0
    if counters.state not in ("idle", "sending"):
        return None
    surplus = counters.delivered.per_s(now) - incoming_per_s
    return backlog / surplus if surplus > 0 else None
