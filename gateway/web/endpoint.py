"""The gateway's own HTTP endpoint: the status page, /status, /metrics, /config, /healthz, /readyz. Loopback
by default.

Requests from this machine may do everything; others may view with a token (`StatusAuth`) and change nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from cloud_sync.http.responses import RequestRejectedError
from cloud_sync.http.uvicorn_server import HeadTimeoutProtocol, UvicornServer
from cloud_sync.runtime.server_sockets import bind_sockets
from cloud_sync.runtime.watchdog import find_late_stages
from gateway.auth.tls import build_cert_reloader
from gateway.payloads.decoder_registry import RuleSet
from gateway.spool.errors import SpoolError
from gateway.spool.spool import compact_open_spool
from gateway.spooltools.quarantine_retry import retry_open_spool
from gateway.status.active_config import build_config_document
from gateway.status.metrics import render_metrics
from gateway.web.page import StatusAuth, StatusPage, is_local_request, json_response, read_body

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.runtime import Runtime
    from gateway.status.active_config import ActiveConfig
    from gateway.status.collector import StatusCollector

_SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-resource-policy": "same-origin",
}
_RETRY_BODY_MAX_BYTES = 1 << 20
_CONNECTIONS_MAX = 200


class _RetryRequest(msgspec.Struct):
    numbers: list[int]


class StatusEndpoint:
    """Serves one gateway's status, and what commands on this machine ask of it."""

    def __init__(self, runtime: Runtime, collector: StatusCollector, active_config: ActiveConfig) -> None:
        self._runtime = runtime
        self._collector = collector
        self._active_config = active_config
        settings = runtime.settings.status
        self._auth = StatusAuth(settings.tokens_file, f"tidegate-{runtime.settings.gateway_id}")
        self._page = StatusPage(runtime, self._auth)
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
            ],
            exception_handlers={RequestRejectedError: _reject, SpoolError: _report_spool_error},
        )
        files = settings.tls_files
        context = None if files is None else build_cert_reloader(files).context
        self._server = UvicornServer(
            uvicorn.Config(
                app,
                http=HeadTimeoutProtocol,
                limit_concurrency=_CONNECTIONS_MAX,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,  # a client could claim to be this machine
                headers=list(_SECURITY_HEADERS.items()),
                ssl_context_factory=None if context is None else lambda _config, _default: context,
                timeout_graceful_shutdown=1,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and serve. Raises OSError."""
        status = self._runtime.settings.status
        sockets = bind_sockets(status.host, status.port)
        self._serving = asyncio.create_task(self._server.serve(sockets=sockets), name="status endpoint")

    async def stop(self) -> None:
        """Finish open requests and close."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._page.chart_executor.shutdown(wait=False, cancel_futures=True)

    async def _status(self, request: Request) -> Response:
        self._auth.require_view(request)
        return json_response(await self._collector.status())

    async def _serve_metrics(self, request: Request) -> Response:
        self._auth.require_view(request)
        text = render_metrics(await self._collector.status(), self._runtime)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _config(self, request: Request) -> Response:
        self._auth.require_view(request)
        return json_response(build_config_document(self._runtime.settings, self._active_config))

    async def _retry(self, request: Request) -> Response:
        """Decode quarantined publishes again: `{"numbers": [1, 2]}`."""
        _require_local_json(request)
        body = await read_body(request, _RETRY_BODY_MAX_BYTES)
        if body is None:
            raise RequestRejectedError(413, "too_large", f"at most {_RETRY_BODY_MAX_BYTES} bytes")
        try:
            numbers = msgspec.json.decode(body, type=_RetryRequest).numbers
        except msgspec.DecodeError as error:
            raise RequestRejectedError(400, "malformed", str(error)) from error
        active = self._runtime.committer.decoder.rules
        rules = RuleSet(active.template, active.rules, active.births.for_replay())
        return json_response(await retry_open_spool(self._runtime.spool, rules, numbers))

    async def _compact(self, request: Request) -> Response:
        _require_local_json(request)
        await self._runtime.commit_consumer.catch_up()  # segments that processing still reads are not merged
        return json_response(await compact_open_spool(self._runtime.spool))

    async def _healthz(self, request: Request) -> Response:
        """Whether every stage makes progress, or is idle because there is nothing to do."""
        late = find_late_stages(self._runtime.stages())
        stages = {"stages": list(map(str, late))} if self._auth.may_view(request) else {}
        return json_response({"status": "stuck", **stages}, 503) if late else json_response({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        reason = self._runtime.committer.counters.holding_reason
        if not reason:
            return json_response({"status": "ok"})
        reasons = {"reason": reason} if self._auth.may_view(request) else {}
        return json_response({"status": "holding", **reasons}, 503)


def _reject(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRejectedError)
    return error.response()


def _report_spool_error(_: Request, error: Exception) -> Response:
    return json_response({"error": "spool", "message": str(error)}, 503)


def _require_local_json(request: Request) -> None:
    """Reject requests that may change nothing. Of another origin's page a browser sends no JSON unasked."""
    if not is_local_request(request):
        raise RequestRejectedError(403, "not_here", "only this machine itself may request this")
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise RequestRejectedError(415, "unsupported_media_type", "expected application/json")
