"""What the service counts, for Prometheus. One registry a service."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from cloud_sync.ingest.intake import Intake
    from cloud_sync.ingest.turns import Turns
    from cloud_sync.records import Receipt

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class IngestMetrics:
    """The instruments, each named `tidegate_ingest_*`."""

    def __init__(self, intake: Intake, turns: Turns) -> None:
        self.registry = CollectorRegistry()
        self._batches = Counter(
            "tidegate_ingest_batches", "Batches answered with a receipt.", ["status"], registry=self.registry
        )
        self._rows = Counter(
            "tidegate_ingest_rows", "Rows of applied batches.", ["outcome"], registry=self.registry
        )
        self._plain = Counter(
            "tidegate_ingest_plain_rows", "Plain readings of clients.", ["outcome"], registry=self.registry
        )
        self._rejections = Counter(
            "tidegate_ingest_rejections",
            "Requests answered with an error.",
            ["error"],
            registry=self.registry,
        )
        self.body_bytes = Counter("tidegate_ingest_body_bytes", "Bytes of batches.", registry=self.registry)
        self.decode_seconds = self._histogram("decode", "Time to decode a batch.")
        self.apply_seconds = self._histogram("apply", "Time to apply a batch, waiting for a turn included.")
        self._gauge("requests", "Requests with a body in progress.").set_function(lambda: intake.requests)
        self._gauge("waiting", "Requests that wait for their turn at the database.").set_function(
            lambda: turns.waiting
        )
        self._gauge("buffered_bytes", "Bytes of bodies in memory.").set_function(
            lambda: intake.buffered_bytes
        )
        self.database_up = self._gauge("database_up", "1 when the database answered last, else 0.")

    def count_receipt(self, receipt: Receipt) -> None:
        """Count one answered batch, and its rows if they were applied now."""
        self._batches.labels("duplicate" if receipt.applied_before else "applied").inc()
        if not receipt.applied_before:
            for outcome in ("stored", "duplicates", "conflicts"):
                self._rows.labels(outcome).inc(getattr(receipt, outcome))

    def count_plain(self, receipt: Receipt) -> None:
        """Count the readings of one client's request."""
        for outcome in ("stored", "duplicates", "conflicts"):
            self._plain.labels(outcome).inc(getattr(receipt, outcome))

    def count_rejection(self, error: str) -> None:
        """Count one request answered with an error code."""
        self._rejections.labels(error).inc()

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _histogram(self, what: str, words: str) -> Histogram:
        return Histogram(f"tidegate_ingest_{what}_seconds", words, registry=self.registry, buckets=_SECONDS)

    def _gauge(self, what: str, words: str) -> Gauge:
        return Gauge(f"tidegate_ingest_{what}", words, registry=self.registry)
