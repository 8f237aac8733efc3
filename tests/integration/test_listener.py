"""The listener on real sockets and both event loops: raw clients, many of them, floods, faults, the end."""

import asyncio
import random
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop

from gateway.auth.authenticator import Identity, Refusal
from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import (
    V5,
    V311,
    Connack,
    Connect,
    Disconnect,
    PacketType,
    Pingreq,
    Pingresp,
    Publish,
    PublishAck,
    TopicCache,
)
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.context import MqttServerOptions
from gateway.mqtt.server import MqttServer
from gateway.mqtt.transport import WriteLimits
from tests.support.tasks import LooseTasks

TIMEOUT_S = 20


class Committing:
    """An intake that acknowledges a moment later, as a committer does, unless told to hold."""

    def __init__(self):
        self.taken = []
        self.owed = []
        self.holding = False

    def submit_publishes(self, source, batch):
        self.taken += batch
        self.owed.append((source, batch))
        if not self.holding and len(self.owed) == 1:
            asyncio.get_running_loop().call_later(0.002, self.commit)

    def commit(self):
        owed, self.owed = self.owed, []
        for source, batch in owed:
            source.acknowledge(batch)


class RawClient:
    """A client of bytes: what it sends is up to the test, what it gets is parsed strictly."""

    def __init__(self, reader, writer, version):
        self.reader, self.writer, self.version = reader, writer, version
        self._parser = PacketParser(
            max_packet_bytes=1 << 20, topics=TopicCache(), client=True, version=version
        )
        self._found = []

    def send(self, *packets):
        self.writer.write(
            b"".join(p if isinstance(p, bytes) else encode_packet(p, self.version) for p in packets)
        )

    async def receive(self, count=1):
        """The next `count` packets, fewer only at the end of the connection."""
        async with asyncio.timeout(TIMEOUT_S):
            while len(self._found) < count and (data := await self.reader.read(1 << 16)):
                for item in self._parser.feed(data):
                    self._found += item if isinstance(item, list) else [item]
                assert self._parser.fault is None
        found, self._found = self._found[:count], self._found[count:]
        return found

    async def ended(self):
        """Whether the server has closed, with nothing more to read."""
        async with asyncio.timeout(TIMEOUT_S):
            return await self.reader.read() == b""


