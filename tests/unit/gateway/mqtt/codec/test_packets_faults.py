"""What breaks the protocol, and the reason code the specification has for it."""

import pytest

from gateway.mqtt.codec.packets import V5, V311, MqttProtocolError, Publish, TopicCache, check_topic_name
from gateway.mqtt.codec.parser import CONNECT_MAX_BYTES, PacketParser

CONNECTED = {
    V5: bytes.fromhex("10 0e 0004 4d515454 05 02 003c 00 0001 78"),
    V311: bytes.fromhex("10 0d 0004 4d515454 04 02 003c 0001 78"),
}
BOTH = (V5, V311)

AFTER_CONNECT = [
    ("packet type 0", BOTH, "00 00", 0x81),
    ("flags in PINGREQ", BOTH, "c1 00", 0x81),
    ("a body in PINGREQ", BOTH, "c0 01 00", 0x81),
    ("SUBSCRIBE without its reserved bit", V5, "80 06 0001 00 0001 61".replace("06", "07") + "00", 0x81),
    ("PUBREL without its reserved bit", BOTH, "60 02 0001", 0x81),
    ("a second CONNECT", V5, "10 0e 0004 4d515454 05 02 003c 00 0001 78", 0x82),
    ("CONNACK from a client", BOTH, "20 02 00 00", 0x82),
    ("SUBACK from a client", V5, "90 04 0001 00 00", 0x82),
    ("PINGRESP from a client", BOTH, "d0 00", 0x82),
    ("AUTH in 3.1.1", V311, "f0 00", 0x81),
    ("QoS 3", BOTH, "36 06 0001 61 0001 00", 0x81),
    ("DUP at QoS 0", BOTH, "38 04 0001 61 00", 0x81),
    ("packet identifier 0", V5, "32 06 0001 61 0000 00", 0x82),
    ("packet identifier 0", V311, "32 05 0001 61 0000", 0x82),
    ("packet identifier 0 at QoS 2", V5, "34 06 0001 61 0000 00", 0x82),
    ("a topic past the end", BOTH, "32 05 00ff 61 0001", 0x81),
    ("no room for the packet identifier", BOTH, "32 04 0001 61 00", 0x81),
    ("no property length", V5, "32 05 0001 61 0001", 0x81),
    ("an empty PUBLISH", BOTH, "32 00", 0x81),
    ("one byte of PUBLISH", BOTH, "30 01 00", 0x81),
    ("an empty topic", V5, "30 03 0000 00", 0x82),
    ("an empty topic", V311, "30 02 0000", 0x82),
    ("an empty topic at QoS 1", V5, "32 05 0000 0001 00", 0x82),
    ("a wildcard in a topic", BOTH, "30 04 0001 23 00", 0x90),
    ("a single-level wildcard in a topic", V5, "32 08 0003 612f2b 0001 00", 0x90),
    ("U+0000 in a topic", BOTH, "30 05 0002 6100 00", 0x81),
    ("an overlong UTF-8 topic", BOTH, "30 05 0002 c080 00", 0x81),
    ("a surrogate in a topic", BOTH, "30 06 0003 eda080 00", 0x81),
    ("properties past the end", V5, "30 05 0001 61 09 01", 0x81),
    ("an unknown property", V5, "30 06 0001 61 02 04 00", 0x81),
    ("a property of another packet", V5, "30 07 0001 61 03 13 0001", 0x81),
    ("an overlong property identifier", V5, "30 07 0001 61 03 8100 01", 0x81),
    ("a property cut short", V5, "30 06 0001 61 02 02 00", 0x81),
    ("a property twice", V5, "30 08 0001 61 04 01 00 01 00", 0x82),
    ("payload format indicator 2", V5, "30 06 0001 61 02 01 02", 0x82),
    ("a wildcard in the response topic", V5, "30 08 0001 61 04 08 0001 23", 0x82),
    ("a user property that is not UTF-8", V5, "30 0b 0001 61 07 26 0002 ff61 0000", 0x81),
    ("a subscription identifier from a client", V5, "30 06 0001 61 02 0b 01", 0x82),
    ("topic alias 0", V5, "30 07 0001 61 03 23 0000", 0x94),
    ("a topic alias above the maximum", V5, "30 07 0001 61 03 23 0003", 0x94),
    ("a topic alias not set", V5, "30 06 0000 03 23 0001", 0x82),
    ("an overlong remaining length", V5, "c0 80 00", 0x81),
    ("an overlong remaining length of PUBLISH", V5, "32 86 00 0001 61 0001 00", 0x81),
    ("an overlong property length", V5, "30 05 0001 61 8000", 0x81),
    ("a remaining length of five bytes", BOTH, "30 80 80 80 80 01", 0x81),
    ("a larger packet than allowed", BOTH, "30 f1 07", 0x95),
    ("packet identifier 0 in PUBREL", BOTH, "62 02 0000", 0x82),
    ("a reason code that PUBREL has not", V5, "62 03 0001 80", 0x82),
    ("bytes after PUBREL", V311, "62 03 0001 00", 0x81),
    ("SUBSCRIBE without a filter", V5, "82 03 0001 00", 0x82),
    ("SUBSCRIBE without a filter", V311, "82 02 0001", 0x82),
    ("subscription options with reserved bits", V5, "82 07 0001 00 0001 61 40", 0x81),
    ("subscription options of MQTT 5", V311, "82 06 0001 0001 61 04", 0x81),
    ("a subscription at QoS 3", BOTH, None, 0x81),
    ("retain handling 3", V5, "82 07 0001 00 0001 61 30", 0x82),
    ("subscription identifier 0", V5, "82 09 0001 02 0b 00 0001 61 00", 0x82),
    ("UNSUBSCRIBE without a filter", V5, "a2 03 0001 00", 0x82),
    ("a body in DISCONNECT", V311, "e0 01 00", 0x81),
    ("a reason only servers give", V5, "e0 01 8b", 0x82),
    ("authentication data without a method", V5, "f0 06 18 04 16 0001 00", 0x82),
]

