"""What the connections of the MQTT server share: options, counters, clock, sessions, and the room there is.

A connection counts from the accept on, TLS handshake included. At `max_connections` the one that has been
unauthenticated for longest makes room.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import msgspec

from cloud_sync.runtime.rates import TokenBuckets
from gateway.mqtt.codec.packets import TopicCache
from gateway.mqtt.session_state import CommandSubscriptions, Qos2Exchanges, SessionTable
from gateway.mqtt.transport import MqttTransport, WriteLimits

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from gateway.auth.authenticator import Authenticator
    from gateway.ingress.source import PublishSink
    from gateway.mqtt.codec.packets import ReasonCode

_EVICTION_GRACE_S: Final = 2.0
_DENIED_LOG_RATE: Final = (1, 1 / 300)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttServerOptions:
    """Where to listen, and every limit.

    Attributes:
        connect_timeout_s: from the accept to a complete CONNECT, TLS handshake included.
        keep_alive_max_s: MQTT 5 clients that ask for more, or for none, get this; 0 for no limit.
        receive_maximum: QoS 1 and 2 publishes of one connection not yet acknowledged. MQTT 5 clients are
            told, and disconnected beyond it (0x93); 3.1.1 clients are not read until half is acknowledged.
        max_sessions: sessions kept without a connection, for up to `session_expiry_max_s`.
        ssl: returns the TLS context of a new connection; None for no TLS.
    """

    host: str = "127.0.0.1"
    port: int = 1883
    max_connections: int = 10_500
    max_packet_bytes: int = 1 << 20
    connect_timeout_s: float = 10.0
    authentication_timeout_s: float = 60.0
    keep_alive_max_s: int = 3600
    receive_maximum: int = 10_000
    topic_alias_maximum: int = 32
    session_expiry_max_s: int = 7 * 86_400
    max_sessions: int = 20_000
    write_limits: WriteLimits = field(default_factory=WriteLimits)
    ssl: Callable[[], ssl.SSLContext] | None = None


class ListenStatus(msgspec.Struct):
    """The MQTT server in the status document; `connections` is now, the rest is since the start."""

    connections: int = 0
    connections_ever: int = 0
    publishes: int = 0
    wills: int = 0
    bytes_in: int = 0
    protocol_faults: dict[str, int] = msgspec.field(default_factory=Counter)
    refused: dict[str, int] = msgspec.field(default_factory=Counter)
    closed: dict[str, int] = msgspec.field(default_factory=Counter)


class ServedConnection(Protocol):
    """What the server, and another connection of the same client, ask of a connection."""

    transport: MqttTransport

    def release_session(self) -> Qos2Exchanges | None:
        """Give way to a new connection of the client; its session if that lives on."""

    def clear_permission_cache(self) -> None:
        """Ask again whether each topic may be published to."""

    def end(self, reason_code: ReasonCode, *, with_will: bool = True) -> None:
        """Close from this side."""

    def tick(self, now_s: float) -> None:
        """Enforce time limits."""


class ServerContext:
    """Shared by all connections of one server.

    Attributes:
        clients: the connection of each client in use, by client key.
        now_s: monotonic seconds at the last tick, by which every time limit is measured.
        pending: accepted sockets whose connections have no transport yet (TLS handshake), and their tasks.
    """

    def __init__(
        self,
        options: MqttServerOptions,
        sink: PublishSink,
        authenticator: Authenticator,
        commands: CommandSubscriptions,
    ) -> None:
        self.options = options
        self.sink = sink
        self.authenticator = authenticator
        self.commands = commands
        self.counters = ListenStatus()
        self.topics = TopicCache()
        self.sessions = SessionTable(options.max_sessions)
        self.clients: dict[str, ServedConnection] = {}
        self.now_s = 0.0
        self.paused = False
        self.stopping = False
        self.all_closed = asyncio.Event()
        self.connections: set[ServedConnection] = set()
        self.pending: dict[ServedConnection, tuple[asyncio.Task[None], socket.socket]] = {}
        self._unauthenticated: dict[ServedConnection, float] = {}
        self._denied_log_rate: TokenBuckets[str] = TokenBuckets(*_DENIED_LOG_RATE)

    def make_room(self) -> bool:
        """Count a new connection; whether there is room for it."""
        self.counters.connections_ever += 1
        if self.stopping:
            self.counters.refused["stopping"] += 1
            return False
        if len(self.connections) + len(self.pending) < self.options.max_connections:
            return True
        oldest, since_s = next(iter(self._unauthenticated.items()), (None, 0.0))
        if oldest is None or self.now_s - since_s < _EVICTION_GRACE_S:
            self.counters.refused["max_connections"] += 1
            return False
        del self._unauthenticated[oldest]
        self.counters.closed["made_room"] += 1
        if oldest in self.pending:
            shut_down_socket(self.pending[oldest][1])
        else:
            oldest.transport.abort()
        return True

    def add_pending(
        self, connection: ServedConnection, handshake: asyncio.Task[None], accepted: socket.socket
    ) -> None:
        """Count an accepted socket whose connection is still to be made."""
        self._unauthenticated[connection] = self.now_s
        self.pending[connection] = (handshake, accepted)

    def add_connection(self, connection: ServedConnection) -> bool:
        """Count a connection whose transport is there; False when it is to be aborted."""
        if self.pending.pop(connection, None) is None and not self.make_room():
            return False
        if self.stopping:
            self._unauthenticated.pop(connection, None)
            return False
        self.connections.add(connection)
        self._unauthenticated.setdefault(connection, self.now_s)
        self.counters.connections = len(self.connections)
        return True

    def remove_connection(self, connection: ServedConnection) -> None:
        """Forget a connection that is lost or was never made."""
        self._unauthenticated.pop(connection, None)
        self.connections.discard(connection)
        self.counters.connections = len(self.connections)
        if not self.connections:
            self.all_closed.set()

    def claim_session(self, client_key: str, connection: ServedConnection) -> Qos2Exchanges | None:
        """Make `connection` the one of an authenticated client; returns the client's session, if any."""
        self._unauthenticated.pop(connection, None)
        session = self.sessions.claim(client_key)
        previous = self.clients.get(client_key)
        if previous is not None:
            session = previous.release_session()
        self.clients[client_key] = connection
        return session

    def log_denied_publish(self, name: str, topic: bytes) -> None:
        """Log that an identity published where it may not, once in a while."""
        if self._denied_log_rate.try_spend(name, now_s=self.now_s):
            _log.warning("%r may not publish to %.200r: refused, and not stored", name, topic)


def shut_down_socket(accepted: socket.socket) -> None:
    """End a connection during its TLS handshake, which then fails; its transport closes the socket."""
    with contextlib.suppress(OSError):
        accepted.shutdown(socket.SHUT_RDWR)
