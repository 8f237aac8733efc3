"""The MQTT server that devices publish to (`listen`). Not a broker: publishes go to the publish sink only.

Owns the listening sockets, the state that connections share, and one timer for every time limit. A
connection counts from the accept on, TLS handshake included. At `max_connections` the one that has been
unauthenticated for longest is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from cloud_sync.runtime.rates import TokenBuckets
from cloud_sync.runtime.server_sockets import SocketAcceptor
from gateway.auth.authenticator import AnonymousAuthenticator
from gateway.mqtt.codec.packets import ReasonCode, TopicCache
from gateway.mqtt.connection import DeviceConnection
from gateway.mqtt.session_state import CommandSubscriptions, SessionTable
from gateway.mqtt.transport import PauseReason

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from gateway.auth.authenticator import Authenticator
    from gateway.ingress.source import PublishSink
    from gateway.mqtt.handshake import ConnectHandshake

_TICK_S: Final = 1.0
_EVICTION_GRACE_S: Final = 2.0
_DENIED_LOG_RATE: Final = (1, 1 / 300)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttServerOptions:
    """Where to listen, and every limit.

    Attributes:
        host: address to bind; port: 0 takes a free one.
        max_connections: sockets beyond it are closed at once, or take the place of one not yet admitted.
        max_packet_bytes: largest packet taken, announced to MQTT 5 clients.
        connect_timeout_s: from the accept to a complete CONNECT, TLS handshake included.
        admission_timeout_s: from CONNECT to the authenticator's decision.
        keep_alive_max_s: MQTT 5 clients that ask for more, or for none, are told this; 0 leaves them alone.
        receive_maximum: QoS 1 and 2 publishes of one connection not yet acknowledged. MQTT 5 clients are
            told, and disconnected beyond it (0x93); 3.1.1 clients are not read until half is acknowledged.
        topic_alias_maximum: topic aliases an MQTT 5 client may use; 0 for none.
        session_expiry_max_s: how long a session is kept without a connection; 0 for never.
        max_sessions: sessions kept without a connection.
        write_high_bytes: a connection with more waiting to be sent is not read.
        write_limit_bytes: one with more than this is closed.
        write_stall_s: so is one whose peer reads nothing for so long.
        ssl: what gives the TLS context of a new connection, asked with monotonic seconds; None for no TLS.
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
    write_high_bytes: int = 1 << 16
    write_limit_bytes: int = 1 << 20
    write_stall_s: float = 60.0
    ssl: Callable[[float], ssl.SSLContext] | None = None


@dataclass(slots=True)
class MqttServerCounters:
    """What has happened since the start; `connections_open` is now.

    Attributes:
        protocol_faults_total: violations, by reason code name in lower case.
        refused_total: connections, publishes and subscriptions refused, by reason.
        closed_total: connections closed from this side for another reason, by reason.
    """

    connections_open: int = 0
    connections_total: int = 0
    publishes_total: int = 0
    wills_total: int = 0
    bytes_in_total: int = 0
    protocol_faults_total: Counter[str] = field(default_factory=Counter)
    refused_total: Counter[str] = field(default_factory=Counter)
    closed_total: Counter[str] = field(default_factory=Counter)


