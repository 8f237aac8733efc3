"""The status document: what the operator reads (promise 12). Pure: structs only, never changed once built.

Served at `/status`, printed by `tidegate status --json`, shown as text by `tidegate status` and on the page.
Units end the names; None means not known. Text that devices chose is in it unescaped: escape it before
printing.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from gateway.ingress.http import HttpStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.mqtt.broker_session import SubscribeStatus  # noqa: TC001 - msgspec reads the annotations
from gateway.mqtt.context import ListenStatus  # noqa: TC001 - msgspec reads the annotations

AdviceSeverity = Literal["critical", "warning", "note", "good"]
CERTIFICATE_WARNING_DAYS = 30
CERTIFICATE_CRITICAL_DAYS = 7


class Advice(msgspec.Struct, frozen=True):
    """One sentence. `critical`: data is or will be lost, act; `warning`: look soon; `note`: good to know."""

    severity: AdviceSeverity
    text: str


class Loss(msgspec.Struct, frozen=True):
    """What one destination ("": none) lost of one class of records; `remains` is the coarser form left."""

    declared_at_us: int
    destination: str
    what: str
    records: int
    reason: str
    remains: str
    from_us: int
    to_us: int


class LossesStatus(msgspec.Struct, frozen=True):
    """The loss ledger: readings given up in all (once for each destination), and the newest losses."""

    entries: int
    readings: int
    newest: list[Loss]


class Alert(msgspec.Struct, frozen=True):
    """One alert, firing or resolved. `subject` is the series it is about: untrusted text."""

    rule: str
    severity: str
    subject: str
    text: str
    since_us: int
    firing: bool


class AlertsStatus(msgspec.Struct, frozen=True):
    """Alerts that are firing, the critical ones among them, and the newest, resolved ones included."""

    firing: int
    critical: int
    newest: list[Alert]


class ChannelStatus(msgspec.Struct, frozen=True):
    """One alert channel. `waiting` counts notices in its outbox, `given_up` those dropped since start."""

    name: str
    sent: int
    failed: int
    given_up: int
    waiting: int
    last_error: str
    last_sent_at_us: int | None


class ClockStatus(msgspec.Struct, frozen=True):
    """Whether the clock is trusted. `waiting` readings are in the spool without their times; since start,
    `restamped` got them and `in_doubt` were committed as they were stamped.
    """

    trusted: bool
    why: str
    waiting: int
    restamped: int
    in_doubt: int


class SilentDevice(msgspec.Struct, frozen=True):
    """A device that was not heard for `silent_after_s`."""

    sensor_id: str
    heard_at_us: int
    series: int


class DevicesStatus(msgspec.Struct, frozen=True):
    """Devices known to the spool, by when they were last heard. `silent_devices` names those silent last."""

    known: int
    heard: int
    silent: int
    silent_after_s: float
    silent_devices: list[SilentDevice]


class ProcessingStatus(msgspec.Struct, frozen=True):
    """Checks, rollups and alerts. `late_unrolled` windows came late: their rollups had been evicted."""

    lag_commits: int
    lag_s: float
    readings: int
    damaged_readings: int
    windows_open: int
    rollups: int
    revisions: int
    late_unrolled: int
    last_error: str


class QuarantineReasonStatus(msgspec.Struct, frozen=True):
    """Items of one reason, and the newest of them. `topic` and `detail` are untrusted text."""

    reason: str
    items: int
    newest_at_us: int
    source: str
    topic: str
    detail: str


class QuarantineStatus(msgspec.Struct, frozen=True):
    """What is in quarantine. `ever` also counts what was retried, dropped or had to make room."""

    items: int
    ever: int
    reasons: list[QuarantineReasonStatus]


class InputsStatus(msgspec.Struct, frozen=True):
    """The sources of readings by kind; None for one that is not in use."""

    listen: ListenStatus
    subscribe: list[SubscribeStatus]
    http: HttpStatus | None


class IngressStatus(msgspec.Struct, frozen=True):
    """What comes in, over all sources; all zero for a gateway that does not run."""

    connections: int = 0
    publishes: int = 0
    acknowledged: int = 0
    readings: int = 0
    readings_per_s: float = 0.0
    duplicates: int = 0
    quarantined: int = 0
    holding_since_us: int | None = None
    holding_reason: str = ""


class SpoolStatus(msgspec.Struct, frozen=True):
    """The spool. `room_bytes` may still be written; `room_days` until then, if nothing were delivered."""

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


class LaneStatus(msgspec.Struct, frozen=True):
    """What one lane of a destination has delivered since start."""

    batches: int
    rows: int
    wire_bytes: int
    delivered_per_s: float


class DestinationStatus(msgspec.Struct, frozen=True):
    """One destination: `state` as in `ShipperCounters`, or stopped when the gateway does not run."""

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


class RateHistoryStatus(msgspec.Struct, frozen=True):
    """Samples `step_s` apart, the newest last and taken at `until_us`; `backlog` is in readings."""

    step_s: float
    until_us: int
    readings_per_s: list[float]
    backlog: dict[str, list[int | None]]


class FlashWearStatus(msgspec.Struct, frozen=True):
    """Bytes written over the last day, or since start; None where the kernel does not say.

    `amplification` is bytes written by this gateway for each byte of encoded readings. `years_left` is at the
    disk's present rate, or the gateway's own where that is not known. The last two are since start of the
    process, and of the machine.
    """

    disk: str | None
    observed_s: float
    written_bytes_per_day: float | None
    disk_written_bytes_per_day: float | None
    amplification: float | None
    endurance_bytes: float | None
    years_left: float | None
    written_bytes: int | None = None
    disk_written_bytes: int | None = None


class CertificateStatus(msgspec.Struct, frozen=True):
    """The file that the setting `key` names, judged by its entry that expires first.

    `days_left` is None when the file cannot be read; `fault` says why, or that it is not valid yet.
    """

    key: str
    path: str
    kind: str
    days_left: float | None
    fault: str = ""

    @property
    def urgent(self) -> bool:
        """Whether it is unusable, has expired, or expires within a week."""
        return bool(self.fault) or (self.days_left is not None and self.days_left < CERTIFICATE_CRITICAL_DAYS)

    @property
    def soon(self) -> bool:
        """Whether it should be renewed now."""
        return self.urgent or (self.days_left is not None and self.days_left < CERTIFICATE_WARNING_DAYS)

    def __str__(self) -> str:
        return f"{self.key}: {self.path}: {self.condition}"

    @property
    def condition(self) -> str:
        """What is wrong with it, or when it expires."""
        days = self.days_left or 0.0
        when = f"expires in {days:.0f} days" if days >= 0 else f"expired {-days:.0f} days ago"
        return self.fault or f"the {self.kind} {when}"


class Status(msgspec.Struct, frozen=True):
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
