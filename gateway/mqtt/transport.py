"""One socket with flow control, for both roles: the server's connections and the client of a broker.

Reading is paused for reasons and goes on when none is left. What is written between `cork` and `flush` is
sent at once; the write buffer is limited in size and time. A close from this side lingers: the sending side
is shut down and what the peer still sends is discarded until it closes or `_LINGER_S` have passed. Closing
with unread bytes would reset the connection, and the peer could lose the packet that says why.
"""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from enum import IntFlag, auto
from typing import TYPE_CHECKING, Final, Protocol, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.mqtt.codec.parser import PacketParser

_LINGER_S: Final = 5.0


class PauseReason(IntFlag):
    """Why a socket is not being read."""

    BACKPRESSURE = auto()
    WRITE_BUFFER = auto()
    IN_FLIGHT = auto()
    AUTHENTICATION = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteLimits:
    """A peer that leaves more than `high_bytes` unread is not read either; after `stall_s`, or beyond
    `limit_bytes`, its connection is closed.
    """

    high_bytes: int = 1 << 16
    limit_bytes: int = 1 << 20
    stall_s: float = 60.0


class TransportOwner(Protocol):
    """The connection that a transport belongs to."""

    def connection_made(self) -> None:
        """The transport can be used."""

    def data_received(self, data: bytes) -> None:
        """Bytes that came before any close from this side."""

    def connection_lost(self) -> None:
        """The socket is closed; the transport's `error` says why."""

    def write_limit_exceeded(self, limit: str) -> None:
        """The peer left too much unread: `write_limit` or `write_stalled`. The transport aborts next."""


class MqttTransport(asyncio.Protocol):
    """The socket of one connection.

    Once `closing` nothing is written or reported any more; `error` is what broke the connection.
    """

    stream: asyncio.Transport  # once the connection is made

    def __init__(self, owner: TransportOwner, limits: WriteLimits, clock_s: Callable[[], float]) -> None:
        self.closing = False
        self.error = ""
        self.pauses = PauseReason(0)
        self.last_write_s = clock_s()
        self._owner = owner
        self._limits = limits
        self._clock_s = clock_s
        self._stalled_since_s = 0.0
        self._closing_since_s = 0.0
        self._corked: bytearray | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self.stream = cast("asyncio.Transport", transport)  # uvloop's own class does not derive from it
        self.stream.set_write_buffer_limits(high=self._limits.high_bytes)
        peer = transport.get_extra_info("socket")
        if peer is not None:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._owner.connection_made()

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        if not self.closing:
            self._owner.data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self.closing = True
        self.error = "" if exc is None else str(exc) or type(exc).__name__
        self._owner.connection_lost()

    def pause_writing(self) -> None:
        """The peer does not read what it is sent: stop reading it, too. Called by the event loop."""
        self._stalled_since_s = self._clock_s()
        self.pause(PauseReason.WRITE_BUFFER)

    def resume_writing(self) -> None:
        """Called by the event loop."""
        self.resume(PauseReason.WRITE_BUFFER)

    def pause(self, reason: PauseReason) -> None:
        """Stop reading, for one more reason."""
        if not self.pauses and not self.closing:
            self.stream.pause_reading()
        self.pauses |= reason

    def reapply_pause(self) -> None:
        """Pause again: uvloop starts to read after `connection_made`, even when paused in it."""
        if self.pauses and not self.closing:
            self.stream.pause_reading()

    def resume(self, reason: PauseReason) -> None:
        """Drop one reason, and read again when it was the last."""
        before, self.pauses = self.pauses, self.pauses & ~reason
        if before and not self.pauses and not self.closing:
            self.stream.resume_reading()

    def cork(self) -> None:
        """Collect what is written until `flush`."""
        self._corked = bytearray()

    def flush(self) -> None:
        """Send what was collected since `cork`."""
        collected, self._corked = self._corked, None
        if collected:
            self.write(bytes(collected))

    def write(self, out: bytes) -> None:
        """Send, unless closing. A peer that leaves too much unread loses the connection."""
        if self.closing or not out:
            return
        if self._corked is not None:
            self._corked += out
            return
        self.last_write_s = self._clock_s()
        self.stream.write(out)
        if (
            self.pauses & PauseReason.WRITE_BUFFER
            and self.stream.get_write_buffer_size() > self._limits.limit_bytes
        ):
            self._owner.write_limit_exceeded("write_limit")
            self.abort()

    def tick(self, now_s: float) -> None:
        """Enforce the time limits of writing and lingering. Called about once a second."""
        if self.closing:
            if now_s - self._closing_since_s > _LINGER_S:
                self.stream.abort()
        elif self.pauses & PauseReason.WRITE_BUFFER and now_s - self._stalled_since_s > self._limits.stall_s:
            self._owner.write_limit_exceeded("write_stalled")
            self.abort()

    def close(self) -> None:
        """Send what was written, then close and linger."""
        self.flush()
        if self.closing:
            return
        self.closing = True
        self._closing_since_s = self._clock_s()
        if self.stream.is_closing() or not self.stream.can_write_eof():  # TLS has a close_notify instead
            self.stream.close()
            return
        try:
            self.stream.write_eof()
        except OSError:  # the peer has reset the connection, which the loop has not reported yet
            self.stream.abort()
            return
        if self.pauses:
            self.stream.resume_reading()

    def close_after_peer(self) -> None:
        """Close without lingering: the peer has announced its own close."""
        self.flush()
        self.closing = True
        self.stream.close()

    def abort(self) -> None:
        """Close without sending what is still to be sent."""
        self.closing = True
        self.stream.abort()


class InFlightWindow:
    """QoS 1 and 2 publishes of a connection not yet answered, against its Receive Maximum (section 4.9).

    `pause_if_full` stops the reading, which goes on once half of the window is free.
    """

    def __init__(self, receive_maximum: int, transport: MqttTransport, parser: PacketParser) -> None:
        self.count = 0
        self.receive_maximum = receive_maximum
        self._transport = transport
        self._parser = parser
        self._qos0_counted = 0

    @property
    def exceeded(self) -> bool:
        """Whether more are in flight than allowed."""
        return self.count > self.receive_maximum

    def add(self, publishes: int) -> None:
        """Count a batch; the publishes of QoS 0 that were parsed since the last one are not in flight."""
        parsed = self._parser.qos0_publishes
        self.count += publishes - (parsed - self._qos0_counted)
        self._qos0_counted = parsed

    def skip_qos0(self, publishes: int) -> None:
        """Leave publishes of QoS 0 out of the next batch."""
        self._qos0_counted += publishes

    def remove(self, publishes: int) -> None:
        """Publishes of QoS 1 and 2 have been answered."""
        self.count -= publishes
        if self._transport.pauses & PauseReason.IN_FLIGHT and self.count * 2 <= self.receive_maximum:
            self._transport.resume(PauseReason.IN_FLIGHT)

    def pause_if_full(self) -> None:
        """Read no further while more are in flight than allowed."""
        if self.exceeded:
            self._transport.pause(PauseReason.IN_FLIGHT)
