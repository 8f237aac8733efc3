"""The codec against three others: mqtt5 (Rust), paho and gmqtt. Each reads or writes the same packets."""

from typing import Any

import mqtt5
import pytest
from gmqtt.mqtt import constants as gmqtt_constants
from gmqtt.mqtt.package import LoginPackageFactor, PublishPacket
from gmqtt.mqtt.property import Property as GmqttProperty
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.properties import VariableByteIntegers

from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import V5, V311, Auth, Connect, PacketType, Property, TopicCache
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.codec.properties import (
    VARINT_MAX,
    FieldReader,
    decode_properties,
    encode_properties,
    encode_varint,
)
from tests.support.mqtt_strategies import connects, properties, publishes, to_client, to_server

P = Property


def rust_read(wire) -> tuple[Any, int]:
    return mqtt5.read(memoryview(wire))


def parsed(wire, *, version=V5, client=False):
    parser = PacketParser(
        max_packet_bytes=1 << 20,
        topics=TopicCache(),
        topic_alias_maximum=65_535,
        client=client,
        version=version if client else None,
    )
    if not client and wire[0] != 0x10:
        parser.feed(encode_packet(Connect("x", version), version))
    items = parser.feed(wire)
    return parser, [p for item in items for p in (item if isinstance(item, list) else [item])]


def test_mqtt5_reads_the_publishes_we_write():
    @settings(max_examples=200, deadline=None)
    @given(publishes())
    def check(publish):
        wire = encode_packet(publish)
        read, size = rust_read(wire)
        assert size == len(wire)
        assert (
            read.topic.encode(),
            read.payload,
            read.packet_id or 0,
            int(read.qos),
            read.retain,
            read.duplicate,
        ) == (
            publish.topic,
            publish.payload,
            publish.packet_id,
            publish.qos,
            publish.retain,
            publish.dup,
        )
        known = publish.properties
        assert read.payload_format_indicator == known.get(P.PAYLOAD_FORMAT_INDICATOR, 0)
        assert read.message_expiry_interval == known.get(P.MESSAGE_EXPIRY_INTERVAL)
        assert read.content_type == known.get(P.CONTENT_TYPE)
        assert read.response_topic == known.get(P.RESPONSE_TOPIC)
        assert read.correlation_data == known.get(P.CORRELATION_DATA)
        assert tuple(read.user_properties or ()) == known.get(P.USER_PROPERTY, ())

    check()


def test_mqtt5_reads_the_connects_we_write():
    @settings(max_examples=200, deadline=None)
    @given(connects())
    def check(connect):
        wire = encode_packet(connect)
        read, size = rust_read(wire)
        assert size == len(wire)
        assert (read.client_id, read.username, read.password, read.clean_start, read.keep_alive) == (
            connect.client_id,
            connect.username,
            connect.password,
            connect.clean_start,
            connect.keep_alive_s,
        )
        assert (read.will is None) == (connect.will is None)
        if connect.will is not None:
            assert (
                read.will.topic.encode(),
                read.will.payload or b"",
                int(read.will.qos),
                read.will.retain,
            ) == (
                connect.will.topic,
                connect.will.payload,
                connect.will.qos,
                connect.will.retain,
            )
        known = connect.properties
        assert read.session_expiry_interval == known.get(P.SESSION_EXPIRY_INTERVAL, 0)
        assert read.receive_max == known.get(P.RECEIVE_MAXIMUM, 65_535)
        assert read.max_packet_size == known.get(P.MAXIMUM_PACKET_SIZE)

    check()


@pytest.mark.parametrize("client", [False, True], ids=["to server", "to client"])
def test_what_mqtt5_writes_again_after_reading_ours_we_read_the_same(client):
    @settings(max_examples=300, deadline=None)
    @given(to_client() if client else to_server())
    def check(packet):
        if packet == Auth():
            return  # mqtt5 does not read the two-byte form that section 3.15.2.1 allows
        wire = encode_packet(packet)
        again = rust_read(wire)[0].write()
        _, first = parsed(wire, client=client)
        parser, second = parsed(again, client=client)
        assert parser.fault is None
        assert strip(first[0]) == strip(second[0])

    check()


DEFAULTS = {
    P.PAYLOAD_FORMAT_INDICATOR: 0,
    P.RECEIVE_MAXIMUM: 65_535,
    P.TOPIC_ALIAS_MAXIMUM: 0,
    P.RETAIN_AVAILABLE: 1,
    P.WILDCARD_SUBSCRIPTION_AVAILABLE: 1,
    P.SUBSCRIPTION_IDENTIFIER_AVAILABLE: 1,
    P.SHARED_SUBSCRIPTION_AVAILABLE: 1,
}


