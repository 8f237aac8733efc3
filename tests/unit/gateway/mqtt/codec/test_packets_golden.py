"""Packets byte for byte as the specifications draw them, written out by hand, in both directions."""

import pytest

from gateway.mqtt.codec.packet_codec import encode_packet, encode_publish_acks
from gateway.mqtt.codec.packets import (
    V5,
    V311,
    Auth,
    Connack,
    Connect,
    Disconnect,
    PacketType,
    Pingreq,
    Pingresp,
    Property,
    Publish,
    PublishAck,
    Suback,
    Subscribe,
    TopicCache,
    Unsuback,
    Unsubscribe,
    Will,
)
from gateway.mqtt.codec.parser import PacketParser

P = Property
CONNECT_V5 = bytes.fromhex("10 0e 0004 4d515454 05 02 003c 00 0001 78")
CONNECT_V311 = bytes.fromhex("10 0d 0004 4d515454 04 02 003c 0001 78")

FROM_CLIENT = [
    ("qos 0 publish", V5, "30 09 0003 612f62 00 6869 21", Publish(b"a/b", b"hi!")),
    ("qos 0 publish", V311, "30 08 0003 612f62 6869 21", Publish(b"a/b", b"hi!")),
    ("empty payload", V311, "30 03 0001 61", Publish(b"a", b"")),
    ("qos 1 publish", V5, "32 0a 0003 612f62 000a 00 6869", Publish(b"a/b", b"hi", 10, 1)),
    ("qos 1 publish", V311, "32 09 0003 612f62 000a 6869", Publish(b"a/b", b"hi", 10, 1)),
    ("qos 1 publish, empty payload", V311, "32 05 0001 61 ffff", Publish(b"a", b"", 65535, 1)),
    (
        "qos 2 publish, dup, retain",
        V5,
        "3d 08 0001 61 0102 00 6869",
        Publish(b"a", b"hi", 258, 2, True, True),
    ),
    (
        "publish with properties",
        V5,
        (
            "32 29 0001 61 0001 21 01 01 02 0000003c 03 0002 6a73 08 0001 72 09 0002 0001 "
            "26 0001 6b 0001 76 26 0000 0000 7b7d"
        ),
        Publish(
            b"a",
            b"{}",
            1,
            1,
            properties={
                P.PAYLOAD_FORMAT_INDICATOR: 1,
                P.MESSAGE_EXPIRY_INTERVAL: 60,
                P.CONTENT_TYPE: "js",
                P.RESPONSE_TOPIC: "r",
                P.CORRELATION_DATA: b"\0\1",
                P.USER_PROPERTY: (("k", "v"), ("", "")),
            },
        ),
    ),
    ("puback in two bytes", V5, "40 02 0007", PublishAck(PacketType.PUBACK, 7)),
    ("puback with a reason", V5, "40 03 0007 97", PublishAck(PacketType.PUBACK, 7, 0x97)),
    (
        "puback with a reason string",
        V5,
        "40 09 0007 80 05 1f 0002 6e6f",
        PublishAck(PacketType.PUBACK, 7, 0x80, {P.REASON_STRING: "no"}),
    ),
    ("puback", V311, "40 02 0007", PublishAck(PacketType.PUBACK, 7)),
    ("pubrec", V5, "50 02 0007", PublishAck(PacketType.PUBREC, 7)),
    ("pubrel", V5, "62 02 0007", PublishAck(PacketType.PUBREL, 7)),
    ("pubrel not found", V5, "62 03 0007 92", PublishAck(PacketType.PUBREL, 7, 0x92)),
    ("pubcomp", V311, "70 02 0007", PublishAck(PacketType.PUBCOMP, 7)),
    ("subscribe", V5, "82 09 000a 00 0003 612f62 2e", Subscribe(10, (("a/b", 0x2E),))),
    (
        "subscribe with identifier",
        V5,
        "82 0a 000a 03 0b ff01 0001 23 01",
        Subscribe(10, (("#", 1),), {P.SUBSCRIPTION_IDENTIFIER: 255}),
    ),
    ("subscribe to two", V311, "82 0a 000a 0001 61 01 0001 62 02", Subscribe(10, (("a", 1), ("b", 2)))),
    ("unsubscribe", V5, "a2 08 000a 00 0003 612f62", Unsubscribe(10, ("a/b",))),
    ("unsubscribe", V311, "a2 07 000a 0003 612f62", Unsubscribe(10, ("a/b",))),
    ("pingreq", V5, "c0 00", Pingreq()),
    ("pingreq", V311, "c0 00", Pingreq()),
    ("disconnect", V5, "e0 00", Disconnect()),
    ("disconnect", V311, "e0 00", Disconnect()),
    ("disconnect with will", V5, "e0 01 04", Disconnect(4)),
    (
        "disconnect with expiry",
        V5,
        "e0 07 00 05 11 0000000a",
        Disconnect(0, {P.SESSION_EXPIRY_INTERVAL: 10}),
    ),
    (
        "auth",
        V5,
        "f0 09 19 07 15 0001 6d 16 0000",
        Auth(0x19, {P.AUTHENTICATION_METHOD: "m", P.AUTHENTICATION_DATA: b""}),
    ),
]

