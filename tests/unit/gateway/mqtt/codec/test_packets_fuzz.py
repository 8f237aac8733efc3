"""Hostile bytes: valid packets mutated where it hurts. Bounded in time; TIDEGATE_FUZZ_SECONDS gives more."""

import os
import random
import time
from typing import Any

import mqtt5
import pytest

from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import (
    V5,
    V311,
    Connect,
    Disconnect,
    MqttProtocolError,
    Packet,
    PacketType,
    Pingreq,
    Properties,
    Property,
    Publish,
    PublishAck,
    Subscribe,
    TopicCache,
    Unsubscribe,
    Will,
    check_topic_name,
)
from gateway.mqtt.codec.parser import PacketParser

SECONDS = float(os.environ.get("TIDEGATE_FUZZ_SECONDS", "4"))
MAX_PACKET_BYTES = 4096
P = Property
RICH: Properties = {
    P.PAYLOAD_FORMAT_INDICATOR: 1,
    P.CONTENT_TYPE: "application/json",
    P.TOPIC_ALIAS: 3,
    P.USER_PROPERTY: (("é", "ü"), ("k", "v")),
}


def seeds(version):
    rich: Properties = RICH if version == V5 else {}
    return [
        encode_packet(packet, version)
        for packet in (
            Connect(
                "dev",
                version,
                False,
                60,
                "u",
                b"p",
                Will(b"w", b"bye", 1),
                {P.RECEIVE_MAXIMUM: 9} if rich else {},
            ),
            Publish(b"sensors/a/temperature", b'{"value": 21.5}', 1, 1),
            Publish("é/温度".encode(), b"x" * 200, 2, 1, True, True, rich),
            Publish(b"a", b""),
            Publish(b"a/b", b"y", 3, 2, properties=rich),
            PublishAck(PacketType.PUBREL, 3),
            Subscribe(4, (("a/#", 1), ("$share/g/b", 0)), {P.SUBSCRIPTION_IDENTIFIER: 300} if rich else {}),
            Unsubscribe(5, ("a",)),
            Pingreq(),
            Disconnect(4 if rich else 0, {P.REASON_STRING: "bye"} if rich else {}),
        )
    ]


NASTY = (
    b"\0",
    b"\xff",
    b"\x80",
    b"\x7f",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xff\xff",
    b"\0\0",
    b"\xff\xff\xff\x7f",
    b"+",
    b"#",
)


def mutate(rng, wire):
    """One to four changes: a bit, a byte, a nasty piece put in or over, a piece cut out or doubled."""
    out = bytearray(wire)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(out):
                out[at] = rng.randrange(256)
            case 2:
                out[at:at] = rng.choice(NASTY)
            case 3:
                piece = rng.choice(NASTY)
                out[at : at + len(piece)] = piece
            case 4:
                del out[at : at + rng.randint(1, 8)]
            case _:
                out[at:at] = out[at : at + rng.randint(1, 16)]
    return bytes(out)


@pytest.mark.timeout(SECONDS * 4 + 60)
@pytest.mark.parametrize("version", [V5, V311])
@pytest.mark.parametrize("client", [False, True], ids=["server", "client"])
def test_mutated_packets_end_in_packets_or_one_fault_and_nothing_else(version, client):
    rng = random.Random(20_240 + version + client)
    good = seeds(version)
    topics = TopicCache(limit=1000)
    faults = parsed = 0
    until = time.monotonic() + SECONDS / 4
    while time.monotonic() < until:
        for _ in range(50):
            wire = b"".join(rng.choice(good) for _ in range(rng.randint(0, 3)))
            wire = good[0] * rng.randint(0, 1) + mutate(rng, wire + rng.choice(good))
            parser = PacketParser(
                max_packet_bytes=MAX_PACKET_BYTES,
                topics=topics,
                topic_alias_maximum=5,
                client=client,
                version=version if client else None,
            )
            cut = rng.randrange(len(wire) + 1)
            items = parser.feed(wire[:cut]) + parser.feed(wire[cut:])
            for item in items:
                for packet in item if isinstance(item, list) else [item]:
                    parsed += 1
                    if isinstance(packet, Publish):
                        check_topic_name(packet.topic)
                        assert packet.qos in (0, 1, 2)
                        assert (packet.packet_id > 0) == (packet.qos > 0)
            assert parser.fault is None or type(parser.fault) is MqttProtocolError
            assert len(parser._held) <= MAX_PACKET_BYTES + len(wire)
            faults += parser.fault is not None
    assert faults
    assert parsed


def test_the_outcome_does_not_depend_on_how_the_bytes_were_read():
    rng = random.Random(7)
    good = seeds(V5)
    for _ in range(1500):
        wire = good[0] + mutate(rng, b"".join(rng.choice(good[1:]) for _ in range(3)))
        outcomes = []
        for step in (len(wire), 1, 5):
            parser = PacketParser(
                max_packet_bytes=MAX_PACKET_BYTES, topics=TopicCache(), topic_alias_maximum=5
            )
            found: list[Packet] = []
            for at in range(0, len(wire), step):
                for item in parser.feed(wire[at : at + step]):
                    found += item if isinstance(item, list) else [item]
            outcomes.append((found, parser.fault and parser.fault.reason_code))
        assert outcomes[0] == outcomes[1] == outcomes[2], wire.hex()


def test_what_we_accept_of_mutated_packets_the_mqtt5_library_accepts_too():
    rng = random.Random(3)
    good = seeds(V5)
    accepted = 0
    for _ in range(4000):
        wire = mutate(rng, rng.choice(good))
        parser = PacketParser(max_packet_bytes=1 << 28, topics=TopicCache(), topic_alias_maximum=65_535)
        if wire[:1] != good[0][:1]:
            parser.feed(good[0])
        items = parser.feed(wire)
        if not items or wire.startswith(b"\xf0\0"):
            continue  # section 3.15.2.1 allows the empty AUTH, which that library does not
        accepted += 1
        read: Any
        read, size = mqtt5.read(memoryview(wire))
        first = items[0][0] if isinstance(items[0], list) else items[0]
        if isinstance(first, Publish) and P.TOPIC_ALIAS not in first.properties:
            assert (read.topic.encode(), read.payload, read.packet_id or 0) == (
                first.topic,
                first.payload,
                first.packet_id,
            )
        assert 0 < size <= len(wire)
    assert accepted > 500
