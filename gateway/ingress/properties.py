"""MQTT data types (section 1.5) and properties (section 2.2.2), read and written. Pure.

`Fields` is a cursor over one packet's body. Everything it reads is checked against the end of that body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.ingress.packets import (
    NO_PROPERTIES,
    PacketType,
    Properties,
    Property,
    PropertyValue,
    ProtocolFault,
    ReasonCode,
)

if TYPE_CHECKING:
    from collections.abc import Callable

WILL: Final = 0
"""Stands beside the packet types where properties of a will are meant."""

VARINT_MAX: Final = 268_435_455
_VARINT_BYTES = 4
_SIXTEEN_BITS = 0xFFFF


def malformed(message: str) -> ProtocolFault:
    """The fault of a packet that cannot be parsed (section 4.13)."""
    return ProtocolFault(ReasonCode.MALFORMED_PACKET, message)


def broken(message: str) -> ProtocolFault:
    """The fault of a packet that can be parsed but is not allowed (section 4.13)."""
    return ProtocolFault(ReasonCode.PROTOCOL_ERROR, message)


class Fields:
    """Reads one body, `data[at:stop]`, field by field."""

    __slots__ = ("at", "data", "stop")

    def __init__(self, data: bytes, at: int, stop: int) -> None:
        self.data = data
        self.at = at
        self.stop = stop

    def _take(self, size: int) -> int:
        at = self.at
        if at + size > self.stop:
            raise malformed("a field reaches past the end of its packet")
        self.at = at + size
        return at

    def u8(self) -> int:
        """One byte."""
        return self.data[self._take(1)]

    def u16(self) -> int:
        """Two Byte Integer."""
        at = self._take(2)
        return self.data[at] << 8 | self.data[at + 1]

    def u32(self) -> int:
        """Four Byte Integer."""
        at = self._take(4)
        return int.from_bytes(self.data[at : at + 4], "big")

    def varint(self) -> int:
        """Variable Byte Integer, in its shortest form only (MQTT-1.5.5-1)."""
        value = 0
        for position in range(_VARINT_BYTES):
            byte = self.u8()
            value |= (byte & 0x7F) << 7 * position
            if byte < 0x80:  # noqa: PLR2004 - the continuation bit
                if not byte and position:
                    raise malformed("a variable byte integer longer than it needs to be")
                return value
        raise malformed("a variable byte integer of more than four bytes")

    def binary(self) -> bytes:
        """Binary Data, or the bytes of a string not yet checked."""
        size = self.u16()
        at = self._take(size)
        return self.data[at : at + size]

    def text(self) -> str:
        """UTF-8 Encoded String: no surrogates, no U+0000 (MQTT-1.5.4-1, -2)."""
        raw = self.binary()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise malformed("a string is not UTF-8") from None
        if "\0" in text:
            raise malformed("U+0000 in a string")
        return text

    def pair(self) -> tuple[str, str]:
        """UTF-8 String Pair."""
        return self.text(), self.text()

    def rest(self) -> bytes:
        """Everything up to the end."""
        at, self.at = self.at, self.stop
        return self.data[at : self.stop]

    def packet_id(self) -> int:
        """A Packet Identifier, which is never 0 (section 2.2.1)."""
        number = self.u16()
        if not number:
            raise broken("packet identifier 0")
        return number

    def finish(self) -> None:
        """Refuse bytes after the last field."""
        if self.at != self.stop:
            raise malformed(f"{self.stop - self.at} bytes after the last field of a packet")


def u16(number: int) -> bytes:
    """Two Byte Integer. Raises OverflowError beyond 65,535."""
    return number.to_bytes(2, "big")


def varint(number: int) -> bytes:
    """Variable Byte Integer. Raises ValueError beyond 268,435,455."""
    if not 0 <= number <= VARINT_MAX:
        raise ValueError(f"{number} does not fit a variable byte integer")
    out = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def binary(raw: bytes) -> bytes:
    """Binary Data. Raises ValueError beyond 65,535 bytes."""
    if len(raw) > _SIXTEEN_BITS:
        raise ValueError(f"{len(raw)} bytes do not fit a field of at most {_SIXTEEN_BITS}")
    return u16(len(raw)) + raw


def text(string: str) -> bytes:
    """UTF-8 Encoded String. Raises ValueError for U+0000, surrogates, or more than 65,535 bytes."""
    if "\0" in string:
        raise ValueError("U+0000 cannot be sent in a string")
    return binary(string.encode())


def _flag(fields: Fields) -> int:
    value = fields.u8()
    if value > 1:
        raise broken(f"a property of 0 or 1 is {value}")
    return value


def _positive(read: Callable[[Fields], int]) -> Callable[[Fields], int]:
    def checked(fields: Fields) -> int:
        value = read(fields)
        if not value:
            raise broken("a property that may not be 0 is 0")
        return value

    return checked


def _alias(fields: Fields) -> int:
    value = fields.u16()
    if not value:
        raise ProtocolFault(ReasonCode.TOPIC_ALIAS_INVALID, "topic alias 0")
    return value


def _topic(fields: Fields) -> str:
    value = fields.text()
    if not value or "+" in value or "#" in value:
        raise broken("a response topic that is no topic name")
    return value


_P = Property
_READ: dict[Property, Callable[[Fields], int | str | bytes | tuple[str, str]]] = {
    _P.PAYLOAD_FORMAT_INDICATOR: _flag,
    _P.MESSAGE_EXPIRY_INTERVAL: Fields.u32,
    _P.CONTENT_TYPE: Fields.text,
    _P.RESPONSE_TOPIC: _topic,
    _P.CORRELATION_DATA: Fields.binary,
    _P.SUBSCRIPTION_IDENTIFIER: _positive(Fields.varint),
    _P.SESSION_EXPIRY_INTERVAL: Fields.u32,
    _P.ASSIGNED_CLIENT_IDENTIFIER: Fields.text,
    _P.SERVER_KEEP_ALIVE: Fields.u16,
    _P.AUTHENTICATION_METHOD: Fields.text,
    _P.AUTHENTICATION_DATA: Fields.binary,
    _P.REQUEST_PROBLEM_INFORMATION: _flag,
    _P.WILL_DELAY_INTERVAL: Fields.u32,
    _P.REQUEST_RESPONSE_INFORMATION: _flag,
    _P.RESPONSE_INFORMATION: Fields.text,
    _P.SERVER_REFERENCE: Fields.text,
    _P.REASON_STRING: Fields.text,
    _P.RECEIVE_MAXIMUM: _positive(Fields.u16),
    _P.TOPIC_ALIAS_MAXIMUM: Fields.u16,
    _P.TOPIC_ALIAS: _alias,
    _P.MAXIMUM_QOS: _flag,
    _P.RETAIN_AVAILABLE: _flag,
    _P.USER_PROPERTY: Fields.pair,
    _P.MAXIMUM_PACKET_SIZE: _positive(Fields.u32),
    _P.WILDCARD_SUBSCRIPTION_AVAILABLE: _flag,
    _P.SUBSCRIPTION_IDENTIFIER_AVAILABLE: _flag,
    _P.SHARED_SUBSCRIPTION_AVAILABLE: _flag,
}

_U8 = {
    _P.PAYLOAD_FORMAT_INDICATOR,
    _P.REQUEST_PROBLEM_INFORMATION,
    _P.REQUEST_RESPONSE_INFORMATION,
    _P.MAXIMUM_QOS,
    _P.RETAIN_AVAILABLE,
    _P.WILDCARD_SUBSCRIPTION_AVAILABLE,
    _P.SUBSCRIPTION_IDENTIFIER_AVAILABLE,
    _P.SHARED_SUBSCRIPTION_AVAILABLE,
}
_U16 = {_P.SERVER_KEEP_ALIVE, _P.RECEIVE_MAXIMUM, _P.TOPIC_ALIAS_MAXIMUM, _P.TOPIC_ALIAS}

_T = PacketType
_MESSAGE = {
    _P.PAYLOAD_FORMAT_INDICATOR,
    _P.MESSAGE_EXPIRY_INTERVAL,
    _P.CONTENT_TYPE,
    _P.RESPONSE_TOPIC,
    _P.CORRELATION_DATA,
    _P.USER_PROPERTY,
}
_REPLY = {_P.REASON_STRING, _P.USER_PROPERTY}
_AUTHENTICATION = {_P.AUTHENTICATION_METHOD, _P.AUTHENTICATION_DATA}
ALLOWED: dict[int, set[Property]] = {
    WILL: _MESSAGE | {_P.WILL_DELAY_INTERVAL},
    _T.CONNECT: _AUTHENTICATION
    | {
        _P.SESSION_EXPIRY_INTERVAL,
        _P.REQUEST_PROBLEM_INFORMATION,
        _P.REQUEST_RESPONSE_INFORMATION,
        _P.RECEIVE_MAXIMUM,
        _P.TOPIC_ALIAS_MAXIMUM,
        _P.MAXIMUM_PACKET_SIZE,
        _P.USER_PROPERTY,
    },
    _T.CONNACK: _AUTHENTICATION
    | _REPLY
    | {
        _P.SESSION_EXPIRY_INTERVAL,
        _P.ASSIGNED_CLIENT_IDENTIFIER,
        _P.SERVER_KEEP_ALIVE,
        _P.RESPONSE_INFORMATION,
        _P.SERVER_REFERENCE,
        _P.RECEIVE_MAXIMUM,
        _P.TOPIC_ALIAS_MAXIMUM,
        _P.MAXIMUM_QOS,
        _P.RETAIN_AVAILABLE,
        _P.MAXIMUM_PACKET_SIZE,
        _P.WILDCARD_SUBSCRIPTION_AVAILABLE,
        _P.SUBSCRIPTION_IDENTIFIER_AVAILABLE,
        _P.SHARED_SUBSCRIPTION_AVAILABLE,
    },
    _T.PUBLISH: _MESSAGE | {_P.SUBSCRIPTION_IDENTIFIER, _P.TOPIC_ALIAS},
    _T.PUBACK: _REPLY,
    _T.PUBREC: _REPLY,
    _T.PUBREL: _REPLY,
    _T.PUBCOMP: _REPLY,
    _T.SUBSCRIBE: {_P.SUBSCRIPTION_IDENTIFIER, _P.USER_PROPERTY},
    _T.SUBACK: _REPLY,
    _T.UNSUBSCRIBE: {_P.USER_PROPERTY},
    _T.UNSUBACK: _REPLY,
    _T.DISCONNECT: _REPLY | {_P.SESSION_EXPIRY_INTERVAL, _P.SERVER_REFERENCE},
    _T.AUTH: _AUTHENTICATION | _REPLY,
}
"""Which properties each packet, and a will, may carry (the table of section 2.2.2.2)."""


def read_properties(fields: Fields, owner: int) -> Properties:  # noqa: C901 - one loop, one rule a branch
    """The properties at the cursor. `owner` is a packet type or `WILL`.

    Raises:
        ProtocolFault: malformed for an identifier that is unknown or not allowed there, a protocol error for
            one given twice or a value out of range.
    """
    size = fields.varint()
    if not size:
        return NO_PROPERTIES
    body = Fields(fields.data, fields.at, fields.at + size)
    if body.stop > fields.stop:
        raise malformed("properties reach past the end of their packet")
    fields.at = body.stop
    allowed = ALLOWED[owner]
    found: dict[Property, PropertyValue] = {}
    pairs: list[tuple[str, str]] = []
    identifiers: list[int] = []
    while body.at < body.stop:
        number = body.u8()
        if number not in allowed:
            raise malformed(f"property {number:#04x} does not belong in this packet")
        key = Property(number)
        value = _READ[key](body)
        if isinstance(value, tuple):
            pairs.append(value)
        elif key is Property.SUBSCRIPTION_IDENTIFIER and owner == PacketType.PUBLISH:
            assert isinstance(value, int)
            identifiers.append(value)
        elif key in found:
            raise broken(f"property {key.name} twice")
        else:
            found[key] = value
    if pairs:
        found[Property.USER_PROPERTY] = tuple(pairs)
    if identifiers:
        found[Property.SUBSCRIPTION_IDENTIFIER] = tuple(identifiers)
    if Property.AUTHENTICATION_DATA in found and Property.AUTHENTICATION_METHOD not in found:
        raise broken("authentication data without an authentication method")
    return found


def write_properties(properties: Properties) -> bytes:
    """The properties, their length in front. Raises ValueError or OverflowError where one does not fit."""
    if not properties:
        return b"\0"
    out = bytearray()
    for key, value in properties.items():
        if isinstance(value, tuple):
            for item in value:
                out.append(key)
                out += varint(item) if isinstance(item, int) else text(item[0]) + text(item[1])
            continue
        out.append(key)
        if isinstance(value, str):
            out += text(value)
        elif isinstance(value, bytes):
            out += binary(value)
        elif key in _U8:
            out.append(value)
        elif key in _U16:
            out += u16(value)
        elif key is Property.SUBSCRIPTION_IDENTIFIER:
            out += varint(value)
        else:
            out += value.to_bytes(4, "big")
    return varint(len(out)) + bytes(out)
