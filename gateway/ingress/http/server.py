"""The `http` ingress: requests, and the server as a pausable source. Answers follow the commit.

POST /v1/readings         plain readings: JSON, NDJSON, line protocol, SenML
POST /v1/batches          a wire batch of another gateway; the answer is its receipt
GET  /v1/gateways         progress of every gateway that delivers here
GET  /v1/gateways/{id}    progress of one; ?epoch=UUID for one epoch
GET  /healthz             the process answers

Requests, answers and codes are those of the ingest service (docs/wire-format.md), so that tiers chain.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import inspect
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cloud_sync.codec import wire
from cloud_sync.http.auth import Caller, allow_any_sensor, client_certificate
from cloud_sync.http.requests import PlainRequest
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
from cloud_sync.http.tokens import SCOPES
from cloud_sync.http.uvicorn_server import (
    CannotStartError,
    HeadTimeoutProtocol,
    UvicornServer,
    bind_http_sockets,
)
from gateway.auth.authenticator import AnonymousAuthenticator, Credentials, Identity
from gateway.ingress.http import HttpStatus
from gateway.ingress.http.readings import MEDIA_TYPES
from gateway.mqtt.codec.packets import ReasonCode
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Sequence

    from starlette.requests import Request

    from cloud_sync.http.auth import RequestAuthenticator
    from cloud_sync.http.requests import RequestAdmission
    from cloud_sync.http.responses import RequestHandler
    from cloud_sync.http.tokens import Scope
    from cloud_sync.runtime.watchdog import StageProgress
    from cloud_sync.runtime.watched_file import CertReloader
    from gateway.auth.authenticator import Authenticator
    from gateway.ingress.committer import Committer
    from gateway.ingress.http.batches import BatchReceiver
    from gateway.ingress.http.readings import ReadingReceiver

T = TypeVar("T")

_INLINE_DECODE_MAX_BYTES = 16_384
_RATE_LIMITED_RETRY_S = 10
_ANONYMOUS_NAME = "anonymous"


async def identify_device(authenticator: Authenticator, request: Request, header: str | None) -> Caller:
    """Who sends a request without a token, as the MQTT listener knows devices: by password or certificate.

    A device sends readings of its own sensor_id only (`publish_as`), as readings and in batches.
    """
    name, password = (None, None) if header is None else _parse_basic_credentials(header)
    address = request.client.host if request.client else ""
    answer = authenticator.authenticate(
        Credentials(name or _ANONYMOUS_NAME, name, password, client_certificate(request), address)
    )
    verdict = await answer if inspect.isawaitable(answer) else answer
    if not isinstance(verdict, Identity):
        if verdict.reason_code == ReasonCode.CONNECTION_RATE_EXCEEDED:
            message = "wrong passwords too often"
            raise RequestRejectedError(429, "guessing", message, retry_after_s=_RATE_LIMITED_RETRY_S)
        message = "a token, or a name and password that are known, or a certificate is needed"
        raise RequestRejectedError(401, "no_token", message)
    if isinstance(authenticator, AnonymousAuthenticator):
        return Caller(verdict.name, SCOPES, None)
    scopes: tuple[Scope, ...] = ("readings",)
    if verdict.client_id_scope:  # a named device may send batches as well; an anonymous one is no gateway
        scopes = ("batches", "readings")
    allow = verdict.may_publish_sensor or allow_any_sensor
    return Caller(verdict.name, scopes, frozenset({verdict.name}), allow)


def _parse_basic_credentials(header: str) -> tuple[str, bytes]:
    """The name and password of a Basic header (RFC 7617)."""
    scheme, _, secret = header.partition(" ")
    message = "expected Authorization: Bearer TOKEN, or Basic with a name and password"
    if scheme.lower() == "basic":
        message = "the Basic credentials cannot be read"
        try:
            name, colon, password = base64.b64decode(secret.strip(), validate=True).partition(b":")
            if colon:
                return name.decode(), password
        except (binascii.Error, UnicodeDecodeError):
            pass
    raise RequestRejectedError(401, "no_token", message)


@dataclass(kw_only=True)
class HttpApp:
    """The requests, over the parts that store them. While `closed` has a reason, bodies are rejected."""

    gateway_id: str
    authenticator: RequestAuthenticator
    admission: RequestAdmission
    committer: Committer
    batches: BatchReceiver
    readings: ReadingReceiver
    limits: wire.WireLimits
    answer_within_s: float
    closed: str = ""
    counters: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)

    def build(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/readings", self._answering(self._post_readings), methods=["POST"]),
            Route("/v1/batches", self._answering(self._post_batch), methods=["POST"]),
            Route("/v1/gateways", self._answering(self._get_gateways), methods=["GET"]),
            Route("/v1/gateways/{gateway_id}", self._answering(self._get_gateway), methods=["GET"]),
            Route("/healthz", self._get_health, methods=["GET"]),
        ]
        return Starlette(
            routes=routes,
            exception_handlers={HTTPException: answer_not_found, Exception: answer_internal_error},
        )

    async def _post_readings(self, request: Request) -> Response:
        caller = await self.authenticator.authenticate(request, "readings")
        plain = PlainRequest(request, MEDIA_TYPES)
        self._require_open()
        with self.admission.admit(caller.name) as body:
            raw = await body.read_request(request)
            data = await plain.decompress(raw, body, self.admission.limits.max_plain_bytes)
            answer = await self._in_time(self.readings.store(plain, data, caller))
        return Response(answer, media_type="application/json")

    async def _post_batch(self, request: Request) -> Response:
        caller = await self.authenticator.authenticate(request, "batches")
        require_media_type(request, [wire.MEDIA_TYPE])
        self._require_open()
        with self.admission.admit(caller.name) as body:
            data, decode = await body.read_request(request), partial(wire.decode, limits=self.limits)
            is_small = len(data) <= _INLINE_DECODE_MAX_BYTES
            batch = decode(data) if is_small else await asyncio.to_thread(decode, data)
            gateway_id = batch.range.gateway_id
            if gateway_id == self.gateway_id:
                raise RequestRejectedError(
                    403, "own_gateway", f"this is {gateway_id} itself; a gateway_id names one"
                )
            if not caller.may_act_for(gateway_id):
                message = f"the credentials are of {caller.name}, the batch is of {gateway_id}"
                raise RequestRejectedError(403, "other_gateway", message)
            others = [s.sensor_id for s in batch.series if not caller.may_publish_sensor(s.sensor_id)]
            if others:
                message = f"{caller.name} may not send readings of {others[0]}"
                raise RequestRejectedError(403, "other_device", message)
            receipt = await self._in_time(self.batches.store(batch))
        self.counters["batches"] += 1
        self.counters["batches_again"] += receipt.applied_before
        return JSONResponse(receipt_to_json(batch.range, receipt))

    async def _get_gateways(self, request: Request) -> Response:
        await self.authenticator.authenticate(request, "view")
        ledger = self.batches.ledger
        names = await ledger.gateways()
        return JSONResponse(
            {"gateways": [progress_to_json(name, await ledger.progress(name)) for name in names]}
        )

    async def _get_gateway(self, request: Request) -> Response:
        """The caller's own gateway, or any where the scope is `view`."""
        gateway_id = request.path_params["gateway_id"]
        caller = await self.authenticator.authenticate(request, "batches", "view")
        if "view" not in caller.scopes and not caller.may_act_for(gateway_id):
            raise RequestRejectedError(403, "other_gateway", f"the credentials are of {caller.name}")
        progress = await self.batches.ledger.progress(gateway_id, read_epoch(request))
        return JSONResponse(progress_to_json(gateway_id, progress))

    async def _get_health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    def _require_open(self) -> None:
        """Reject a request before its body when it could not be committed soon."""
        why = self.closed
        if not why and self.committer.counters.holding_reason:
            why = f"the spool cannot be written: {self.committer.counters.holding_reason}"
        if why:
            raise self._later("holding", why)

    async def _in_time(self, work: Awaitable[T]) -> T:
        """Wait for a commit up to a limit; what was submitted is committed all the same."""
        try:
            async with asyncio.timeout(self.answer_within_s):
                return await work
        except TimeoutError as fault:
            why = self.committer.counters.holding_reason or "the commit takes too long"
            raise self._later("holding", why) from fault

    def _later(self, error: str, message: str) -> RequestRejectedError:
        return RequestRejectedError(503, error, message, retry_after_s=self.admission.limits.retry_after_s)

    def _answering(self, handler: RequestHandler) -> RequestHandler:
        def reject_unavailable(fault: Exception) -> RequestRejectedError:
            return self._later("spool" if isinstance(fault, SpoolError) else "no_room", str(fault))

        async def count_and_handle(request: Request) -> Response:
            self.counters["requests"] += 1
            return await handler(request)

        return answering(
            count_and_handle,
            count_rejection=lambda error: self.rejections.update([error]),
            reject_unavailable=reject_unavailable,
            unavailable=SpoolError,
        )


