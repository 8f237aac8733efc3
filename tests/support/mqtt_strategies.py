"""Hypothesis strategies for MQTT packets: anything that may be sent, in either version and direction."""

from hypothesis import strategies as st

from gateway.mqtt.codec.packet_codec import ALLOWED_REASON_CODES
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
    Unsuback,
    Unsubscribe,
    Will,
)
from gateway.mqtt.codec.properties import ALLOWED_PROPERTIES, VARINT_MAX, WILL_PROPERTIES

CLIENT_CODES = (0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99)

text = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20)
blob = st.binary(max_size=30)
topic_text = st.text(st.characters(exclude_characters="\0+#", codec="utf-8"), min_size=1, max_size=30)
topic = topic_text.map(str.encode)
packet_id = st.integers(1, 65_535)
versions = st.sampled_from((V5, V311))

_u16 = st.integers(0, 65_535)
_u32 = st.integers(0, 0xFFFF_FFFF)
_bit = st.integers(0, 1)
_VALUES = {
    Property.PAYLOAD_FORMAT_INDICATOR: _bit,
    Property.MESSAGE_EXPIRY_INTERVAL: _u32,
    Property.CONTENT_TYPE: text,
    Property.RESPONSE_TOPIC: topic_text,
    Property.CORRELATION_DATA: blob,
    Property.SUBSCRIPTION_IDENTIFIER: st.integers(1, VARINT_MAX),
    Property.SESSION_EXPIRY_INTERVAL: _u32,
    Property.ASSIGNED_CLIENT_IDENTIFIER: text,
    Property.SERVER_KEEP_ALIVE: _u16,
    Property.AUTHENTICATION_METHOD: text,
    Property.AUTHENTICATION_DATA: blob,
    Property.REQUEST_PROBLEM_INFORMATION: _bit,
    Property.WILL_DELAY_INTERVAL: _u32,
    Property.REQUEST_RESPONSE_INFORMATION: _bit,
    Property.RESPONSE_INFORMATION: text,
    Property.SERVER_REFERENCE: text,
    Property.REASON_STRING: text,
    Property.RECEIVE_MAXIMUM: st.integers(1, 65_535),
    Property.TOPIC_ALIAS_MAXIMUM: _u16,
    Property.MAXIMUM_QOS: _bit,
    Property.RETAIN_AVAILABLE: _bit,
    Property.USER_PROPERTY: st.lists(st.tuples(text, text), min_size=1, max_size=3).map(tuple),
    Property.MAXIMUM_PACKET_SIZE: st.integers(1, 0xFFFF_FFFF),
    Property.WILDCARD_SUBSCRIPTION_AVAILABLE: _bit,
    Property.SUBSCRIPTION_IDENTIFIER_AVAILABLE: _bit,
    Property.SHARED_SUBSCRIPTION_AVAILABLE: _bit,
}


def properties(owner, version=V5):
    """Any properties that may stand in a packet of this type; topic aliases are tested on their own."""
    if version != V5:
        return st.just({})
    optional = {key: _VALUES[key] for key in sorted(ALLOWED_PROPERTIES[owner]) if key in _VALUES}
    if owner == PacketType.PUBLISH:
        del optional[Property.SUBSCRIPTION_IDENTIFIER]
    drawn = st.fixed_dictionaries({}, optional=optional)
    if Property.AUTHENTICATION_DATA in optional:
        drawn = drawn.filter(
            lambda found: Property.AUTHENTICATION_DATA not in found or Property.AUTHENTICATION_METHOD in found
        )
    return drawn


def publishes(version=V5):
    """A PUBLISH at any QoS, without a topic alias."""
    return st.integers(0, 2).flatmap(
        lambda qos: st.builds(
            Publish,
            topic=topic,
            payload=st.binary(max_size=300),
            packet_id=packet_id if qos else st.just(0),
            qos=st.just(qos),
            retain=st.booleans(),
            dup=st.booleans() if qos else st.just(False),
            properties=properties(PacketType.PUBLISH, version),
        )
    )


def connects(version=V5):
    """A CONNECT."""
    will = st.builds(
        Will,
        topic=topic,
        payload=blob,
        qos=st.integers(0, 2),
        retain=st.booleans(),
        properties=properties(WILL_PROPERTIES, version),
    )
    built = st.builds(
        Connect,
        client_id=text,
        version=st.just(version),
        clean_start=st.booleans(),
        keep_alive_s=_u16,
        username=st.none() | text,
        password=st.none() | blob,
        will=st.none() | will,
        properties=properties(PacketType.CONNECT, version),
    )
    return built if version == V5 else built.filter(lambda c: c.password is None or c.username is not None)


def replies(kind, version=V5):
    """A PUBACK, PUBREC, PUBREL or PUBCOMP."""
    code = st.sampled_from(sorted(ALLOWED_REASON_CODES[kind])) if version == V5 else st.just(0)
    return st.builds(PublishAck, st.just(kind), packet_id, code, properties(kind, version))


def _common(version):
    kinds = (PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP)
    found = [publishes(version), *(replies(kind, version) for kind in kinds)]
    if version == V5:
        codes = st.sampled_from(sorted(ALLOWED_REASON_CODES[PacketType.AUTH]))
        found.append(st.builds(Auth, codes, properties(PacketType.AUTH)))
    return st.one_of(found)


def to_server(version=V5):
    """Any packet a client sends after CONNECT."""
    options = st.builds(
        lambda qos, bits, handling: qos | bits << 2 | handling << 4,
        st.integers(0, 2),
        st.integers(0, 3),
        st.integers(0, 2),
    )
    filters = st.lists(
        st.tuples(text, options if version == V5 else st.integers(0, 2)), min_size=1, max_size=3
    )
    codes = st.sampled_from(CLIENT_CODES)
    return st.one_of(
        _common(version),
        st.builds(Subscribe, packet_id, filters.map(tuple), properties(PacketType.SUBSCRIBE, version)),
        st.builds(
            Unsubscribe,
            packet_id,
            st.lists(text, min_size=1, max_size=3).map(tuple),
            properties(PacketType.UNSUBSCRIBE, version),
        ),
        st.just(Pingreq()),
        st.builds(Disconnect, codes, properties(PacketType.DISCONNECT))
        if version == V5
        else st.just(Disconnect()),
    )


def to_client(version=V5):
    """Any packet a server sends."""

    def codes(kind):
        return st.lists(st.sampled_from(sorted(ALLOWED_REASON_CODES[kind])), min_size=1, max_size=3).map(
            tuple
        )

    code = (
        st.sampled_from(sorted(ALLOWED_REASON_CODES[PacketType.CONNACK]))
        if version == V5
        else st.integers(0, 5)
    )
    connack = st.one_of(
        st.builds(Connack, code, st.just(False), properties(PacketType.CONNACK, version)),
        st.builds(Connack, st.just(0), st.just(True), properties(PacketType.CONNACK, version)),
    )
    found = [
        _common(version),
        connack,
        st.builds(Suback, packet_id, codes(PacketType.SUBACK), properties(PacketType.SUBACK, version)),
        st.builds(
            Unsuback,
            packet_id,
            codes(PacketType.UNSUBACK) if version == V5 else st.just(()),
            properties(PacketType.UNSUBACK, version),
        ),
        st.just(Pingresp()),
    ]
    if version == V5:
        reasons = st.sampled_from(sorted(ALLOWED_REASON_CODES[PacketType.DISCONNECT] - {0x04}))
        found.append(st.builds(Disconnect, reasons, properties(PacketType.DISCONNECT)))
    return st.one_of(found)
