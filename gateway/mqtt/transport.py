"""One socket with flow control: reading is paused for reasons, the write buffer is limited, closing lingers.

After the last byte this side is shut down and what the peer still sends is discarded until it closes or
`_LINGER_S` have passed: closing with unread bytes would reset the connection, and the peer could lose the
packet that says why.
"""

from __future__ import annotations

import asyncio
import socket
from enum import IntFlag, auto
from typing import TYPE_CHECKING, Final, cast

if TYPE_CHECKING:
    from gateway.mqtt.server import MqttServer

_LINGER_S: Final = 5.0


class PauseReason(IntFlag):
    """Why a socket is not being read; it is read when no reason is left."""

    BACKPRESSURE = auto()
    WRITE_BUFFER = auto()
    IN_FLIGHT = auto()
    AUTHENTICATION = auto()


class MqttTransport(asyncio.Protocol):
    """The transport side of a connection.

    Attributes:
        closing: this side has closed or the connection is gone: nothing is written or taken any more.
        pauses: the reasons why the socket is not being read.
        since_s: when the connection last entered its present phase or was last heard, in `Listener.now_s`.
    """

    def __init__(self, listener: MqttServer) -> None:
        self.listener = listener
        self.counters = listener.counters
        self.closing = False
        self.pauses = PauseReason(0)
        self.since_s = listener.now_s
        self._write_stalled_since_s = 0.0
        self._corked: bytearray | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self.transport.set_write_buffer_limits(high=self.listener.settings.write_high_bytes)
        peer = transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self.listener.paused:
            self.pause(PauseReason.BACKPRESSURE)

    def pause_writing(self) -> None:
        """The peer does not read what it is sent: stop reading it, too."""
        self._write_stalled_since_s = self.listener.now_s
        self.pause(PauseReason.WRITE_BUFFER)

    def resume_writing(self) -> None:
        """The peer has read enough."""
        self.resume(PauseReason.WRITE_BUFFER)

    def pause(self, reason: PauseReason) -> None:
        """Stop reading the socket, for one more reason."""
        if not self.pauses and not self.closing:
            self.transport.pause_reading()
        self.pauses |= reason

    def reapply_pause(self) -> None:
        """Pause again: uvloop starts to read after `connection_made`, whatever was asked in it."""
        if self.pauses and not self.closing:
            self.transport.pause_reading()

    def resume(self, reason: PauseReason) -> None:
        """Drop one reason, and read again when it was the last."""
        was, self.pauses = self.pauses, self.pauses & ~reason
        if was and not self.pauses and not self.closing:
            self.since_s = self.listener.now_s
            self.transport.resume_reading()

    def cork(self) -> None:
        """Gather what is written from now on, to send it at once."""
        self._corked = bytearray()

    def uncork(self) -> None:
        """Send what has been gathered."""
        gathered, self._corked = self._corked, None
        if gathered:
            self.write(bytes(gathered))

    def write(self, out: bytes) -> None:
        """Send, unless closing. A peer that leaves too much unread loses the connection."""
        if self.closing:
            return
        if self._corked is not None:
            self._corked += out
            return
        self.transport.write(out)
        if self.pauses & PauseReason.WRITE_BUFFER:
            waiting_bytes = self.transport.get_write_buffer_size()
            if waiting_bytes > self.listener.settings.write_limit_bytes:
                self.count_close("write_limit")
                self.abort()

    def tick(self, now_s: float) -> None:
        """Enforce the time limits of writing and closing. Called about once a second."""
        if self.closing:
            if now_s - self.since_s > _LINGER_S:
                self.transport.abort()
        elif (
            self.pauses & PauseReason.WRITE_BUFFER
            and now_s - self._write_stalled_since_s > self.listener.settings.write_stall_s
        ):
            self.count_close("write_stalled")
            self.abort()

    def hang_up(self) -> None:
        """Close from this side, once everything written has gone out."""
        self.uncork()
        if self.closing:
            return
        self.closing = True
        self.since_s = self.listener.now_s
        if self.transport.is_closing() or not self.transport.can_write_eof():  # TLS has its own goodbye
            self.transport.close()
            return
        try:
            self.transport.write_eof()
        except OSError:  # the peer has reset the connection, and we have not been told yet
            self.transport.abort()
            return
        if self.pauses:
            self.transport.resume_reading()

    def part(self) -> None:
        """Close after the peer has said that it is about to: nothing of it is left to wait for."""
        self.uncork()
        self.closing = True
        self.transport.close()

    def abort(self) -> None:
        """Close without sending what is still to be sent."""
        self.closing = True
        self.transport.abort()

    def count_close(self, reason: str) -> None:
        """Count a close from this side."""
        self.counters.closed_total[reason] += 1
