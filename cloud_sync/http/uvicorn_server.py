"""uvicorn inside a program that handles its own signals, with a timeout for the head of a request.

uvicorn waits without end for a head; here it must be complete within `HEAD_WITHIN_S`, so that slowloris
connections do not last.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from cloud_sync.runtime.server_sockets import bind_sockets

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Iterator

HEAD_WITHIN_S = 10.0
CERTIFICATE_KEY = "certificate"


class HeadTimeoutProtocol(H11Protocol):
    """One connection; its requests have the client's verified certificate, which uvicorn does not expose."""

    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Wait for the first head."""
        super().connection_made(transport)
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.app_state = {**self.app_state, CERTIFICATE_KEY: certificate}
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; between requests they are those of a head."""
        super().data_received(data)
        # whatever its type says, it is None before the first request
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self._await_head()
        else:
            self._end_wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end_wait()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if self._head_due is None:
            self._head_due = self.loop.call_later(HEAD_WITHIN_S, self.transport.close)

    def _end_wait(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None


class CannotStartError(Exception):
    """The service cannot start as it is configured; the message is for a person."""


class UvicornServer(uvicorn.Server):
    """uvicorn without its signal handlers: it would end the process by the signal instead of with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the program."""
        yield


def bind_http_sockets(host: str, port: int, keys: str = "listen.host, listen.port") -> list[socket.socket]:
    """Listening sockets as `bind_sockets` makes them."""
    try:
        return bind_sockets(host, port)
    except OSError as fault:
        raise CannotStartError(f"cannot listen on {fault.strerror} ({keys})") from fault
