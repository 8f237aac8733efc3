"""The requests of the service and its metrics; an answer comes after the database's commit.

POST /v1/batches          a wire batch; the answer is its receipt
POST /v1/readings         plain readings of clients that are no gateways
GET  /v1/gateways         what has been applied of every gateway
GET  /v1/gateways/{id}    of one: applied ranges, gaps, declared losses; ?epoch=UUID for one epoch
GET  /openapi.json        the OpenAPI description
GET  /healthz             batches get their turn
GET  /readyz              the database answers; 503 with the reason when it does not
GET  /metrics             for Prometheus
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from uuid import UUID

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloud_sync.codec import wire
from cloud_sync.http.requests import PlainRequest, build_idempotency
from cloud_sync.http.responses import (
    RequestRejectedError,
    progress_to_json,
    receipt_to_json,
    rejection_from_error,
)
from cloud_sync.ingest import openapi
from cloud_sync.ingest.apply_queue import DrainCredit
from cloud_sync.model.errors import DeliveryError, FormatError
from cloud_sync.model.records import Receipt
from cloud_sync.runtime.watchdog import find_late_stages
from cloud_sync.timescale.row_store import ReadingSource
from cloud_sync.timescale.schema import SchemaTooNewError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cloud_sync.http.auth import RequestAuthenticator
    from cloud_sync.http.requests import RequestAdmission, RequestBody
    from cloud_sync.ingest.apply_queue import ApplyQueue
    from cloud_sync.model.ledger_rules import GatewayProgress
    from cloud_sync.model.records import Batch, Readings, Series

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class IngestMetrics:
    """The instruments, each named `tidegate_ingest_*`."""

    def __init__(self, intake: RequestAdmission, turns: ApplyQueue) -> None:
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
        return Histogram(f"tidegate_ingest_{what}_seconds", words, registry=self.registry, buckets=_BUCKETS_S)

    def _gauge(self, what: str, words: str) -> Gauge:
        return Gauge(f"tidegate_ingest_{what}", words, registry=self.registry)


T = TypeVar("T")

_log = logging.getLogger(__name__)
_DISCONNECTED = 499
_VERSION = version("tidegate")


class BatchSink(Protocol):
    """Where batches are applied. `TimescaleSink` is the one that exists."""

    async def apply(self, batch: Batch) -> Receipt:
        """Apply a batch once in effect."""
        ...

    async def store(
        self, series: Sequence[Series], readings: Readings, source: ReadingSource, memory: Any
    ) -> Any:
        """Store readings that no ledger covers, or answer from memory."""
        ...

    async def progress(
        self, gateway_id: str | None = None, epoch: UUID | None = None
    ) -> list[GatewayProgress]:
        """What has been applied of a gateway, or of all."""
        ...

    async def ping(self) -> None:
        """Raise when a batch could not be applied now."""
        ...


class IngestApp:
    """The service's requests, over its parts."""

    def __init__(
        self,
        *,
        sink: BatchSink,
        callers: RequestAuthenticator,
        intake: RequestAdmission,
        turns: ApplyQueue,
        limits: wire.WireLimits,
        metrics: IngestMetrics,
    ) -> None:
        self._sink = sink
        self._callers = callers
        self._intake = intake
        self._turns = turns
        self._drain_credit = DrainCredit()
        self._wire_limits = limits
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """Every path with its handler."""
        return [
            Route("/v1/batches", self._answered(self.post_batch), methods=["POST"]),
            Route("/v1/readings", self._answered(self.post_readings), methods=["POST"]),
            Route("/v1/gateways", self._answered(self.get_gateways), methods=["GET"]),
            Route("/v1/gateways/{gateway_id}", self._answered(self.get_gateway_progress), methods=["GET"]),
            Route("/openapi.json", self.get_openapi, methods=["GET"]),
            Route("/healthz", self.get_health, methods=["GET"]),
            Route("/readyz", self.get_readiness, methods=["GET"]),
            Route("/metrics", self.get_metrics, methods=["GET"]),
        ]

    async def post_batch(self, request: Request) -> Response:
        """Apply one batch and answer with its receipt."""
        caller = self._callers.authenticate(request, "batches")
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type != wire.MEDIA_TYPE:
            raise RequestRejectedError(
                415, "media_type", f"expected {wire.MEDIA_TYPE}, not {media_type or 'nothing'}"
            )
        with self._intake.admitted(str(caller), self._wait_s()) as body:
            data = await self._read(request, body)
            with self._metrics.decode_seconds.time():
                batch = await asyncio.to_thread(wire.decode, data, self._wire_limits)
            if not caller.may_act_for(batch.range.gateway_id):
                message = f"the token is for {caller}, the batch is of {batch.range.gateway_id}"
                raise RequestRejectedError(403, "other_gateway", message)
            with self._metrics.apply_seconds.time():
                receipt = await self._in_turn(
                    batch.range.gateway_id, batch.rows, lambda: self._sink.apply(batch)
                )
        self._metrics.count_receipt(receipt)
        receipt = replace(receipt, credit=self._drain_credit.credit(time.monotonic()))
        return JSONResponse(receipt_to_json(batch.range, receipt))

    async def post_readings(self, request: Request) -> Response:
        """Store plain readings and answer with what became of them."""
        caller = self._callers.authenticate(request, "readings")
        plain = PlainRequest(request)
        client, limits = str(caller), self._intake.limits
        with self._intake.admitted(client, self._wait_s()) as body:
            data = await plain.decompress(await self._read(request, body), body, limits.plain_bytes)
            parsed = await asyncio.to_thread(plain.parse, data, max_rows=limits.plain_rows)
            memory = build_idempotency(plain.asked(client, data), parsed, self._metrics.count_plain)
            answer = await self._in_turn(
                f"client {client}",
                parsed.readings.rows,
                lambda: self._sink.store(parsed.series, parsed.readings, ReadingSource(client), memory),
            )
        return Response(answer, media_type="application/json")

    async def get_gateways(self, request: Request) -> Response:
        """Answer with the applied ranges and gaps of every gateway."""
        self._callers.authenticate(request, "view")
        known = await self._sink.progress()
        return JSONResponse({"gateways": [progress_to_json(each.gateway_id, each) for each in known]})

    async def get_gateway_progress(self, request: Request) -> Response:
        """Answer with the applied ranges and gaps of the caller's own gateway, or of any to who may view."""
        gateway_id = request.path_params["gateway_id"]
        caller = self._callers.authenticate(request, "batches", "view")
        if caller.scope != "view" and not caller.may_act_for(gateway_id):
            raise RequestRejectedError(403, "other_gateway", f"the token is for {caller}")
        try:
            epoch = UUID(request.query_params["epoch"]) if "epoch" in request.query_params else None
        except ValueError as fault:
            raise RequestRejectedError(400, "bad_epoch", "epoch is no UUID") from fault
        known = await self._sink.progress(gateway_id, epoch)
        answer = progress_to_json(gateway_id, known[0] if known else None)
        return JSONResponse(answer, headers={"Tidegate-Version": _VERSION})

    async def get_openapi(self, _request: Request) -> Response:
        """Answer with the description of these requests."""
        return JSONResponse(openapi.build_openapi())

    async def get_health(self, _request: Request) -> Response:
        """Answer whether what waits for the database gets its turn, however slowly."""
        late = find_late_stages([self._turns.stage])
        if late:
            return JSONResponse({"status": "stuck", "stages": list(map(str, late))}, 503)
        return JSONResponse({"status": "ok"})

    async def get_readiness(self, _request: Request) -> Response:
        """Answer whether a batch could be applied now, and why not."""
        try:
            await self._sink.ping()
        except (DeliveryError, SchemaTooNewError) as fault:
            self._metrics.database_up.set(0)
            return RequestRejectedError(503, "database_away", str(fault)).response()
        self._metrics.database_up.set(1)
        return JSONResponse({"status": "ready"})

    async def get_metrics(self, _request: Request) -> Response:
        """Answer with the metrics."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def _read(self, request: Request, body: RequestBody) -> bytes:
        declared = request.headers.get("Content-Length")
        pieces = (piece async for piece in request.stream() if piece)
        data = await body.read(pieces, int(declared) if declared is not None else None)
        self._metrics.body_bytes.inc(len(data))
        return data

    async def _in_turn(self, name: str, rows: int, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` when it is its turn, and learn from it how fast the database is."""
        applied = 0
        async with self._turns.turn(name, rows):
            self._drain_credit.begin(time.monotonic(), self._turns.crowd)
            try:
                result = await work()
                applied = 0 if isinstance(result, Receipt) and result.applied_before else rows
            finally:
                self._drain_credit.end(name, applied, time.monotonic())
        return result

    def _wait_s(self) -> int:
        """What a request is asked to wait for which there is no room now: the queue's own time."""
        return max(self._intake.limits.retry_after_s, self._drain_credit.wait_s(self._turns.waiting_rows))

    def _answered(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler whose every fault becomes an answer, counted by its code."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestRejectedError as fault:
                rejection = fault
            except FormatError as fault:
                rejection = RequestRejectedError(400, fault.reason, str(fault))
            except DeliveryError as fault:
                rejection = rejection_from_error(fault, self._intake.limits.retry_after_s)
                _log.warning("%s %s: %s", request.method, request.url.path, fault)
            except ClientDisconnect:
                self._metrics.count_rejection("disconnected")
                return Response(status_code=_DISCONNECTED)
            self._metrics.count_rejection(rejection.error)
            return rejection.response()

        return answer


def build_app(parts: IngestApp) -> Starlette:
    """The ASGI application."""
    return Starlette(
        routes=parts.routes(),
        exception_handlers={HTTPException: _answer_not_found, Exception: _answer_internal_error},
    )


async def _answer_not_found(_request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    return RequestRejectedError(fault.status_code, "no_such_request", str(fault.detail)).response()


async def _answer_internal_error(_request: Request, fault: Exception) -> Response:
    """Answer for a fault of ours; Starlette raises it again, so that it is logged with its traceback."""
    return RequestRejectedError(
        500, "internal", f"a fault of this service: {type(fault).__name__}"
    ).response()
