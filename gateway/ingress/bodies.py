"""The bodies of control packets, read from `Fields`: every packet but PUBLISH. Pure.

What a packet may not hold is refused here: reserved bits, codes and properties that do not belong to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.ingress.packets import (
    NO_PROPERTIES,
    V5,
    V311,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    PacketType,
    Pingreq,
    Pingresp,
    Properties,
    Reply,
    Suback,
    Subscribe,
    TopicTable,
    Unsuback,
    Unsubscribe,
    Will,
)
from gateway.ingress.properties import WILL, Fields, broken, malformed, read_properties

if TYPE_CHECKING:
    from collections.abc import Callable


_PROTOCOL_NAMES = (b"MQTT", b"MQIsdp")
"""Of 3.1.1 and 5, and of 3.1, whose clients are told that their version is not spoken."""


def read_level(fields: Fields) -> tuple[str, int]:
    """The protocol's name and level, with which CONNECT begins."""
    name, level = fields.binary(), fields.u8()
    if name not in _PROTOCOL_NAMES:
        raise broken("the protocol name is not MQTT")
    return name.decode(), level


def read_connect(fields: Fields, version: int, topics: TopicTable) -> Connect:
    """CONNECT after its protocol level."""
    flags, keep_alive_s = fields.u8(), fields.u16()
    has_will, will_qos = bool(flags & 0x04), flags >> 3 & 3
    if flags & 1 or will_qos == 3 or (not has_will and flags & 0x38):  # noqa: PLR2004 - both QoS bits set
        raise malformed(f"connect flags {flags:#04x}")
    if version == V311 and flags & 0x40 and not flags & 0x80:
        raise malformed("a password without a user name")
    properties = read_properties(fields, PacketType.CONNECT) if version == V5 else NO_PROPERTIES
    client_id = fields.text()
    will = None
    if has_will:
        will_properties = read_properties(fields, WILL) if version == V5 else NO_PROPERTIES
        topic = topics[fields.binary()]
        will = Will(topic, fields.binary(), will_qos, bool(flags & 0x20), will_properties)
    return Connect(
        client_id,
        version,
        bool(flags & 2),
        keep_alive_s,
        fields.text() if flags & 0x80 else None,
        fields.binary() if flags & 0x40 else None,
        will,
        properties,
    )


def _read_connack(_kind: PacketType, fields: Fields, version: int) -> Connack:
    flags, code = fields.u8(), fields.u8()
    if flags > 1 or (flags and code):
        raise malformed(f"CONNACK with flags {flags:#04x} and code {code:#04x}")
    if code not in (CODES[PacketType.CONNACK] if version == V5 else range(6)):
        raise broken(f"CONNACK with code {code:#04x}")
    return Connack(
        code, bool(flags), read_properties(fields, PacketType.CONNACK) if version == V5 else NO_PROPERTIES
    )


def _read_reply(kind: PacketType, fields: Fields, version: int) -> Reply:
    packet_id = fields.packet_id()
    if version != V5 or fields.at == fields.stop:
        return Reply(kind, packet_id)
    code, properties = _read_reason(kind, fields)
    return Reply(kind, packet_id, code, properties)


def _read_reason(kind: PacketType, fields: Fields) -> tuple[int, Properties]:
    """A reason code and properties; the latter may be left out (sections 3.4.2.2, 3.14.2.2)."""
    code = fields.u8()
    if code not in CODES[kind]:
        raise broken(f"{kind.name} with reason code {code:#04x}")
    return code, read_properties(fields, kind) if fields.at < fields.stop else NO_PROPERTIES


def _read_subscribe(_kind: PacketType, fields: Fields, version: int) -> Subscribe:
    packet_id = fields.packet_id()
    properties = read_properties(fields, PacketType.SUBSCRIBE) if version == V5 else NO_PROPERTIES
    filters = []
    while fields.at < fields.stop:
        name, options = fields.text(), fields.u8()
        reserved = 0xC0 if version == V5 else 0xFC
        if options & 3 == 3 or options & reserved:  # noqa: PLR2004 - both QoS bits set
            raise malformed(f"subscription options {options:#04x}")
        if options & 0x30 == 0x30:  # noqa: PLR2004 - retain handling 3
            raise broken("retain handling 3")
        filters.append((name, options))
    if not filters:
        raise broken("SUBSCRIBE without a topic filter")
    return Subscribe(packet_id, tuple(filters), properties)


