"""The transport that server and client share, and the window of publishes in flight."""

import asyncio

import pytest

from gateway.mqtt.codec.packets import V5, TopicCache
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.transport import InFlightWindow, MqttTransport, PauseReason, WriteLimits


class Stream(asyncio.Transport):
    def __init__(self):
        super().__init__()
        self.reading, self.aborted, self.sent = True, False, []

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def get_write_buffer_size(self):
        return 0

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def write(self, data):
        self.sent.append(data)

    def abort(self):
        self.aborted = True


class Owner:
    def __init__(self):
        self.exceeded = []

    def connection_made(self):
        pass

    def data_received(self, data):
        pass

    def connection_lost(self):
        pass

    def write_limit_exceeded(self, limit):
        self.exceeded.append(limit)


@pytest.fixture
def transport():
    transport = MqttTransport(Owner(), WriteLimits(stall_s=60), lambda: 0.0)
    transport.connection_made(Stream())
    return transport


def test_what_is_written_while_corked_is_sent_at_once(transport):
    transport.cork()
    transport.write(b"a")
    transport.write(b"b")
    assert transport.stream.sent == []
    transport.flush()
    assert transport.stream.sent == [b"ab"]


def test_a_peer_that_reads_nothing_for_too_long_is_reported_and_aborted(transport):
    transport.pause_writing()
    assert not transport.stream.reading
    transport.tick(60)
    assert not transport.stream.aborted
    transport.tick(61)
    assert transport.stream.aborted
    assert transport._owner.exceeded == ["write_stalled"]


def test_reading_goes_on_once_half_of_the_window_is_free(transport):
    parser = PacketParser(max_packet_bytes=1 << 20, topics=TopicCache(), client=True, version=V5)
    window = InFlightWindow(10, transport, parser)
    window.add(11)
    assert window.exceeded
    window.pause_if_full()
    window.remove(5)
    assert transport.pauses == PauseReason.IN_FLIGHT
    window.remove(1)
    assert transport.stream.reading


def test_publishes_of_qos_0_are_not_in_flight(transport):
    parser = PacketParser(max_packet_bytes=1 << 20, topics=TopicCache(), client=True, version=V5)
    window = InFlightWindow(10, transport, parser)
    parser.qos0_publishes = 3
    window.skip_qos0(1)
    window.add(4)
    assert window.count == 2
