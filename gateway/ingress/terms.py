"""What the server answers to CONNECT and SUBSCRIBE: the terms of a connection. Pure.

Choices where the specification leaves one:

- SUBSCRIBE gets 0x83, "the SUBSCRIBE is valid but the Server does not accept it": 0x87 would say that other
  credentials help. Wildcards, shared subscriptions and subscription identifiers get the codes made for them
  (0xA2, 0x9E, 0xA1) instead of a disconnect, so that a device which also subscribes can still publish.
- Retain is not announced as unavailable: nobody subscribes, and many devices set the flag always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.ingress.packets import (
    V5,
    V311,
    Connack,
    Connect,
    Properties,
    Property,
    PropertyValue,
    ReasonCode,
    Subscribe,
)
from gateway.ingress.sessions import NEVER

if TYPE_CHECKING:
    from gateway.ingress.listener import ListenSettings

_CLIENT_ID_MAX_BYTES = 1024
_RETURN_CODES = {
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
class Terms:
    """What is in force on a connection.

    Attributes:
        silence_max_s: without a packet for so long the client is gone (one and a half times its keep alive);
            0 for never.
        session_expiry_s: how long the session outlives the connection; 0 for not at all.
        client_max_bytes: larger packets are not sent to the client; 0 for no limit.
        announced: the properties of CONNACK that say what differs from what the client may assume.
    """

    silence_max_s: float
    session_expiry_s: int
    client_max_bytes: int
    announced: Properties


def refusal_of(connect: Connect) -> ReasonCode | None:
    """Why a CONNECT is refused whoever sent it, or None."""
    if Property.AUTHENTICATION_METHOD in connect.properties:
        return ReasonCode.BAD_AUTHENTICATION_METHOD
    if not connect.client_id and connect.version == V311 and not connect.clean_start:
        return ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
    if len(connect.client_id.encode()) > _CLIENT_ID_MAX_BYTES:
        return ReasonCode.CLIENT_IDENTIFIER_NOT_VALID
    return None


def terms_of(connect: Connect, client_id: str, settings: ListenSettings) -> Terms:
    """The terms of a connection that is accepted under `client_id`."""
    if connect.version == V311:
        expiry_s = 0 if connect.clean_start else min(NEVER, settings.session_expiry_max_s)
        return Terms(1.5 * connect.keep_alive_s, expiry_s, 0, {})
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
    wanted_s = _number(connect, Property.SESSION_EXPIRY_INTERVAL)
    expiry_s = min(wanted_s, settings.session_expiry_max_s)
    if expiry_s != wanted_s:
        announced[Property.SESSION_EXPIRY_INTERVAL] = expiry_s
    return Terms(1.5 * keep_alive_s, expiry_s, _number(connect, Property.MAXIMUM_PACKET_SIZE), announced)


def refusing_connack(version: int | None, reason_code: int) -> Connack | None:
    """The CONNACK that refuses a connection, or None where only the close can speak."""
    if version == V5:
        return Connack(reason_code)
    if version is None or reason_code not in _RETURN_CODES:
        return None
    return Connack(_RETURN_CODES[ReasonCode(reason_code)])


def subscription_codes(subscribe: Subscribe, version: int) -> tuple[int, ...]:
    """The refusal of each topic filter, in order."""
    if version == V311:
        return (ReasonCode.UNSPECIFIED_ERROR,) * len(subscribe.filters)
    identified = Property.SUBSCRIPTION_IDENTIFIER in subscribe.properties
    return tuple(_subscription_code(name, identified=identified) for name, _ in subscribe.filters)


def _subscription_code(name: str, *, identified: bool) -> ReasonCode:
    if not name:
        return ReasonCode.TOPIC_FILTER_INVALID
    if name.startswith("$share/"):
        return ReasonCode.SHARED_SUBSCRIPTIONS_NOT_SUPPORTED
    if identified:
        return ReasonCode.SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED
    if "+" in name or "#" in name:
        return ReasonCode.WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED
    return ReasonCode.IMPLEMENTATION_SPECIFIC_ERROR


def _number(connect: Connect, key: Property) -> int:
    value = connect.properties.get(key, 0)
    assert isinstance(value, int)
    return value
