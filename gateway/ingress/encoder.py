"""Packets to bytes, for both sides and both versions. Pure.

Values come from our own code: one that cannot be sent is a ValueError or an OverflowError, never a
`ProtocolFault`.
"""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Final

from gateway.ingress.packets import (
    V5,
    Auth,
    Connack,
    Connect,
    Disconnect,
    Packet,
    PacketType,
    Pingreq,
    Publish,
    Reply,
    Suback,
    Subscribe,
    Unsuback,
    Unsubscribe,
)
from gateway.ingress.properties import binary, text, u16, varint, write_properties

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.ingress.packets import Properties

PINGRESP: Final = b"\xd0\x00"

_REPLY_HEAD = {
    PacketType.PUBACK: 0x40020000,
    PacketType.PUBREC: 0x50020000,
    PacketType.PUBCOMP: 0x70020000,
}


def encode_replies(kind: PacketType, packet_ids: Iterable[int]) -> bytes:
    """PUBACK, PUBREC or PUBCOMP with success for each packet identifier: four bytes each in both versions."""
    head = _REPLY_HEAD[kind]
    words = array("I", [head | packet_id for packet_id in packet_ids])
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


def encode_pubacks(packet_ids: Iterable[int]) -> bytes:
    """One PUBACK for each packet identifier."""
    return encode_replies(PacketType.PUBACK, packet_ids)


def encode(packet: Packet, version: int = V5) -> bytes:  # noqa: C901, PLR0911 - one case a packet type
    """One packet in the form of `version`: 3.1.1 has no room for properties and reason codes."""
    v5 = version == V5
    match packet:
        case Publish():
            return _publish(packet, version)
        case Connect():
            return _connect(packet)
        case Connack(code, session_present, properties):
            body = bytes((session_present, code))
            return _framed(PacketType.CONNACK << 4, body + write_properties(properties) if v5 else body)
        case Reply(kind, packet_id, reason_code, properties):
            tail = _reason(reason_code, properties) if v5 else b""
            return _framed(kind << 4 | (2 if kind is PacketType.PUBREL else 0), u16(packet_id) + tail)
        case Subscribe(packet_id, filters, properties):
            body = b"".join(
                text(name) + bytes((options if v5 else options & 3,)) for name, options in filters
            )
            return _framed(PacketType.SUBSCRIBE << 4 | 2, _numbered(packet_id, properties, version) + body)
        case Suback(packet_id, codes, properties):
            return _framed(PacketType.SUBACK << 4, _numbered(packet_id, properties, version) + bytes(codes))
        case Unsubscribe(packet_id, filters, properties):
            body = b"".join(map(text, filters))
            return _framed(PacketType.UNSUBSCRIBE << 4 | 2, _numbered(packet_id, properties, version) + body)
        case Unsuback(packet_id, codes, properties):
            body = bytes(codes) if v5 else b""
            return _framed(PacketType.UNSUBACK << 4, _numbered(packet_id, properties, version) + body)
        case Disconnect(reason_code, properties):
            return _framed(PacketType.DISCONNECT << 4, _reason(reason_code, properties) if v5 else b"")
        case Auth(reason_code, properties):
            body = bytes((reason_code,)) + write_properties(properties) if reason_code or properties else b""
            return _framed(PacketType.AUTH << 4, body)
        case Pingreq():
            return b"\xc0\x00"
        case _:
            return PINGRESP


def _framed(first: int, body: bytes) -> bytes:
    return bytes((first,)) + varint(len(body)) + body


def _numbered(packet_id: int, properties: Properties, version: int) -> bytes:
    return u16(packet_id) + (write_properties(properties) if version == V5 else b"")


def _reason(reason_code: int, properties: Properties) -> bytes:
    """The shortest form: nothing for plain success, no properties where there are none."""
    if properties:
        return bytes((reason_code,)) + write_properties(properties)
    return bytes((reason_code,)) if reason_code else b""


def _publish(packet: Publish, version: int) -> bytes:
    first = PacketType.PUBLISH << 4 | packet.dup << 3 | packet.qos << 1 | packet.retain
    packet_id = u16(packet.packet_id) if packet.qos else b""
    properties = write_properties(packet.properties) if version == V5 else b""
    return _framed(first, binary(packet.topic) + packet_id + properties + packet.payload)


def _connect(packet: Connect) -> bytes:
    v5, will = packet.version == V5, packet.will
    flags = packet.clean_start << 1 | (packet.username is not None) << 7 | (packet.password is not None) << 6
    parts = [write_properties(packet.properties) if v5 else b"", text(packet.client_id)]
    if will is not None:
        flags |= 4 | will.qos << 3 | will.retain << 5
        parts += (write_properties(will.properties) if v5 else b"", binary(will.topic), binary(will.payload))
    if packet.username is not None:
        parts.append(text(packet.username))
    if packet.password is not None:
        parts.append(binary(packet.password))
    head = b"\x00\x04MQTT" + bytes((packet.version, flags)) + u16(packet.keep_alive_s)
    return _framed(PacketType.CONNECT << 4, head + b"".join(parts))
