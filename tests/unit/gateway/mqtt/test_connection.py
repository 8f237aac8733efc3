"""A connection's answers, byte for byte, on a transport that only writes down what is done to it."""

import asyncio

import pytest

from gateway.auth.authenticator import Identity, Refusal
from gateway.mqtt.codec.packet_codec import encode_packet
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
    ReasonCode,
    Suback,
    Subscribe,
    TopicCache,
    Unsuback,
    Unsubscribe,
    Will,
)
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.connection import DeviceConnection
from gateway.mqtt.context import MqttServerOptions
from gateway.mqtt.server import MqttServer
from gateway.mqtt.transport import WriteLimits

P = Property
PUBACK, PUBREC, PUBREL, PUBCOMP = PacketType.PUBACK, PacketType.PUBREC, PacketType.PUBREL, PacketType.PUBCOMP


class Wire(asyncio.Transport):
    """Stands for the socket: keeps what is written, and whether it is read and open."""

    def __init__(self):
        super().__init__()
        self.sent = bytearray()
        self.writes = 0
        self.reading = True
        self.closed = self.aborted = self.ended = False
        self.unsent_bytes = 0

    def write(self, data):
        self.sent += data
        self.writes += 1

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def get_write_buffer_size(self):
        return self.unsent_bytes

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def can_write_eof(self):
        return True

    def write_eof(self):
        self.ended = True

    def close(self):
        self.closed = True

    def abort(self):
        self.aborted = True

    def is_closing(self):
        return self.closed or self.aborted


class Holding:
    """An intake that keeps publishes until told to acknowledge them."""

    def __init__(self):
        self.batches = []
        self.all = []

    def submit_publishes(self, source, batch):
        self.batches.append((source, batch))
        self.all += batch

    def commit(self):
        batches, self.batches = self.batches, []
        for source, batch in batches:
            source.acknowledge(batch)


class Peer:
    """A client at the other end of a connection."""

    def __init__(self, listener, version=V5):
        self.version = version
        self.connection = DeviceConnection(listener.context)
        self.wire = Wire()
        self.connection.transport.connection_made(self.wire)
        self._parser = PacketParser(
            max_packet_bytes=1 << 20, topics=TopicCache(), client=True, version=version
        )

    def send(self, *packets):
        self.connection.transport.data_received(
            b"".join(p if isinstance(p, bytes) else encode_packet(p, self.version) for p in packets)
        )
        return self.received()

    def received(self):
        sent, self.wire.sent = bytes(self.wire.sent), bytearray()
        found = self._parser.feed(sent)
        assert self._parser.fault is None, self._parser.fault
        return found

    def connect(self, client_id="dev", **fields):
        connack = self.send(Connect(client_id, self.version, **fields))[0]
        assert connack.code == 0
        return connack

    def is_read(self):
        return self.wire.reading

    def lose(self):
        self.connection.transport.connection_lost(None)


def make_listener(authenticator=None, **settings):
    return MqttServer(MqttServerOptions(port=0, **settings), Holding(), authenticator)


@pytest.fixture
def listener():
    return make_listener()


@pytest.fixture(params=[V5, V311], ids=["5", "3.1.1"])
def peer(request, listener):
    return Peer(listener, request.param)


def qos(level, packet_id=1, topic=b"a", payload=b"1"):
    return Publish(topic, payload, packet_id if level else 0, level)


def test_connack_of_mqtt_5_announces_the_limits_in_force(listener):
    connack = Peer(listener).send(Connect("dev", keep_alive_s=30))[0]
    assert connack == Connack(
        0,
        False,
        {
            P.RECEIVE_MAXIMUM: 10_000,
            P.MAXIMUM_PACKET_SIZE: 1 << 20,
            P.TOPIC_ALIAS_MAXIMUM: 32,
            P.WILDCARD_SUBSCRIPTION_AVAILABLE: 0,
            P.SUBSCRIPTION_IDENTIFIER_AVAILABLE: 0,
            P.SHARED_SUBSCRIPTION_AVAILABLE: 0,
        },
    )


