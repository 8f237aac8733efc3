"""The requests of the service. It keeps no state of its own: an answer comes after the database's commit.

POST /v1/batches          a wire batch; the answer is its receipt
GET  /v1/gateways/{id}    applied ranges and gaps; ?epoch=UUID for one epoch
GET  /healthz             the process answers
GET  /readyz              the database answers; 503 with the reason when it does not
GET  /metrics             for Prometheus
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol
from uuid import UUID

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloud_sync import wire
from cloud_sync.database.schema import SchemaTooNewError
from cloud_sync.errors import DeliveryError, FormatError
from cloud_sync.ingest.answers import Rejection, progress_answer, receipt_answer, rejection_of
from cloud_sync.ingest.tokens import TokensFault

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cloud_sync.database.ledger import Progress
    from cloud_sync.ingest.intake import Intake
    from cloud_sync.ingest.metrics import IngestMetrics
    from cloud_sync.ingest.tokens import TokenFile
    from cloud_sync.records import Batch, Receipt

_log = logging.getLogger(__name__)
_DISCONNECTED = 499


class Sink(Protocol):
    """Where batches are applied. `TimescaleSink` is the one that exists."""

    async def apply(self, batch: Batch) -> Receipt:
        """Apply a batch once in effect."""
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
        self, sink: Sink, tokens: TokenFile, intake: Intake, limits: wire.WireLimits, metrics: IngestMetrics
    ) -> None:
        self._sink = sink
        self._tokens = tokens
        self._intake = intake
        self._wire_limits = limits
        self._metrics = metrics

    def routes(self) -> list[Route]:
        """Every path with its handler."""
        return [
            Route("/v1/batches", self._answered(self.take_batch), methods=["POST"]),
            Route("/v1/gateways/{gateway_id}", self._answered(self.tell_progress), methods=["GET"]),
            Route("/healthz", self.tell_health, methods=["GET"]),
            Route("/readyz", self.tell_readiness, methods=["GET"]),
            Route("/metrics", self.tell_metrics, methods=["GET"]),
        ]

    async def take_batch(self, request: Request) -> Response:
        """Apply one batch and answer with its receipt."""
        gateway_id = self._authenticated(request)
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type != wire.MEDIA_TYPE:
            raise Rejection(415, "media_type", f"expected {wire.MEDIA_TYPE}, not {media_type or 'nothing'}")
        declared = request.headers.get("Content-Length")
        with self._intake.admitted() as body:
            pieces = (piece async for piece in request.stream() if piece)
            data = await body.read(pieces, int(declared) if declared is not None else None)
            self._metrics.body_bytes.inc(len(data))
            with self._metrics.decode_seconds.time():
                batch = await asyncio.to_thread(wire.decode, data, self._wire_limits)
            if batch.range.gateway_id != gateway_id:
                message = f"the token is for {gateway_id}, the batch is of {batch.range.gateway_id}"
                raise Rejection(403, "other_gateway", message)
            with self._metrics.apply_seconds.time():
                receipt = await self._sink.apply(batch)
        self._metrics.count_receipt(receipt)
        return JSONResponse(receipt_answer(batch.range, receipt))

    async def tell_progress(self, request: Request) -> Response:
        """Answer with the applied ranges and gaps of the token's own gateway."""
        gateway_id = request.path_params["gateway_id"]
        owner = self._authenticated(request)
        if gateway_id != owner:
            raise Rejection(403, "other_gateway", f"the token is for {owner}")
        try:
            epoch = UUID(request.query_params["epoch"]) if "epoch" in request.query_params else None
        except ValueError as fault:
            raise Rejection(400, "bad_epoch", "epoch is no UUID") from fault
        known = await self._sink.progress(gateway_id, epoch)
        return JSONResponse(progress_answer(gateway_id, known[0] if known else None))

    async def tell_health(self, _request: Request) -> Response:
        """Answer that the process lives."""
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

    def _authenticated(self, request: Request) -> str:
        """The gateway whose token the request carries."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Rejection(401, "no_token", "expected the header Authorization: Bearer TOKEN")
        try:
            self._tokens.refresh()
        except TokensFault as fault:
            _log.error("%s; the tokens read before stay in force", fault)
        gateway_id = self._tokens.gateway_of(token.strip())
        if gateway_id is None:
            raise Rejection(401, "unknown_token", "no gateway has this token")
        return gateway_id

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
