"""uvicorn inside a program that handles its own signals, with a timeout for the head of a request.

uvicorn waits without end for a head; here it must be complete within `HEAD_WITHIN_S`, so that slowloris
connections do not last.
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator

HEAD_WITHIN_S = 10.0


class HeadTimeoutProtocol(H11Protocol):
    """One connection."""

    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Wait for the first head."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes; between requests they are those of a head."""
        super().data_received(data)
        cycle: RequestResponseCycle | None = (
            self.cycle
        )  # None before the first request, whatever its type says
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


def bind_socket(host: str, port: int, keys: str = "listen.host, listen.port") -> socket.socket:
    """A listening socket.

    Args:
        host: a name or address.
        port: 0 for a free one.
        keys: the settings to name when it does not work.

    Raises:
        CannotStartError: the address is in use, or not ours.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as fault:
        reason = fault.strerror or str(fault)
        raise CannotStartError(f"cannot listen on {host}:{port} ({keys}): {reason}") from fault
    # Accepted connections inherit it. asyncio sets it by itself only where the socket's protocol number is
    # given, and without it every answer waits 40 ms for the client's delayed acknowledgement.
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return bound