def strip(packet):
    """The packet without what means the same when left out."""
    if not hasattr(packet, "properties"):
        return packet
    kept = {key: value for key, value in packet.properties.items() if DEFAULTS.get(key) != value}
    fields = {name: getattr(packet, name) for name in packet.__struct_fields__}
    return type(packet)(**(fields | {"properties": kept}))


PAHO_NAMES = {
    P.PAYLOAD_FORMAT_INDICATOR: "PayloadFormatIndicator",
    P.MESSAGE_EXPIRY_INTERVAL: "MessageExpiryInterval",
    P.CONTENT_TYPE: "ContentType",
    P.RESPONSE_TOPIC: "ResponseTopic",
    P.CORRELATION_DATA: "CorrelationData",
    P.USER_PROPERTY: "UserProperty",
    P.SESSION_EXPIRY_INTERVAL: "SessionExpiryInterval",
    P.REQUEST_PROBLEM_INFORMATION: "RequestProblemInformation",
    P.REQUEST_RESPONSE_INFORMATION: "RequestResponseInformation",
    P.RECEIVE_MAXIMUM: "ReceiveMaximum",
    P.TOPIC_ALIAS_MAXIMUM: "TopicAliasMaximum",
    P.MAXIMUM_PACKET_SIZE: "MaximumPacketSize",
    P.AUTHENTICATION_METHOD: "AuthenticationMethod",
    P.AUTHENTICATION_DATA: "AuthenticationData",
}


@pytest.mark.parametrize(
    ("kind", "paho_kind"),
    [(PacketType.PUBLISH, PacketTypes.PUBLISH), (PacketType.CONNECT, PacketTypes.CONNECT)],
)
def test_paho_packs_and_unpacks_the_same_properties(kind, paho_kind):
    @settings(max_examples=200, deadline=None)
    @given(properties(kind))
    def check(ours):
        if ours.get(P.MAXIMUM_PACKET_SIZE, 0) > VARINT_MAX:
            return  # paho does not send what section 3.1.2.11.4 allows
        theirs = PahoProperties(paho_kind)
        for key, value in ours.items():
            setattr(theirs, PAHO_NAMES[key], list(value) if isinstance(value, tuple) else value)
        packed = theirs.pack()
        assert decode_properties(FieldReader(packed, 0, len(packed)), kind) == ours
        back = PahoProperties(paho_kind)
        written = encode_properties(ours)
        _, size = back.unpack(written)
        assert size == len(written)
        for key, value in ours.items():
            read = getattr(back, PAHO_NAMES[key])
            assert (tuple(map(tuple, read)) if isinstance(value, tuple) else read) == value

    check()


@given(st.integers(0, 268_435_455))
def test_paho_writes_the_same_variable_byte_integers(number):
    assert encode_varint(number) == VariableByteIntegers.encode(number)


class Spoken:
    """What gmqtt's packet factories ask a protocol for."""

    def __init__(self, version):
        self.proto_ver = version
        self.proto_name = b"MQTT"
        self.id_generator = self

    def next_id(self):
        return 7


class Message:
    """What gmqtt's publish factory asks a message for."""

    def __init__(self, publish):
        self.topic, self.payload = publish.topic, publish.payload
        self.qos, self.retain, self.dup = publish.qos, publish.retain, publish.dup
        self.payload_size = len(publish.payload)
        self.properties = {"content_type": publish.properties[P.CONTENT_TYPE]} if publish.properties else {}


@pytest.mark.parametrize("version", [V5, V311])
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_we_read_the_publishes_gmqtt_writes(version, data):
    publish = data.draw(publishes(version))
    content_type = publish.properties.get(P.CONTENT_TYPE)
    publish.properties = {} if content_type is None else {P.CONTENT_TYPE: content_type}
    if publish.qos:
        publish.packet_id = 7
    publish.dup = False
    assert GmqttProperty.factory(name="content_type") is not None
    _, wire = PublishPacket.build_package(Message(publish), Spoken(version))
    parser, found = parsed(bytes(wire), version=version)
    assert parser.fault is None
    assert found == [publish]


def test_we_read_the_connects_gmqtt_writes():
    assert gmqtt_constants.MQTTv50 == V5
    for version in (V5, V311):
        wire = LoginPackageFactor.build_package("dev-1", "user", "pass", True, 60, Spoken(version))
        _, found = parsed(bytes(wire))
        assert found == [Connect("dev-1", version, True, 60, "user", b"pass")]
