"""uvicorn as part of a program that handles its own signals, and the socket it is given."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from collections.abc import Iterator


class CannotStartError(Exception):
    """The service cannot start as it is configured; the message is for a person."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: it would end the process by the signal instead of with 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the program."""
        yield


def bind(host: str, port: int, keys: str = "listen.host, listen.port") -> socket.socket:
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
