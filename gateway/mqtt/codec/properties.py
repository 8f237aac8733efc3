"""MQTT data types (section 1.5) and properties (section 2.2.2), decoded and encoded. Pure.

`FieldReader` is a cursor over one packet's body; every read is checked against the end of that body.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.mqtt.codec.packets import (
    NO_PROPERTIES,
    MqttProtocolError,
    PacketType,
    Properties,
    Property,
    PropertyValue,
    ReasonCode,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

WILL_PROPERTIES: Final = 0
"""The owner of a will's properties, beside the packet types."""

VARINT_MAX: Final = 268_435_455
VARINT_MAX_BYTES: Final = 4
CONTINUATION_BIT: Final = 0x80
"""Set in every byte of a Variable Byte Integer but the last."""
_U16_MAX = 0xFFFF


def malformed_packet(message: str) -> MqttProtocolError:
    """The fault of a packet that cannot be parsed (section 4.13)."""
    return MqttProtocolError(ReasonCode.MALFORMED_PACKET, message)


def protocol_error(message: str) -> MqttProtocolError:
    """The fault of a packet that can be parsed but is not allowed (section 4.13)."""
    return MqttProtocolError(ReasonCode.PROTOCOL_ERROR, message)


class FieldReader:
    """Reads one body, `data[at:stop]`, field by field."""

    __slots__ = ("at", "data", "stop")

    def __init__(self, data: bytes, at: int, stop: int) -> None:
        self.data = data
        self.at = at
        self.stop = stop

    def _advance(self, size: int) -> int:
        at = self.at
        if at + size > self.stop:
            raise malformed_packet("a field reaches past the end of its packet")
        self.at = at + size
        return at

    def u8(self) -> int:
        """One byte."""
        return self.data[self._advance(1)]

    def u16(self) -> int:
        """Two Byte Integer."""
        at = self._advance(2)
        return self.data[at] << 8 | self.data[at + 1]

    def u32(self) -> int:
        """Four Byte Integer."""
        at = self._advance(4)
        return int.from_bytes(self.data[at : at + 4], "big")

    def varint(self) -> int:
        """Variable Byte Integer, in its shortest form only (MQTT-1.5.5-1)."""
        value = 0
        for position in range(VARINT_MAX_BYTES):
            byte = self.u8()
            value |= (byte & 0x7F) << 7 * position
            if byte < CONTINUATION_BIT:
                if not byte and position:
                    raise malformed_packet("a variable byte integer longer than it needs to be")
                return value
        raise malformed_packet("a variable byte integer of more than four bytes")

    def binary(self) -> bytes:
        """Binary Data, or the bytes of a string not yet checked."""
        size = self.u16()
        at = self._advance(size)
        return self.data[at : at + size]

    def text(self) -> str:
        """UTF-8 Encoded String: no surrogates, no U+0000 (MQTT-1.5.4-1, -2)."""
        raw = self.binary()
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            raise malformed_packet("a string is not UTF-8") from None
        if "\0" in text:
            raise malformed_packet("U+0000 in a string")
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
            raise protocol_error("packet identifier 0")
        return number

    def finish(self) -> None:
        """Refuse bytes after the last field."""
        if self.at != self.stop:
            raise malformed_packet(f"{self.stop - self.at} bytes after the last field of a packet")


def encode_u16(number: int) -> bytes:
    """Two Byte Integer. Raises OverflowError beyond 65,535."""
    return number.to_bytes(2, "big")


def encode_varint(number: int) -> bytes:
    """Variable Byte Integer. Raises ValueError beyond 268,435,455."""
    if not 0 <= number <= VARINT_MAX:
        raise ValueError(f"{number} does not fit a variable byte integer")
    out = bytearray()
    while number >= CONTINUATION_BIT:
        out.append(number & 0x7F | CONTINUATION_BIT)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode_binary(raw: bytes) -> bytes:
    """Binary Data. Raises ValueError beyond 65,535 bytes."""
    if len(raw) > _U16_MAX:
        raise ValueError(f"{len(raw)} bytes do not fit a field of at most {_U16_MAX}")
    return encode_u16(len(raw)) + raw


