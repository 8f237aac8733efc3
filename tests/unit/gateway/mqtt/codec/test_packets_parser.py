"""How packets come out of reads: split anywhere, many at once, in order, with aliases resolved."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import V5, V311, Connect, Disconnect, Pingreq, Property, Publish, TopicCache
from gateway.mqtt.codec.parser import PacketParser
from tests.support.mqtt_strategies import connects, to_client, to_server


def flat(items):
    return [packet for item in items for packet in (item if isinstance(item, list) else [item])]


def parser(*, max_packet_bytes=1 << 20, client=False, version=None):
    return PacketParser(
        max_packet_bytes=max_packet_bytes,
        topics=TopicCache(),
        topic_alias_maximum=5,
        client=client,
        version=version,
    )


def stream(version):
    return [
        Connect("x", version),
        Publish(b"a/b", b"1", 1, 1),
        Publish(b"a/b", b"2" * 130, 2, 1),
        Publish("é/ü".encode(), b"", 0, 0),
        Publish(b"c", b"3", 3, 2),
        Pingreq(),
        Publish(b"c", b"4" * 20_000, 4, 1, True, True),
        Publish(b"a/b", b"5", 5, 1),
        Disconnect(),
    ]


@pytest.mark.parametrize("version", [V5, V311])
def test_a_stream_cut_in_two_anywhere_gives_the_same_packets(version):
    packets = stream(version)
    wire = b"".join(encode_packet(packet, version) for packet in packets)
    for cut in [*range(400), *range(len(wire) - 200, len(wire))]:
        whole = parser()
        found = flat(whole.feed(wire[:cut])) + flat(whole.feed(wire[cut:]))
        assert found == packets, cut
        assert whole.fault is None


@pytest.mark.parametrize("version", [V5, V311])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_a_stream_in_small_reads_gives_the_same_packets(version, step):
    packets = stream(version)
    wire = b"".join(encode_packet(packet, version) for packet in packets)
    whole = parser()
    assert [p for at in range(0, len(wire), step) for p in flat(whole.feed(wire[at : at + step]))] == packets
    assert whole.fault is None


def test_thousands_of_publishes_in_one_read_come_as_one_run():
    publishes = [Publish(b"sensors/%d/t" % (n % 50), b'{"value":%d}' % n, n + 1, 1) for n in range(8000)]
    wire = b"".join(map(encode_packet, publishes))
    whole = parser()
    assert whole.feed(encode_packet(Connect("x")) + wire)[1:] == [publishes]


def test_runs_hold_qos_0_and_1_and_keep_their_place_among_other_packets():
    a, b, c, d = (
        Publish(b"a", b"", 1, 1),
        Publish(b"b", b""),
        Publish(b"c", b"", 2, 2),
        Publish(b"d", b"", 3, 1),
    )
    whole = parser()
    items = whole.feed(b"".join(encode_packet(p) for p in (Connect("x"), a, b, c, Pingreq(), d, a)))
    assert items == [Connect("x"), [a, b], c, Pingreq(), [d, a]]
    assert whole.qos0_publishes == 1


@pytest.mark.parametrize("version", [V5, V311])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_a_client_may_send_comes_back_as_it_was(version, data):
    connect = data.draw(connects(version))
    packets = data.draw(st.lists(to_server(version), max_size=5))
    wire = b"".join(encode_packet(packet, version) for packet in [connect, *packets])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=4)))
    whole = parser()
    found = []
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        found += flat(whole.feed(wire[start:stop]))
    assert whole.fault is None
    assert found == [connect, *packets]


@pytest.mark.parametrize("version", [V5, V311])
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_a_server_may_send_comes_back_as_it_was(version, data):
    packets = data.draw(st.lists(to_client(version), max_size=5))
    whole = parser(client=True, version=version)
    assert flat(whole.feed(b"".join(encode_packet(packet, version) for packet in packets))) == packets
    assert whole.fault is None


def aliased(topic, alias, packet_id):
    return Publish(topic, b"v", packet_id, 1, properties={Property.TOPIC_ALIAS: alias})


def test_topic_aliases_are_resolved_and_may_be_set_anew():
    whole = parser()
    sent = [
        aliased(b"a", 1, 1),
        aliased(b"b", 5, 2),
        aliased(b"", 1, 3),
        aliased(b"c", 1, 4),
        aliased(b"", 1, 5),
        aliased(b"", 5, 6),
    ]
    items = whole.feed(encode_packet(Connect("x")) + b"".join(map(encode_packet, sent)))
    assert [publish.topic for publish in items[1]] == [b"a", b"b", b"a", b"c", b"c", b"b"]


def test_aliases_of_one_connection_mean_nothing_on_another():
    first, second = parser(), parser()
    first.feed(encode_packet(Connect("x")) + encode_packet(aliased(b"a", 1, 1)))
    second.feed(encode_packet(Connect("y")) + encode_packet(aliased(b"", 1, 1)))
    assert first.fault is None
    assert second.fault is not None


def test_the_server_is_not_let_pass_for_a_client_nor_the_other_way_round():
    whole = parser(client=True, version=V5)
    whole.feed(encode_packet(Connect("x")))
    assert whole.fault is not None


@pytest.mark.timeout(60)
def test_a_large_packet_in_small_reads_does_not_cost_a_copy_of_itself_at_each():
    # copying what is held at every read would be 2 TB here: the timeout is what fails
    whole = parser(max_packet_bytes=32 << 20)
    whole.feed(encode_packet(Connect("x")))
    wire = encode_packet(Publish(b"a", b"x" * (16 << 20), 1, 1))
    found = [item for at in range(0, len(wire), 64) for item in whole.feed(wire[at : at + 64])]
    assert [len(run[0].payload) for run in found] == [16 << 20]
