"""CONNECT to CONNACK: validation, the authenticator's decision, and the parameters of the session. No I/O.

Retain is not announced as unavailable: nobody subscribes, and many devices always set the flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.auth.authenticator import Identity, Refusal
from gateway.mqtt.codec.packets import (
    SESSION_NEVER_EXPIRES,
    V5,
    V311,
    Connack,
    Connect,
    Properties,
    Property,
    PropertyValue,
    Publish,
    ReasonCode,
    int_property,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.mqtt.context import MqttServerOptions

_CACHED_TOPICS_MAX: Final = 1000
_CLIENT_ID_MAX_BYTES: Final = 1024
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


class PublishPermissions:
    """What one connection may publish: its identity's rule, asked once per topic (of a bounded number)."""

    __slots__ = ("_answers", "_rule")

    def __init__(self, rule: Callable[[bytes], bool]) -> None:
        self._rule = rule
        self._answers: dict[bytes, bool] = {}

    def allows(self, topic: bytes) -> bool:
        """Whether `topic` may be published to."""
        answer = self._answers.get(topic)
        if answer is None:
            if len(self._answers) >= _CACHED_TOPICS_MAX:
                self._answers.clear()
            answer = self._answers[topic] = self._rule(topic)
        return answer

    def clear_cache(self) -> None:
        """Ask the rule about each topic again."""
        self._answers.clear()

    def split(self, publishes: list[Publish]) -> tuple[list[Publish], list[Publish]]:
        """Those that are allowed, and those that are denied, each in order."""
        allowed: list[Publish] = []
        denied: list[Publish] = []
        for publish in publishes:
            (allowed if self.allows(publish.topic) else denied).append(publish)
        return allowed, denied


@dataclass(frozen=True, slots=True)
class SessionParameters:
    """An accepted client and what is in force on its connection; a time or size of 0 is no limit.

    Attributes:
        client_key: the client identifier, unique beyond the identity's scope.
        permissions: None when every topic may be published to.
        announced: properties of CONNACK: what differs from what the client may assume.
    """

    client_key: str
    identity: Identity
    permissions: PublishPermissions | None
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


def decide_connect(
    connect: Connect, client_id: str, outcome: Identity | Refusal, options: MqttServerOptions
) -> SessionParameters | Refusal:
    """Accept or refuse a valid CONNECT, given the authenticator's decision.

    `client_id` is the one in effect, assigned when the client sent none.
    """
    if isinstance(outcome, Refusal):
        return outcome
    permissions = None if outcome.may_publish is None else PublishPermissions(outcome.may_publish)
    if connect.will is not None and permissions is not None and not permissions.allows(connect.will.topic):
        return Refusal(ReasonCode.NOT_AUTHORIZED)
    scope = outcome.client_id_scope
    client_key = f"{scope}\0{client_id}" if scope else client_id  # NUL is in no string of MQTT
    keep_alive_s = connect.keep_alive_s
    announced: dict[Property, PropertyValue] = {}
    if connect.version == V311:
        expiry_s = 0 if connect.clean_start else min(SESSION_NEVER_EXPIRES, options.session_expiry_max_s)
    else:
        announced = {
            Property.RECEIVE_MAXIMUM: options.receive_maximum,
            Property.MAXIMUM_PACKET_SIZE: options.max_packet_bytes,
            Property.TOPIC_ALIAS_MAXIMUM: options.topic_alias_maximum,
            Property.WILDCARD_SUBSCRIPTION_AVAILABLE: 0,
            Property.SUBSCRIPTION_IDENTIFIER_AVAILABLE: 0,
            Property.SHARED_SUBSCRIPTION_AVAILABLE: 0,
        }
        if not connect.client_id:
            announced[Property.ASSIGNED_CLIENT_IDENTIFIER] = client_id
        if options.keep_alive_max_s and not 0 < keep_alive_s <= options.keep_alive_max_s:
            keep_alive_s = announced[Property.SERVER_KEEP_ALIVE] = options.keep_alive_max_s
        requested_s = int_property(connect.properties, Property.SESSION_EXPIRY_INTERVAL)
        expiry_s = min(requested_s, options.session_expiry_max_s)
        if expiry_s != requested_s:
            announced[Property.SESSION_EXPIRY_INTERVAL] = expiry_s
    return SessionParameters(
        client_key,
        outcome,
        permissions,
        1.5 * keep_alive_s,
        expiry_s,
        int_property(connect.properties, Property.MAXIMUM_PACKET_SIZE),
        announced,
    )


def build_refusal_connack(version: int | None, reason_code: int) -> Connack | None:
    """The CONNACK that refuses a connection, or None where the version has none for it."""
    if version == V5:
        return Connack(reason_code)
    if version is None or reason_code not in _CONNACK_RETURN_CODES:
        return None
    return Connack(_CONNACK_RETURN_CODES[ReasonCode(reason_code)])
