"""The gateway's own HTTP endpoint: /status, /healthz, /readyz. Loopback by default."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from gateway.operate.quarantine_retry import retry_within
from gateway.operate.spool_compact import compact_within
from gateway.operate.status import status_of
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.parts import Parts


class _RetryRequest(msgspec.Struct):
    numbers: list[int]


class Endpoint:
    """Serves one gateway's parts."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        app = Starlette(
            routes=[
                Route("/status", self._status),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
                Route("/quarantine/retry", self._retry, methods=["POST"]),
                Route("/compact", self._compact, methods=["POST"]),
            ]
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1
            )
        )
        self._server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]  # the program handles signals itself
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            OSError: the address cannot be bound.
        """
        listener = bound(self._parts.settings.status.host, self._parts.settings.status.port)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="status endpoint")

    async def stop(self) -> None:
        """Finish the requests at hand and close."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving

    async def _status(self, _: Request) -> Response:
        return _json(await status_of(self._parts))

    async def _retry(self, request: Request) -> Response:
        """Decode quarantined publishes again: `{"numbers": [1, 2]}`."""
        if not _is_json(request):
            return _NOT_JSON
        try:
            asked = msgspec.json.decode(await request.body(), type=_RetryRequest)
        except msgspec.DecodeError as fault:
            return _json({"error": "malformed", "message": str(fault)}, 400)
        parts = self._parts
        rules = parts.settings.ingress.rules
        try:
            result = await retry_within(parts.database, parts.appender, parts.book, rules, asked.numbers)
        except SpoolError as fault:
            return _json({"error": "spool", "message": str(fault)}, 503)
        return _json(result)

    async def _compact(self, request: Request) -> Response:
        """Merge what may be merged, now."""
        if not _is_json(request):
            return _NOT_JSON
        try:
            done = await compact_within(self._parts.database, self._parts.compaction)
        except SpoolError as fault:
            return _json({"error": "spool", "message": str(fault)}, 503)
        return _json(done)

    async def _healthz(self, _: Request) -> Response:
        return _json({"status": "ok"})

    async def _readyz(self, _: Request) -> Response:
        holding = self._parts.committer.counters.holding_reason
        if holding:
            return _json({"status": "holding", "reason": holding}, 503)
        return _json({"status": "ok"})


def bound(host: str, port: int) -> socket.socket:
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


def _is_json(request: Request) -> bool:
    """Whether a request says it is JSON: a web page of another origin cannot send that unasked."""
    return request.headers.get("content-type", "").partition(";")[0] == "application/json"


def _json(content: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")


_NOT_JSON = _json({"error": "unsupported_media_type", "message": "application/json is expected"}, 415)
