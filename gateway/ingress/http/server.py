"""The `http` ingress as a part of the gateway: served, paused with the other ways in, stopped in order."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from cloud_sync.ingest.server import CannotStartError, Server, bind
from gateway.ingress.http.protocol import DeviceProtocol

if TYPE_CHECKING:
    import socket
    import ssl

    from gateway.ingress.http.app import HttpApp, HttpCounters
    from gateway.ingress.tls import Certificates

_KEEP_ALIVE_S = 75


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """Where to serve and whom. `certificates` None is without TLS."""

    host: str
    port: int
    max_connections: int
    certificates: Certificates | None = None


class HttpIngress:
    """Implements `Gate`."""

    def __init__(self, settings: HttpSettings, app: HttpApp, *, stop_within_s: float) -> None:
        self.settings = settings
        self._app = app
        self._stop_within_s = stop_within_s
        self._bound: socket.socket | None = None
        self._server: Server | None = None
        self._serving: asyncio.Task[None] | None = None

    @property
    def counters(self) -> HttpCounters:
        """What has happened since start."""
        return self._app.counters

    @property
    def port(self) -> int:
        """The port in use."""
        assert self._bound is not None
        return int(self._bound.getsockname()[1])

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            OSError: the address cannot be bound.
        """
        try:
            self._bound = bind(self.settings.host, self.settings.port, "ingress.http.host, ingress.http.port")
        except CannotStartError as fault:
            raise OSError(str(fault)) from fault
        config = uvicorn.Config(
            self._app.starlette(),
            http=DeviceProtocol,
            ws="none",
            ssl_context_factory=None if self.settings.certificates is None else lambda *_: self._context(),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            limit_concurrency=self.settings.max_connections,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=max(1, int(self._stop_within_s)),
        )
        self._server = Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._bound]), name="http ingress")

    def pause(self) -> None:
        """Answer requests with 503 for now; those that are being answered go on."""
        self._app.closed = "too much is waiting for its commit"

    def resume(self) -> None:
        """Take requests again."""
        self._app.closed = ""

    def stop_reading(self) -> None:
        """Take no more requests; those at hand are answered once they are committed."""
        self._app.closed = "the gateway is stopping"
        if self._server is not None:
            self._server.should_exit = True

    async def close(self) -> None:
        """Finish the answers and close."""
        self.stop_reading()
        if self._serving is not None:
            await self._serving

    def _context(self) -> ssl.SSLContext:
        """A context that hands each new connection the certificate that is in force then."""
        certificates = self.settings.certificates
        assert certificates is not None
        context = certificates.context(time.monotonic())

        def renew(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = certificates.context(time.monotonic())

        context.sni_callback = renew
        return context