def test_connack_of_3_1_1_is_four_bytes(listener):
    peer = Peer(listener, V311)
    peer.connection.transport.data_received(encode_packet(Connect("dev", V311), V311))
    assert bytes(peer.wire.sent) == b"\x20\x02\0\0"


def test_a_client_without_a_name_is_given_one(listener):
    first = Peer(listener).connect("")
    second = Peer(listener).connect("")
    names = {first.properties[P.ASSIGNED_CLIENT_IDENTIFIER], second.properties[P.ASSIGNED_CLIENT_IDENTIFIER]}
    assert len(names) == 2
    assert names == set(listener.context.clients)


def test_a_3_1_1_client_without_a_name_needs_a_clean_session(listener):
    assert Peer(listener, V311).send(Connect("", V311, clean_start=True)) == [Connack(0)]
    refused = Peer(listener, V311)
    assert refused.send(Connect("", V311, clean_start=False)) == [Connack(2)]
    assert refused.wire.ended


def test_version_3_1_is_refused_with_return_code_1(listener):
    peer = Peer(listener, V311)
    old = b"\x10\x0e\0\x06MQIsdp\x03\x02\0\0\0\0"
    assert peer.send(old) == [Connack(1)]
    assert peer.wire.ended


def test_a_future_version_is_refused_in_the_words_of_mqtt_5(listener):
    peer = Peer(listener)
    assert peer.send(b"\x10\x0c\0\x04MQTT\x06\x02\0\0\0\0") == [Connack(0x84)]
    assert peer.wire.ended


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0", b"\0", b"\xff" * 100])
def test_what_is_not_mqtt_is_closed_without_an_answer_and_counted(listener, noise):
    peer = Peer(listener)
    assert peer.send(noise) == []
    assert peer.wire.ended
    assert listener.context.counters.protocol_faults.total() == 1


def test_a_malformed_connect_gets_connack_in_5_and_silence_in_3_1_1(listener):
    new, old = Peer(listener), Peer(listener, V311)
    assert new.send(b"\x10\x0d\0\x04MQTT\x05\x03\0\0\0\0\0") == [Connack(0x81)]
    assert old.send(b"\x10\x0c\0\x04MQTT\x04\x03\0\0\0\0") == []
    assert new.wire.ended
    assert old.wire.ended


def test_enhanced_authentication_is_refused(listener):
    peer = Peer(listener)
    assert peer.send(Connect("dev", properties={P.AUTHENTICATION_METHOD: "SCRAM"})) == [Connack(0x8C)]
    assert listener.context.counters.refused == {"bad_authentication_method": 1}


def test_qos_1_is_acknowledged_after_the_commit_and_not_before(listener, peer):
    peer.connect()
    assert peer.send(qos(1, 5), qos(1, 6)) == []
    listener.context.sink.commit()
    assert peer.received() == [PublishAck(PUBACK, 5), PublishAck(PUBACK, 6)]


def test_all_acknowledgements_of_a_commit_go_out_in_one_write(listener, peer):
    peer.connect()
    writes = peer.wire.writes
    peer.send(*(qos(1 + n % 2, n + 1) for n in range(100)))
    listener.context.sink.commit()
    assert peer.wire.writes == writes + 1
    replies = peer.received()
    assert [r.packet_id for r in replies if r.kind is PUBACK] == list(range(1, 101, 2))
    assert [r.packet_id for r in replies if r.kind is PUBREC] == list(range(2, 101, 2))


def test_all_answers_to_one_read_go_out_in_one_write(peer):
    peer.connect()
    writes = peer.wire.writes
    assert peer.send(*[Pingreq()] * 50) == [Pingresp()] * 50
    assert peer.wire.writes == writes + 1


