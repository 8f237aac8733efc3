"""The requests of the service and its metrics; an answer comes after the database's commit.

`openapi.json` describes the requests; `IngestApp.build` lists them.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloud_sync.codec import wire
from cloud_sync.http.requests import PlainRequest, plain_answer_json
from cloud_sync.http.responses import (
    RequestRejectedError,
    answer_internal_error,
    answer_not_found,
    answering,
    progress_to_json,
    read_epoch,
    receipt_to_json,
    require_media_type,
)
from cloud_sync.ingest.apply_queue import DrainCredit
from cloud_sync.model.errors import DeliveryError
from cloud_sync.model.records import Receipt
from cloud_sync.runtime.watchdog import find_late_stages
from cloud_sync.timescale.ledger import ClientIdempotency
from cloud_sync.timescale.row_store import ReadingSource
from cloud_sync.timescale.schema import SchemaTooNewError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request

    from cloud_sync.http.auth import RequestAuthenticator
    from cloud_sync.http.requests import RequestAdmission, RequestBody
    from cloud_sync.http.responses import RequestHandler
    from cloud_sync.ingest.apply_queue import ApplyQueue
    from cloud_sync.timescale.sink import TimescaleSink

T = TypeVar("T")

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_OUTCOMES = ("stored", "duplicates", "conflicts")
_VERSION = version("tidegate")


class IngestMetrics:
    """The instruments, each named `tidegate_ingest_*`."""

    def __init__(self, admission: RequestAdmission, queue: ApplyQueue) -> None:
        self.registry = CollectorRegistry()
        self._batches = self._counter("batches", "Batches answered with a receipt.", "status")
        self._rows = self._counter("rows", "Rows of applied batches.", "outcome")
        self.plain = self._counter("plain_rows", "Plain readings of clients.", "outcome")
        self.rejections = self._counter("rejections", "Requests answered with an error.", "error")
        self.body_bytes = self._counter("body_bytes", "Bytes of batches.")
        self.decode_seconds = self._histogram("decode", "Time to decode a batch.")
        self.apply_seconds = self._histogram("apply", "Time to apply a batch, waiting for a turn included.")
        self._gauge("requests", "Requests with a body in progress.").set_function(lambda: admission.requests)
        self._gauge("waiting", "Requests that wait for their turn at the database.").set_function(
            lambda: queue.waiting
        )
        self._gauge("buffered_bytes", "Bytes of bodies in memory.").set_function(
            lambda: admission.buffered_bytes
        )
        self.database_up = self._gauge("database_up", "1 when the database answered last, else 0.")

    def count_receipt(self, receipt: Receipt) -> None:
        """Count one answered batch, and its rows if they were applied now."""
        self._batches.labels("duplicate" if receipt.applied_before else "applied").inc()
        if not receipt.applied_before:
            for outcome in _OUTCOMES:
                self._rows.labels(outcome).inc(getattr(receipt, outcome))

    def _counter(self, name: str, description: str, *labels: str) -> Counter:
        return Counter(f"tidegate_ingest_{name}", description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str) -> Histogram:
        return Histogram(
            f"tidegate_ingest_{name}_seconds", description, registry=self.registry, buckets=_BUCKETS_S
        )

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(f"tidegate_ingest_{name}", description, registry=self.registry)


class IngestApp:
    """The service's requests, over its parts."""

    def __init__(
        self,
        sink: TimescaleSink,
        authenticator: RequestAuthenticator,
        admission: RequestAdmission,
        queue: ApplyQueue,
        wire_limits: wire.WireLimits,
    ) -> None:
        self._sink = sink
        self._authenticator = authenticator
        self._admission = admission
        self._queue = queue
        self._wire_limits = wire_limits
        self._drain_credit = DrainCredit()
        self._metrics = IngestMetrics(admission, queue)

    def build(self) -> Starlette:
        """The ASGI application."""
        openapi = json.loads((files("cloud_sync.ingest") / "openapi.json").read_bytes())
        return Starlette(
            routes=[
                Route("/v1/batches", self._answering(self._post_batch), methods=["POST"]),
                Route("/v1/readings", self._answering(self._post_readings), methods=["POST"]),
                Route("/v1/gateways", self._answering(self._get_gateways), methods=["GET"]),
                Route("/v1/gateways/{gateway_id}", self._answering(self._get_gateway), methods=["GET"]),
                Route("/openapi.json", JSONResponse(openapi), methods=["GET"]),
                Route("/healthz", self._get_health, methods=["GET"]),
                Route("/readyz", self._get_readiness, methods=["GET"]),
                Route("/metrics", self._get_metrics, methods=["GET"]),
            ],
            exception_handlers={HTTPException: answer_not_found, Exception: answer_internal_error},
        )

    async def _post_batch(self, request: Request) -> Response:
        caller = await self._authenticator.authenticate(request, "batches")
        require_media_type(request, [wire.MEDIA_TYPE])
        with self._admission.admit(caller.name, self._wait_s()) as body:
            data = await self._read_body(request, body)
            with self._metrics.decode_seconds.time():
                batch = await asyncio.to_thread(wire.decode, data, self._wire_limits)
            gateway_id = batch.range.gateway_id
            if not caller.may_act_for(gateway_id):
                message = f"the token is for {caller.name}, the batch is of {gateway_id}"
                raise RequestRejectedError(403, "other_gateway", message)
            with self._metrics.apply_seconds.time():
                receipt = await self._in_turn(gateway_id, batch.rows, lambda: self._sink.apply(batch))
        self._metrics.count_receipt(receipt)
        receipt = replace(receipt, credit=self._drain_credit.credit(time.monotonic()))
        return JSONResponse(receipt_to_json(batch.range, receipt))

    async def _post_readings(self, request: Request) -> Response:
        caller = await self._authenticator.authenticate(request, "readings")
        plain = PlainRequest(request)
        client, limits = caller.name, self._admission.limits
        with self._admission.admit(client, self._wait_s()) as body:
            data = await plain.decompress(await self._read_body(request, body), body, limits.max_plain_bytes)
            parsed = await asyncio.to_thread(plain.parse, data, max_rows=limits.max_plain_rows)

            def make_answer(receipt: Receipt) -> str:
                for outcome in _OUTCOMES:
                    self._metrics.plain.labels(outcome).inc(getattr(receipt, outcome))
                return plain_answer_json(parsed, receipt.stored, receipt.duplicates, receipt.conflicts)

            idempotency = ClientIdempotency(client, plain.key, plain.digest(data), make_answer)
            answer = await self._in_turn(
                f"client {client}",
                parsed.readings.rows,
                lambda: self._sink.store(parsed.series, parsed.readings, ReadingSource(client), idempotency),
            )
        return Response(answer, media_type="application/json")

    async def _get_gateways(self, request: Request) -> Response:
        await self._authenticator.authenticate(request, "view")
        known = await self._sink.progress()
        return JSONResponse({"gateways": [progress_to_json(each.gateway_id, each) for each in known]})

    async def _get_gateway(self, request: Request) -> Response:
        """The caller's own gateway, or any where the scope is `view`."""
        gateway_id = request.path_params["gateway_id"]
        caller = await self._authenticator.authenticate(request, "batches", "view")
        if "view" not in caller.scopes and not caller.may_act_for(gateway_id):
            raise RequestRejectedError(403, "other_gateway", f"the token is for {caller.name}")
        known = await self._sink.progress(gateway_id, read_epoch(request))
        answer = progress_to_json(gateway_id, known[0] if known else None)
        return JSONResponse(answer, headers={"Tidegate-Version": _VERSION})

    async def _get_health(self, _request: Request) -> Response:
        """Whether what waits for the database gets its turn, however slowly."""
        late = [str(stage) for stage in find_late_stages([self._queue.stage])]
        answer = {"status": "stuck", "stages": late} if late else {"status": "ok"}
        return JSONResponse(answer, 503 if late else 200)

    async def _get_readiness(self, _request: Request) -> Response:
        try:
            await self._sink.ping()
        except (DeliveryError, SchemaTooNewError) as fault:
            self._metrics.database_up.set(0)
            return RequestRejectedError(503, "database_away", str(fault)).response()
        self._metrics.database_up.set(1)
        return JSONResponse({"status": "ready"})

    async def _get_metrics(self, _request: Request) -> Response:
        return Response(
            prometheus_client.generate_latest(self._metrics.registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    async def _read_body(self, request: Request, body: RequestBody) -> bytes:
        data = await body.read_request(request)
        self._metrics.body_bytes.inc(len(data))
        return data

    async def _in_turn(self, name: str, rows: int, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` when it is its turn, and measure how fast the database is."""
        applied = 0
        async with self._queue.turn(name, rows):
            self._drain_credit.begin(time.monotonic(), self._queue.waiting_gateways)
            try:
                result = await work()
                applied = 0 if isinstance(result, Receipt) and result.applied_before else rows
            finally:
                self._drain_credit.end(name, applied, time.monotonic())
        return result

    def _wait_s(self) -> int:
        """The Retry-After of a request for which there is no room now: the time the queue needs."""
        queued_s = self._drain_credit.wait_s(self._queue.waiting_rows)
        return max(self._admission.limits.retry_after_s, queued_s)

    def _answering(self, handler: RequestHandler) -> RequestHandler:
        return answering(
            handler,
            count_rejection=lambda error: self._metrics.rejections.labels(error).inc(),
            reject_unavailable=lambda fault: RequestRejectedError(
                503, "database_away", str(fault), retry_after_s=self._admission.limits.retry_after_s
            ),
            unavailable=DeliveryError,
        )
