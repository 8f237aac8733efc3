"""The subscriber against a stub of a broker: what a real one does seldom, at a moment the test chooses."""

import asyncio
import logging
import socket
from contextlib import asynccontextmanager, suppress

import pytest

from cloud_sync.runtime.rates import Backoff
from gateway.mqtt.broker_session import SubscriberOptions
from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import (
    Connack,
    Connect,
    Disconnect,
    PacketType,
    Pingreq,
    Property,
    Publish,
    PublishAck,
    Suback,
    Subscribe,
    TopicCache,
)
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.subscriber import Subscriber
from tests.support.tasks import LooseTasks

TIMEOUT_S = 15
AT_ONCE = Backoff(0.02, 0.05, 0.01)


class Withholding:
    """An intake that answers only when the test says so."""

    def __init__(self):
        self.taken = []
        self.owed = []

    def submit_publishes(self, source, batch):
        self.taken += batch
        self.owed.append((source, batch))

    def commit(self):
        owed, self.owed = self.owed, []
        for source, batch in owed:
            source.acknowledge(batch)

    def refuse(self, reason_code):
        owed, self.owed = self.owed, []
        for source, batch in owed:
            source.refuse(batch, reason_code)


class Line:
    """One connection at the stub."""

    def __init__(self, reader, writer):
        self._reader, self.writer = reader, writer
        self._parser = PacketParser(max_packet_bytes=1 << 20, topics=TopicCache())
        self._found = []

    def send(self, *packets):
        self.writer.write(b"".join(p if isinstance(p, bytes) else encode_packet(p) for p in packets))

    async def receive(self, count=1):
        """The next `count` packets, fewer only at the end of the connection."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self._found) < count and (data := await self._reader.read(1 << 16)):
                for item in self._parser.feed(data):
                    self._found += item if isinstance(item, list) else [item]
                assert self._parser.fault is None
        found, self._found = self._found[:count], self._found[count:]
        return found

    async def silent(self):
        """Whether nothing comes for a moment."""
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                return await self.receive() == []
        return True

    async def accept(self, connack=None, codes=(1,)):
        """Answer CONNECT and SUBSCRIBE; returns both."""
        [connect] = await self.receive()
        assert isinstance(connect, Connect)
        self.send(connack or Connack())
        [subscribe] = await self.receive()
        assert isinstance(subscribe, Subscribe)
        self.send(Suback(subscribe.packet_id, codes))
        return connect, subscribe


class Stub:
    """Listens; `line()` is the next connection."""

    def __init__(self):
        self._lines: asyncio.Queue[Line] = asyncio.Queue()
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def _accept(self, reader, writer):
        self._writers.append(writer)
        self._lines.put_nowait(Line(reader, writer))

    async def line(self):
        async with asyncio.timeout(TIMEOUT_S):
            return await self._lines.get()

    async def stop(self):
        self._server.close()
        for writer in self._writers:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    def waiting(self):
        return self._lines.qsize()


@pytest.fixture
async def stub():
    stub = Stub()
    await stub.start()
    yield stub
    await stub.stop()


@asynccontextmanager
async def subscribing(stub, *, slowly=AT_ONCE, filters=("sensors/#",), **settings):
    asked = SubscriberOptions(
        url=f"mqtt://127.0.0.1:{stub.port}", client_id="tidegate-g", filters=filters, **settings
    )
    subscriber = Subscriber(asked, Withholding(), backoff=AT_ONCE, operator_backoff=slowly)
    await subscriber.start(LooseTasks())
    try:
        yield subscriber
    finally:
        await subscriber.close(0.2)


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
            await asyncio.sleep(0.01)


def pubacks(*packet_ids):
    return [PublishAck(PacketType.PUBACK, packet_id) for packet_id in packet_ids]


def reading(packet_id, payload=b"1", qos=1, **flags):
    return Publish(b"sensors/a/t", payload, packet_id, qos, **flags)


async def test_it_asks_for_its_old_session_and_a_window_of_the_size_of_a_group_commit(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        connect, subscribe = await line.accept()
        assert (connect.client_id, connect.clean_start) == ("tidegate-g", False)
        assert connect.properties[Property.SESSION_EXPIRY_INTERVAL] >= 7 * 86_400
        assert connect.properties[Property.RECEIVE_MAXIMUM] == 5000
        assert subscribe.filters == (("sensors/#", 0x21),)
        await until(lambda: subscriber.counters.connected)


async def test_acknowledgements_wait_for_the_intake_and_come_in_order(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(*(reading(n) for n in (9, 3, 7)))
        line.send(reading(5, qos=2), reading(4, qos=2), reading(0, qos=0))
        await until(lambda: len(subscriber.sink.taken) == 6)
        assert subscriber.in_flight == 5
        assert await line.silent()
        subscriber.sink.commit()
        recs = [PublishAck(PacketType.PUBREC, n) for n in (5, 4)]
        found = await line.receive(5)
        assert [p for p in found if p.kind is PacketType.PUBACK] == pubacks(9, 3, 7)
        assert [p for p in found if p.kind is PacketType.PUBREC] == recs
        assert subscriber.in_flight == 0
        assert subscriber.counters.acknowledged == 5
        line.send(PublishAck(PacketType.PUBREL, 5), PublishAck(PacketType.PUBREL, 4))
        assert await line.receive(2) == [PublishAck(PacketType.PUBCOMP, n) for n in (5, 4)]


async def test_an_acknowledgement_is_never_written_to_a_newer_connection(stub):
    async with subscribing(stub) as subscriber:
        first = await stub.line()
        await first.accept()
        first.send(reading(1), reading(2))
        await until(lambda: len(subscriber.sink.taken) == 2)
        first.writer.transport.abort()
        second = await stub.line()
        await second.accept(Connack(session_present=True))
        await until(lambda: subscriber.counters.connected)
        subscriber.sink.commit()
        assert await second.silent()
        second.send(reading(2, dup=True), reading(3))
        await until(lambda: len(subscriber.sink.taken) == 4)
        subscriber.sink.commit()
        assert await second.receive(2) == pubacks(2, 3)
        assert subscriber.counters.again == 1


async def test_a_qos_2_message_sent_again_while_it_is_committed_is_taken_once(stub):
    async with subscribing(stub) as subscriber:
        first = await stub.line()
        await first.accept()
        first.send(reading(1, qos=2), reading(2, qos=2))
        await until(lambda: len(subscriber.sink.taken) == 2)
        first.writer.transport.abort()
        second = await stub.line()
        await second.accept(Connack(session_present=True))
        second.send(reading(1, qos=2, dup=True))
        assert await second.silent()
        subscriber.sink.commit()
        assert await second.receive() == [PublishAck(PacketType.PUBREC, 1)]
        second.send(reading(2, qos=2, dup=True))  # durable by now, though its PUBREC was never sent
        assert await second.receive() == [PublishAck(PacketType.PUBREC, 2)]
        assert len(subscriber.sink.taken) == 2


async def test_a_qos_2_identifier_used_for_another_message_does_not_hide_it(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(reading(1, b"1", qos=2))
        await until(lambda: subscriber.sink.taken)
        subscriber.sink.commit()
        assert await line.receive() == [PublishAck(PacketType.PUBREC, 1)]
        line.writer.transport.abort()  # and the broker comes back as it was before
        line = await stub.line()
        await line.accept(Connack(session_present=True))
        line.send(reading(1, b"2", qos=2))
        await until(lambda: len(subscriber.sink.taken) == 2)
        subscriber.sink.commit()
        assert await line.receive() == [PublishAck(PacketType.PUBREC, 1)]


async def test_a_new_session_shares_no_identifier_with_the_one_before(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(reading(1, qos=2))
        await until(lambda: subscriber.sink.taken)
        line.writer.transport.abort()
        line = await stub.line()
        await line.accept(Connack(session_present=False))
        line.send(reading(1, qos=2, dup=True))
        await until(lambda: len(subscriber.sink.taken) == 2)
        subscriber.sink.commit()
        assert await line.receive() == [PublishAck(PacketType.PUBREC, 1)]


async def test_a_release_of_something_unknown_is_completed_as_such(stub):
    async with subscribing(stub):
        line = await stub.line()
        await line.accept()
        line.send(PublishAck(PacketType.PUBREL, 77))
        assert await line.receive() == [PublishAck(PacketType.PUBCOMP, 77, 0x92)]


async def test_topic_aliases_of_the_broker_are_understood_and_end_with_the_connection(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(Publish(b"sensors/a/t", b"1", 1, 1, properties={Property.TOPIC_ALIAS: 3}))
        line.send(Publish(b"", b"2", 2, 1, properties={Property.TOPIC_ALIAS: 3}))
        await until(lambda: len(subscriber.sink.taken) == 2)
        assert {p.topic for p in subscriber.sink.taken} == {b"sensors/a/t"}
        line.writer.transport.abort()
        line = await stub.line()
        await line.accept()
        line.send(Publish(b"", b"3", 2, 1, properties={Property.TOPIC_ALIAS: 3}))
        assert await line.receive() == [Disconnect(0x82)]
        assert subscriber.counters.protocol_faults == {"protocol_error": 1}
        assert len(subscriber.sink.taken) == 2


async def test_a_passing_refusal_leaves_the_message_with_the_broker(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(reading(1), reading(2, qos=2))
        await until(lambda: len(subscriber.sink.taken) == 2)
        subscriber.sink.refuse(0x97)
        assert await line.receive(5) == [Disconnect(0x97)]
        line.writer.close()
        line = await stub.line()
        await line.accept(Connack(session_present=True))
        line.send(reading(1, dup=True), reading(2, qos=2, dup=True))
        await until(lambda: len(subscriber.sink.taken) == 4)
        subscriber.sink.commit()
        assert len(await line.receive(2)) == 2


async def test_a_refusal_for_good_is_told_to_the_broker(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(reading(1), reading(2, qos=2))
        await until(lambda: len(subscriber.sink.taken) == 2)
        subscriber.sink.refuse(0x99)
        assert await line.receive(2) == [
            PublishAck(PacketType.PUBACK, 1, 0x99),
            PublishAck(PacketType.PUBREC, 2, 0x99),
        ]
        assert subscriber.counters.refused == {"payload_format_invalid": 2}


async def test_a_broker_that_exceeds_the_receive_maximum_loses_nothing_but_is_counted(stub):
    async with subscribing(stub, receive_maximum=2) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(*(reading(n) for n in range(1, 6)))
        await until(lambda: len(subscriber.sink.taken) == 5)
        subscriber.sink.commit()
        assert await line.receive(5) == pubacks(1, 2, 3, 4, 5)
        assert subscriber.counters.protocol_faults == {"receive_maximum_exceeded": 1}


async def test_the_reason_of_a_disconnect_is_said_and_the_connection_made_again(stub, caplog):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(Disconnect(0x8B, {Property.REASON_STRING: "maintenance"}))
        line.writer.close()
        await (await stub.line()).accept()
        await until(lambda: subscriber.counters.connected)
        assert subscriber.counters.last_fault.endswith(
            "server shutting down (0x8b, DISCONNECT): 'maintenance'"
        )
        assert subscriber.counters.faults == {"server_shutting_down": 1}
        assert "maintenance" in caplog.text


async def test_a_forgotten_session_is_said_loudly_and_counted(stub, caplog):
    async with subscribing(stub) as subscriber:
        for present in (False, True, False):
            line = await stub.line()
            await line.accept(Connack(session_present=present))
            await until(lambda: subscriber.counters.connected)
            line.writer.transport.abort()
            await until(lambda: not subscriber.counters.connected)
        assert subscriber.counters.sessions_lost == 1
        [record] = [r for r in caplog.records if "lost the session" in r.message]
        assert record.levelno == logging.ERROR


async def test_a_silent_broker_is_asked_and_then_given_up(stub):
    async with subscribing(stub, keep_alive_s=60) as subscriber:
        line = await stub.line()
        await line.accept(Connack(properties={Property.SERVER_KEEP_ALIVE: 1}))
        assert await line.receive() == [Pingreq()]
        line.send(b"\xd0\x00")
        assert await line.receive() == [Pingreq()]
        assert await line.receive() == []
        await until(lambda: subscriber.counters.faults["keep_alive_timeout"])
        assert "nothing received from the broker" in subscriber.counters.last_fault


async def test_a_paused_subscriber_still_sends_pings_and_expects_no_answer(stub):
    async with subscribing(stub, keep_alive_s=1) as subscriber:
        line = await stub.line()
        await line.accept()
        await until(lambda: subscriber.counters.connected)
        subscriber.pause()
        line.send(reading(1))
        assert await line.receive(4) == [Pingreq()] * 4
        assert subscriber.sink.taken == []
        subscriber.resume()
        await until(lambda: subscriber.sink.taken)
        assert subscriber.counters.faults.total() == 0


async def test_a_subscriber_paused_before_it_connects_subscribes_and_reads_nothing(stub):
    async with subscribing(stub) as subscriber:
        subscriber.pause()
        line = await stub.line()
        await line.accept()
        await until(lambda: subscriber.counters.connected)
        await asyncio.sleep(0.05)
        line.send(reading(1))
        await asyncio.sleep(0.1)
        assert subscriber.sink.taken == []
        subscriber.resume()
        await until(lambda: subscriber.sink.taken)


async def test_a_refused_filter_is_said_and_the_others_are_served(stub, caplog):
    async with subscribing(stub, filters=("a/#", "b/#")) as subscriber:
        line = await stub.line()
        await line.accept(codes=(1, 0x87))
        await until(lambda: subscriber.counters.connected)
        assert subscriber.counters.refused_filters == {"b/#": "not_authorized"}
        assert "refuses the filter 'b/#': not_authorized" in caplog.text


async def test_a_broker_that_serves_no_filter_is_left_and_asked_again(stub):
    async with subscribing(stub) as subscriber:
        await (await stub.line()).accept(codes=(0x87,))
        await (await stub.line()).accept(codes=(1,))
        await until(lambda: subscriber.counters.connected)
        assert subscriber.counters.refused_filters == {}
        assert subscriber.counters.faults == {"no_filter": 1}


async def test_a_shared_filter_is_not_sent_to_a_broker_without_shared_subscriptions(stub):
    async with subscribing(stub, filters=("a", "$share/g/b")) as subscriber:
        line = await stub.line()
        _, subscribe = await line.accept(Connack(properties={Property.SHARED_SUBSCRIPTION_AVAILABLE: 0}))
        assert [name for name, _ in subscribe.filters] == ["a"]
        await until(lambda: subscriber.counters.connected)
        assert subscriber.counters.refused_filters == {"$share/g/b": "shared_subscriptions_not_supported"}


@pytest.mark.parametrize(
    ("nonsense", "kind"),
    [
        (b"SSH-2.0-OpenSSH_9.2p1\r\n" * 4, "malformed_packet"),
        (b"\x20\x02\x00\x01", "protocol_error"),  # how a broker of 3.1.1 says that it is one
        (encode_packet(Publish(b"a", b"1", 1, 1)), "protocol_error"),
        (encode_packet(Suback(1, (0,))), "protocol_error"),
        (encode_packet(Connack()) * 2, "protocol_error"),
    ],
)
async def test_nonsense_from_the_broker_ends_the_connection_and_nothing_else(stub, nonsense, kind):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.receive()
        line.send(nonsense)
        await (await stub.line()).accept()
        await until(lambda: subscriber.counters.connected)
        assert subscriber.counters.faults[kind] == 1
        assert subscriber.sink.taken == []


async def test_bad_credentials_are_tried_again_slowly_with_the_file_as_it_is_then(stub, tmp_path, caplog):
    secret = tmp_path / "secret"
    async with subscribing(
        stub, slowly=Backoff(0.2, 0.3, 0.2), username="u", password_file=secret
    ) as subscriber:
        await until(lambda: subscriber.counters.faults["file"])
        assert str(secret) in subscriber.counters.last_fault
        secret.write_text("old\nnot this\n")
        line = await stub.line()
        [connect] = await line.receive()
        assert (connect.username, connect.password) == ("u", b"old")
        secret.write_text("new\n")
        line.send(Connack(0x86))
        line.writer.close()
        line = await stub.line()
        connect, _ = await line.accept()
        assert connect.password == b"new"
        assert [r for r in caplog.records if r.levelno == logging.ERROR and "bad user name" in r.message]
        assert "old" not in caplog.text


async def test_addresses_that_cannot_be_reached_are_faults_and_not_the_end(stub):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refusing = f"mqtt://127.0.0.1:{free.getsockname()[1]}"
    for url, kind in ((refusing, "unreachable"), ("mqtt://no..host", "name_lookup")):
        asked = SubscriberOptions(url=url, client_id="g", filters=("a",))
        assert (await Subscriber(asked, Withholding()).run_connection()).kind == kind


async def test_a_broker_that_does_not_answer_is_not_waited_for(stub):
    async with subscribing(stub, connect_timeout_s=0.1) as subscriber:
        await stub.line()
        await stub.line()
        assert subscriber.counters.faults["timeout"] >= 1
        assert subscriber.counters.last_fault == "no answer within 0.1 s"


async def test_stopping_acknowledges_what_was_read_and_then_disconnects(stub):
    async with subscribing(stub) as subscriber:
        line = await stub.line()
        await line.accept()
        line.send(reading(1))
        await until(lambda: subscriber.sink.taken)
        subscriber.stop_reading()
        line.send(*(reading(n) for n in range(2, 100)))
        await asyncio.sleep(0.05)
        assert len(subscriber.sink.taken) == 1
        subscriber.resume()  # the committer's pressure going down does not start it again
        await asyncio.sleep(0.05)
        subscriber.sink.commit()
        closing = asyncio.create_task(subscriber.close(60))
        assert await line.receive(5) == [*pubacks(1), Disconnect()]
        line.send(*(reading(n, b"x" * 100_000) for n in range(200, 300)))
        await line.writer.drain()  # read and dropped: a close with unread bytes would reset the connection
        line.writer.close()
        await closing
        assert len(subscriber.sink.taken) == 1
        assert subscriber.counters.state == "stopped"


async def test_a_stop_while_it_connects_is_obeyed_at_once(stub):
    async with subscribing(stub):
        await stub.line()
    assert stub.waiting() == 0
