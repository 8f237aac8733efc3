"""The metrics of a gateway for Prometheus, at `/metrics`.

`METRICS` declares every one; docs/metrics.md is a table of the same, and a test holds them together. Names
follow Prometheus's conventions: base units at the end, `_total` for counters. Labels are few and bounded: a
destination is one of the configuration, a lane one of three, a reason one of `REASONS_MAX`, the rest "other".
No series, sensor or topic is ever a label.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from prometheus_client.core import Metric as Family

    from gateway.runtime import Runtime
    from gateway.status.document import DestinationStatus, Status

REASONS_MAX = 30
OTHER_REASONS = "other"

Labels = tuple[str, ...]
Values = dict[Labels, float]
MetricValues = dict[str, Values | float | None]


class Metric(NamedTuple):
    """One metric. `name` is as it is exposed, with `_total`; a summary has `_count` and `_sum` of its own."""

    name: str
    kind: Literal["counter", "gauge", "summary"]
    labels: Labels
    help: str


def _counter(name: str, description: str, *labels: str) -> Metric:
    return Metric(name, "counter", labels, description)


def _gauge(name: str, description: str, *labels: str) -> Metric:
    return Metric(name, "gauge", labels, description)


METRICS = (
    _gauge("tidegate_info", "Always 1; says which gateway this is.", "gateway_id", "version"),
    _counter("tidegate_publishes_total", "Publishes received, from every source."),
    _counter("tidegate_publishes_acknowledged_total", "Publishes acknowledged: durable."),
    _counter("tidegate_publishes_refused_total", "Publishes answered with quota exceeded."),
    _counter("tidegate_readings_total", "Readings stored."),
    _counter("tidegate_readings_duplicate_total", "Readings that were stored already."),
    _counter(
        "tidegate_readings_conflicting_total",
        "Readings whose series and time were stored with another value.",
    ),
    _counter("tidegate_quarantined_total", "Items put into quarantine."),
    Metric("tidegate_commit_seconds", "summary", (), "Group commits, including the fsync."),
    _gauge("tidegate_connections", "Devices connected by MQTT now."),
    _counter("tidegate_connections_total", "MQTT connections accepted."),
    _counter("tidegate_received_bytes_total", "Bytes received by MQTT."),
    _counter("tidegate_refusals_total", "Connections, publishes and subscriptions refused.", "reason"),
    _counter("tidegate_protocol_faults_total", "Violations of MQTT.", "reason"),
    _counter("tidegate_connections_closed_total", "MQTT connections closed by the gateway.", "reason"),
    _gauge("tidegate_holding", "1 while acknowledgements are withheld, else 0."),
    _gauge("tidegate_stages_late", "Stages that make no progress; /healthz names them."),
    _gauge("tidegate_series", "Series known, once per state of their attributes."),
    _gauge("tidegate_devices", "Devices known."),
    _gauge("tidegate_devices_silent", "Devices not heard for status.silent_after_s."),
    _gauge("tidegate_spool_readings", "Readings in the spool."),
    _gauge("tidegate_spool_bytes", "Bytes of the spool on disk."),
    _gauge("tidegate_spool_room_bytes", "Bytes the spool may still use."),
    _gauge("tidegate_spool_room_seconds", "Time until that is used, if nothing were delivered."),
    _gauge("tidegate_spool_damaged_readings", "Readings in damaged segments, set aside."),
    _gauge("tidegate_quarantine_items", "Items in quarantine now.", "reason"),
    _gauge("tidegate_backlog_readings", "Readings not delivered yet.", "destination"),
    _gauge("tidegate_backlog_bytes", "Bytes of those readings in the spool.", "destination"),
    _gauge("tidegate_backlog_oldest_seconds", "Age of the oldest of them; 0 without any.", "destination"),
    _gauge(
        "tidegate_backlog_drain_seconds",
        "Time until they are delivered; absent when not shrinking.",
        "destination",
    ),
    _gauge("tidegate_destination_failing", "1 while the last attempt failed, else 0.", "destination"),
    _gauge(
        "tidegate_destination_held", "1 while it is blocked and an operator is needed, else 0.", "destination"
    ),
    _gauge("tidegate_last_receipt_timestamp_seconds", "When the last receipt came.", "destination"),
    _counter("tidegate_delivery_failures_total", "Attempts that failed.", "destination"),
    _counter(
        "tidegate_readings_refused_total", "Rows refused by a destination, now in quarantine.", "destination"
    ),
    _counter("tidegate_delivered_rows_total", "Rows with a receipt.", "destination", "lane"),
    _counter("tidegate_delivered_batches_total", "Batches with a receipt.", "destination", "lane"),
    _counter("tidegate_delivered_bytes_total", "Bytes of those batches as sent.", "destination", "lane"),
    _counter("tidegate_encoded_bytes_total", "Bytes of encoded segments."),
    _counter("tidegate_written_bytes_total", "Bytes written to disks by this process."),
    _counter("tidegate_disk_written_bytes_total", "Bytes written to the spool's disk by all processes."),
    _gauge("tidegate_flash_left_seconds", "Time until the configured endurance is used up, at this rate."),
    _gauge("tidegate_alerts_firing", "Alerts that are firing."),
    _gauge("tidegate_readings_given_up", "Readings declared lost, by the loss ledger."),
)


_PROCESS = CollectorRegistry()
ProcessCollector(registry=_PROCESS)


def render_metrics(status: Status, runtime: Runtime) -> bytes:
    """What Prometheus scrapes: from the status, the components' own counters and the process."""
    collector = _MetricCollector({**_status_values(status), **_counter_values(runtime)})
    return generate_latest(collector) + generate_latest(_PROCESS)