FROM_SERVER = [
    ("connack", V5, "20 03 00 00 00", Connack()),
    ("connack, session present", V311, "20 02 01 00", Connack(0, True)),
    ("connack, bad version", V311, "20 02 00 01", Connack(1)),
    ("connack, not authorized", V5, "20 03 00 87 00", Connack(0x87)),
    (
        "connack with properties",
        V5,
        "20 10 00 00 0d 21 000a 27 00010000 28 00 13 003c",
        Connack(
            0,
            False,
            {
                P.RECEIVE_MAXIMUM: 10,
                P.MAXIMUM_PACKET_SIZE: 65536,
                P.WILDCARD_SUBSCRIPTION_AVAILABLE: 0,
                P.SERVER_KEEP_ALIVE: 60,
            },
        ),
    ),
    ("suback", V5, "90 05 000a 00 00 a2", Suback(10, (0, 0xA2))),
    ("suback", V311, "90 04 000a 01 80", Suback(10, (1, 0x80))),
    ("unsuback", V5, "b0 04 000a 00 11", Unsuback(10, (0x11,))),
    ("unsuback", V311, "b0 02 000a", Unsuback(10)),
    ("pingresp", V5, "d0 00", Pingresp()),
    ("disconnect, taken over", V5, "e0 01 8e", Disconnect(0x8E)),
    (
        "publish with subscription identifiers",
        V5,
        "30 08 0001 61 04 0b 01 0b 02",
        Publish(b"a", b"", properties={P.SUBSCRIPTION_IDENTIFIER: (1, 2)}),
    ),
]

CONNECTS = [
    ("the least", "10 0d 0004 4d515454 05 02 0000 00 0000", Connect("")),
    ("the least, 3.1.1", "10 0c 0004 4d515454 04 02 0000 0000", Connect("", V311)),
    (
        "everything, 3.1.1",
        "10 1d 0004 4d515454 04 ec 000a 0002 6964 0001 77 0003 627965 0001 75 0002 7077",
        Connect("id", V311, False, 10, "u", b"pw", Will(b"w", b"bye", 1, True)),
    ),
    (
        "everything",
        (
            "10 3a 0004 4d515454 05 f6 ffff 0d 11 ffffffff 21 0014 27 00000400 0001 78 "
            "0d 18 00000005 26 0001 6b 0002 7676 0003 772f78 0002 0001 0001 75 0003 00ff00"
        ),
        Connect(
            "x",
            V5,
            True,
            65535,
            "u",
            b"\0\xff\0",
            Will(b"w/x", b"\0\1", 2, True, {P.WILL_DELAY_INTERVAL: 5, P.USER_PROPERTY: (("k", "vv"),)}),
            {P.SESSION_EXPIRY_INTERVAL: 0xFFFFFFFF, P.RECEIVE_MAXIMUM: 20, P.MAXIMUM_PACKET_SIZE: 1024},
        ),
    ),
    ("a password alone", "10 10 0004 4d515454 05 42 0000 00 0000 0001 70", Connect("", password=b"p")),
]