_KEEP_ALIVE_S = 75


@dataclass(frozen=True, slots=True)
class HttpServerOptions:
    """Without `tls` requests are not encrypted."""

    host: str
    port: int
    max_connections: int
    tls: CertReloader | None = None


class HttpSource:
    """A `Source`: the server."""

    kind = name = "http"
    stages: Sequence[StageProgress] = ()

    def __init__(self, options: HttpServerOptions, app: HttpApp, *, stop_within_s: float) -> None:
        self._options = options
        self._app = app
        self._stop_within_s = stop_within_s
        self._sockets: list[socket.socket] = []
        self._server: UvicornServer | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port in use."""
        return int(self._sockets[0].getsockname()[1])

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Bind and serve."""
        options, tls = self._options, self._options.tls
        try:
            self._sockets = bind_http_sockets(
                options.host, options.port, "ingress.http.host, ingress.http.port"
            )
        except CannotStartError as fault:
            raise OSError(str(fault)) from fault
        config = uvicorn.Config(
            self._app.build(),
            http=HeadTimeoutProtocol,
            ws="none",
            ssl_context_factory=None if tls is None else lambda *_: tls.context,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=options.max_connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, int(self._stop_within_s)),
        )
        self._server = UvicornServer(config)
        self._serving = tasks.create_task(self._server.serve(sockets=self._sockets), name="http ingress")

    def pause(self) -> None:
        """Answer new requests with 503."""
        self._app.closed = "too much is waiting for its commit"

    def resume(self) -> None:
        """Accept requests again."""
        self._app.closed = ""

    def stop_reading(self) -> None:
        """Accept no more requests; those in progress are answered once they are committed."""
        self._app.closed = "the gateway is stopping"
        if self._server is not None:
            self._server.should_exit = True

    async def close(self) -> None:
        """Finish the answers and close."""
        self.stop_reading()
        if self._serving is not None:
            await asyncio.wait([self._serving])

    def status(self) -> HttpStatus:
        """What has happened since start."""
        counters = self._app.counters
        return HttpStatus(
            counters["requests"], counters["batches"], counters["batches_again"], dict(self._app.rejections)
        )