def test_all_publishes_of_a_read_are_handed_over_together_whatever_stands_between(listener, peer):
    peer.connect()
    assert peer.send(qos(0), qos(1, 1), Pingreq(), qos(2, 2), qos(1, 3)) == [Pingresp()]
    assert [len(batch) for _, batch in listener.context.sink.batches] == [4]
    assert listener.context.counters.publishes == 4


def test_publishes_sent_right_after_connect_are_taken(listener, peer):
    peer.send(Connect("dev", peer.version), qos(1, 1))
    assert listener.context.sink.all == [qos(1, 1)]


def test_publishes_before_a_disconnect_count_and_those_after_it_do_not(listener, peer):
    peer.connect()
    peer.send(qos(0), Disconnect(), qos(0, payload=b"2"))
    assert listener.context.sink.all == [qos(0)]
    assert peer.wire.closed


def test_qos_2_runs_through_its_four_steps(listener, peer):
    peer.connect()
    assert peer.send(qos(2, 9)) == []
    listener.context.sink.commit()
    assert peer.received() == [PublishAck(PUBREC, 9)]
    assert peer.send(PublishAck(PUBREL, 9)) == [PublishAck(PUBCOMP, 9)]
    peer.send(qos(2, 9, payload=b"2"))
    assert [p.payload for p in listener.context.sink.all] == [b"1", b"2"]


def test_a_qos_2_publish_sent_again_is_not_handed_over_again(listener, peer):
    peer.connect()
    again = Publish(b"a", b"1", 9, 2, dup=True)
    assert peer.send(qos(2, 9), again) == []
    listener.context.sink.commit()
    assert peer.received() == [PublishAck(PUBREC, 9)]
    assert peer.send(again) == [PublishAck(PUBREC, 9)]
    assert listener.context.sink.all == [qos(2, 9)]


def test_release_and_reuse_of_an_identifier_in_one_read_keep_their_order(listener, peer):
    peer.connect()
    peer.send(qos(2, 9))
    listener.context.sink.commit()
    peer.received()
    assert peer.send(PublishAck(PUBREL, 9), qos(2, 9, payload=b"2")) == [PublishAck(PUBCOMP, 9)]
    assert [p.payload for p in listener.context.sink.all] == [b"1", b"2"]


def test_an_unknown_identifier_is_released_with_0x92(listener):
    peer = Peer(listener)
    peer.connect()
    assert peer.send(PublishAck(PUBREL, 77)) == [PublishAck(PUBCOMP, 77, 0x92)]
    old = Peer(listener, V311)
    old.connect("old")
    assert old.send(PublishAck(PUBREL, 77)) == [PublishAck(PUBCOMP, 77)]


def test_a_release_before_the_commit_is_a_protocol_error(listener):
    peer = Peer(listener)
    peer.connect()
    assert peer.send(qos(2, 9), PublishAck(PUBREL, 9)) == [Disconnect(0x82)]


def test_replies_to_publishes_never_sent_do_no_harm(listener):
    peer = Peer(listener)
    peer.connect()
    assert peer.send(PublishAck(PUBACK, 1), PublishAck(PUBCOMP, 2)) == []
    assert peer.send(PublishAck(PUBREC, 3)) == [PublishAck(PUBREL, 3, 0x92)]


def test_topic_aliases_reach_the_intake_resolved(listener):
    peer = Peer(listener)
    peer.connect()
    peer.send(
        Publish(b"a/b", b"1", 1, 1, properties={P.TOPIC_ALIAS: 32}),
        Publish(b"", b"2", 2, 1, properties={P.TOPIC_ALIAS: 32}),
    )
    assert [p.topic for p in listener.context.sink.all] == [b"a/b", b"a/b"]
    assert peer.send(Publish(b"a", b"", 3, 1, properties={P.TOPIC_ALIAS: 33})) == [Disconnect(0x94)]


