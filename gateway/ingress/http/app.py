"""The requests of the `http` ingress. An answer comes after the commit, or says that there was none.

POST /v1/readings         plain readings: JSON, NDJSON, line protocol, SenML
POST /v1/batches          a wire batch of another gateway; the answer is its receipt
GET  /v1/gateways         what has been taken of every gateway that delivers here
GET  /v1/gateways/{id}    of one; ?epoch=UUID for one epoch
GET  /healthz             the process answers

Requests, answers and codes are those of the ingest service (docs/wire-format.md), so that tiers chain.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloud_sync import wire
from cloud_sync.applied import RangeConflict
from cloud_sync.errors import FormatError, Refused, RetryLater
from cloud_sync.ingest.answers import Rejection, progress_answer, receipt_answer
from cloud_sync.ingest.clients import PlainRequest
from gateway.ingress.http.readings import MEDIA_TYPES
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cloud_sync.ingest.intake import Body, Intake
    from cloud_sync.records import Batch
    from gateway.ingress.committer import Committer
    from gateway.ingress.http.batches import BatchIntake
    from gateway.ingress.http.callers import Callers
    from gateway.ingress.http.readings import ReadingIntake

T = TypeVar("T")

_log = logging.getLogger(__name__)
_DISCONNECTED = 499
_INLINE_BYTES = 16_384


@dataclass(slots=True)
class HttpCounters:
    """What has happened since start; `rejections` by code, of which there are few."""

    requests: int = 0
    batches: int = 0
    batches_again: int = 0
    rejections: Counter[str] = field(default_factory=Counter)


class HttpApp:
    """The requests, over the parts that take them."""

    def __init__(
        self,
        gateway_id: str,
        *,
        callers: Callers,
        intake: Intake,
        committer: Committer,
        batches: BatchIntake,
        readings: ReadingIntake,
        limits: wire.WireLimits,
        answer_within_s: float,
    ) -> None:
        self._gateway_id = gateway_id
        self._callers = callers
        self._intake = intake
        self._committer = committer
        self._batches = batches
        self._readings = readings
        self._wire_limits = limits
        self._answer_within_s = answer_within_s
        self.closed = ""
        self.counters = HttpCounters()

    def starlette(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/readings", self._answered(self.take_readings), methods=["POST"]),
            Route("/v1/batches", self._answered(self.take_batch), methods=["POST"]),
            Route("/v1/gateways", self._answered(self.tell_gateways), methods=["GET"]),
            Route("/v1/gateways/{gateway_id}", self._answered(self.tell_progress), methods=["GET"]),
            Route("/healthz", self.tell_health, methods=["GET"]),
        ]
        return Starlette(
            routes=routes, exception_handlers={HTTPException: self._no_route, Exception: self._internal}
        )

    async def take_readings(self, request: Request) -> Response:
        """Store plain readings and answer with what became of them."""
        caller = await self._callers.of(request, "readings")
        plain = PlainRequest(request, MEDIA_TYPES)
        self._require_open()
        with self._intake.admitted(caller.name) as body:
            raw = await self._read(request, body)
            data = await plain.decompress(raw, body, self._intake.limits.plain_bytes)
            answer = await self._in_time(self._readings.take(plain, data, caller))
        return Response(answer, media_type="application/json")

    async def take_batch(self, request: Request) -> Response:
        """Store one batch of another gateway and answer with its receipt."""
        caller = await self._callers.of(request, "batches")
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type != wire.MEDIA_TYPE:
            raise Rejection(415, "media_type", f"expected {wire.MEDIA_TYPE}, not {media_type or 'nothing'}")
        self._require_open()
        with self._intake.admitted(caller.name) as body:
            batch = await self._decoded(await self._read(request, body))
            gateway_id = batch.range.gateway_id
            if gateway_id == self._gateway_id:
                raise Rejection(403, "own_gateway", f"this is {gateway_id} itself; a gateway_id names one")
            if not caller.may_be(gateway_id):
                message = f"the credentials are of {caller.name}, the batch is of {gateway_id}"
                raise Rejection(403, "other_gateway", message)
            others = [s.sensor_id for s in batch.series if caller.fault_of(s) is not None]
            if others:
                message = f"{caller.name} may not bring readings of {others[0]}"
                raise Rejection(403, "other_device", message)
            receipt = await self._in_time(self._batches.take(batch))
        self.counters.batches += 1
        self.counters.batches_again += receipt.applied_before
        return JSONResponse(receipt_answer(batch.range, receipt))

    async def tell_gateways(self, request: Request) -> Response:
        """Answer with the ranges and gaps of every gateway that delivers here."""
        await self._callers.of(request, "view")
        ledger = self._batches.ledger
        names = await ledger.gateways()
        return JSONResponse(
            {"gateways": [progress_answer(name, await ledger.progress(name)) for name in names]}
        )

    async def tell_progress(self, request: Request) -> Response:
        """Answer with the ranges and gaps of the caller's own gateway, or of any to who may view."""
        gateway_id = request.path_params["gateway_id"]
        caller = await self._callers.of(request, "batches", "view")
        if "view" not in caller.scopes and not caller.may_be(gateway_id):
            raise Rejection(403, "other_gateway", f"the credentials are of {caller.name}")
        try:
            epoch = UUID(request.query_params["epoch"]) if "epoch" in request.query_params else None
        except ValueError as fault:
            raise Rejection(400, "bad_epoch", "epoch is no UUID") from fault
        known = await self._batches.ledger.progress(gateway_id, epoch)
        return JSONResponse(progress_answer(gateway_id, known))

    async def tell_health(self, _request: Request) -> Response:
        """Answer that the process lives."""
        return JSONResponse({"status": "ok"})

    def _require_open(self) -> None:
        """Turn a request away before its body when it could not be committed soon: its sender keeps it."""
        why = self.closed
        if not why and self._committer.counters.holding_reason:
            why = f"the spool cannot be written: {self._committer.counters.holding_reason}"
        if why:
            raise self._later("holding", why)

    async def _read(self, request: Request, body: Body) -> bytes:
        declared = request.headers.get("Content-Length")
        pieces = (piece async for piece in request.stream() if piece)
        return await body.read(pieces, int(declared) if declared is not None else None)

    async def _decoded(self, data: bytes) -> Batch:
        if len(data) <= _INLINE_BYTES:
            return wire.decode(data, self._wire_limits)
        return await asyncio.to_thread(wire.decode, data, self._wire_limits)

    async def _in_time(self, work: Awaitable[T]) -> T:
        """Wait for a commit, but not without end. What was handed over is committed all the same."""
        try:
            async with asyncio.timeout(self._answer_within_s):
                return await work
        except TimeoutError as fault:
            why = self._committer.counters.holding_reason or "the commit takes too long"
            raise self._later("holding", why) from fault

    def _later(self, error: str, message: str) -> Rejection:
        return Rejection(503, error, message, retry_after_s=self._intake.limits.retry_after_s)

    def _answered(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """A handler whose every fault becomes an answer, counted by its code."""

        async def answer(request: Request) -> Response:
            self.counters.requests += 1
            try:
                return await handler(request)
            except ClientDisconnect:
                self.counters.rejections["disconnected"] += 1
                return Response(status_code=_DISCONNECTED)
            except (Rejection, FormatError, Refused, RetryLater, SpoolError) as fault:
                rejection = self._rejection_of(fault)
            self.counters.rejections[rejection.error] += 1
            return rejection.response()

        return answer

    def _rejection_of(self, fault: Exception) -> Rejection:
        """How a fault is told to a sender."""
        match fault:
            case Rejection():
                return fault
            case FormatError():
                return Rejection(400, fault.reason, str(fault))
            case RangeConflict():
                return Rejection(409, fault.reason, str(fault))
            case Refused():
                return Rejection(422, fault.reason, str(fault))
            case RetryLater():
                return self._later("no_room", str(fault))
            case _:
                _log.warning("http: %s", fault)
                return self._later("spool", str(fault))

    async def _no_route(self, _request: Request, fault: Exception) -> Response:
        assert isinstance(fault, HTTPException)
        return Rejection(fault.status_code, "no_such_request", str(fault.detail)).response()

    async def _internal(self, _request: Request, fault: Exception) -> Response:
        """Answer for a fault of ours; Starlette raises it again, so that it is logged with its traceback."""
        return Rejection(500, "internal", f"a fault of this gateway: {type(fault).__name__}").response()
