"""Incremental parser: the bytes of one connection to packets. Pure.

`feed` returns every whole packet of a read, in order; consecutive QoS 0 and 1 publishes come as one list,
QoS 2 publishes and other packets one by one. Invalid bytes set `PacketParser.fault` after the packets
before them. Memory is bounded by `max_packet_bytes`: a larger packet is a fault as soon as its fixed
header is known.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from gateway.mqtt.codec.packet_codec import decode_connect, decode_packet_body, decode_protocol_level
from gateway.mqtt.codec.packets import (
    EXACTLY_ONCE,
    NO_PROPERTIES,
    REQUIRED_FLAGS,
    RESERVED_QOS,
    V5,
    V311,
    Connect,
    MqttProtocolError,
    Packet,
    PacketType,
    Property,
    Publish,
    ReasonCode,
    TopicCache,
)
from gateway.mqtt.codec.properties import (
    CONTINUATION_BIT,
    VARINT_MAX_BYTES,
    FieldReader,
    decode_properties,
    malformed_packet,
    protocol_error,
)

ParsedItem = list[Publish] | Packet
"""Consecutive publishes of QoS 0 and 1, or one other packet."""

CONNECT_MAX_BYTES: Final = 65_536
"""Largest CONNECT: an unauthenticated peer cannot make us buffer more."""

_PLAIN_QOS1_PUBLISH = 0x32
"""First byte of a PUBLISH at QoS 1, neither retained nor a duplicate: the common case."""
_PUBLISH_MIN_BYTES = 4
_MIN_PACKET_LIMIT_BYTES = 256
"""The fast path does not check packets of up to this size against the limit."""

_unpack_publish_head = Struct(">BBH").unpack_from
_unpack_u16 = Struct(">H").unpack_from
_unpack_id_and_properties = Struct(">HB").unpack_from

_SENT_BY_CLIENTS = frozenset(
    {PacketType.CONNECT, PacketType.SUBSCRIBE, PacketType.UNSUBSCRIBE, PacketType.PINGREQ}
)
_SENT_BY_SERVERS = frozenset(
    {PacketType.CONNACK, PacketType.SUBACK, PacketType.UNSUBACK, PacketType.PINGRESP}
)


class PacketParser:
    """One direction of one connection, at a server or, with `client=True`, at a client.

    A server's parser learns the version from CONNECT, which must come first and once.

    `max_packet_bytes` includes the fixed header and is at least 256. `topics` may be shared between
    connections, so that each topic is checked once. After a `fault` `feed` returns nothing more.
    """

    __slots__ = (
        "_alias_maximum",
        "_aliases",
        "_client",
        "_connected",
        "_held",
        "_limit",
        "_max_packet_bytes",
        "_needed",
        "_topics",
        "fault",
        "qos0_publishes",
        "version",
    )

    def __init__(
        self,
        *,
        max_packet_bytes: int,
        topics: TopicCache,
        topic_alias_maximum: int = 0,
        client: bool = False,
        version: int | None = None,
    ) -> None:
        assert max_packet_bytes >= _MIN_PACKET_LIMIT_BYTES
        self.fault: MqttProtocolError | None = None
        self.version = version
        self.qos0_publishes = 0
        self._topics = topics
        self._aliases: dict[int, bytes] = {}
        self._alias_maximum = topic_alias_maximum
        self._client = client
        self._connected = client
        self._max_packet_bytes = max_packet_bytes
        self._limit = max_packet_bytes if client else min(max_packet_bytes, CONNECT_MAX_BYTES)
        self._held = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> list[ParsedItem]:
        """All packets that end in `data`, in order. Never raises; see `fault`."""
        if self.fault is not None:
            return []
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return []
            data = bytes(self._held)
            self._held = bytearray()
        items: list[ParsedItem] = []
        try:
            at = self._scan(data, items)
        except MqttProtocolError as fault:
            self.fault = fault
            return items
        if at < len(data):
            self._held += data[at:]
        return items

    def _scan(self, data: bytes, items: list[ParsedItem]) -> int:
        """Append every whole packet to `items`, also when a fault follows; returns where the rest begins."""
        at, end = 0, len(data)
        run: list[Publish] = []
        try:
            while at < end:
                if self._connected:
                    at = self._publishes(data, at, run)
                    if at == end:
                        break
                elif data[at] != PacketType.CONNECT << 4:
                    raise protocol_error("the first packet is not CONNECT")
                frame = self._frame(data, at)
                if frame is None:
                    break
                packet = self._packet(data[at], FieldReader(data, *frame))
                at = frame[1]
                if type(packet) is Publish and packet.qos != EXACTLY_ONCE:
                    run.append(packet)
                else:
                    if run:
                        items.append(run)
                        run = []
                    items.append(packet)
        finally:
            if run:
                items.append(run)
        return at

    def _publishes(self, data: bytes, at: int, run: list[Publish]) -> int:
        """The hot path: append the plain QoS 1 publishes at `at` to `run`.

        Returns the position of the first packet that is anything else, or incomplete, or faulty.
        """
        topics, add = self._topics, run.append
        last = len(data) - _PUBLISH_MIN_BYTES
        v5 = self.version == V5
        gap = 3 if v5 else 2  # packet identifier and, in MQTT 5, a property length of 0
        while at <= last:
            first, size, topic_bytes = _unpack_publish_head(data, at)
            if first != _PLAIN_QOS1_PUBLISH:
                break
            body = at + 4
            if size >= CONTINUATION_BIT:
                # two bytes of remaining length: the second is the upper half of what was read as the topic's
                size = size & 0x7F | topic_bytes >> 8 << 7
                if topic_bytes & 0x8000 or at > last - 1 or size + 3 > self._limit or size < CONTINUATION_BIT:
                    break
                topic_bytes = _unpack_u16(data, at + 3)[0]
                body = at + 5
            stop = body + size - 2
            payload = body + topic_bytes + gap
            if payload > stop or stop > last + _PUBLISH_MIN_BYTES:
                break
            if v5:
                packet_id, properties = _unpack_id_and_properties(data, payload - 3)
                if properties:
                    break
            else:
                packet_id = _unpack_u16(data, payload - 2)[0]
            if not packet_id:
                break
            add(Publish(topics[data[body : payload - gap]], data[payload:stop], packet_id, 1))
            at = stop
        return at

    def _frame(self, data: bytes, at: int) -> tuple[int, int] | None:
        """Where the body of the packet at `at` begins and ends, or None while it is not all there."""
        size = 0
        for position in range(1, VARINT_MAX_BYTES + 1):
            if at + position >= len(data):
                self._needed = position + 1
                return None
            byte = data[at + position]
            size |= (byte & 0x7F) << 7 * (position - 1)
            if byte < CONTINUATION_BIT:
                break
        else:
            raise malformed_packet("a remaining length of more than four bytes")
        if not byte and position > 1 and self.version == V5:
            raise malformed_packet("a remaining length longer than it needs to be")
        self._needed = position + 1 + size
        if self._needed > self._limit:
            raise MqttProtocolError(
                ReasonCode.PACKET_TOO_LARGE,
                f"a packet of {self._needed} bytes; at most {self._limit} are taken",
            )
        stop = at + self._needed
        return None if stop > len(data) else (at + position + 1, stop)

    def _packet(self, first: int, fields: FieldReader) -> Packet:
        number, flags = first >> 4, first & 0x0F
        if not number:
            raise malformed_packet("packet type 0")
        kind = PacketType(number)
        if kind in (_SENT_BY_CLIENTS if self._client else _SENT_BY_SERVERS):
            raise protocol_error(f"{kind.name} from the wrong side")
        if kind is PacketType.PUBLISH:
            return self._publish(flags, fields)
        if flags != REQUIRED_FLAGS.get(kind, 0):
            raise malformed_packet(f"{kind.name} with flags {flags:#x}")
        if kind is PacketType.CONNECT:
            return self._connect(fields)
        assert self.version is not None
        return decode_packet_body(kind, fields, self.version, from_server=self._client)

    def _publish(self, flags: int, fields: FieldReader) -> Publish:
        dup, qos, retain = bool(flags & 8), flags >> 1 & 3, bool(flags & 1)
        if qos == RESERVED_QOS:
            raise malformed_packet("PUBLISH at QoS 3")
        if dup and not qos:
            raise malformed_packet("PUBLISH marked as a duplicate at QoS 0")
        topic = fields.binary()
        packet_id = fields.packet_id() if qos else 0
        properties = NO_PROPERTIES
        alias = None
        if self.version == V5:
            properties = decode_properties(fields, PacketType.PUBLISH)
            alias = properties.get(Property.TOPIC_ALIAS)
            if not self._client and Property.SUBSCRIPTION_IDENTIFIER in properties:
                raise protocol_error("a subscription identifier from a client")
        if alias is None or topic:
            topic = self._topics[topic]
        if isinstance(alias, int):
            topic = self._resolve(topic, alias)
        if not qos:
            self.qos0_publishes += 1
        return Publish(topic, fields.rest(), packet_id, qos, retain, dup, properties)

    def _resolve(self, topic: bytes, alias: int) -> bytes:
        if alias > self._alias_maximum:
            raise MqttProtocolError(
                ReasonCode.TOPIC_ALIAS_INVALID, f"topic alias {alias}; at most {self._alias_maximum} is taken"
            )
        if topic:
            self._aliases[alias] = topic
            return topic
        if alias not in self._aliases:
            raise protocol_error(f"topic alias {alias} has not been set")
        return self._aliases[alias]

    def _connect(self, fields: FieldReader) -> Connect:
        if self._connected:
            raise protocol_error("a second CONNECT")
        name, level = decode_protocol_level(fields)
        self.version = V5 if level & 0x7F >= V5 else V311
        if name != "MQTT" or level not in (V311, V5):
            raise MqttProtocolError(
                ReasonCode.UNSUPPORTED_PROTOCOL_VERSION,
                f"protocol {name} level {level}; MQTT 4 and 5 are spoken",
            )
        packet = decode_connect(fields, level, self._topics)
        fields.finish()
        self._connected = True
        self._limit = self._max_packet_bytes
        return packet