def test_every_subscription_is_refused_with_its_own_code_and_publishing_goes_on(listener):
    peer = Peer(listener)
    peer.connect()
    filters = (("a/b", 0), ("a/#", 1), ("+/b", 2), ("$share/g/a", 0), ("", 0))
    assert peer.send(Subscribe(3, filters)) == [Suback(3, (0x83, 0xA2, 0xA2, 0x9E, 0x8F))]
    assert peer.send(Subscribe(4, (("a", 0),), {P.SUBSCRIPTION_IDENTIFIER: 1})) == [Suback(4, (0xA1,))]
    assert peer.send(Unsubscribe(5, ("a", "b"))) == [Unsuback(5, (0x11, 0x11))]
    peer.send(qos(1))
    assert len(listener.context.sink.all) == 1


def test_subscriptions_are_refused_with_0x80_in_3_1_1(listener):
    peer = Peer(listener, V311)
    peer.connect()
    assert peer.send(Subscribe(3, (("a", 0), ("#", 1)))) == [Suback(3, (0x80, 0x80))]
    assert peer.send(Unsubscribe(5, ("a",))) == [Unsuback(5)]


def test_auth_is_a_protocol_error(listener):
    peer = Peer(listener)
    peer.connect()
    assert peer.send(Auth(0x19, {P.AUTHENTICATION_METHOD: "x"})) == [Disconnect(0x82)]


def test_a_violation_is_answered_counted_and_costs_nothing_sent_before_it(listener, peer):
    peer.connect()
    answer = peer.send(qos(1, 1), b"\x36\x00")
    assert answer == ([Disconnect(0x81)] if peer.version == V5 else [])
    assert peer.wire.ended
    assert listener.context.sink.all == [qos(1, 1)]
    assert listener.context.counters.protocol_faults == {"malformed_packet": 1}
    listener.context.sink.commit()
    assert peer.received() == []


def test_receive_maximum_exceeded_ends_a_connection_of_mqtt_5_and_keeps_what_was_read():
    listener = make_listener(receive_maximum=3)
    peer = Peer(listener)
    assert peer.connect().properties[P.RECEIVE_MAXIMUM] == 3
    peer.send(*(qos(1, n) for n in (1, 2, 3)), qos(0), qos(0))
    listener.context.sink.commit()
    assert len(peer.received()) == 3
    assert peer.send(*(qos(1, n) for n in (1, 2, 3))) == []
    assert peer.send(qos(1, 4)) == [Disconnect(0x93)]
    assert len(listener.context.sink.all) == 9


def test_a_3_1_1_client_with_too_much_in_flight_is_not_read_for_a_while():
    listener = make_listener(receive_maximum=4)
    peer = Peer(listener, V311)
    peer.connect()
    peer.send(*(qos(1, n) for n in range(1, 7)))
    assert not peer.wire.reading
    source, batch = listener.context.sink.batches[0]
    source.acknowledge(batch[:3])
    assert not peer.wire.reading
    source.acknowledge(batch[3:4])
    assert peer.wire.reading


def test_refused_publishes_get_their_reason_code_in_5(listener):
    peer = Peer(listener)
    peer.connect()
    peer.send(qos(1, 1), qos(2, 2), qos(0))
    peer.connection.refuse(listener.context.sink.all, 0x97)
    assert peer.received() == [PublishAck(PUBACK, 1, 0x97), PublishAck(PUBREC, 2, 0x97)]
    assert not peer.wire.ended
    peer.send(qos(2, 2))
    assert listener.context.sink.all[-1] == qos(2, 2)
    assert listener.context.counters.refused == {"quota_exceeded": 3}


def test_refused_publishes_close_a_connection_of_3_1_1(listener):
    peer = Peer(listener, V311)
    peer.connect()
    peer.send(qos(1, 1))
    peer.connection.refuse(listener.context.sink.all, 0x97)
    assert peer.received() == []
    assert peer.wire.ended


