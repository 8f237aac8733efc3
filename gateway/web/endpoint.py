"""The gateway's own HTTP endpoint: the status page, /status, /healthz, /readyz. Loopback by default.

This machine may ask for everything; others look with a token (`visitors`) and change nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING

import msgspec
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from cloud_sync.http.uvicorn_server import HeadTimeoutProtocol
from cloud_sync.runtime.watchdog import find_late_stages
from gateway.auth.tls import ReloadingServerContext, build_server_context
from gateway.payloads.decoder_registry import RuleSet
from gateway.spool.errors import SpoolError
from gateway.spool.spool import compact_open_spool
from gateway.spooltools.quarantine_retry import retry_open_spool
from gateway.status.active_config import build_config_document
from gateway.status.metrics import GatewayMetrics
from gateway.web.page import (
    SECURITY_HEADERS,
    StatusAuth,
    StatusPage,
    is_local_request,
    json_response,
    read_body,
    unauthorized_response,
)

if TYPE_CHECKING:
    import ssl

    from starlette.requests import Request

    from gateway.auth.tls import TlsFiles
    from gateway.runtime import Runtime
    from gateway.status.active_config import ActiveConfig
    from gateway.status.collector import StatusCollector

_RETRY_BODY_MAX_BYTES = 1 << 20
_CONNECTIONS_MAX = 200


class _RetryRequest(msgspec.Struct):
    numbers: list[int]


class StatusEndpoint:
    """Serves one gateway's parts."""

    def __init__(self, parts: Runtime, collector: StatusCollector, active_config: ActiveConfig) -> None:
        self._parts = parts
        self._collector = collector
        self._active_config = active_config
        settings = parts.settings.status
        self._auth = StatusAuth(settings.tokens_file, f"tidegate-{parts.settings.gateway_id}")
        self._page = StatusPage(parts, self._auth)
        self._metrics = GatewayMetrics(parts)
        app = Starlette(
            routes=[
                *self._page.routes(),
                Route("/status", self._status),
                Route("/metrics", self._serve_metrics),
                Route("/config", self._config),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/quarantine/retry", self._retry, methods=["POST"]),
                Route("/compact", self._compact, methods=["POST"]),
            ]
        )
        context = None if settings.tls_files is None else _reloading_ssl_context(settings.tls_files)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=HeadTimeoutProtocol,
                limit_concurrency=_CONNECTIONS_MAX,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,  # whoever says so could pass for this machine
                headers=list(SECURITY_HEADERS.items()),
                ssl_context_factory=None if context is None else lambda _config, _default: context,
                timeout_graceful_shutdown=1,
            )
        )
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # the program handles signals itself
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            OSError: the address cannot be bound.
        """
        listener = bind_listening_socket(self._parts.settings.status.host, self._parts.settings.status.port)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="status endpoint")

    async def stop(self) -> None:
        """Finish the requests at hand and close."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._page.close()

    async def _status(self, request: Request) -> Response:
        if not self._auth.may_view(request):
            return unauthorized_response()
        try:
            return json_response(await self._collector.status())
        except SpoolError as fault:
            return json_response({"error": "spool", "message": str(fault)}, 503)

    async def _serve_metrics(self, request: Request) -> Response:
        if not self._auth.may_view(request):
            return unauthorized_response()
        try:
            page = self._metrics.page(await self._collector.status())
        except SpoolError as fault:
            return json_response({"error": "spool", "message": str(fault)}, 503)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    async def _config(self, request: Request) -> Response:
        """What is in force, secrets masked, and what became of the newest reload."""
        if not self._auth.may_view(request):
            return unauthorized_response()
        return json_response(build_config_document(self._parts.settings, self._active_config))

    async def _retry(self, request: Request) -> Response:
        """Decode quarantined publishes again: `{"numbers": [1, 2]}`."""
        if (unfit := _reject_change(request)) is not None:
            return unfit
        body = await read_body(request, _RETRY_BODY_MAX_BYTES)
        if body is None:
            return json_response(
                {"error": "too_large", "message": f"at most {_RETRY_BODY_MAX_BYTES} bytes"}, 413
            )
        try:
            asked = msgspec.json.decode(body, type=_RetryRequest)
        except msgspec.DecodeError as fault:
            return json_response({"error": "malformed", "message": str(fault)}, 400)
        parts = self._parts
        told = parts.committer.rules
        rules = RuleSet(told.template, told.rules, told.births.for_replay())
        try:
            result = await retry_open_spool(parts.spool, rules, asked.numbers)
        except SpoolError as fault:
            return json_response({"error": "spool", "message": str(fault)}, 503)
        return json_response(result)

    async def _compact(self, request: Request) -> Response:
        """Merge what may be merged, now."""
        if (unfit := _reject_change(request)) is not None:
            return unfit
        try:
            await self._parts.commit_consumer.catch_up()  # what processing has not been over is not merged
            done = await compact_open_spool(self._parts.spool)
        except SpoolError as fault:
            return json_response({"error": "spool", "message": str(fault)}, 503)
        return json_response(done)

    async def _healthz(self, request: Request) -> Response:
        """Whether every stage makes progress, or rests because there is nothing to do."""
        late = find_late_stages(self._parts.stages())
        stages = {"stages": list(map(str, late))} if self._auth.may_view(request) else {}
        return json_response({"status": "stuck", **stages}, 503) if late else json_response({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        """Whether publishes are taken and will be acknowledged."""
        reason = self._parts.committer.counters.holding_reason
        if not reason:
            return json_response({"status": "ok"})
        reasons = {"reason": reason} if self._auth.may_view(request) else {}
        return json_response({"status": "holding", **reasons}, 503)


def bind_listening_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket.

    Raises:
        OSError: with the address in its text.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as fault:
        raise OSError(fault.errno, f"{host}:{port}: {fault.strerror or fault}") from fault
    return listener


def _reject_change(request: Request) -> Response | None:
    """What is answered to a request that may change nothing here."""
    if not is_local_request(request):
        return json_response({"error": "not_here", "message": "only this machine itself may ask for it"}, 403)
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        # a web page of another origin cannot send that unasked
        return json_response(
            {"error": "unsupported_media_type", "message": "application/json is expected"}, 415
        )
    return None


def _reloading_ssl_context(files: TlsFiles) -> ssl.SSLContext:
    """A context that serves each new connection with the certificate as it is then."""
    certificates = ReloadingServerContext(files)
    context = build_server_context(files)

    def renew(connection: ssl.SSLObject | ssl.SSLSocket, _name: str, _context: ssl.SSLContext) -> None:
        connection.context = certificates.context(time.monotonic())

    context.sni_callback = renew
    return context
