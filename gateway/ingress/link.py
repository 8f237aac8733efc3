"""One accepted socket, bounded in both directions: reading is paused for reasons, writing has limits.

Closing is lingering where TCP allows it: this side is shut after the last byte, and what the peer still sends
is read and dropped until it closes or `_LINGER_S` have passed. A plain close with unread bytes would reset
the connection, and the peer could lose the answer that says why.
"""

from __future__ import annotations

import asyncio
import socket
from enum import IntFlag, auto
from typing import TYPE_CHECKING, cast, Final

if TYPE_CHECKING:
    from gateway.ingress.listener import Listener

_LINGER_S: Final = 5.0


class Pause(IntFlag):
    """Why a socket is not being read; it is read when no reason is left."""

    INTAKE = auto()
    WRITES = auto()
    IN_FLIGHT = auto()
    ADMISSION = auto()


class Link(asyncio.Protocol):
    """The transport side of a connection.

    Attributes:
        closing: this side has closed or the connection is gone: nothing is written or taken any more.
        pauses: the reasons why the socket is not being read.
        since_s: when the connection last entered its present phase or was last heard, in `Listener.now_s`.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.counters = listener.counters
        self.closing = False
        self.pauses = Pause(0)
        self.since_s = listener.now_s
        self._stalled_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self.transport.set_write_buffer_limits(high=self.listener.settings.write_high_bytes)
        peer = transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.listener.paused:
            self.pause(Pause.INTAKE)

    def pause_writing(self) -> None:
        """The peer does not read what it is sent: stop reading it, too."""
        self._stalled_s = self.listener.now_s
        self.pause(Pause.WRITES)

    def resume_writing(self) -> None:
        """The peer has read enough."""
        self.resume(Pause.WRITES)

    def pause(self, reason: Pause) -> None:
        """Stop reading the socket, for one more reason."""
        if not self.pauses and not self.closing:
            self.transport.pause_reading()
        self.pauses |= reason

    def resume(self, reason: Pause) -> None:
        """Drop one reason, and read again when it was the last."""
        was, self.pauses = self.pauses, self.pauses & ~reason
        if was and not self.pauses and not self.closing:
            self.since_s = self.listener.now_s
            self.transport.resume_reading()

    def write(self, out: bytes) -> None:
        """Send, unless closing. A peer that leaves too much unread loses the connection."""
        if self.closing:
            return
        self.transport.write(out)
        if self.pauses & Pause.WRITES:
            waiting_bytes = self.transport.get_write_buffer_size()
            if waiting_bytes > self.listener.settings.write_limit_bytes:
                self.count_close("write_limit")
                self.abort()

    def tick(self, now_s: float) -> None:
        """Enforce the time limits of writing and closing. Called about once a second."""
        if self.closing:
            if now_s - self.since_s > _LINGER_S:
                self.transport.abort()
        elif self.pauses & Pause.WRITES and now_s - self._stalled_s > self.listener.settings.write_stall_s:
            self.count_close("write_stalled")
            self.abort()

    def hang_up(self) -> None:
        """Close from this side, once everything written has gone out."""
        if self.closing:
            return
        self.closing = True
        self.since_s = self.listener.now_s
        if self.transport.is_closing() or not self.transport.can_write_eof():  # TLS has its own goodbye
            self.transport.close()
            return
        self.transport.write_eof()
        if self.pauses:
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close without sending what is still to be sent."""
        self.closing = True
        self.transport.abort()

    def count_close(self, reason: str) -> None:
        """Count a close from this side."""
        self.counters.closed_total[reason] += 1
