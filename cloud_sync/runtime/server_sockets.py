"""Listening sockets, accepting a few connections at a time, and the file descriptors they need.

`SocketAcceptor` replaces `asyncio.Server`, which bounds neither sockets nor TLS handshakes, and keeps one
TLS context.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger(__name__)
RESERVED_DESCRIPTORS: Final = 256
"""For the spool, destinations, the status endpoint and libraries."""


def raise_fd_limit(connections: int) -> int:
    """Raise the soft limit of open files for `connections`; returns how many fit, warns when fewer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    affordable = max(1, soft - RESERVED_DESCRIPTORS)
    _log.warning(
        "max_connections is %d, but this process may open only %d files: "
        "at most %d connections are accepted. "
        "Raise LimitNOFILE of the unit, or `ulimit -n`, to %d or more",
        connections,
        soft,
        affordable,
        needed,
    )
    return affordable


_BACKLOG: Final = 4096
_ACCEPTS_PER_WAKEUP: Final = 32
_TRANSIENT_ERRNOS = frozenset({errno.EAGAIN, errno.EINTR, errno.ECONNABORTED, errno.EPROTO, errno.EPERM})
_ADDRESS_UNAVAILABLE_ERRNOS = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


class SocketAcceptor:
    """Calls `on_accept` with each accepted socket, non-blocking.

    `starved`: accepting is put off because the system had no file descriptor or memory for it.
    """

    def __init__(self, on_accept: Callable[[socket.socket], None]) -> None:
        self._on_accept = on_accept
        self.sockets: list[socket.socket] = []
        self.starved = False
        self._paused = False

    async def open(self, host: str, port: int) -> int:
        """Bind as `bind_sockets` does, and accept; returns the port."""
        self.sockets = await asyncio.to_thread(bind_sockets, host, port)
        self._paused = False
        self._add_readers()
        return int(self.sockets[0].getsockname()[1])

    def pause(self) -> None:
        """Accept nothing for now; new connections wait in the system's queue."""
        self._paused = True
        self._remove_readers()

    def resume(self) -> None:
        """Accept again."""
        self._paused = False
        self._add_readers()

    def retry(self) -> None:
        """Accept again after starvation. To be called about once a second."""
        if self.starved:
            self.starved = False
            self._add_readers()

    def close(self) -> None:
        """Stop listening."""
        self._remove_readers()
        for listening in self.sockets:
            listening.close()
        self.sockets = []

    def _add_readers(self) -> None:
        if self._paused or self.starved:
            return
        for listening in self.sockets:
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _remove_readers(self) -> None:
        for listening in self.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())

    def _accept(self, listening: socket.socket) -> None:
        """Accept a bounded number at once: with TLS each costs a signature."""
        for _ in range(_ACCEPTS_PER_WAKEUP):
            try:
                accepted, _address = listening.accept()
            except OSError as fault:
                if fault.errno not in _TRANSIENT_ERRNOS:
                    _log.error("cannot accept connections, trying again in a second: %s", fault.strerror)
                    self.starved = True
                    self._remove_readers()
                return
            accepted.setblocking(False)
            self._on_accept(accepted)
            if self._paused:
                return


def bind_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening, non-blocking sockets of one port (0 finds one), one for each address of `host` ("": of all).

    Addresses that this machine does not have are left out. The text of an OSError begins with the address.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as fault:
        raise OSError(fault.errno, f"{host}:{port}: {(fault.strerror or str(fault)).lower()}") from fault
    bound: list[socket.socket] = []
    unavailable: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            listening = socket.create_server(
                (address[0], port, *address[2:]), family=family, backlog=_BACKLOG
            )
            bound.append(listening)
        except OSError as fault:
            reason = os.strerror(fault.errno or 0).lower()
            unavailable = OSError(fault.errno, f"{address[0]}:{port}: {reason}")
            if fault.errno not in _ADDRESS_UNAVAILABLE_ERRNOS:
                for opened in bound:
                    opened.close()
                raise unavailable from fault
            continue
        # accepted connections inherit it; without it an HTTP answer waits 40 ms for the client's delayed ACK
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.setblocking(False)
        port = bound[0].getsockname()[1]
    if not bound and unavailable is not None:
        raise unavailable
    return bound