def _read_unsubscribe(_kind: PacketType, fields: Fields, version: int) -> Unsubscribe:
    packet_id = fields.packet_id()
    properties = read_properties(fields, PacketType.UNSUBSCRIBE) if version == V5 else NO_PROPERTIES
    filters = []
    while fields.at < fields.stop:
        filters.append(fields.text())
    if not filters:
        raise broken("UNSUBSCRIBE without a topic filter")
    return Unsubscribe(packet_id, tuple(filters), properties)


def _read_suback(_kind: PacketType, fields: Fields, version: int) -> Suback:
    packet_id = fields.packet_id()
    properties = read_properties(fields, PacketType.SUBACK) if version == V5 else NO_PROPERTIES
    codes = tuple(fields.rest())
    if not codes or not CODES[PacketType.SUBACK].issuperset(codes):
        raise broken("SUBACK without codes or with one that is none")
    return Suback(packet_id, codes, properties)


def _read_unsuback(_kind: PacketType, fields: Fields, version: int) -> Unsuback:
    packet_id = fields.packet_id()
    if version != V5:
        return Unsuback(packet_id)
    properties = read_properties(fields, PacketType.UNSUBACK)
    codes = tuple(fields.rest())
    if not codes or not CODES[PacketType.UNSUBACK].issuperset(codes):
        raise broken("UNSUBACK without codes or with one that is none")
    return Unsuback(packet_id, codes, properties)


def _read_disconnect(kind: PacketType, fields: Fields, version: int) -> Disconnect:
    if version != V5 or fields.at == fields.stop:
        return Disconnect()
    return Disconnect(*_read_reason(kind, fields))


def _read_auth(kind: PacketType, fields: Fields, version: int) -> Auth:
    if version != V5:
        raise malformed("packet type 15 in MQTT 3.1.1")
    if fields.at == fields.stop:
        return Auth()
    return Auth(*_read_reason(kind, fields))


def read_body(kind: PacketType, fields: Fields, version: int, *, from_server: bool) -> Packet:
    """The packet of type `kind`, which is neither CONNECT nor PUBLISH, up to the end of its body.

    Raises:
        ProtocolFault: malformed or a protocol error; never anything else.
    """
    packet = _BODY[kind](kind, fields, version)
    fields.finish()
    if isinstance(packet, Disconnect):
        if from_server and version != V5:
            raise broken("DISCONNECT from a server of MQTT 3.1.1")
        if packet.reason_code not in (_DISCONNECT_BY_SERVER if from_server else _DISCONNECT_BY_CLIENT):
            raise broken(f"DISCONNECT with reason code {packet.reason_code:#04x} from the wrong side")
    return packet


_BODY: dict[PacketType, Callable[[PacketType, Fields, int], Packet]] = {
    PacketType.CONNACK: _read_connack,
    PacketType.PUBACK: _read_reply,
    PacketType.PUBREC: _read_reply,
    PacketType.PUBREL: _read_reply,
    PacketType.PUBCOMP: _read_reply,
    PacketType.SUBSCRIBE: _read_subscribe,
    PacketType.SUBACK: _read_suback,
    PacketType.UNSUBSCRIBE: _read_unsubscribe,
    PacketType.UNSUBACK: _read_unsuback,
    PacketType.PINGREQ: lambda _kind, _fields, _version: Pingreq(),
    PacketType.PINGRESP: lambda _kind, _fields, _version: Pingresp(),
    PacketType.DISCONNECT: _read_disconnect,
    PacketType.AUTH: _read_auth,
}

_PUBLISH_CODES = frozenset({0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99})
_RELEASE_CODES = frozenset({0x00, 0x92})
_DISCONNECT_BY_CLIENT = frozenset({0x00, 0x04, *range(0x80, 0x84), 0x90, *range(0x93, 0x9A)})
_DISCONNECT_BY_SERVER = frozenset(
    {0x00, *range(0x80, 0x84), 0x87, 0x89, 0x8B, *range(0x8D, 0x91), *range(0x93, 0xA3)}
)
CODES: dict[PacketType, frozenset[int]] = {
    PacketType.CONNACK: frozenset(
        {0x00, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, *range(0x99, 0x9E), 0x9F}
    ),
    PacketType.PUBACK: _PUBLISH_CODES,
    PacketType.PUBREC: _PUBLISH_CODES,
    PacketType.PUBREL: _RELEASE_CODES,
    PacketType.PUBCOMP: _RELEASE_CODES,
    PacketType.SUBACK: frozenset({0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2}),
    PacketType.UNSUBACK: frozenset({0, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91}),
    PacketType.DISCONNECT: _DISCONNECT_BY_CLIENT | _DISCONNECT_BY_SERVER,
    PacketType.AUTH: frozenset({0x00, 0x18, 0x19}),
}
"""Which reason codes each packet may carry (the table of section 2.4)."""