@pytest.fixture(params=[None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    def run_on_loop(main):
        with asyncio.Runner(loop_factory=request.param) as runner:
            return runner.run(asyncio.wait_for(main, TIMEOUT_S * 2))

    return run_on_loop


@asynccontextmanager
async def listening(authenticator=None, **settings):
    listener = MqttServer(MqttServerOptions(port=0, **settings), Committing(), authenticator)
    await listener.start(LooseTasks())
    try:
        yield listener
    finally:
        await listener.close(0.2)


@asynccontextmanager
async def connected(listener, client_id="dev", version=V5, **options):
    where = () if "sock" in options else ("127.0.0.1", listener.port)
    reader, writer = await asyncio.open_connection(*where, **options)
    client = RawClient(reader, writer, version)
    try:
        if client_id is not None:
            client.send(Connect(client_id, version))
            assert (await client.receive())[0].code == 0
        yield client
    except BaseException:
        writer.transport.abort()
        raise
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
            await asyncio.sleep(0.01)


def test_thousands_of_publishes_in_one_write_are_each_acknowledged_in_order(run):
    async def main():
        async with listening() as listener, connected(listener) as client:
            sent = [Publish(b"sensors/%d/t" % (n % 100), b'{"value":%d}' % n, n + 1, 1) for n in range(5000)]
            client.send(*sent)
            assert await client.receive(5000) == [PublishAck(PacketType.PUBACK, n + 1) for n in range(5000)]
            assert listener.context.sink.taken == sent
            assert listener.context.counters.publishes == 5000

    run(main())


@pytest.mark.parametrize("version", [V5, V311])
def test_packets_sent_byte_by_byte_are_understood(run, version):
    async def main():
        async with listening() as listener, connected(listener, None) as client:
            client.version = version
            client._parser.version = version
            wire = b"".join(
                encode_packet(p, version)
                for p in (Connect("dev", version), Publish(b"a/b", b"1" * 200, 1, 1), Pingreq(), Disconnect())
            )
            for at in range(len(wire)):
                client.writer.write(wire[at : at + 1])
                await client.writer.drain()
                if at % 8 == 0:
                    await asyncio.sleep(0)
            found = await client.receive(3)
            assert found[0].code == 0
            assert Pingresp() in found
            await until(lambda: listener.context.sink.taken)
            assert await client.ended()

    run(main())


def test_two_hundred_connections_publish_at_once(run):
    async def main():
        async with listening() as listener:

            async def device(number):
                async with connected(listener, f"dev-{number}", V5 if number % 2 else V311) as client:
                    for packet_id in range(1, 21):
                        client.send(Publish(b"sensors/%d/t" % number, b"%d" % packet_id, packet_id, 1))
                    assert len(await client.receive(20)) == 20
                    client.send(Disconnect())
                    assert await client.ended()

            async with asyncio.TaskGroup() as group:
                for number in range(200):
                    group.create_task(device(number))
            assert len(listener.context.sink.taken) == 4000
            await until(lambda: listener.context.counters.connections == 0)
            assert listener.context.counters.connections_ever == 200
            assert listener.context.clients == {}

    run(main())


def test_a_paused_listener_pushes_back_through_tcp_and_loses_nothing(run):
    async def main():
        async with listening(receive_maximum=65_535) as listener, connected(listener, "flood") as client:
            listener.pause()
            sent = [Publish(b"a", b"x" * 10_000, n + 1, 1) for n in range(2000)]
            client.send(*sent)
            await asyncio.sleep(0.2)
            before = listener.context.counters.bytes_in
            await asyncio.sleep(0.2)
            assert listener.context.counters.bytes_in == before
            assert client.writer.transport.get_write_buffer_size() > 5_000_000
            async with connected(listener, None) as late:
                late.send(Connect("late"))
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(late.receive(), 0.2)
                listener.resume()
                assert len(await client.receive(2000)) == 2000
                assert (await late.receive())[0].code == 0
            assert [p.packet_id for p in listener.context.sink.taken] == list(range(1, 2001))

    run(main())


def test_a_client_that_never_reads_its_answers_is_itself_no_longer_read(run):
    async def main():
        async with (
            listening(write_limits=WriteLimits(high_bytes=4096)) as listener,
            connected(listener, "fine") as fine,
        ):
            accepting = listener._acceptor.sockets[0]
            accepting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
            small = socket.socket()
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            small.connect(("127.0.0.1", listener.port))
            small.setblocking(False)
            async with connected(listener, "deaf", sock=small) as deaf:
                deaf.writer.transport.pause_reading()
                deaf.send(encode_packet(Pingreq()) * 2_000_000)
                before = -1
                while before != listener.context.counters.bytes_in:
                    before = listener.context.counters.bytes_in
                    await asyncio.sleep(0.3)
                assert before < 2_000_000
                fine.send(Pingreq())
                assert await fine.receive() == [Pingresp()]
                deaf.writer.transport.abort()

    run(main())


def test_a_second_connection_of_a_client_takes_over(run):
    async def main():
        async with listening() as listener, connected(listener) as first, connected(listener) as second:
            assert await first.receive() == [Disconnect(0x8E)]
            assert await first.ended()
            second.send(Publish(b"a", b"1", 1, 1))
            assert await second.receive() == [PublishAck(PacketType.PUBACK, 1)]

    run(main())


def test_a_silent_client_is_disconnected_after_its_keep_alive(run):
    async def main():
        async with listening() as listener, connected(listener, None) as client:
            client.send(Connect("quiet", keep_alive_s=1))
            found = await client.receive(2)
            assert found[1] == Disconnect(0x8D)
            assert await client.ended()
            assert listener.context.counters.closed == {"keep_alive_timeout": 1}

    run(main())


def test_the_reason_for_a_close_arrives_although_the_client_was_still_sending(run):
    async def main():
        async with listening(max_packet_bytes=10_000) as listener, connected(listener) as client:
            client.send(Publish(b"a", b"x" * 3_000_000, 1, 1))
            assert await client.receive() == [Disconnect(0x95)]
            assert await client.ended()
            assert listener.context.counters.protocol_faults == {"packet_too_large": 1}

    run(main())


def test_stopping_acknowledges_first_then_says_so_and_closes_everything(run):
    async def main():
        async with (
            listening() as listener,
            connected(listener) as client,
            connected(listener, "old", V311) as old,
        ):
            listener.context.sink.holding = True
            client.send(Publish(b"a", b"1", 1, 1))
            await until(lambda: listener.context.sink.taken)
            listener.stop_reading()
            client.send(Publish(b"a", b"2", 2, 1))
            with pytest.raises(OSError):  # noqa: PT011 - refused or reset, as the platform likes
                await asyncio.open_connection("127.0.0.1", listener.port)
            listener.context.sink.commit()
            closing = asyncio.create_task(listener.close(5))
            assert await client.receive(2) == [PublishAck(PacketType.PUBACK, 1), Disconnect(0x8B)]
            assert await client.ended()
            assert await old.ended()
            client.writer.close()
            old.writer.close()
            await closing
            assert listener.context.counters.connections == 0
            assert len(listener.context.sink.taken) == 1

    run(main())


def test_a_client_that_does_not_close_cannot_hold_up_the_stop(run):
    async def main():
        async with listening() as listener, connected(listener) as client:
            await asyncio.wait_for(listener.close(0.1), 2)
            assert (await client.receive(5))[0] == Disconnect(0x8B)

    run(main())


def test_a_port_in_use_is_an_error_of_the_start(run):
    async def main():
        async with listening() as listener:
            other = MqttServer(MqttServerOptions(port=listener.port), Committing())
            with pytest.raises(OSError, match="address already in use"):
                await other.start(LooseTasks())

    run(main())


def test_connections_beyond_the_maximum_are_closed_and_room_is_made_again(run):
    async def main():
        async with listening(max_connections=2) as listener, connected(listener, "a"):
            async with connected(listener, "b"), connected(listener, None) as third:
                assert await third.ended()
            await until(lambda: listener.context.counters.connections == 1)
            async with connected(listener, "c"):
                assert listener.context.counters.connections == 2

    run(main())


def test_clients_sending_noise_do_not_disturb_one_that_does_not(run):
    async def main():
        rng = random.Random(11)
        failures = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with listening() as listener, connected(listener, "good") as good:
            for number in range(150):
                async with connected(listener, None) as noisy:
                    if number % 3:
                        noisy.send(Connect(f"noisy-{number}"))
                    noisy.send(rng.randbytes(rng.randint(1, 600)))
                    if number % 2:
                        noisy.writer.transport.abort()
                if number % 10 == 0:
                    good.send(Publish(b"a", b"%d" % number, number + 1, 1))
                    assert await good.receive() == [PublishAck(PacketType.PUBACK, number + 1)]
            await until(lambda: listener.context.counters.connections == 1)
            assert listener.context.counters.protocol_faults.total() > 50
            assert failures == []

    run(main())


# Microcontrollers: what PubSubClient, lwmqtt and the like put on the wire


def test_a_microcontroller_of_3_1_1_publishes_at_qos_0(run):
    async def main():
        async with listening() as listener, connected(listener, None, V311) as client:
            client.send(b"\x10\x1a\0\x04MQTT\x04\x02\0\x0f\0\x0eESP8266-1a2b3c")
            assert await client.receive() == [Connack(0)]
            client.send(b"\x30\x11\0\x0bsensors/a/t21.5")
            client.send(b"\x31\x11\0\x0bsensors/a/t22.5", b"\xc0\0")
            assert await client.receive() == [Pingresp()]
            client.send(b"\xe0\0")
            assert await client.ended()
            assert listener.context.sink.taken == [
                Publish(b"sensors/a/t", b"21.5"),
                Publish(b"sensors/a/t", b"22.5", retain=True),
            ]

    run(main())


def test_a_microcontroller_with_a_will_user_and_password_connects(run):
    async def main():
        async with listening() as listener, connected(listener, None, V311) as client:
            connect = b"\0\x04MQTT\x04\xee\0\x0f\0\x03esp\0\x05lwt/a\0\x07offline\0\x04user\0\x04pass"
            client.send(bytes((0x10, len(connect))) + connect)
            assert await client.receive() == [Connack(0)]
            client.writer.transport.abort()
            await until(lambda: listener.context.sink.taken)
            assert listener.context.sink.taken == [Publish(b"lwt/a", b"offline", retain=True)]

    run(main())


def test_a_microcontroller_of_version_3_1_is_told_its_version_is_not_spoken(run):
    async def main():
        async with listening() as listener, connected(listener, None, V311) as client:
            client.send(b"\x10\x13\0\x06MQIsdp\x03\x02\0\x0f\0\x05esp32")
            assert await client.receive() == [Connack(1)]
            assert await client.ended()
            assert listener.context.counters.protocol_faults == {"unsupported_protocol_version": 1}

    run(main())


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A private authority with a server's and a device's certificate."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words):
        try:
            subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("openssl is not installed")

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        "req",
        "-x509",
        *key,
        "-keyout",
        "ca.key",
        "-out",
        "ca.pem",
        "-subj",
        "/CN=Test Authority",
        "-days",
        "2",
    )
    for name, subject in (("server", "/CN=localhost"), ("device", "/CN=dev-7")):
        (folder / f"{name}.ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        openssl(
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", f"{name}.pem", "-days", "2", "-extfile", f"{name}.ext"),
        )
    return folder


class ByCertificate:
    """Admits a device under the common name of its certificate, and no other."""

    def authenticate(self, credentials):
        client_id, certificate = credentials.client_id, credentials.certificate
        names = dict(part[0] for part in certificate["subject"]) if certificate else {}
        return Identity(client_id) if names.get("commonName") == client_id else Refusal()


def test_a_device_with_a_client_certificate_publishes_over_tls(run, certificates):
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=certificates / "ca.pem")
    server.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    server.verify_mode = ssl.CERT_OPTIONAL
    known = ssl.create_default_context(cafile=certificates / "ca.pem")
    stranger = ssl.create_default_context(cafile=certificates / "ca.pem")
    known.load_cert_chain(certificates / "device.pem", certificates / "device.key")

    async def main():
        async with listening(ByCertificate(), ssl=lambda: server) as listener:
            async with connected(listener, "dev-7", ssl=known) as client:
                client.send(*(Publish(b"a", b"x" * 5000, n + 1, 1) for n in range(500)))
                assert len(await client.receive(500)) == 500
            for context, client_id in ((stranger, "dev-7"), (known, "dev-8")):
                async with connected(listener, None, ssl=context) as client:
                    client.send(Connect(client_id))
                    assert await client.receive() == [Connack(0x87)]
                    assert await client.ended()
            assert listener.context.counters.refused == {"not_authorized": 2}

    run(main())