CONNECTS = [
    ("not CONNECT", "c0 00", 0x82, None),
    ("HTTP", "474554202f20485454502f312e310d0a", 0x82, None),
    ("TLS", "1603010200010001fc0303", 0x82, None),
    ("CONNECT with flags", "11 0c 0004 4d515454 04 02 0000 0000", 0x82, None),
    ("another protocol", "10 0c 0004 4d515455 04 02 0000 0000", 0x82, None),
    ("MQTT 3.1", "10 0e 0006 4d5149736470 03 02 0000 0000", 0x84, V311),
    ("level 3 named MQTT", "10 0c 0004 4d515454 03 02 0000 0000", 0x84, V311),
    ("level 6", "10 0c 0004 4d515454 06 02 0000 0000", 0x84, V5),
    ("a bridge of 3.1.1", "10 0c 0004 4d515454 84 02 0000 0000", 0x84, V311),
    ("the reserved flag", "10 0d 0004 4d515454 05 03 0000 00 0000", 0x81, V5),
    ("a will at QoS 3", "10 0d 0004 4d515454 05 1e 0000 00 0000", 0x81, V5),
    ("a will's QoS without a will", "10 0d 0004 4d515454 05 0a 0000 00 0000", 0x81, V5),
    ("a will's retain without a will", "10 0c 0004 4d515454 04 22 0000 0000", 0x81, V311),
    ("a password alone", "10 0f 0004 4d515454 04 42 0000 0000 0001 70", 0x81, V311),
    ("cut short", "10 09 0004 4d515454 05 02 00", 0x81, V5),
    ("bytes after the end", "10 0e 0004 4d515454 05 02 0000 00 0000 00", 0x81, V5),
    ("U+0000 in the client identifier", "10 0e 0004 4d515454 04 02 0000 0002 6100", 0x81, V311),
    ("a wildcard in the will topic", "10 11 0004 4d515454 04 06 0000 0000 0001 23 0000", 0x90, V311),
    ("receive maximum 0", "10 10 0004 4d515454 05 02 0000 03 21 0000 0000", 0x82, V5),
    ("maximum packet size 0", "10 12 0004 4d515454 05 02 0000 05 27 00000000 0000", 0x82, V5),
    ("a CONNECT of megabytes", "10 ffff7f", 0x95, None),
]


def parser_for(version, topics=None):
    parser = PacketParser(max_packet_bytes=1000, topics=topics or TopicCache(), topic_alias_maximum=2)
    parser.feed(CONNECTED[version])
    assert parser.fault is None
    return parser