def test_answers_after_the_connection_has_gone_do_no_harm(listener, peer):
    peer.connect()
    peer.send(qos(1, 1), qos(2, 2))
    peer.lose()
    listener.context.sink.commit()
    peer.connection.refuse([qos(1, 1)], 0x97)
    assert peer.received() == []


# Sessions and take-over


def test_a_second_connection_of_a_client_takes_over(listener):
    first, second = Peer(listener), Peer(listener)
    first.connect()
    second.connect()
    assert first.received() == [Disconnect(0x8E)]
    assert first.wire.ended
    first.lose()
    assert listener.context.clients == {"dev": second.connection}
    assert second.send(Pingreq()) == [Pingresp()]


def test_take_over_of_a_3_1_1_connection_is_a_close(listener):
    first, second = Peer(listener, V311), Peer(listener, V311)
    first.connect()
    second.connect()
    assert first.received() == []
    assert first.wire.ended


def test_a_session_is_present_again_within_its_expiry_and_not_after_it(listener):
    expiring = {"clean_start": False, "properties": {P.SESSION_EXPIRY_INTERVAL: 60}}
    first = Peer(listener)
    assert not first.connect(**expiring).session_present
    first.lose()
    listener.tick(59)
    second = Peer(listener)
    assert second.connect(**expiring).session_present
    second.lose()
    listener.tick(59 + 61)
    assert not Peer(listener).connect(**expiring).session_present


def test_a_3_1_1_session_without_clean_session_is_present_again(listener):
    for expected in (False, True):
        peer = Peer(listener, V311)
        assert peer.connect(clean_start=False).session_present is expected
        peer.lose()
    peer = Peer(listener, V311)
    assert not peer.connect(clean_start=True).session_present
    peer.lose()
    assert not Peer(listener, V311).connect(clean_start=False).session_present


def test_a_session_without_expiry_ends_with_its_connection(listener):
    first = Peer(listener)
    first.connect(clean_start=False)
    first.lose()
    assert len(listener.context.sessions) == 0
    assert not Peer(listener).connect(clean_start=False).session_present


def test_disconnect_may_end_a_session_but_not_begin_one(listener):
    peer = Peer(listener)
    peer.connect(properties={P.SESSION_EXPIRY_INTERVAL: 60})
    peer.send(Disconnect(0, {P.SESSION_EXPIRY_INTERVAL: 0}))
    peer.lose()
    assert len(listener.context.sessions) == 0
    peer = Peer(listener)
    peer.connect()
    assert peer.send(Disconnect(0, {P.SESSION_EXPIRY_INTERVAL: 5})) == [Disconnect(0x82)]


def test_a_longer_expiry_than_allowed_is_cut_and_announced():
    listener = make_listener(session_expiry_max_s=10)
    connack = Peer(listener).connect(properties={P.SESSION_EXPIRY_INTERVAL: 0xFFFFFFFF})
    assert connack.properties[P.SESSION_EXPIRY_INTERVAL] == 10


def test_idle_sessions_are_bounded():
    listener = make_listener(max_sessions=3)
    for number in range(10):
        peer = Peer(listener, V311)
        peer.connect(f"dev-{number}", clean_start=False)
        peer.lose()
    assert len(listener.context.sessions) == 3


def test_qos_2_is_handed_over_once_across_a_reconnect(listener, peer):
    kept = {"clean_start": False} | (
        {"properties": {P.SESSION_EXPIRY_INTERVAL: 60}} if peer.version == V5 else {}
    )
    peer.connect(**kept)
    peer.send(qos(2, 1), qos(2, 2))
    source, batch = listener.context.sink.batches[0]
    source.acknowledge(batch[:1])
    peer.lose()
    again = Peer(listener, peer.version)
    assert again.connect(**kept).session_present
    assert again.send(qos(2, 1), qos(2, 2)) == [PublishAck(PUBREC, 1)]
    source.acknowledge(batch[1:])
    assert again.received() == [PublishAck(PUBREC, 2)]
    assert again.send(PublishAck(PUBREL, 1), PublishAck(PUBREL, 2)) == [
        PublishAck(PUBCOMP, 1),
        PublishAck(PUBCOMP, 2),
    ]
    assert len(listener.context.sink.all) == 2


