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


class Metric(NamedTuple):
    """One metric. `name` is as it is exposed, with `_total`; a summary has `_count` and `_sum` of its own."""

    name: str
    kind: Literal["counter", "gauge", "summary"]
    labels: Labels
    help: str


_DESTINATION_LABEL = ("destination",)
_LANE_LABELS = ("destination", "lane")
_REASON_LABEL = ("reason",)

METRICS = (
    Metric("tidegate_info", "gauge", ("gateway_id", "version"), "Always 1; says which gateway this is."),
    Metric("tidegate_publishes_total", "counter", (), "Publishes taken, from every way in."),
    Metric("tidegate_publishes_acknowledged_total", "counter", (), "Publishes acknowledged: durable."),
    Metric("tidegate_publishes_refused_total", "counter", (), "Publishes answered with quota exceeded."),
    Metric("tidegate_readings_total", "counter", (), "Readings made durable."),
    Metric("tidegate_readings_duplicate_total", "counter", (), "Readings that were there already."),
    Metric(
        "tidegate_readings_conflicting_total", "counter", (), "Readings of a time stored with another value."
    ),
    Metric("tidegate_quarantined_total", "counter", (), "Items put into quarantine."),
    Metric("tidegate_commit_seconds", "summary", (), "Group commits: from their beginning to the fsync."),
    Metric("tidegate_connections", "gauge", (), "Devices connected by MQTT now."),
    Metric("tidegate_connections_total", "counter", (), "MQTT connections accepted."),
    Metric("tidegate_received_bytes_total", "counter", (), "Bytes received by MQTT."),
    Metric(
        "tidegate_refusals_total",
        "counter",
        _REASON_LABEL,
        "Connections, publishes and subscriptions refused.",
    ),
    Metric("tidegate_protocol_faults_total", "counter", _REASON_LABEL, "Violations of MQTT."),
    Metric(
        "tidegate_connections_closed_total",
        "counter",
        _REASON_LABEL,
        "MQTT connections closed by the gateway.",
    ),
    Metric("tidegate_holding", "gauge", (), "1 while acknowledgements are withheld, else 0."),
    Metric("tidegate_stages_late", "gauge", (), "Stages that make no progress; /healthz names them."),
    Metric("tidegate_series", "gauge", (), "Series known, once per state of their attributes."),
    Metric("tidegate_devices", "gauge", (), "Devices known."),
    Metric("tidegate_devices_silent", "gauge", (), "Devices not heard for status.silent_after_s."),
    Metric("tidegate_spool_readings", "gauge", (), "Readings in the spool."),
    Metric("tidegate_spool_bytes", "gauge", (), "Bytes of the spool on disk."),
    Metric("tidegate_spool_room_bytes", "gauge", (), "Bytes the spool may still use."),
    Metric("tidegate_spool_room_seconds", "gauge", (), "Until that is used, if nothing were delivered."),
    Metric("tidegate_spool_damaged_readings", "gauge", (), "Readings in damaged segments, set aside."),
    Metric("tidegate_quarantine_items", "gauge", _REASON_LABEL, "Items in quarantine now."),
    Metric("tidegate_backlog_readings", "gauge", _DESTINATION_LABEL, "Readings a destination lacks."),
    Metric("tidegate_backlog_bytes", "gauge", _DESTINATION_LABEL, "What they take in the spool."),
    Metric(
        "tidegate_backlog_oldest_seconds",
        "gauge",
        _DESTINATION_LABEL,
        "Since the oldest of them was written; 0 without any.",
    ),
    Metric(
        "tidegate_backlog_drain_seconds",
        "gauge",
        _DESTINATION_LABEL,
        "Until they are delivered; absent when not shrinking.",
    ),
    Metric(
        "tidegate_destination_failing",
        "gauge",
        _DESTINATION_LABEL,
        "1 while the last attempt failed, else 0.",
    ),
    Metric("tidegate_destination_held", "gauge", _DESTINATION_LABEL, "1 while a person is needed, else 0."),
    Metric(
        "tidegate_last_receipt_timestamp_seconds", "gauge", _DESTINATION_LABEL, "When the last receipt came."
    ),
    Metric("tidegate_delivery_failures_total", "counter", _DESTINATION_LABEL, "Attempts that failed."),
    Metric(
        "tidegate_readings_refused_total",
        "counter",
        _DESTINATION_LABEL,
        "Rows a destination refused: in quarantine.",
    ),
    Metric("tidegate_delivered_rows_total", "counter", _LANE_LABELS, "Rows that receipts came for."),
    Metric("tidegate_delivered_batches_total", "counter", _LANE_LABELS, "Batches that receipts came for."),
    Metric("tidegate_delivered_bytes_total", "counter", _LANE_LABELS, "Bytes of those on the link."),
    Metric("tidegate_encoded_bytes_total", "counter", (), "Bytes of segments as they were encoded."),
    Metric(
        "tidegate_written_bytes_total", "counter", (), "Bytes this process caused to be written to disks."
    ),
    Metric(
        "tidegate_disk_written_bytes_total", "counter", (), "Bytes written to the spool's disk by everyone."
    ),
    Metric(
        "tidegate_flash_left_seconds", "gauge", (), "Until the stated endurance is used up, at this rate."
    ),
    Metric("tidegate_alerts_firing", "gauge", (), "Alerts that are firing."),
    Metric("tidegate_readings_given_up", "gauge", (), "Readings declared lost, by the loss ledger."),
)