class MqttServer:
    """The server. `start`, then `stop_reading`, then (once what was handed over is committed) `close`.

    Attributes:
        served: the topics that devices may subscribe to.
        clients: the connection of each client identifier in use, preceded by its scope and NUL if it has one.
        now_s: monotonic seconds, advanced by the timer: what every time limit is measured by.
    """

    def __init__(
        self,
        settings: MqttServerOptions,
        intake: PublishSink,
        authenticator: Authenticator | None = None,
        served: CommandSubscriptions | None = None,
    ) -> None:
        self.settings = settings
        self.intake = intake
        self.authenticator: Authenticator = authenticator or AnonymousAuthenticator()
        self.served = CommandSubscriptions() if served is None else served
        self.counters = MqttServerCounters()
        self.topics = TopicCache()
        self.sessions = SessionTable(settings.max_sessions)
        self.clients: dict[str, ConnectHandshake] = {}
        self.now_s = 0.0
        self.paused = False
        self._connections: set[DeviceConnection] = set()
        self._pending_transports: dict[DeviceConnection, tuple[asyncio.Task[None], socket.socket]] = {}
        self._unauthenticated: dict[ConnectHandshake, float] = {}
        self._denied_log_rate: TokenBuckets[str] = TokenBuckets(*_DENIED_LOG_RATE)
        self._acceptor = SocketAcceptor(self._accepted)
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False
        self._gone = asyncio.Event()
        self._port = settings.port

    @property
    def port(self) -> int:
        """The port in use."""
        return self._port

    async def start(self) -> None:
        """Bind and accept.

        Raises:
            OSError: the address cannot be bound.
        """
        self._port = await self._acceptor.open(self.settings.host, self.settings.port)
        self._stopping = False
        self._tick()

    def clear_permission_caches(self) -> None:
        """What topics carry has changed: ask again about each that connected devices publish to."""
        for connection in self._connections:
            connection.clear_permission_cache()

    def pause(self) -> None:
        """Stop accepting, and reading every socket: TCP pushes back to the devices. Harmless when paused."""
        if not self.paused:
            self.paused = True
            self._acceptor.pause()
            for connection in self._connections:
                connection.pause(PauseReason.BACKPRESSURE)

    def resume(self) -> None:
        """Read and accept again, unless stopping. Harmless when not paused."""
        if self.paused and not self._stopping:
            self.paused = False
            self._acceptor.resume()
            for connection in self._connections:
                connection.resume(PauseReason.BACKPRESSURE)

    def stop_reading(self) -> None:
        """Accept nothing more and read nothing more; acknowledgements are still written."""
        self._stopping = True
        self._acceptor.close()
        for _, accepted in self._pending_transports.values():
            _shut_down_socket(accepted)
        self.pause()

    async def close(self, deadline_s: float = 2.0) -> None:
        """Say that the server is shutting down (0x8B in MQTT 5), close every connection, within the deadline.

        Wills are not published: it is the gateway that leaves, not the devices.
        """
        for connection in list(self._connections):
            connection.end(ReasonCode.SERVER_SHUTTING_DOWN, with_will=False)
        try:
            async with asyncio.timeout(deadline_s):
                while self._connections or self._pending_transports:
                    self._gone.clear()
                    await self._gone.wait()
        except TimeoutError:
            for connection in list(self._connections):
                connection.abort()
        if self._timer is not None:
            self._timer.cancel()

    async def stop(self, deadline_s: float = 2.0) -> None:
        """`stop_reading` and `close` at once, where nothing is left to commit."""
        self.stop_reading()
        await self.close(deadline_s)

    def opened(self, connection: DeviceConnection) -> bool:
        """Count in a connection whose transport is there; whether there is room for it. Called by it."""
        if self._pending_transports.pop(connection, None) is None and not self._has_room():
            return False
        if self._stopping:
            self._unauthenticated.pop(connection, None)
            return False
        self._connections.add(connection)
        self._unauthenticated.setdefault(connection, self.now_s)
        self.counters.connections_open += 1
        return True

    def connection_accepted(self, connection: ConnectHandshake) -> None:
        """A connection has been admitted. Called by it."""
        self._unauthenticated.pop(connection, None)

    def closed(self, connection: DeviceConnection) -> None:
        """Count out a connection. Called by it."""
        self._unauthenticated.pop(connection, None)
        if connection in self._connections:
            self._connections.remove(connection)
            self.counters.connections_open -= 1
        if not self._connections:
            self._gone.set()

    def log_denied_publish(self, name: str, topic: bytes) -> None:
        """Log that an identity published where it may not, once in a while. Called by connections."""
        if self._denied_log_rate.try_spend(name, now_s=self.now_s):
            _log.warning(
                "%r may not publish to %.200r; it is told so, and what it sends there is not stored",
                name,
                topic,
            )

    def _accepted(self, accepted: socket.socket) -> None:
        if not self._has_room():
            accepted.close()
            return
        connection = DeviceConnection(self)
        self._unauthenticated[connection] = self.now_s
        beginning = asyncio.get_running_loop().create_task(self._begin(connection, accepted), name="arriving")
        self._pending_transports[connection] = (beginning, accepted)

    async def _begin(self, connection: DeviceConnection, accepted: socket.socket) -> None:
        """Make the transport, after the handshake if there is TLS."""
        loop, settings = asyncio.get_running_loop(), self.settings
        try:
            await loop.connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=settings.ssl(loop.time()) if settings.ssl else None,
                ssl_handshake_timeout=settings.connect_timeout_s if settings.ssl else None,
            )
            connection.reapply_pause()
        except OSError as fault:  # also what ssl raises, and a handshake that takes too long
            self.counters.closed_total["tls_handshake"] += 1
            _log.debug("the handshake failed: %s", fault)
        finally:
            if self._pending_transports.pop(connection, None) is not None:  # it never got its transport
                self.closed(connection)

    def _has_room(self) -> bool:
        """Whether one more connection can be taken; the oldest stranger makes room if it must."""
        counters = self.counters
        counters.connections_total += 1
        if self._stopping:
            counters.refused_total["stopping"] += 1
            return False
        if len(self._connections) + len(self._pending_transports) < self.settings.max_connections:
            return True
        stranger, since_s = next(iter(self._unauthenticated.items()), (None, 0.0))
        if stranger is None or self.now_s - since_s < _EVICTION_GRACE_S:
            counters.refused_total["max_connections"] += 1
            return False
        del self._unauthenticated[stranger]
        counters.closed_total["made_room"] += 1
        if stranger in self._pending_transports:
            _shut_down_socket(self._pending_transports[stranger][1])
        else:
            stranger.abort()
        return True

    def tick(self, now_s: float) -> None:
        """Enforce the time limits of all connections and sessions."""
        self.now_s = now_s
        self._acceptor.retry()
        for connection in list(self._connections):
            connection.tick(now_s)
        self.sessions.expire(now_s=now_s)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self.tick(loop.time())
        self._timer = loop.call_later(_TICK_S, self._tick)


def _shut_down_socket(accepted: socket.socket) -> None:
    """End a connection during its handshake, which then fails; its transport closes the socket."""
    with contextlib.suppress(OSError):
        accepted.shutdown(socket.SHUT_RDWR)
