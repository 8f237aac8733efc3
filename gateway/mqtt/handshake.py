"""CONNECT to CONNACK: validation, authentication, session parameters, session takeover.

awaiting CONNECT ──> (authenticating) ──> connected ──> closing

Choices where the specification leaves one:

- SUBSCRIBE gets 0x83: 0x87 would say that other credentials help. Wildcards, shared subscriptions and
  subscription identifiers get their own codes (0xA2, 0x9E, 0xA1) instead of a disconnect, so that such a
  device can still publish.
- Retain is not announced as unavailable: nobody subscribes, and many devices always set the flag.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import secrets
from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

from gateway.auth.authenticator import Identity, PublishPermissions, Refusal
from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import (
    V5,
    V311,
    Connack,
    Connect,
    Disconnect,
    Packet,
    Properties,
    Property,
    PropertyValue,
    ReasonCode,
    Subscribe,
    Will,
)
from gateway.mqtt.codec.parser import PacketParser, ParsedItem
from gateway.mqtt.session_state import SESSION_NEVER_EXPIRES, DeviceSession
from gateway.mqtt.transport import MqttTransport, PauseReason

if TYPE_CHECKING:
    from gateway.mqtt.server import MqttServer, MqttServerOptions

_CLIENT_ID_MAX_BYTES = 1024
_CONNACK_RETURN_CODES = {
    ReasonCode.UNSUPPORTED_PROTOCOL_VERSION: 1,
    ReasonCode.CLIENT_IDENTIFIER_NOT_VALID: 2,
    ReasonCode.SERVER_UNAVAILABLE: 3,
    ReasonCode.SERVER_BUSY: 3,
    ReasonCode.QUOTA_EXCEEDED: 3,
    ReasonCode.CONNECTION_RATE_EXCEEDED: 3,
    ReasonCode.BAD_USER_NAME_OR_PASSWORD: 4,
    ReasonCode.BANNED: 5,
    ReasonCode.NOT_AUTHORIZED: 5,
}
"""CONNACK return codes of 3.1.1 (its section 3.2.2.3). Without one the connection is closed in silence."""


@dataclass(frozen=True, slots=True)
class SessionParameters:
    """What is in force on a connection.

    Attributes:
        silence_max_s: without a packet for so long the client is gone (one and a half times its keep alive);
            0 for never.
        session_expiry_s: how long the session outlives the connection; 0 for not at all.
        client_max_bytes: larger packets are not sent to the client; 0 for no limit.
        announced: the properties of CONNACK that say what differs from what the client may assume.
    """

    keep_alive_timeout_s: float
    session_expiry_s: int
    client_max_packet_bytes: int
    announced: Properties


def find_connect_refusal(connect: Connect) -> ReasonCode | None:
    """Why a CONNECT is refused whoever sent it, or None."""
    if Property.AUTHENTICATION_METHOD in connect.properties:
        return ReasonCode.BAD_AUTHENTICATION_METHOD
    if not connect.client_id and connect.version == V311 and not connect.clean_start:
        return ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
    if len(connect.client_id.encode()) > _CLIENT_ID_MAX_BYTES:
        return ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
    return None


def negotiate_session_parameters(
    connect: Connect, client_id: str, settings: MqttServerOptions
) -> SessionParameters:
    """The terms of a connection that is accepted under `client_id`."""
    if connect.version == V311:
        expiry_s = 0 if connect.clean_start else min(SESSION_NEVER_EXPIRES, settings.session_expiry_max_s)
        return SessionParameters(1.5 * connect.keep_alive_s, expiry_s, 0, {})
    announced: dict[Property, PropertyValue] = {
        Property.RECEIVE_MAXIMUM: settings.receive_maximum,
        Property.MAXIMUM_PACKET_SIZE: settings.max_packet_bytes,
        Property.TOPIC_ALIAS_MAXIMUM: settings.topic_alias_maximum,
        Property.WILDCARD_SUBSCRIPTION_AVAILABLE: 0,
        Property.SUBSCRIPTION_IDENTIFIER_AVAILABLE: 0,
        Property.SHARED_SUBSCRIPTION_AVAILABLE: 0,
    }
    if not connect.client_id:
        announced[Property.ASSIGNED_CLIENT_IDENTIFIER] = client_id
    keep_alive_s = connect.keep_alive_s
    if settings.keep_alive_max_s and not 0 < keep_alive_s <= settings.keep_alive_max_s:
        keep_alive_s = announced[Property.SERVER_KEEP_ALIVE] = settings.keep_alive_max_s
    wanted_s = _int_property(connect, Property.SESSION_EXPIRY_INTERVAL)
    expiry_s = min(wanted_s, settings.session_expiry_max_s)
    if expiry_s != wanted_s:
        announced[Property.SESSION_EXPIRY_INTERVAL] = expiry_s
    return SessionParameters(
        1.5 * keep_alive_s, expiry_s, _int_property(connect, Property.MAXIMUM_PACKET_SIZE), announced
    )


def build_refusal_connack(version: int | None, reason_code: int) -> Connack | None:
    """The CONNACK that refuses a connection, or None where only the close can speak."""
    if version == V5:
        return Connack(reason_code)
    if version is None or reason_code not in _CONNACK_RETURN_CODES:
        return None
    return Connack(_CONNACK_RETURN_CODES[ReasonCode(reason_code)])


def subscription_refusal_codes(subscribe: Subscribe, version: int) -> tuple[int, ...]:
    """The refusal of each topic filter, in order."""
    if version == V311:
        return (ReasonCode.UNSPECIFIED_ERROR,) * len(subscribe.filters)
    identified = Property.SUBSCRIPTION_IDENTIFIER in subscribe.properties
    return tuple(_subscription_refusal_code(name, identified=identified) for name, _ in subscribe.filters)


def _subscription_refusal_code(name: str, *, identified: bool) -> ReasonCode:
    if not name:
        return ReasonCode.TOPIC_FILTER_INVALID
    if name.startswith("$share/"):
        return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
    if identified:
        return ReasonCode.SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED
    if "+" in name or "#" in name:
        return ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
    return ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR


def _int_property(connect: Connect, key: Property) -> int:
    value = connect.properties.get(key, 0)
    assert isinstance(value, int)
    return value


_log = logging.getLogger(__name__)


class ConnectionState(Enum):
    """Where a connection is."""

    AWAITING_CONNECT = auto()
    AUTHENTICATING = auto()
    CONNECTED = auto()


class ConnectHandshake(MqttTransport):
    """What a connection knows of its client, and how it came to know it."""

    def __init__(self, listener: MqttServer) -> None:
        super().__init__(listener)
        self._parser = PacketParser(
            max_packet_bytes=listener.settings.max_packet_bytes,
            topics=listener.topics,
            topic_alias_maximum=listener.settings.topic_alias_maximum,
        )
        self._state = ConnectionState.AWAITING_CONNECT
        self._client_id = ""
        self._client_key = ""
        self._identity: Identity | None = None
        self._session = DeviceSession()
        self._session_expiry_s = 0
        self._terms = SessionParameters(0, 0, 0, {})
        self._will: Will | None = None
        self._permissions: PublishPermissions | None = None
        self._deferred: list[ParsedItem] = []
        self._authentication: asyncio.Task[Identity | Refusal] | None = None

    @abstractmethod
    def end(self, reason_code: ReasonCode, *, with_will: bool = True) -> None:
        """Close from this side."""

    @abstractmethod
    def _take(self, items: list[ParsedItem]) -> None:
        """Act on what came while the client was being admitted."""

    def _connect(self, packet: Connect) -> None:
        refusal = find_connect_refusal(packet)
        if refusal is not None:
            self._refuse_connect(refusal)
            return
        self._client_id = packet.client_id or f"tidegate-{secrets.token_hex(8)}"
        outcome = self.listener.authenticator.authenticate(
            self._client_id,
            packet.username,
            packet.password,
            self.transport.get_extra_info("peercert") or None,
            self._address(),
        )
        if isinstance(outcome, Identity | Refusal):
            self._complete_handshake(packet, outcome)
            return
        self._state = ConnectionState.AUTHENTICATING
        self.since_s = self.listener.now_s
        self.pause(PauseReason.AUTHENTICATION)
        self._authentication = asyncio.get_running_loop().create_task(
            _await_decision(outcome), name=f"admit {self._client_id}"
        )
        self._authentication.add_done_callback(lambda task: self._authentication_done(packet, task))

    def _authentication_done(self, packet: Connect, task: asyncio.Task[Identity | Refusal]) -> None:
        if self.closing:
            return
        if task.cancelled() or task.exception() is not None:
            _log.error("the authenticator failed for %r", self._client_id, exc_info=task.exception())
            self._refuse_connect(ReasonCode.SERVER_UNAVAILABLE)
            return
        self._complete_handshake(packet, task.result())
        self.resume(PauseReason.AUTHENTICATION)
        items, self._deferred = self._deferred, []
        if not self.closing:
            self._take(items)

    def clear_permission_cache(self) -> None:
        """What topics carry has changed: ask again about each that is published to."""
        if self._permissions is not None:
            self._permissions.forget()

    def _complete_handshake(self, packet: Connect, outcome: Identity | Refusal) -> None:
        if isinstance(outcome, Refusal):
            self._refuse_connect(outcome.reason_code)
            return
        permit = None if outcome.may_publish is None else PublishPermissions(outcome.may_publish)
        if packet.will is not None and permit is not None and not permit.allows(packet.will.topic):
            self._refuse_connect(ReasonCode.NOT_AUTHORIZED)
            return
        self._permissions = permit
        self._identity = outcome
        self._client_key = self._client_id
        if outcome.scope:
            self._client_key = f"{outcome.scope}\0{self._client_id}"  # NUL is in no string of MQTT
        self._will = packet.will
        self._terms = negotiate_session_parameters(packet, self._client_id, self.listener.settings)
        self._session_expiry_s = self._terms.session_expiry_s
        present = self._take_over_session(packet)
        self._state = ConnectionState.CONNECTED
        self.since_s = self.listener.now_s
        self.listener.connection_accepted(self)
        self._send(Connack(0, present, self._terms.announced))

    def _take_over_session(self, packet: Connect) -> bool:
        """Take over the client identifier and its session; whether a session was there."""
        listener = self.listener
        session = listener.sessions.claim(self._client_key)
        previous = listener.clients.get(self._client_key)
        if previous is not None:
            session = previous.release_session()
        listener.clients[self._client_key] = self
        present = session is not None and not packet.clean_start
        if present:
            assert session is not None
            self._session = session
        self._session.connection = self
        return present

    def release_session(self) -> DeviceSession | None:
        """Give way to a new connection of the client: DISCONNECT 0x8E. Returns the session if it lives on."""
        if self._will is not None and self._will.properties.get(Property.WILL_DELAY_INTERVAL):
            self._will = None
        session = self._session if self._session_expiry_s else None
        self._session.connection = None
        self.end(ReasonCode.SESSION_TAKEN_OVER)
        return session

    def _address(self) -> str:
        peer = self.transport.get_extra_info("peername")
        return str(peer[0]) if peer else ""

    def _refuse_connect(self, reason_code: int) -> None:
        self.counters.refused_total[reason_code_name(reason_code)] += 1
        self._state = ConnectionState.AWAITING_CONNECT
        self._send_close_reason(reason_code)
        self.hang_up()

    def _send_close_reason(self, reason_code: int) -> None:
        """CONNACK or DISCONNECT with the code, as far as the version and the state have one."""
        if self._state is ConnectionState.CONNECTED:
            if self._version == V5:
                self._send(Disconnect(reason_code))
            return
        refusal = build_refusal_connack(self._parser.version, reason_code)
        if refusal is not None:
            self._send(refusal)

    @property
    def _version(self) -> int:
        return self._parser.version or V5

    def _send(self, packet: Packet) -> None:
        out = encode_packet(packet, self._version)
        if not 0 < self._terms.client_max_packet_bytes < len(out):
            self.write(out)


def reason_code_name(reason_code: int) -> str:
    """The name of a reason code, in lower case: what counters call it."""
    return ReasonCode(reason_code).name.lower()


async def _await_decision(outcome: Any) -> Identity | Refusal:
    assert inspect.isawaitable(outcome)
    answer = await outcome
    assert isinstance(answer, Identity | Refusal)
    return answer
