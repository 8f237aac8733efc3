"""Decoding and encoding of single control packets, for both sides and both versions. Pure.

Decoding covers the body of every packet but PUBLISH (`parser` has that) and rejects reserved bits, reason
codes and properties that a packet may not carry. Encoding takes values of our own: one that cannot be sent
is a ValueError or an OverflowError, never an `MqttProtocolError`.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Final

from gateway.mqtt.codec.packets import (
    NO_PROPERTIES,
    REQUIRED_FLAGS,
    RESERVED_QOS,
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
    Publish,
    PublishAck,
    Suback,
    Subscribe,
    TopicCache,
    Unsuback,
    Unsubscribe,
    Will,
)
from gateway.mqtt.codec.properties import (
    WILL_PROPERTIES,
    FieldReader,
    decode_properties,
    encode_binary,
    encode_properties,
    encode_string,
    encode_u16,
    encode_varint,
    malformed_packet,
    protocol_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_PROTOCOL_NAMES = (b"MQTT", b"MQIsdp")
"""Of 3.1.1 and 5, and of 3.1, whose clients are told that their version is not supported."""
_RETAIN_HANDLING_BITS = 0x30


def decode_protocol_level(fields: FieldReader) -> tuple[str, int]:
    """The protocol's name and level, with which CONNECT begins."""
    name, level = fields.binary(), fields.u8()
    if name not in _PROTOCOL_NAMES:
        raise protocol_error("the protocol name is not MQTT")
    return name.decode(), level


def _decode_v5_properties(fields: FieldReader, owner: int, version: int) -> Properties:
    return decode_properties(fields, owner) if version == V5 else NO_PROPERTIES


def decode_connect(fields: FieldReader, version: int, topics: TopicCache) -> Connect:
    """CONNECT after its protocol level."""
    flags, keep_alive_s = fields.u8(), fields.u16()
    has_will, will_qos = bool(flags & 0x04), flags >> 3 & 3
    if flags & 1 or will_qos == RESERVED_QOS or (not has_will and flags & 0x38):
        raise malformed_packet(f"connect flags {flags:#04x}")
    if version == V311 and flags & 0x40 and not flags & 0x80:
        raise malformed_packet("a password without a user name")
    properties = _decode_v5_properties(fields, PacketType.CONNECT, version)
    client_id = fields.text()
    will = None
    if has_will:
        will_properties = _decode_v5_properties(fields, WILL_PROPERTIES, version)
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


def _decode_connack(kind: PacketType, fields: FieldReader, version: int) -> Connack:
    flags, code = fields.u8(), fields.u8()
    if flags > 1 or (flags and code):
        raise malformed_packet(f"CONNACK with flags {flags:#04x} and code {code:#04x}")
    if code not in (ALLOWED_REASON_CODES[PacketType.CONNACK] if version == V5 else range(6)):
        raise protocol_error(f"CONNACK with code {code:#04x}")
    return Connack(code, bool(flags), _decode_v5_properties(fields, kind, version))


def _decode_publish_ack(kind: PacketType, fields: FieldReader, version: int) -> PublishAck:
    packet_id = fields.packet_id()
    if version != V5 or fields.at == fields.stop:
        return PublishAck(kind, packet_id)
    code, properties = _decode_reason(kind, fields)
    return PublishAck(kind, packet_id, code, properties)


def _decode_reason(kind: PacketType, fields: FieldReader) -> tuple[int, Properties]:
    """A reason code and properties; the latter may be left out (sections 3.4.2.2, 3.14.2.2)."""
    code = fields.u8()
    if code not in ALLOWED_REASON_CODES[kind]:
        raise protocol_error(f"{kind.name} with reason code {code:#04x}")
    return code, decode_properties(fields, kind) if fields.at < fields.stop else NO_PROPERTIES


def _decode_subscribe(kind: PacketType, fields: FieldReader, version: int) -> Subscribe:
    packet_id, properties = fields.packet_id(), _decode_v5_properties(fields, kind, version)
    filters = []
    while fields.at < fields.stop:
        name, options = fields.text(), fields.u8()
        reserved = 0xC0 if version == V5 else 0xFC
        if options & 3 == RESERVED_QOS or options & reserved:
            raise malformed_packet(f"subscription options {options:#04x}")
        if options & _RETAIN_HANDLING_BITS == _RETAIN_HANDLING_BITS:
            raise protocol_error("retain handling 3")
        filters.append((name, options))
    if not filters:
        raise protocol_error("SUBSCRIBE without a topic filter")
    return Subscribe(packet_id, tuple(filters), properties)