class GatewayMetrics:
    """Makes the page that Prometheus scrapes, from a status document and the parts' own counters."""

    def __init__(self, parts: Runtime) -> None:
        self._parts = parts
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)

    def page(self, status: Status) -> bytes:
        """The metrics as of `status`, in the text format."""
        values = {**_status_values(status), **_counter_values(self._parts)}
        return generate_latest(_MetricCollector(values)) + generate_latest(self._registry)


class _MetricCollector:
    """What `generate_latest` takes: something to collect from."""

    def __init__(self, values: Mapping[str, Values]) -> None:
        self._values = values

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            values = self._values[metric.name]
            family: CounterMetricFamily | GaugeMetricFamily | SummaryMetricFamily
            if metric.kind == "summary":
                family = SummaryMetricFamily(metric.name, metric.help, labels=metric.labels)
                family.add_metric((), int(values["count",]), values["sum",])
            elif metric.kind == "counter":
                family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, value in values.items():
                    family.add_metric(labels, value)
            else:
                family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, value in values.items():
                    family.add_metric(labels, value)
            yield family


def _status_values(status: Status) -> dict[str, Values]:
    spool, devices, wear = status.spool, status.devices, status.wear
    reasons = {} if status.quarantine is None else {r.reason: r.items for r in status.quarantine.reasons}
    values: dict[str, Values] = {
        "tidegate_info": {(status.gateway_id, status.version): 1},
        "tidegate_holding": _single_value(status.ingress.holding_since_us is not None),
        "tidegate_devices": _single_value(None if devices is None else devices.known),
        "tidegate_devices_silent": _single_value(None if devices is None else devices.silent),
        "tidegate_spool_readings": _single_value(spool.readings_kept),
        "tidegate_spool_bytes": _single_value(spool.size_bytes),
        "tidegate_spool_room_bytes": _single_value(spool.room_bytes),
        "tidegate_spool_room_seconds": _single_value(
            None if spool.room_days is None else spool.room_days * 86_400
        ),
        "tidegate_spool_damaged_readings": _single_value(spool.damaged_readings),
        "tidegate_quarantine_items": limit_reasons(reasons),
        "tidegate_written_bytes_total": _single_value(None if wear is None else wear.written_bytes),
        "tidegate_disk_written_bytes_total": _single_value(None if wear is None else wear.disk_written_bytes),
        "tidegate_flash_left_seconds": _single_value(
            None if wear is None or wear.years_left is None else wear.years_left * 365.25 * 86_400
        ),
        "tidegate_alerts_firing": _single_value(0 if status.alerts is None else status.alerts.firing),
        "tidegate_readings_given_up": _single_value(0 if status.losses is None else status.losses.readings),
    }
    for name, of in _DESTINATION_GAUGES.items():
        told = {(d.name,): of(d) for d in status.destinations}
        values[name] = {labels: value for labels, value in told.items() if value is not None}
    return values