class _MetricCollector:
    """The interface that `generate_latest` reads from. A value of None, or no value, is not shown."""

    def __init__(self, values: MetricValues) -> None:
        self._values = values

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            given = self._values[metric.name]
            values: Values = given if isinstance(given, dict) else {} if given is None else {(): float(given)}
            if metric.kind == "summary":
                summary = SummaryMetricFamily(metric.name, metric.help, labels=metric.labels)
                summary.add_metric((), int(values["count",]), values["sum",])
                yield summary
                continue
            make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            family = make(metric.name, metric.help, labels=metric.labels)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family


def _status_values(status: Status) -> MetricValues:
    spool, devices, wear = status.spool, status.devices, status.wear
    years_left = None if wear is None else wear.years_left
    reasons = {} if status.quarantine is None else {r.reason: r.items for r in status.quarantine.reasons}
    values: MetricValues = {
        "tidegate_info": {(status.gateway_id, status.version): 1},
        "tidegate_holding": status.ingress.holding_since_us is not None,
        "tidegate_devices": None if devices is None else devices.known,
        "tidegate_devices_silent": None if devices is None else devices.silent,
        "tidegate_spool_readings": spool.readings_kept,
        "tidegate_spool_bytes": spool.size_bytes,
        "tidegate_spool_room_bytes": spool.room_bytes,
        "tidegate_spool_room_seconds": None if spool.room_days is None else spool.room_days * 86_400,
        "tidegate_spool_damaged_readings": spool.damaged_readings,
        "tidegate_quarantine_items": limit_reasons(reasons),
        "tidegate_written_bytes_total": None if wear is None else wear.written_bytes,
        "tidegate_disk_written_bytes_total": None if wear is None else wear.disk_written_bytes,
        "tidegate_flash_left_seconds": None if years_left is None else years_left * 365.25 * 86_400,
        "tidegate_alerts_firing": 0 if status.alerts is None else status.alerts.firing,
        "tidegate_readings_given_up": 0 if status.losses is None else status.losses.readings,
    }
    for name, read in _DESTINATION_GAUGES.items():
        by_destination = {(d.name,): read(d) for d in status.destinations}
        values[name] = {labels: value for labels, value in by_destination.items() if value is not None}
    return values


_DESTINATION_GAUGES: dict[str, Callable[[DestinationStatus], float | None]] = {
    "tidegate_backlog_readings": lambda d: d.backlog_readings,
    "tidegate_backlog_bytes": lambda d: d.backlog_bytes,
    "tidegate_backlog_oldest_seconds": lambda d: d.backlog_oldest_s or 0.0,
    "tidegate_backlog_drain_seconds": lambda d: d.drain_s,
    "tidegate_destination_failing": lambda d: float(bool(d.last_error)),
    "tidegate_destination_held": lambda d: float(d.state == "held"),
    "tidegate_last_receipt_timestamp_seconds": lambda d: d.last_receipt_at_us and d.last_receipt_at_us / 1e6,
}


def _counter_values(runtime: Runtime) -> MetricValues:
    committer, listener = runtime.committer.counters, runtime.listener.context.counters
    shippers = {(shipper.name,): shipper.counters for shipper in runtime.shippers}
    lanes = {
        (*destination, lane): lane_counters
        for destination, counters in shippers.items()
        for lane, lane_counters in counters.lanes.items()
    }
    return {
        "tidegate_publishes_total": committer.publishes,
        "tidegate_publishes_acknowledged_total": committer.acknowledged_publishes,
        "tidegate_publishes_refused_total": committer.refused_publishes,
        "tidegate_readings_total": committer.readings,
        "tidegate_readings_duplicate_total": committer.duplicates,
        "tidegate_readings_conflicting_total": committer.conflicts,
        "tidegate_quarantined_total": committer.quarantined,
        "tidegate_commit_seconds": {("count",): committer.commits, ("sum",): committer.commits_s},
        "tidegate_connections": listener.connections,
        "tidegate_connections_total": listener.connections_ever,
        "tidegate_received_bytes_total": listener.bytes_in,
        "tidegate_refusals_total": limit_reasons(listener.refused),
        "tidegate_protocol_faults_total": limit_reasons(listener.protocol_faults),
        "tidegate_connections_closed_total": limit_reasons(listener.closed),
        "tidegate_stages_late": sum(stage.late_s() > 0 for stage in runtime.stages()),
        "tidegate_series": len(runtime.spool.catalog),
        "tidegate_encoded_bytes_total": runtime.spool.segments.appended_bytes,
        "tidegate_delivery_failures_total": {name: c.failures for name, c in shippers.items()},
        "tidegate_readings_refused_total": {name: c.refused for name, c in shippers.items()},
        "tidegate_delivered_rows_total": {labels: c.rows for labels, c in lanes.items()},
        "tidegate_delivered_batches_total": {labels: c.batches for labels, c in lanes.items()},
        "tidegate_delivered_bytes_total": {labels: c.wire_bytes for labels, c in lanes.items()},
    }


def limit_reasons(by_reason: Mapping[str, float]) -> Values:
    """Values by reason; those beyond `REASONS_MAX` are summed as "other".

    The first ones keep their own label, so that a counter never moves into "other".
    """
    values: Values = {}
    for reason, value in by_reason.items():
        label = reason if len(values) < REASONS_MAX else OTHER_REASONS
        values[label,] = values.get((label,), 0) + value
    return values
