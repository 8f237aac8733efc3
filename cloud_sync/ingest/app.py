"""The requests of the service. It keeps nothing of its own: an answer comes after the database's commit.

POST /v1/batches          a wire batch; the answer is its receipt
POST /v1/readings         plain readings of clients that are no gateways
GET  /v1/gateways         what has been applied of every gateway
GET  /v1/gateways/{id}    of one: applied ranges, gaps, declared losses; ?epoch=UUID for one epoch
GET  /openapi.json        all of this, for programs
GET  /healthz             the process answers
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

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloud_sync import wire
from cloud_sync.database.schema import SchemaTooNewError
from cloud_sync.database.storing import Source
from cloud_sync.errors import DeliveryError, FormatError
from cloud_sync.ingest import openapi
from cloud_sync.ingest.answers import Rejection, progress_answer, receipt_answer, rejection_of
from cloud_sync.ingest.clients import PlainRequest, memory_of
from cloud_sync.ingest.fairness import Fairness
from cloud_sync.progress import late_of
from cloud_sync.records import Receipt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cloud_sync.applied import Progress
    from cloud_sync.ingest.callers import Callers
    from cloud_sync.ingest.intake import Body, Intake
    from cloud_sync.ingest.metrics import IngestMetrics
    from cloud_sync.ingest.turns import Turns
    from cloud_sync.records import Batch, Readings, Series

T = TypeVar("T")

_log = logging.getLogger(__name__)
_DISCONNECTED = 499
_VERSION = version("tidegate")


class Sink(Protocol):
    """Where batches are applied. `TimescaleSink` is the one that exists."""

    async def apply(self, batch: Batch) -> Receipt:
        """Apply a batch once in effect."""
        ...

    async def store(self, series: Sequence[Series], readings: Readings, source: Source, memory: Any) -> Any:
        """Store readings that no ledger covers, or answer from memory."""
        ...

    async def progress(self, gateway_id: str | None = None, epoch: UUID | None = None) -> list[Progress]:
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
        sink: Sink,
        callers: Callers,
        intake: Intake,
        turns: Turns,
        limits: wire.WireLimits,
        metrics: IngestMetrics,
    ) -> None:
        self._sink = sink
        self._callers = callers
        self._intake = intake
        self._turns = turns
        self._fairness = Fairness()
        self._wire_limits = limits
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """Every path with its handler."""
        return [
            Route("/v1/batches", self._answered(self.take_batch), methods=["POST"]),
            Route("/v1/readings", self._answered(self.take_readings), methods=["POST"]),
            Route("/v1/gateways", self._answered(self.tell_gateways), methods=["GET"]),
            Route("/v1/gateways/{gateway_id}", self._answered(self.tell_progress), methods=["GET"]),
            Route("/openapi.json", self.tell_openapi, methods=["GET"]),
            Route("/healthz", self.tell_health, methods=["GET"]),
            Route("/readyz", self.tell_readiness, methods=["GET"]),
            Route("/metrics", self.tell_metrics, methods=["GET"]),
        ]

    async def take_batch(self, request: Request) -> Response:
        """Apply one batch and answer with its receipt."""
        caller = self._callers.of(request, "batches")
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type != wire.MEDIA_TYPE:
            raise Rejection(415, "media_type", f"expected {wire.MEDIA_TYPE}, not {media_type or 'nothing'}")
        with self._intake.admitted(str(caller), self._wait_s()) as body:
            data = await self._read(request, body)
            with self._metrics.decode_seconds.time():
                batch = await asyncio.to_thread(wire.decode, data, self._wire_limits)
            if not caller.may_be(batch.range.gateway_id):
                message = f"the token is for {caller}, the batch is of {batch.range.gateway_id}"
                raise Rejection(403, "other_gateway", message)
            with self._metrics.apply_seconds.time():
                receipt = await self._in_turn(
                    batch.range.gateway_id, batch.rows, lambda: self._sink.apply(batch)
                )
        self._metrics.count_receipt(receipt)
        receipt = replace(receipt, credit=self._fairness.credit(time.monotonic()))
        return JSONResponse(receipt_answer(batch.range, receipt))

    async def take_readings(self, request: Request) -> Response:
        """Store plain readings and answer with what became of them."""
        caller = self._callers.of(request, "readings")
        plain = PlainRequest(request)
        client, limits = str(caller), self._intake.limits
        with self._intake.admitted(client, self._wait_s()) as body:
            data = await plain.decompress(await self._read(request, body), body, limits.plain_bytes)
            parsed = await asyncio.to_thread(plain.parse, data, max_rows=limits.plain_rows)
            memory = memory_of(plain.asked(client, data), parsed, self._metrics.count_plain)
            answer = await self._in_turn(
                f"client {client}",
                parsed.readings.rows,
                lambda: self._sink.store(parsed.series, parsed.readings, Source(client), memory),
            )
        return Response(answer, media_type="application/json")

    async def tell_gateways(self, request: Request) -> Response:
        """Answer with the applied ranges and gaps of every gateway."""
        self._callers.of(request, "view")
        known = await self._sink.progress()
        return JSONResponse({"gateways": [progress_answer(each.gateway_id, each) for each in known]})

    async def tell_progress(self, request: Request) -> Response:
        """Answer with the applied ranges and gaps of the caller's own gateway, or of any to who may view."""
        gateway_id = request.path_params["gateway_id"]
        caller = self._callers.of(request, "batches", "view")
        if caller.scope != "view" and not caller.may_be(gateway_id):
            raise Rejection(403, "other_gateway", f"the token is for {caller}")
        try:
            epoch = UUID(request.query_params["epoch"]) if "epoch" in request.query_params else None
        except ValueError as fault:
            raise Rejection(400, "bad_epoch", "epoch is no UUID") from fault
        known = await self._sink.progress(gateway_id, epoch)
        answer = progress_answer(gateway_id, known[0] if known else None)
        return JSONResponse(answer, headers={"Tidegate-Version": _VERSION})

    async def tell_openapi(self, _request: Request) -> Response:
        """Answer with the description of these requests."""
        return JSONResponse(openapi.description())

    async def tell_health(self, _request: Request) -> Response:
        """Answer whether what waits for the database gets its turn, however slowly."""
        late = late_of([self._turns.stage])
        if late:
            return JSONResponse({"status": "stuck", "stages": list(map(str, late))}, 503)
        return JSONResponse({"status": "ok"})

    async def tell_readiness(self, _request: Request) -> Response:
        """Answer whether a batch could be applied now, and why not."""
        try:
            await self._sink.ping()
        except (DeliveryError, SchemaTooNewError) as fault:
            self._metrics.database_up.set(0)
            return Rejection(503, "database_away", str(fault)).response()
        self._metrics.database_up.set(1)
        return JSONResponse({"status": "ready"})

    async def tell_metrics(self, _request: Request) -> Response:
        """Answer with the metrics."""
        return Response(self._metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def _read(self, request: Request, body: Body) -> bytes:
        declared = request.headers.get("Content-Length")
        pieces = (piece async for piece in request.stream() if piece)
        data = await body.read(pieces, int(declared) if declared is not None else None)
        self._metrics.body_bytes.inc(len(data))
        return data

    async def _in_turn(self, name: str, rows: int, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work` when it is its turn, and learn from it how fast the database is."""
        applied = 0
        async with self._turns.turn(name, rows):
            self._fairness.begin(time.monotonic(), self._turns.crowd)
            try:
                result = await work()
                applied = 0 if isinstance(result, Receipt) and result.applied_before else rows
            finally:
                self._fairness.end(name, applied, time.monotonic())
        return result

    def _wait_s(self) -> int:
        """What a request is asked to wait for which there is no room now: the queue's own time."""
        return max(self._intake.limits.retry_after_s, self._fairness.wait_s(self._turns.waiting_rows))

    def _answered(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler whose every fault becomes an answer, counted by its code."""

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Rejection as fault:
                rejection = fault
            except FormatError as fault:
                rejection = Rejection(400, fault.reason, str(fault))
            except DeliveryError as fault:
                rejection = rejection_of(fault, self._intake.limits.retry_after_s)
                _log.warning("%s %s: %s", request.method, request.url.path, fault)
            except ClientDisconnect:
                self._metrics.count_rejection("disconnected")
                return Response(status_code=_DISCONNECTED)
            self._metrics.count_rejection(rejection.error)
            return rejection.response()

        return answer


def create_app(parts: IngestApp) -> Starlette:
    """The ASGI application."""
    return Starlette(
        routes=parts.routes(), exception_handlers={HTTPException: _no_route, Exception: _internal}
    )


async def _no_route(_request: Request, fault: Exception) -> Response:
    assert isinstance(fault, HTTPException)
    return Rejection(fault.status_code, "no_such_request", str(fault.detail)).response()


async def _internal(_request: Request, fault: Exception) -> Response:
    """Answer for a fault of ours; Starlette raises it again, so that it is logged with its traceback."""
    return Rejection(500, "internal", f"a fault of this service: {type(fault).__name__}").response()