def flat(items):
    return [packet for item in items for packet in (item if isinstance(item, list) else [item])]


def server_parser(version):
    parser = PacketParser(max_packet_bytes=1 << 20, topics=TopicCache(), topic_alias_maximum=10)
    parser.feed(CONNECT_V5 if version == V5 else CONNECT_V311)
    assert parser.fault is None
    return parser


def client_parser(version):
    return PacketParser(max_packet_bytes=1 << 20, topics=TopicCache(), client=True, version=version)


def named(table):
    return [pytest.param(*row[1:], id=f"{row[0]} {row[1]}") for row in table]


@pytest.mark.parametrize(("version", "drawn", "packet"), named(FROM_CLIENT))
def test_packets_of_clients_are_parsed_and_encoded_as_drawn(version, drawn, packet):
    parser = server_parser(version)
    assert flat(parser.feed(bytes.fromhex(drawn))) == [packet]
    assert parser.fault is None
    assert encode_packet(packet, version) == bytes.fromhex(drawn)


@pytest.mark.parametrize(("version", "drawn", "packet"), named(FROM_SERVER))
def test_packets_of_servers_are_parsed_and_encoded_as_drawn(version, drawn, packet):
    parser = client_parser(version)
    assert flat(parser.feed(bytes.fromhex(drawn))) == [packet]
    assert parser.fault is None
    assert encode_packet(packet, version) == bytes.fromhex(drawn)


@pytest.mark.parametrize(("drawn", "packet"), [pytest.param(*row[1:], id=row[0]) for row in CONNECTS])
def test_connects_are_parsed_and_encoded_as_drawn(drawn, packet):
    parser = PacketParser(max_packet_bytes=1 << 20, topics=TopicCache())
    assert parser.feed(bytes.fromhex(drawn)) == [packet]
    assert parser.version == packet.version
    assert encode_packet(packet, packet.version) == bytes.fromhex(drawn)


def test_acknowledgements_are_encoded_in_bulk_as_one_by_one():
    ids = [1, 255, 256, 65535]
    for kind in (PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBCOMP):
        one_by_one = b"".join(encode_packet(PublishAck(kind, n)) for n in ids)
        assert encode_publish_acks(kind, ids) == one_by_one
        assert encode_publish_acks(kind, []) == b""


@pytest.mark.parametrize(
    ("size", "drawn"),
    [
        (127, "7f"),
        (128, "8001"),
        (16_383, "ff7f"),
        (16_384, "808001"),
        (2_097_151, "ffff7f"),
        (2_097_152, "80808001"),
    ],
)
def test_remaining_lengths_at_every_boundary(size, drawn):
    publish = Publish(b"a", b"x" * (size - 5), 1, 1)
    packet = b"\x32" + bytes.fromhex(drawn) + b"\0\1a\0\1" + publish.payload
    assert encode_packet(publish, V311) == packet
    parser = PacketParser(max_packet_bytes=4 << 20, topics=TopicCache())
    assert parser.feed(CONNECT_V311 + packet)[1:] == [[publish]]


def test_values_that_cannot_be_sent_are_refused_before_they_are():
    for packet in (
        Publish(b"x" * 65_536, b""),
        Publish(b"a", b"", 65_536, 1),
        Subscribe(1, (("a\0b", 0),)),
        Unsubscribe(1, ("\ud800",)),
        Disconnect(0, {P.SESSION_EXPIRY_INTERVAL: 1 << 32}),
        Subscribe(1, (("a", 0),), {P.SUBSCRIPTION_IDENTIFIER: 1 << 28}),
    ):
        with pytest.raises((ValueError, OverflowError)):
            encode_packet(packet)