def encode_string(string: str) -> bytes:
    """UTF-8 Encoded String. Raises ValueError for U+0000, surrogates, or more than 65,535 bytes."""
    if "\0" in string:
        raise ValueError("U+0000 cannot be sent in a string")
    return encode_binary(string.encode())


def _read_flag(fields: FieldReader) -> int:
    value = fields.u8()
    if value > 1:
        raise protocol_error(f"a property of 0 or 1 is {value}")
    return value


def _nonzero(read: Callable[[FieldReader], int]) -> Callable[[FieldReader], int]:
    def checked(fields: FieldReader) -> int:
        value = read(fields)
        if not value:
            raise protocol_error("a property that may not be 0 is 0")
        return value

    return checked


def _read_topic_alias(fields: FieldReader) -> int:
    value = fields.u16()
    if not value:
        raise MqttProtocolError(ReasonCode.TOPIC_ALIAS_INVALID, "topic alias 0")
    return value


def _read_response_topic(fields: FieldReader) -> str:
    value = fields.text()
    if not value or "+" in value or "#" in value:
        raise protocol_error("a response topic that is no topic name")
    return value


_P, _T = Property, PacketType
_MESSAGES = {_T.PUBLISH, WILL_PROPERTIES}
_HANDSHAKE = {_T.CONNECT, _T.CONNACK}
_AUTHENTICATION = {*_HANDSHAKE, _T.AUTH}
_ACKS = {_T.PUBACK, _T.PUBREC, _T.PUBREL, _T.PUBCOMP, _T.SUBACK, _T.UNSUBACK}
_REASONS = {*_ACKS, _T.CONNACK, _T.DISCONNECT, _T.AUTH}
_PROPERTIES: dict[
    Property, tuple[Callable[[FieldReader], int | str | bytes | tuple[str, str]], Collection[int]]
] = {
    _P.PAYLOAD_FORMAT_INDICATOR: (_read_flag, _MESSAGES),
    _P.MESSAGE_EXPIRY_INTERVAL: (FieldReader.u32, _MESSAGES),
    _P.CONTENT_TYPE: (FieldReader.text, _MESSAGES),
    _P.RESPONSE_TOPIC: (_read_response_topic, _MESSAGES),
    _P.CORRELATION_DATA: (FieldReader.binary, _MESSAGES),
    _P.SUBSCRIPTION_IDENTIFIER: (_nonzero(FieldReader.varint), {_T.PUBLISH, _T.SUBSCRIBE}),
    _P.SESSION_EXPIRY_INTERVAL: (FieldReader.u32, {*_HANDSHAKE, _T.DISCONNECT}),
    _P.ASSIGNED_CLIENT_IDENTIFIER: (FieldReader.text, {_T.CONNACK}),
    _P.SERVER_KEEP_ALIVE: (FieldReader.u16, {_T.CONNACK}),
    _P.AUTHENTICATION_METHOD: (FieldReader.text, _AUTHENTICATION),
    _P.AUTHENTICATION_DATA: (FieldReader.binary, _AUTHENTICATION),
    _P.REQUEST_PROBLEM_INFORMATION: (_read_flag, {_T.CONNECT}),
    _P.WILL_DELAY_INTERVAL: (FieldReader.u32, {WILL_PROPERTIES}),
    _P.REQUEST_RESPONSE_INFORMATION: (_read_flag, {_T.CONNECT}),
    _P.RESPONSE_INFORMATION: (FieldReader.text, {_T.CONNACK}),
    _P.SERVER_REFERENCE: (FieldReader.text, {_T.CONNACK, _T.DISCONNECT}),
    _P.REASON_STRING: (FieldReader.text, _REASONS),
    _P.RECEIVE_MAXIMUM: (_nonzero(FieldReader.u16), _HANDSHAKE),
    _P.TOPIC_ALIAS_MAXIMUM: (FieldReader.u16, _HANDSHAKE),
    _P.TOPIC_ALIAS: (_read_topic_alias, {_T.PUBLISH}),
    _P.MAXIMUM_QOS: (_read_flag, {_T.CONNACK}),
    _P.RETAIN_AVAILABLE: (_read_flag, {_T.CONNACK}),
    _P.USER_PROPERTY: (FieldReader.pair, {*_REASONS, *_MESSAGES, _T.CONNECT, _T.SUBSCRIBE, _T.UNSUBSCRIBE}),
    _P.MAXIMUM_PACKET_SIZE: (_nonzero(FieldReader.u32), _HANDSHAKE),
    _P.WILDCARD_SUBSCRIPTION_AVAILABLE: (_read_flag, {_T.CONNACK}),
    _P.SUBSCRIPTION_IDENTIFIER_AVAILABLE: (_read_flag, {_T.CONNACK}),
    _P.SHARED_SUBSCRIPTION_AVAILABLE: (_read_flag, {_T.CONNACK}),
}
"""The reader of each property, and the packets, or a will, that may carry it (section 2.2.2.2)."""