# Wills

WILL = Will(b"dev/gone", b"bye", 1, True)


def test_a_will_is_handed_over_when_the_connection_is_lost(listener, peer):
    peer.connect(will=WILL)
    peer.lose()
    assert listener.context.sink.all == [Publish(b"dev/gone", b"bye", retain=True)]
    assert listener.context.counters.wills == 1
    listener.context.sink.commit()


@pytest.mark.parametrize(("code", "wills"), [(0x00, 0), (0x04, 1), (0x80, 1)])
def test_a_disconnect_decides_about_the_will(listener, code, wills):
    peer = Peer(listener)
    peer.connect(will=WILL)
    peer.send(Disconnect(code))
    peer.lose()
    assert len(listener.context.sink.all) == wills


def test_a_violation_sets_the_will_off(listener, peer):
    peer.connect(will=WILL)
    peer.send(b"\0\0")
    peer.lose()
    assert len(listener.context.sink.all) == 1


@pytest.mark.parametrize(("delay_s", "wills"), [(0, 1), (10, 0)])
def test_a_will_with_a_delay_is_dropped_when_its_client_is_back_at_once(listener, delay_s, wills):
    first = Peer(listener)
    first.connect(will=Will(b"w", b"x", properties={P.WILL_DELAY_INTERVAL: delay_s}))
    Peer(listener).connect()
    first.lose()
    assert len(listener.context.sink.all) == wills


def test_the_gateway_going_down_sets_no_will_off(listener, peer):
    peer.connect(will=WILL)
    peer.connection.end(ReasonCode.SERVER_SHUTTING_DOWN, with_will=False)
    peer.lose()
    assert listener.context.sink.all == []
    assert peer.received() == ([Disconnect(0x8B)] if peer.version == V5 else [])


# Time


def test_without_a_connect_in_time_the_connection_is_closed_even_if_bytes_trickle(listener):
    peer = Peer(listener)
    for second in range(12):
        peer.connection.transport.data_received(b"\x10\x0e\0\x04MQTT\x05\x02\0\x3c\0\0"[second : second + 1])
        listener.tick(second)
    assert peer.wire.ended
    assert listener.context.counters.closed == {"connect_timeout": 1}


def test_silence_beyond_one_and_a_half_times_the_keep_alive_ends_the_connection(listener, peer):
    peer.connect(keep_alive_s=10)
    listener.tick(1)
    listener.tick(15)
    assert not peer.wire.ended
    peer.send(Pingreq())
    listener.tick(16)
    listener.tick(31)
    assert not peer.wire.ended
    listener.tick(32)
    assert peer.wire.ended
    assert peer.received() == ([Disconnect(0x8D)] if peer.version == V5 else [])


def test_without_keep_alive_a_3_1_1_client_may_be_silent_for_ever_and_mqtt_5_is_told_a_limit(listener):
    old, new = Peer(listener, V311), Peer(listener)
    old.connect("old")
    assert new.connect("new").properties[P.SERVER_KEEP_ALIVE] == 3600
    listener.tick(1)
    listener.tick(5402)
    assert not old.wire.ended
    assert new.wire.ended


def test_a_paused_connection_is_not_held_to_its_keep_alive(listener, peer):
    peer.connect(keep_alive_s=10)
    listener.tick(1)
    listener.pause()
    assert not peer.wire.reading
    listener.tick(100)
    assert not peer.wire.ended
    listener.resume()
    assert peer.wire.reading
    listener.tick(114)
    assert not peer.wire.ended
    listener.tick(116)
    assert peer.wire.ended


