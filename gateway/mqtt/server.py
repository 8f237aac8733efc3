"""The MQTT server that devices publish to (`listen`). Not a broker: publishes go to the publish sink only.

Owns the listening sockets and one timer for every time limit.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from cloud_sync.runtime.server_sockets import SocketAcceptor
from gateway.auth.authenticator import AnonymousAuthenticator
from gateway.mqtt.codec.packets import ReasonCode
from gateway.mqtt.connection import DeviceConnection
from gateway.mqtt.context import ListenStatus, MqttServerOptions, ServerContext, shut_down_socket
from gateway.mqtt.session_state import CommandSubscriptions
from gateway.mqtt.transport import PauseReason

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from cloud_sync.runtime.watchdog import StageProgress
    from gateway.auth.authenticator import Authenticator
    from gateway.ingress.source import PublishSink

_TICK_S: Final = 1.0
_CLOSE_TIMEOUT_S: Final = 2.0

_log = logging.getLogger(__name__)


class MqttServer:
    """Implements `Source`."""

    kind = name = "listen"
    stages: Sequence[StageProgress] = ()

    def __init__(
        self,
        options: MqttServerOptions,
        sink: PublishSink,
        authenticator: Authenticator | None = None,
        commands: CommandSubscriptions | None = None,
    ) -> None:
        self.context = ServerContext(
            options,
            sink,
            AnonymousAuthenticator() if authenticator is None else authenticator,
            CommandSubscriptions() if commands is None else commands,
        )
        self.port = options.port
        self._acceptor = SocketAcceptor(self._accepted)
        self._timer: asyncio.Task[None] | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Bind and accept; `port` is then the one in use. OSError when the address cannot be bound."""
        options = self.context.options
        self.port = await self._acceptor.open(options.host, options.port)
        self.context.now_s = asyncio.get_running_loop().time()
        self._timer = tasks.create_task(self._run_timer(), name="mqtt server timer")

    def reconfigure(self, *, max_connections: int, max_packet_bytes: int) -> None:
        """Change limits for new connections."""
        self.context.options = replace(
            self.context.options, max_connections=max_connections, max_packet_bytes=max_packet_bytes
        )

    def clear_permission_caches(self) -> None:
        """Check permissions again for each topic: the rules for topics have changed."""
        for connection in self.context.connections:
            connection.clear_permission_cache()

    def publish(self, topic: bytes, payload: bytes) -> bool:
        """Send a command to the device that has subscribed to it; whether one has."""
        return self.context.commands.publish(topic, payload)

    def status(self) -> ListenStatus:
        """Its part of the status document."""
        return copy.deepcopy(self.context.counters)

    def pause(self) -> None:
        """Stop accepting, and reading every socket: TCP pushes back to the devices. Harmless when paused."""
        if not self.context.paused:
            self.context.paused = True
            self._acceptor.pause()
            for connection in self.context.connections:
                connection.transport.pause(PauseReason.BACKPRESSURE)

    def resume(self) -> None:
        """Read and accept again, unless stopping. Harmless when not paused."""
        if self.context.paused and not self.context.stopping:
            self.context.paused = False
            self._acceptor.resume()
            for connection in self.context.connections:
                connection.transport.resume(PauseReason.BACKPRESSURE)

    def stop_reading(self) -> None:
        """Accept nothing more and read nothing more; acknowledgements are still written."""
        self.context.stopping = True
        self._acceptor.close()
        for _, accepted in self.context.pending.values():
            shut_down_socket(accepted)
        self.pause()

    async def close(self, deadline_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Close every connection (0x8B in MQTT 5), without wills: it is the gateway that leaves."""
        connections = self.context.connections
        self.stop_reading()
        for connection in list(connections):
            connection.end(ReasonCode.SERVER_SHUTTING_DOWN, with_will=False)
        try:
            async with asyncio.timeout(deadline_s):
                while connections or self.context.pending:
                    self.context.all_closed.clear()
                    await self.context.all_closed.wait()
        except TimeoutError:
            for connection in list(connections):
                connection.transport.abort()
        if self._timer is not None:
            self._timer.cancel()

    def _accepted(self, accepted: socket.socket) -> None:
        if not self.context.make_room():
            accepted.close()
            return
        connection = DeviceConnection(self.context)
        handshake = asyncio.get_running_loop().create_task(
            self._make_connection(connection, accepted), name="mqtt accept"
        )
        self.context.add_pending(connection, handshake, accepted)

    async def _make_connection(self, connection: DeviceConnection, accepted: socket.socket) -> None:
        """Make the transport, after the handshake if there is TLS."""
        loop, context, options = asyncio.get_running_loop(), self.context, self.context.options
        try:
            await loop.connect_accepted_socket(
                lambda: connection.transport,
                accepted,
                ssl=options.ssl() if options.ssl else None,
                ssl_handshake_timeout=options.connect_timeout_s if options.ssl else None,
            )
            connection.transport.reapply_pause()
        except OSError as fault:  # also what ssl raises, and a handshake that takes too long
            context.counters.closed["tls_handshake"] += 1
            _log.debug("the TLS handshake failed: %s", fault)
        finally:
            if context.pending.pop(connection, None) is not None:  # it never got its transport
                context.remove_connection(connection)

    def tick(self, now_s: float) -> None:
        """Enforce the time limits of all connections and sessions."""
        self.context.now_s = now_s
        self._acceptor.retry()
        for connection in list(self.context.connections):
            connection.tick(now_s)
        self.context.sessions.expire(now_s=now_s)

    async def _run_timer(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick(asyncio.get_running_loop().time())