def _last_receipt_s(destination: DestinationStatus) -> float | None:
    at_us = destination.last_receipt_at_us
    return None if at_us is None else at_us / 1e6


_DESTINATION_GAUGES: dict[str, Callable[[DestinationStatus], float | None]] = {
    "tidegate_backlog_readings": lambda d: d.backlog_readings,
    "tidegate_backlog_bytes": lambda d: d.backlog_bytes,
    "tidegate_backlog_oldest_seconds": lambda d: d.backlog_oldest_s or 0.0,
    "tidegate_backlog_drain_seconds": lambda d: d.drain_s,
    "tidegate_destination_failing": lambda d: float(bool(d.last_error)),
    "tidegate_destination_held": lambda d: float(d.state == "held"),
    "tidegate_last_receipt_timestamp_seconds": _last_receipt_s,
}


def _counter_values(parts: Runtime) -> dict[str, Values]:
    committer, listener = parts.committer.counters, parts.listener.counters
    shippers = {(shipper.name,): shipper.counters for shipper in parts.shippers}
    lanes = {
        (*destination, lane): of_lane
        for destination, counters in shippers.items()
        for lane, of_lane in counters.lanes.items()
    }
    return {
        "tidegate_publishes_total": _single_value(committer.publishes),
        "tidegate_publishes_acknowledged_total": _single_value(committer.acknowledged_publishes),
        "tidegate_publishes_refused_total": _single_value(committer.refused_publishes),
        "tidegate_readings_total": _single_value(committer.readings),
        "tidegate_readings_duplicate_total": _single_value(committer.duplicates),
        "tidegate_readings_conflicting_total": _single_value(committer.conflicts),
        "tidegate_quarantined_total": _single_value(committer.quarantined),
        "tidegate_commit_seconds": {("count",): committer.commits, ("sum",): committer.commits_s},
        "tidegate_connections": _single_value(listener.connections_open),
        "tidegate_connections_total": _single_value(listener.connections_total),
        "tidegate_received_bytes_total": _single_value(listener.bytes_in_total),
        "tidegate_refusals_total": limit_reasons(listener.refused_total),
        "tidegate_protocol_faults_total": limit_reasons(listener.protocol_faults_total),
        "tidegate_connections_closed_total": limit_reasons(listener.closed_total),
        "tidegate_stages_late": _single_value(sum(stage.late_s() > 0 for stage in parts.stages())),
        "tidegate_series": _single_value(len(parts.spool.catalog)),
        "tidegate_encoded_bytes_total": _single_value(parts.spool.segments.appended_bytes),
        "tidegate_delivery_failures_total": {name: c.failures for name, c in shippers.items()},
        "tidegate_readings_refused_total": {name: c.refused for name, c in shippers.items()},
        "tidegate_delivered_rows_total": {labels: c.rows for labels, c in lanes.items()},
        "tidegate_delivered_batches_total": {labels: c.batches for labels, c in lanes.items()},
        "tidegate_delivered_bytes_total": {labels: c.wire_bytes for labels, c in lanes.items()},
    }


def limit_reasons(by_reason: Mapping[str, float]) -> Values:
    """Values by reason, at most `REASONS_MAX` of them; the rest together.

    Those that came first keep their own, so that a counter never moves into "other".
    """
    reasons = list(by_reason)
    values: Values = {(reason,): by_reason[reason] for reason in reasons[:REASONS_MAX]}
    rest = reasons[REASONS_MAX:]
    if rest:
        values[OTHER_REASONS,] = values.get((OTHER_REASONS,), 0) + sum(by_reason[reason] for reason in rest)
    return values


def _single_value(value: float | None) -> Values:
    return {} if value is None else {(): float(value)}