def test_a_close_the_peer_does_not_answer_is_completed_after_a_grace(listener, peer):
    peer.connect()
    peer.send(b"\0\0")
    peer.connection.transport.data_received(b"ignored")
    assert not peer.wire.aborted
    listener.tick(4)
    assert not peer.wire.aborted
    listener.tick(6)
    assert peer.wire.aborted


# Backpressure


async def test_a_connection_made_while_paused_starts_paused(listener):
    listener.pause()
    peer = Peer(listener)
    assert not peer.wire.reading
    listener.resume()
    assert peer.wire.reading


async def test_a_listener_that_stops_does_not_begin_to_read_again(listener, peer):
    peer.connect()
    listener.stop_reading()
    listener.resume()
    assert not peer.wire.reading
    assert Peer(listener).wire.aborted


def test_a_peer_that_does_not_read_is_not_read_and_then_closed():
    listener = make_listener(write_limits=WriteLimits(limit_bytes=1000, stall_s=60))
    peer = Peer(listener)
    peer.connect()
    peer.connection.transport.pause_writing()
    assert not peer.is_read()
    peer.connection.transport.resume_writing()
    assert peer.is_read()
    peer.connection.transport.pause_writing()
    listener.tick(59)
    assert not peer.wire.aborted
    listener.tick(61)
    assert peer.wire.aborted


def test_more_unread_answers_than_the_limit_end_the_connection():
    listener = make_listener(write_limits=WriteLimits(limit_bytes=1000))
    peer = Peer(listener)
    peer.connect()
    peer.send(qos(1, 1))
    peer.connection.transport.pause_writing()
    peer.wire.unsent_bytes = 1001
    listener.context.sink.commit()
    assert peer.wire.aborted
    assert listener.context.counters.closed == {"write_limit": 1}


def test_reading_resumes_only_when_no_reason_to_pause_is_left(listener, peer):
    peer.connect()
    listener.pause()
    listener.pause()
    peer.connection.transport.pause_writing()
    listener.resume()
    assert not peer.wire.reading
    peer.connection.transport.resume_writing()
    assert peer.wire.reading


def test_connections_beyond_the_maximum_are_closed_at_once():
    listener = make_listener(max_connections=2)
    peers = [Peer(listener) for _ in range(3)]
    assert [p.wire.aborted for p in peers] == [False, False, True]
    peers[2].lose()
    assert listener.context.counters.connections == 2
    peers[0].lose()
    assert not Peer(listener).wire.aborted
    assert listener.context.counters.refused == {"max_connections": 1}


def test_packets_larger_than_the_client_takes_are_not_sent(listener):
    peer = Peer(listener)
    peer.connect(properties={P.MAXIMUM_PACKET_SIZE: 40})
    assert peer.send(Subscribe(1, tuple((f"t{n}", 0) for n in range(50)))) == []
    assert peer.send(Pingreq()) == [Pingresp()]


# Admission


class Doorkeeper:
    """Admits dev with the password secret, under its own topics only."""

    def __init__(self):
        self.asked = []

    def authenticate(self, credentials):
        if credentials.password != b"secret":
            return Refusal(ReasonCode.BAD_USER_NAME_OR_PASSWORD)
        return Identity(credentials.client_id, self.rule(credentials.client_id))

    def rule(self, client_id):
        def may_publish(topic):
            self.asked.append(topic)
            return topic.startswith(b"sensors/" + client_id.encode() + b"/")

        return may_publish


def test_a_wrong_password_is_refused_in_the_words_of_each_version():
    listener = make_listener(Doorkeeper())
    assert Peer(listener).send(Connect("dev")) == [Connack(0x86)]
    assert Peer(listener, V311).send(Connect("dev", V311)) == [Connack(4)]
    assert listener.context.counters.refused == {"bad_user_name_or_password": 2}
    assert listener.context.clients == {}