def cases():
    for name, versions, drawn, code in AFTER_CONNECT:
        for version in versions if isinstance(versions, tuple) else (versions,):
            if drawn is None:
                drawn = "82 07 0001 00 0001 61 03" if version == V5 else "82 06 0001 0001 61 03"  # noqa: PLW2901
            yield pytest.param(version, drawn, code, id=f"{name} {version}")


@pytest.mark.parametrize(("version", "drawn", "code"), list(cases()))
def test_a_violation_is_a_fault_with_its_reason_code_after_the_packets_before_it(version, drawn, code):
    good = bytes.fromhex("32 06 0001 61 0001 00") if version == V5 else bytes.fromhex("32 05 0001 61 0001")
    for before in (b"", good):
        parser = parser_for(version)
        items = parser.feed(before + bytes.fromhex(drawn))
        assert items == ([[Publish(b"a", b"", 1, 1)]] if before else [])
        assert parser.fault is not None
        assert parser.fault.reason_code == code
        assert parser.feed(good) == []


@pytest.mark.parametrize(
    ("drawn", "code", "version"), [pytest.param(*row[1:], id=row[0]) for row in CONNECTS]
)
def test_a_violation_in_connect_is_a_fault_and_tells_the_version_to_answer_in(drawn, code, version):
    parser = PacketParser(max_packet_bytes=1 << 20, topics=TopicCache())
    assert parser.feed(bytes.fromhex(drawn)) == []
    assert parser.fault is not None
    assert parser.fault.reason_code == code
    assert parser.version == version


def test_overlong_remaining_lengths_are_taken_from_microcontrollers_that_speak_3_1_1():
    parser = parser_for(V311)
    assert parser.feed(bytes.fromhex("32 85 00 0001 61 0001")) == [[Publish(b"a", b"", 1, 1)]]


def test_a_packet_too_large_is_refused_before_its_body_is_buffered():
    parser = parser_for(V5)
    assert parser.feed(b"\x32") == []
    assert parser.feed(b"\xff\xff\xff\x7f") == []
    assert parser.fault is not None
    assert parser.fault.reason_code == 0x95


def test_the_largest_packet_allowed_is_taken_and_one_byte_more_is_not():
    body = b"\0\1a\0\1\0"
    largest = b"\x32" + bytes((997 & 0x7F | 0x80, 997 >> 7)) + body + b"x" * (997 - len(body))
    parser = parser_for(V5)
    assert len(largest) == 1000
    assert parser.feed(largest) == [[Publish(b"a", b"x" * 991, 1, 1)]]
    too_large = b"\x32" + bytes((998 & 0x7F | 0x80, 998 >> 7)) + body + b"x" * (998 - len(body))
    assert parser.feed(too_large) == []
    assert parser.fault is not None
    assert parser.fault.reason_code == 0x95


def test_before_connect_no_more_is_buffered_than_a_connect_may_have():
    parser = PacketParser(max_packet_bytes=64 << 20, topics=TopicCache())
    over = CONNECT_MAX_BYTES
    assert parser.feed(bytes((0x10, over & 0x7F | 0x80, over >> 7 & 0x7F | 0x80, over >> 14))) == []
    assert parser.fault is not None


@pytest.mark.parametrize(
    "topic", [b"a", b"/", b"a//b", "température/é".encode(), b"$SYS/x", b"x" * 65_535, b" ", b"\xef\xbb\xbf"]
)
def test_unusual_topics_are_valid(topic):
    check_topic_name(topic)


@pytest.mark.parametrize(
    "topic",
    [b"", b"a+", b"#", b"a/#", b"\0", b"a\0b", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf5\x80\x80\x80"],
)
def test_topics_that_may_not_be_published_to_are_not(topic):
    with pytest.raises(MqttProtocolError):
        check_topic_name(topic)


def test_the_topic_table_stays_bounded_and_goes_on_working():
    topics = TopicCache(limit=3)
    for number in range(10):
        name = b"t/%d" % number
        assert topics[name] == name
        assert len(topics) <= 3
    assert topics[b"x" * 300] == b"x" * 300
    assert b"x" * 300 not in topics


def test_topics_are_shared_between_connections():
    topics = TopicCache()
    packet = bytes.fromhex("32 06 0001 61 0001 00")
    first, second = (parser_for(V5, topics).feed(packet)[0][0].topic for _ in range(2))
    assert first is second
