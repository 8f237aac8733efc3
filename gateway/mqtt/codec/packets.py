"""MQTT control packets as values, for MQTT 5.0 and 3.1.1, and the constants both share. Pure.

`parser.PacketParser` turns bytes into these, `packet_codec.encode_packet` turns them into bytes. A
`Publish` keeps its topic as bytes, which a `TopicCache` validates once per topic. Section numbers in the
MQTT modules are those of the OASIS standard MQTT Version 5.0 (7 March 2019); "3.1.1" in front of one means
MQTT Version 3.1.1 (29 October 2014).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final

import msgspec

V311: Final = 4
"""Protocol level of MQTT 3.1.1."""
V5: Final = 5
"""Protocol level of MQTT 5.0."""

AT_LEAST_ONCE: Final = 1
EXACTLY_ONCE: Final = 2
RESERVED_QOS: Final = 3
"""Both QoS bits set, which no packet may have."""

SESSION_NEVER_EXPIRES: Final = 0xFFFF_FFFF
"""Session Expiry Interval of a session that does not expire (section 3.1.2.11.2)."""


class PacketType(IntEnum):
    """Control packet types (section 2.1.2): the upper four bits of the first byte."""

    CONNECT = 1
    CONNACK = 2
    PUBLISH = 3
    PUBACK = 4
    PUBREC = 5
    PUBREL = 6
    PUBCOMP = 7
    SUBSCRIBE = 8
    SUBACK = 9
    UNSUBSCRIBE = 10
    UNSUBACK = 11
    PINGREQ = 12
    PINGRESP = 13
    DISCONNECT = 14
    AUTH = 15


REQUIRED_FLAGS = {PacketType.PUBREL: 2, PacketType.SUBSCRIBE: 2, PacketType.UNSUBSCRIBE: 2}
"""Lower four bits of the first byte, where they are not 0 (section 2.1.3); PUBLISH has its own."""


class ReasonCode(IntEnum):
    """Reason codes (section 2.4). 0x80 and above are failures."""

    SUCCESS = 0x00
    GRANTED_QOS_1 = 0x01
    GRANTED_QOS_2 = 0x02
    DISCONNECT_WITH_WILL = 0x04
    NO_MATCHING_SUBSCRIBERS = 0x10
    NO_SUBSCRIPTION_EXISTED = 0x11
    CONTINUE_AUTHENTICATION = 0x18
    REAUTHENTICATE = 0x19
    UNSPECIFIED_ERROR = 0x80
    MALFORMED_PACKET = 0x81
    PROTOCOL_ERROR = 0x82
    IMPLEMENTATION_SPECIFIC_ERROR = 0x83
    UNSUPPORTED_PROTOCOL_VERSION = 0x84
    CLIENT_IDENTIFIER_NOT_VALID = 0x85
    BAD_USER_NAME_OR_PASSWORD = 0x86
    NOT_AUTHORIZED = 0x87
    SERVER_UNAVAILABLE = 0x88
    SERVER_BUSY = 0x89
    BANNED = 0x8A
    SERVER_SHUTTING_DOWN = 0x8B
    BAD_AUTHENTICATION_METHOD = 0x8C
    KEEP_ALIVE_TIMEOUT = 0x8D
    SESSION_TAKEN_OVER = 0x8E
    TOPIC_FILTER_INVALID = 0x8F
    TOPIC_NAME_INVALID = 0x90
    PACKET_IDENTIFIER_IN_USE = 0x91
    PACKET_IDENTIFIER_NOT_FOUND = 0x92
    RECEIVE_MAXIMUM_EXCEEDED = 0x93
    TOPIC_ALIAS_INVALID = 0x94
    PACKET_TOO_LARGE = 0x95
    MESSAGE_RATE_TOO_HIGH = 0x96
    QUOTA_EXCEEDED = 0x97
    ADMINISTRATIVE_ACTION = 0x98
    PAYLOAD_FORMAT_INVALID = 0x99
    RETAIN_NOT_SUPPORTED = 0x9A
    QOS_NOT_SUPPORTED = 0x9B
    USE_ANOTHER_SERVER = 0x9C
    SERVER_MOVED = 0x9D
    SHARED_SUBSCRIPTIONS_NOT_SUPPORTED = 0x9E
    CONNECTION_RATE_EXCEEDED = 0x9F
    MAXIMUM_CONNECT_TIME = 0xA0
    SUBSCRIPTION_IDENTIFIERS_NOT_SUPPORTED = 0xA1
    WILDCARD_SUBSCRIPTIONS_NOT_SUPPORTED = 0xA2


def reason_code_name(reason_code: int) -> str:
    """The name of a reason code, in lower case: a key of counters."""
    return ReasonCode(reason_code).name.lower()


class Property(IntEnum):
    """Property identifiers (section 2.2.2.2)."""

    PAYLOAD_FORMAT_INDICATOR = 0x01
    MESSAGE_EXPIRY_INTERVAL = 0x02
    CONTENT_TYPE = 0x03
    RESPONSE_TOPIC = 0x08
    CORRELATION_DATA = 0x09
    SUBSCRIPTION_IDENTIFIER = 0x0B
    SESSION_EXPIRY_INTERVAL = 0x11
    ASSIGNED_CLIENT_IDENTIFIER = 0x12
    SERVER_KEEP_ALIVE = 0x13
    AUTHENTICATION_METHOD = 0x15
    AUTHENTICATION_DATA = 0x16
    REQUEST_PROBLEM_INFORMATION = 0x17
    WILL_DELAY_INTERVAL = 0x18
    REQUEST_RESPONSE_INFORMATION = 0x19
    RESPONSE_INFORMATION = 0x1A
    SERVER_REFERENCE = 0x1C
    REASON_STRING = 0x1F
    RECEIVE_MAXIMUM = 0x21
    TOPIC_ALIAS_MAXIMUM = 0x22
    TOPIC_ALIAS = 0x23
    MAXIMUM_QOS = 0x24
    RETAIN_AVAILABLE = 0x25
    USER_PROPERTY = 0x26
    MAXIMUM_PACKET_SIZE = 0x27
    WILDCARD_SUBSCRIPTION_AVAILABLE = 0x28
    SUBSCRIPTION_IDENTIFIER_AVAILABLE = 0x29
    SHARED_SUBSCRIPTION_AVAILABLE = 0x2A


PropertyValue = int | str | bytes | tuple[int, ...] | tuple[tuple[str, str], ...]
Properties = Mapping[Property, PropertyValue]
"""Properties by identifier. USER_PROPERTY is a tuple of (name, value); SUBSCRIPTION_IDENTIFIER is a tuple of
int in PUBLISH, an int in SUBSCRIBE."""

NO_PROPERTIES: Final[Properties] = MappingProxyType({})


def int_property(properties: Properties, key: Property, default: int = 0) -> int:
    """The value of a property that is an integer."""
    value = properties.get(key, default)
    assert isinstance(value, int)
    return value


class MqttProtocolError(Exception):
    """Bytes that break the protocol. `reason_code` is what MQTT 5 tells the peer about it."""

    def __init__(self, reason_code: int, message: str) -> None:
        super().__init__(message)
        self.reason_code = reason_code


class Publish(msgspec.Struct, gc=False):
    """PUBLISH (section 3.3). `packet_id` is 0 at QoS 0; a parsed `topic` is valid, its alias resolved."""

    topic: bytes
    payload: bytes
    packet_id: int = 0
    qos: int = 0
    retain: bool = False
    dup: bool = False
    properties: Properties = NO_PROPERTIES


class Will(msgspec.Struct, frozen=True):
    """The will message of a CONNECT (section 3.1.2.5)."""

    topic: bytes
    payload: bytes
    qos: int = 0
    retain: bool = False
    properties: Properties = NO_PROPERTIES


class Connect(msgspec.Struct, frozen=True):
    """CONNECT (section 3.1). `clean_start` is Clean Session in 3.1.1; `keep_alive_s` 0 means none."""

    client_id: str
    version: int = V5
    clean_start: bool = True
    keep_alive_s: int = 0
    username: str | None = None
    password: bytes | None = None
    will: Will | None = None
    properties: Properties = NO_PROPERTIES


class Connack(msgspec.Struct, frozen=True):
    """CONNACK (section 3.2). `code` is a reason code in MQTT 5, a return code 0-5 in 3.1.1."""

    code: int = 0
    session_present: bool = False
    properties: Properties = NO_PROPERTIES


class PublishAck(msgspec.Struct, frozen=True):
    """PUBACK, PUBREC, PUBREL or PUBCOMP (sections 3.4 to 3.7). 3.1.1 sends no reason code."""

    kind: PacketType
    packet_id: int
    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


class Subscribe(msgspec.Struct, frozen=True):
    """SUBSCRIBE (section 3.8). `filters` holds (topic filter, options byte); in 3.1.1 options are the QoS."""

    packet_id: int
    filters: tuple[tuple[str, int], ...]
    properties: Properties = NO_PROPERTIES


class Suback(msgspec.Struct, frozen=True):
    """SUBACK (section 3.9), one code per topic filter."""

    packet_id: int
    codes: tuple[int, ...]
    properties: Properties = NO_PROPERTIES


class Unsubscribe(msgspec.Struct, frozen=True):
    """UNSUBSCRIBE (section 3.10)."""

    packet_id: int
    filters: tuple[str, ...]
    properties: Properties = NO_PROPERTIES


class Unsuback(msgspec.Struct, frozen=True):
    """UNSUBACK (section 3.11), one code per topic filter; 3.1.1 sends none."""

    packet_id: int
    codes: tuple[int, ...] = ()
    properties: Properties = NO_PROPERTIES


class Pingreq(msgspec.Struct, frozen=True):
    """PINGREQ (section 3.12)."""


class Pingresp(msgspec.Struct, frozen=True):
    """PINGRESP (section 3.13)."""


class Disconnect(msgspec.Struct, frozen=True):
    """DISCONNECT (section 3.14). 3.1.1 sends neither code nor properties."""

    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


class Auth(msgspec.Struct, frozen=True):
    """AUTH (section 3.15), MQTT 5 only."""

    reason_code: int = 0
    properties: Properties = NO_PROPERTIES


Packet = (
    Publish
    | Connect
    | Connack
    | PublishAck
    | Subscribe
    | Suback
    | Unsubscribe
    | Unsuback
    | Pingreq
    | Pingresp
    | Disconnect
    | Auth
)


def check_topic_name(topic: bytes) -> None:
    """Raise MqttProtocolError for a topic name that may not be published to (section 4.7)."""
    if not topic:
        raise MqttProtocolError(ReasonCode.PROTOCOL_ERROR, "an empty topic without a topic alias")
    if b"+" in topic or b"#" in topic:
        raise MqttProtocolError(ReasonCode.TOPIC_NAME_INVALID, "a wildcard in a topic name")
    if b"\0" in topic:
        raise MqttProtocolError(ReasonCode.MALFORMED_PACKET, "U+0000 in a topic name")
    try:
        topic.decode()
    except UnicodeDecodeError:
        raise MqttProtocolError(ReasonCode.MALFORMED_PACKET, "a topic name is not UTF-8") from None


_CACHED_TOPIC_MAX_BYTES = 256


class TopicCache(dict[bytes, bytes]):
    """Valid topics, each its own value: `cache[topic]` checks a new one and returns one shared object.

    Holds at most `limit` topics of ordinary length; a new one beyond that empties it first, so that hostile
    topics cost checks, not memory.
    """

    def __init__(self, limit: int = 50_000) -> None:
        super().__init__()
        self._limit = limit

    def __missing__(self, topic: bytes) -> bytes:
        check_topic_name(topic)
        if len(topic) > _CACHED_TOPIC_MAX_BYTES:
            return topic
        if len(self) >= self._limit:
            self.clear()
        self[topic] = topic
        return topic