def test_a_device_publishes_only_where_it_may_and_is_asked_about_once_per_topic():
    doorkeeper = Doorkeeper()
    listener = make_listener(doorkeeper)
    peer = Peer(listener)
    peer.connect(password=b"secret")
    mine, other = b"sensors/dev/t", b"sensors/other/t"
    answer = peer.send(
        qos(1, 1, mine),
        qos(1, 2, other),
        qos(2, 3, other),
        qos(0, 0, other),
        qos(2, 4, mine),
        qos(1, 5, mine),
    )
    assert sorted(answer, key=lambda r: r.packet_id) == [
        PublishAck(PUBACK, 2, 0x87),
        PublishAck(PUBREC, 3, 0x87),
    ]
    assert [p.packet_id for p in listener.context.sink.all] == [1, 4, 5]
    assert doorkeeper.asked == [mine, other]
    assert listener.context.counters.refused == {"not_authorized": 3}
    listener.context.sink.commit()
    assert len(peer.received()) == 3


def test_denied_publishes_do_not_confuse_the_count_of_those_in_flight():
    listener = make_listener(Doorkeeper(), receive_maximum=3)
    peer = Peer(listener)
    peer.connect(password=b"secret")
    mine, other = b"sensors/dev/t", b"sensors/other/t"
    peer.send(*(qos(0, 0, other) for _ in range(9)), qos(1, 8, other), *(qos(1, n, mine) for n in (1, 2, 3)))
    assert peer.send(qos(1, 4, mine)) == [Disconnect(0x93)]


def test_a_3_1_1_device_publishing_where_it_may_not_is_closed():
    listener = make_listener(Doorkeeper())
    peer = Peer(listener, V311)
    peer.connect(username="u", password=b"secret")
    peer.send(qos(1, 1, b"sensors/dev/t"), qos(1, 2, b"sensors/other/t"))
    assert peer.wire.ended
    assert [p.packet_id for p in listener.context.sink.all] == [1]


def test_a_will_where_its_device_may_not_publish_is_refused():
    listener = make_listener(Doorkeeper())
    assert Peer(listener).send(Connect("dev", password=b"secret", will=WILL)) == [Connack(0x87)]


class SlowDoorkeeper(Doorkeeper):
    """The same, after a wait that the test ends."""

    def __init__(self):
        super().__init__()
        self.decision = asyncio.get_running_loop().create_future()

    def authenticate(self, *_applicant):
        return self.decision


async def test_what_is_sent_while_a_slow_authenticator_decides_waits_for_it():
    doorkeeper = SlowDoorkeeper()
    listener = make_listener(doorkeeper)
    peer = Peer(listener)
    assert peer.send(Connect("dev"), qos(1, 1)) == []
    assert not peer.wire.reading
    assert peer.send(qos(1, 2)) == []
    assert listener.context.sink.all == []
    doorkeeper.decision.set_result(Identity("dev"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert peer.received()[0].code == 0
    assert listener.context.sink.all == [qos(1, 1), qos(1, 2)]
    assert peer.wire.reading


async def test_an_authenticator_that_fails_refuses_and_the_listener_lives():
    doorkeeper = SlowDoorkeeper()
    listener = make_listener(doorkeeper)
    peer = Peer(listener)
    peer.send(Connect("dev"))
    doorkeeper.decision.set_exception(OSError("the file is gone"))
    for _ in range(3):
        await asyncio.sleep(0)
    assert peer.received() == [Connack(0x88)]
    assert peer.wire.ended


async def test_a_client_that_leaves_while_it_is_being_admitted_leaves_nothing_behind():
    doorkeeper = SlowDoorkeeper()
    listener = make_listener(doorkeeper)
    peer = Peer(listener)
    peer.send(Connect("dev"))
    peer.lose()
    for _ in range(3):
        await asyncio.sleep(0)
    assert listener.context.clients == {}
    assert listener.context.counters.connections == 0