_U8_PROPERTIES = {key for key, (read, _) in _PROPERTIES.items() if read is _read_flag}
_U16_PROPERTIES = {_P.SERVER_KEEP_ALIVE, _P.RECEIVE_MAXIMUM, _P.TOPIC_ALIAS_MAXIMUM, _P.TOPIC_ALIAS}
ALLOWED_PROPERTIES = {
    owner: {key for key, (_, owners) in _PROPERTIES.items() if owner in owners}
    for owner in (WILL_PROPERTIES, *PacketType)
}


def decode_properties(fields: FieldReader, owner: int) -> Properties:  # noqa: C901 - one loop, one rule a branch
    """The properties at the cursor. `owner` is a packet type or `WILL_PROPERTIES`."""
    size = fields.varint()
    if not size:
        return NO_PROPERTIES
    body = FieldReader(fields.data, fields.at, fields.at + size)
    if body.stop > fields.stop:
        raise malformed_packet("properties reach past the end of their packet")
    fields.at = body.stop
    allowed = ALLOWED_PROPERTIES[owner]
    found: dict[Property, PropertyValue] = {}
    pairs: list[tuple[str, str]] = []
    identifiers: list[int] = []
    while body.at < body.stop:
        number = body.u8()
        if number not in allowed:
            raise malformed_packet(f"property {number:#04x} does not belong in this packet")
        key = Property(number)
        value = _PROPERTIES[key][0](body)
        if isinstance(value, tuple):
            pairs.append(value)
        elif key is Property.SUBSCRIPTION_IDENTIFIER and owner == PacketType.PUBLISH:
            assert isinstance(value, int)
            identifiers.append(value)
        elif key in found:
            raise protocol_error(f"property {key.name} twice")
        else:
            found[key] = value
    if pairs:
        found[Property.USER_PROPERTY] = tuple(pairs)
    if identifiers:
        found[Property.SUBSCRIPTION_IDENTIFIER] = tuple(identifiers)
    if Property.AUTHENTICATION_DATA in found and Property.AUTHENTICATION_METHOD not in found:
        raise protocol_error("authentication data without an authentication method")
    return found


def encode_properties(properties: Properties) -> bytes:
    """The properties, their length in front. Raises ValueError or OverflowError where one does not fit."""
    if not properties:
        return b"\0"
    out = bytearray()
    for key, value in properties.items():
        if isinstance(value, tuple):
            for item in value:
                out.append(key)
                out += (
                    encode_varint(item)
                    if isinstance(item, int)
                    else encode_string(item[0]) + encode_string(item[1])
                )
            continue
        out.append(key)
        if isinstance(value, str):
            out += encode_string(value)
        elif isinstance(value, bytes):
            out += encode_binary(value)
        elif key in _U8_PROPERTIES:
            out.append(value)
        elif key in _U16_PROPERTIES:
            out += encode_u16(value)
        elif key is Property.SUBSCRIPTION_IDENTIFIER:
            out += encode_varint(value)
        else:
            out += value.to_bytes(4, "big")
    return encode_varint(len(out)) + bytes(out)