def _decode_unsubscribe(kind: PacketType, fields: FieldReader, version: int) -> Unsubscribe:
    packet_id, properties = fields.packet_id(), _decode_v5_properties(fields, kind, version)
    filters = []
    while fields.at < fields.stop:
        filters.append(fields.text())
    if not filters:
        raise protocol_error("UNSUBSCRIBE without a topic filter")
    return Unsubscribe(packet_id, tuple(filters), properties)


def _decode_subscription_ack(kind: PacketType, fields: FieldReader, version: int) -> Suback | Unsuback:
    packet_id = fields.packet_id()
    if version != V5 and kind is PacketType.UNSUBACK:
        return Unsuback(packet_id)
    properties = _decode_v5_properties(fields, kind, version)
    codes = tuple(fields.rest())
    if not codes or not ALLOWED_REASON_CODES[kind].issuperset(codes):
        raise protocol_error(f"{kind.name} without codes or with one that is invalid")
    packet_class = Suback if kind is PacketType.SUBACK else Unsuback
    return packet_class(packet_id, codes, properties)


def _decode_disconnect_or_auth(kind: PacketType, fields: FieldReader, version: int) -> Disconnect | Auth:
    packet_class = Disconnect if kind is PacketType.DISCONNECT else Auth
    if version != V5 and packet_class is Auth:
        raise malformed_packet("packet type 15 in MQTT 3.1.1")
    if version != V5 or fields.at == fields.stop:
        return packet_class()
    return packet_class(*_decode_reason(kind, fields))


def decode_packet_body(kind: PacketType, fields: FieldReader, version: int, *, from_server: bool) -> Packet:
    """The packet of type `kind`, which is neither CONNECT nor PUBLISH, up to the end of its body."""
    packet = _BODY_DECODERS[kind](kind, fields, version)
    fields.finish()
    if isinstance(packet, Disconnect):
        if from_server and version != V5:
            raise protocol_error("DISCONNECT from a server of MQTT 3.1.1")
        if packet.reason_code not in (_SERVER_DISCONNECT_CODES if from_server else _CLIENT_DISCONNECT_CODES):
            raise protocol_error(f"DISCONNECT with reason code {packet.reason_code:#04x} from the wrong side")
    return packet


_BODY_DECODERS: dict[PacketType, Callable[[PacketType, FieldReader, int], Packet]] = {
    PacketType.CONNACK: _decode_connack,
    PacketType.PUBACK: _decode_publish_ack,
    PacketType.PUBREC: _decode_publish_ack,
    PacketType.PUBREL: _decode_publish_ack,
    PacketType.PUBCOMP: _decode_publish_ack,
    PacketType.SUBSCRIBE: _decode_subscribe,
    PacketType.SUBACK: _decode_subscription_ack,
    PacketType.UNSUBSCRIBE: _decode_unsubscribe,
    PacketType.UNSUBACK: _decode_subscription_ack,
    PacketType.PINGREQ: lambda _kind, _fields, _version: Pingreq(),
    PacketType.PINGRESP: lambda _kind, _fields, _version: Pingresp(),
    PacketType.DISCONNECT: _decode_disconnect_or_auth,
    PacketType.AUTH: _decode_disconnect_or_auth,
}

_PUBLISH_REASON_CODES = frozenset({0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99})
_RELEASE_REASON_CODES = frozenset({0x00, 0x92})
_CLIENT_DISCONNECT_CODES = frozenset({0x00, 0x04, *range(0x80, 0x84), 0x90, *range(0x93, 0x9A)})
_SERVER_DISCONNECT_CODES = frozenset(
    {0x00, *range(0x80, 0x84), 0x87, 0x89, 0x8B, *range(0x8D, 0x91), *range(0x93, 0xA3)}
)
ALLOWED_REASON_CODES: dict[PacketType, frozenset[int]] = {
    PacketType.CONNACK: frozenset(
        {0x00, *range(0x80, 0x8B), 0x8C, 0x90, 0x95, 0x97, *range(0x99, 0x9E), 0x9F}
    ),
    PacketType.PUBACK: _PUBLISH_REASON_CODES,
    PacketType.PUBREC: _PUBLISH_REASON_CODES,
    PacketType.PUBREL: _RELEASE_REASON_CODES,
    PacketType.PUBCOMP: _RELEASE_REASON_CODES,
    PacketType.SUBACK: frozenset({0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2}),
    PacketType.UNSUBACK: frozenset({0, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91}),
    PacketType.DISCONNECT: _CLIENT_DISCONNECT_CODES | _SERVER_DISCONNECT_CODES,
    PacketType.AUTH: frozenset({0x00, 0x18, 0x19}),
}
"""Which reason codes each packet may carry (the table of section 2.4)."""


