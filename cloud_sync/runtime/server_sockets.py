"""Listening sockets that accept a few connections at a time, and the file descriptors they need.

`asyncio.Server` is not used: it starts a TLS handshake without telling anyone before it has ended, so
neither handshakes nor sockets are bounded, and it keeps one TLS context for ever.
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
"""For the spool, destinations, the status endpoint and whatever libraries open."""


def raise_fd_limit(wanted: int) -> int:
    """Raise the soft limit of open files to what `wanted` connections need, as far as the hard limit allows.

    Returns how many connections there is room for then, at most `wanted`; warns when they are fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    affordable = max(1, soft - RESERVED_DESCRIPTORS)
    _log.warning(
        "max_connections is %d, but this process may open %d files only: %d connections are taken. "
        "Raise LimitNOFILE of the unit, or `ulimit -n`, to %d or more",
        wanted,
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
    """Calls `taken` with each accepted socket, non-blocking.

    Attributes:
        sockets: those that listen; the same port on each address of the host.
        starved: accepting has been put off because the system had no file descriptor or memory for it.
    """

    def __init__(self, taken: Callable[[socket.socket], None]) -> None:
        self._taken = taken
        self.sockets: list[socket.socket] = []
        self.starved = False
        self._paused = False

    async def open(self, host: str, port: int) -> int:
        """Bind to every address of `host` ("" is every address there is), accept; returns the port.

        Raises:
            OSError: with the address in its text.
        """
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as fault:
            raise OSError(fault.errno, f"{host}:{port}: {(fault.strerror or str(fault)).lower()}") from fault
        absent: OSError | None = None
        for family, _, protocol, _, address in dict.fromkeys(found):
            try:
                self.sockets.append(_bind_socket(family, protocol, (address[0], port, *address[2:])))
            except OSError as fault:
                told = OSError(fault.errno, f"{address[0]}:{port}: {os.strerror(fault.errno or 0).lower()}")
                if fault.errno not in _ADDRESS_UNAVAILABLE_ERRNOS:
                    self.close()
                    raise told from fault
                absent = told
                continue
            port = self.sockets[0].getsockname()[1]
        if not self.sockets and absent is not None:
            raise absent
        self._paused = False
        self._attend()
        return port

    def pause(self) -> None:
        """Let those who come wait in the system's queue."""
        self._paused = True
        self._remove_readers()

    def resume(self) -> None:
        """Accept again."""
        self._paused = False
        self._attend()

    def retry(self) -> None:
        """Accept again after starvation. To be called about once a second."""
        if self.starved:
            self.starved = False
            self._attend()

    def close(self) -> None:
        """Listen no more."""
        self._remove_readers()
        for listening in self.sockets:
            listening.close()
        self.sockets = []

    def _attend(self) -> None:
        if self._paused or self.starved:
            return
        for listening in self.sockets:
            asyncio.get_running_loop().add_reader(listening.fileno(), self._accept, listening)

    def _remove_readers(self) -> None:
        for listening in self.sockets:
            asyncio.get_running_loop().remove_reader(listening.fileno())

    def _accept(self, listening: socket.socket) -> None:
        """Take what waits, but let others have their turn: with TLS each costs a signature."""
        for _ in range(_ACCEPTS_PER_WAKEUP):
            try:
                accepted, _address = listening.accept()
            except OSError as fault:
                if fault.errno not in _TRANSIENT_ERRNOS:
                    _log.error("no connection can be accepted for a moment: %s", fault.strerror)
                    self.starved = True
                    self._remove_readers()
                return
            accepted.setblocking(False)
            self._taken(accepted)
            if self._paused:
                return


def _bind_socket(family: int, protocol: int, address: tuple[str | int, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