PINGREQ: Final = b"\xc0\x00"
PINGRESP: Final = b"\xd0\x00"

_PUBLISH_ACK_HEADERS = {
    PacketType.PUBACK: 0x40020000,
    PacketType.PUBREC: 0x50020000,
    PacketType.PUBCOMP: 0x70020000,
}


def encode_publish_acks(kind: PacketType, packet_ids: Iterable[int]) -> bytes:
    """PUBACK, PUBREC or PUBCOMP with success for each packet identifier: four bytes each in both versions."""
    head = _PUBLISH_ACK_HEADERS[kind]
    words = array("I", [head | packet_id for packet_id in packet_ids])
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def encode_refusals(publishes: Iterable[Publish], reason_code: int) -> bytes:
    """PUBACK or PUBREC of MQTT 5 with a reason code for each publish of QoS 1 or 2."""
    kinds = (PacketType.PUBACK, PacketType.PUBREC)
    return b"".join(
        encode_packet(PublishAck(kinds[publish.qos - 1], publish.packet_id, reason_code))
        for publish in publishes
    )


def encode_packet(packet: Packet, version: int = V5) -> bytes:  # noqa: C901 - one case a packet type
    """One packet in the form of `version`: 3.1.1 has no room for properties and reason codes."""
    v5 = version == V5
    flags = 0
    match packet:
        case Publish():
            kind, flags = PacketType.PUBLISH, packet.dup << 3 | packet.qos << 1 | packet.retain
            body = encode_binary(packet.topic) + (encode_u16(packet.packet_id) if packet.qos else b"")
            body += (encode_properties(packet.properties) if v5 else b"") + packet.payload
        case Connect():
            kind, body = PacketType.CONNECT, _encode_connect_body(packet)
        case Pingreq():
            return PINGREQ
        case Pingresp():
            return PINGRESP
        case Connack(code, session_present, properties):
            kind = PacketType.CONNACK
            body = bytes((session_present, code)) + (encode_properties(properties) if v5 else b"")
        case PublishAck(kind, packet_id, reason_code, properties):
            body = encode_u16(packet_id) + (_encode_reason(reason_code, properties) if v5 else b"")
        case Subscribe(packet_id, filters, properties):
            kind = PacketType.SUBSCRIBE
            body = _encode_packet_id(packet_id, properties, version) + b"".join(
                encode_string(name) + bytes((options if v5 else options & 3,)) for name, options in filters
            )
        case Suback(packet_id, codes, properties):
            kind = PacketType.SUBACK
            body = _encode_packet_id(packet_id, properties, version) + bytes(codes)
        case Unsubscribe(packet_id, filters, properties):
            kind = PacketType.UNSUBSCRIBE
            body = _encode_packet_id(packet_id, properties, version) + b"".join(map(encode_string, filters))
        case Unsuback(packet_id, codes, properties):
            kind = PacketType.UNSUBACK
            body = _encode_packet_id(packet_id, properties, version) + (bytes(codes) if v5 else b"")
        case Disconnect(reason_code, properties):
            kind = PacketType.DISCONNECT
            body = _encode_reason(reason_code, properties) if v5 else b""
        case Auth(reason_code, properties):
            kind = PacketType.AUTH
            body = bytes((reason_code,)) + encode_properties(properties) if reason_code or properties else b""
    return bytes((kind << 4 | REQUIRED_FLAGS.get(kind, flags),)) + encode_varint(len(body)) + body


def _encode_packet_id(packet_id: int, properties: Properties, version: int) -> bytes:
    return encode_u16(packet_id) + (encode_properties(properties) if version == V5 else b"")


def _encode_reason(reason_code: int, properties: Properties) -> bytes:
    """The shortest form: nothing for plain success, no properties where there are none."""
    if properties:
        return bytes((reason_code,)) + encode_properties(properties)
    return bytes((reason_code,)) if reason_code else b""


def _encode_connect_body(packet: Connect) -> bytes:
    v5, will = packet.version == V5, packet.will
    flags = packet.clean_start << 1 | (packet.username is not None) << 7 | (packet.password is not None) << 6
    parts = [encode_properties(packet.properties) if v5 else b"", encode_string(packet.client_id)]
    if will is not None:
        flags |= 4 | will.qos << 3 | will.retain << 5
        parts += (
            encode_properties(will.properties) if v5 else b"",
            encode_binary(will.topic),
            encode_binary(will.payload),
        )
    if packet.username is not None:
        parts.append(encode_string(packet.username))
    if packet.password is not None:
        parts.append(encode_binary(packet.password))
    head = b"\x00\x04MQTT" + bytes((packet.version, flags)) + encode_u16(packet.keep_alive_s)
    return head + b"".join(parts)
