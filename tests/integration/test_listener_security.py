"""The listener against strangers: TLS, client certificates, passwords, identities, and peers that stall."""

import asyncio
import ssl
import subprocess
from contextlib import asynccontextmanager, suppress
from functools import partial

import pytest
import uvloop

from gateway.auth import device_passwords
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
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import TopicTemplate
from gateway.settings.listeners import Listen
from tests.support.certificates import Authority
from tests.support.tasks import LooseTasks

TIMEOUT_S = 20


class Committing:
    """An intake that acknowledges a moment later, as a committer does."""

    def __init__(self):
        self.taken = []

    def submit_publishes(self, source, batch):
        self.taken += batch
        asyncio.get_running_loop().call_later(0.002, source.acknowledge, batch)


class Client:
    """A client that sends packets and reads what it is answered."""

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

    async def answer(self, *packets):
        """Send, and the next packet; None when the server has closed instead."""
        self.send(*packets)
        async with asyncio.timeout(TIMEOUT_S):
            while not self._found and (data := await self.reader.read(1 << 16)):
                for item in self._parser.feed(data):
                    self._found += item if isinstance(item, list) else [item]
        return self._found.pop(0) if self._found else None

    async def works(self):
        return await self.answer(Pingreq()) == Pingresp()


def run_on(loop_factory, main):
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(asyncio.wait_for(main, TIMEOUT_S * 2))


def run(main):
    """Run on the loop that the gateway uses."""
    return run_on(uvloop.new_event_loop, main)


@pytest.fixture(params=[None, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run_on_both(request):
    return partial(run_on, request.param)


@asynccontextmanager
async def serving(listener):
    await listener.start(LooseTasks())
    try:
        yield listener
    finally:
        await listener.close(0.2)


def listening(**keys):
    """A listener as a configuration with these keys makes it."""
    return serving(Listen(port=0, **keys).build_server(Committing()))


@asynccontextmanager
async def connected(listener, connect=None, **options):
    version = V5 if connect is None else connect.version
    reader, writer = await asyncio.open_connection("127.0.0.1", listener.port, **options)
    client = Client(reader, writer, version)
    try:
        if connect is not None:
            assert (await client.answer(connect)).code == 0
        yield client
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
            await asyncio.sleep(0.02)


# Passwords


@pytest.fixture
def passwords(tmp_path):
    path = tmp_path / "passwords"
    device_passwords.add_device(path, "pump-1", "secret of pump-1")
    device_passwords.add_device(path, "pump-2", "secret of pump-2")
    return path


def device(name, version=V5, *, client_id=None, password=None):
    word = (password or f"secret of {name}").encode()
    return Connect(client_id or name, version, username=name, password=word)


def test_passwords_are_asked_for_and_refusals_use_the_words_of_each_version(run_on_both, passwords):
    async def main():
        async with listening(passwords_file=passwords) as listener:
            async with connected(listener, device("pump-1")), connected(listener, device("pump-2", V311)):
                pass
            for version, wrong, nothing in ((V5, 0x86, 0x87), (V311, 4, 5)):
                for connect, code in (
                    (device("pump-1", version, password="x"), wrong),
                    (device("nobody", version), wrong),
                    (Connect("pump-1", version), nothing),
                ):
                    async with connected(listener) as client:
                        client.version = client._parser.version = version
                        assert await client.answer(connect) == Connack(code)
                        assert await client.answer() is None
            assert listener.context.counters.refused == {"bad_user_name_or_password": 4, "not_authorized": 2}

    run_on_both(main())


def test_guessing_is_answered_with_the_rate_and_a_device_that_is_in_comes_back_all_the_same(passwords):
    async def main():
        async with listening(passwords_file=passwords) as listener:
            async with connected(listener, device("pump-1")):
                pass
            codes = []
            for n in range(7):
                async with connected(listener) as client:
                    codes.append((await client.answer(device("pump-1", password=f"guess {n}"))).code)
            assert codes == [0x86] * 5 + [0x9F] * 2
            async with connected(listener, device("pump-1")):
                pass

    run(main())


def test_a_device_publishes_as_itself_and_is_told_when_it_does_not(passwords):
    async def main():
        async with listening(passwords_file=passwords) as listener:
            async with connected(listener, device("pump-1")) as client:
                other = Publish(b"sensors/pump-2/t", b"1", 1, 1)
                assert await client.answer(other) == PublishAck(PacketType.PUBACK, 1, 0x87)
                part = Publish(b"sensors/pump-1:flow/t", b"2", 2, 1)
                assert await client.answer(part) == PublishAck(PacketType.PUBACK, 2)
            async with connected(listener, device("pump-2", V311)) as old:
                assert await old.answer(Publish(b"sensors/pump-1/t", b"3", 1, 1)) is None
            assert [p.payload for p in listener.context.sink.taken] == [b"2"]
            assert listener.context.counters.refused == {"not_authorized": 2}

    run(main())


def test_what_a_connected_device_may_publish_follows_other_rules_for_topics(passwords):
    async def main():
        rules = RuleSet(
            TopicTemplate("sensors/{sensor_id}/{sensor_type}"),
            [PayloadRule("up/#", "fields", sensor_id="{serial}")],
        )
        listener = Listen(port=0, passwords_file=passwords).build_server(Committing(), rules)
        async with serving(listener), connected(listener, device("pump-1")) as client:
            assert await client.answer(Publish(b"up/pump-2", b"1", 1, 1)) == PublishAck(PacketType.PUBACK, 1)
            rules.replace([PayloadRule("up/{sensor_id}", "fields")])
            listener.clear_permission_caches()
            theirs = Publish(b"up/pump-2", b"2", 2, 1)
            assert await client.answer(theirs) == PublishAck(PacketType.PUBACK, 2, 0x87)
            assert await client.answer(Publish(b"up/pump-1", b"3", 3, 1)) == PublishAck(PacketType.PUBACK, 3)

    run(main())


def test_nobody_takes_over_the_session_of_another_device(passwords):
    async def main():
        async with (
            listening(passwords_file=passwords) as listener,
            connected(listener, device("pump-1", client_id="same")) as first,
            connected(listener, device("pump-2", client_id="same")) as second,
        ):
            assert await first.works()
            assert await second.works()
            async with connected(listener, device("pump-1", client_id="same")) as again:
                assert await first.answer() == Disconnect(0x8E)
                assert await second.works()
                assert await again.works()

    run(main())


def test_a_device_that_is_removed_is_disconnected_and_others_are_not(passwords):
    async def main():
        async with listening(passwords_file=passwords) as listener:
            async with (
                connected(listener, device("pump-1")) as first,
                connected(listener, device("pump-2")) as other,
            ):
                device_passwords.remove_device(passwords, "pump-1")
                assert await first.answer() == Disconnect(0x87)
                assert await other.works()
            async with connected(listener) as client:
                assert await client.answer(device("pump-1")) == Connack(0x86)

    run(main())


def test_a_device_that_was_just_added_connects(passwords):
    async def main():
        async with listening(passwords_file=passwords) as listener:
            async with connected(listener, device("pump-1")):
                pass
            word = device_passwords.add_device(passwords, "pump-3")
            await asyncio.sleep(1.1)
            async with connected(listener, device("pump-3", password=word)):
                pass

    run(main())


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = Authority(tmp_path_factory.mktemp("tls"))
    made.issue("server", "localhost", "IP:127.0.0.1")
    made.issue("renewed", "renewed", "IP:127.0.0.1")
    made.issue("pump-1", "pump-1", "DNS:pump-one")
    made.issue("pump-2", "pump-2")
    return made


@pytest.fixture
def server(authority, tmp_path):
    """The server's files, in a folder where a test may replace them."""
    for name in ("server.pem", "server.key", "ca.pem"):
        (tmp_path / name).write_bytes((authority.folder / name).read_bytes())
    return {"tls_cert_file": tmp_path / "server.pem", "tls_key_file": tmp_path / "server.key"}


def client_tls(authority, name=None):
    context = ssl.create_default_context(cafile=authority.certificate)
    if name is not None:
        context.load_cert_chain(authority.folder / f"{name}.pem", authority.folder / f"{name}.key")
    return context


def replace(path, source):
    draft = path.with_suffix(".new")
    draft.write_bytes(source.read_bytes())
    draft.replace(path)


async def refused_in_handshake(listener, context):
    """Whether a client gets no further; TLS 1.3 tells it only when it reads."""
    try:
        async with connected(listener, ssl=context) as client:
            return await client.answer(Connect("dev")) is None
    except OSError:
        return True


async def serial(listener, authority):
    async with connected(listener, Connect("look"), ssl=client_tls(authority)) as client:
        return dict(part[0] for part in client.writer.get_extra_info("peercert")["subject"])["commonName"]


def test_versions_before_tls_1_2_are_refused(authority, server):
    async def main():
        async with listening(**server) as listener:
            assert await serial(listener, authority) == "localhost"
            for version in (["-tls1"], ["-tls1_1"], ["-tls1_2"], ["-tls1_3"]):
                tried = await asyncio.create_subprocess_exec(
                    *("openssl", "s_client", "-connect", f"127.0.0.1:{listener.port}", *version),
                    *("-cipher", "DEFAULT:@SECLEVEL=0"),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                assert (await tried.wait() == 0) is (version[0] in {"-tls1_2", "-tls1_3"}), version
            await until(lambda: listener.context.counters.closed["tls_handshake"] == 2)

    run(main())


def test_a_renewed_certificate_serves_new_connections_while_old_ones_go_on(authority, server):
    async def main():
        async with (
            listening(**server) as listener,
            connected(listener, Connect("old"), ssl=client_tls(authority)) as old,
        ):
            assert await serial(listener, authority) == "localhost"
            replace(server["tls_cert_file"], authority.folder / "renewed.pem")
            await asyncio.sleep(1.1)
            assert await serial(listener, authority) == "localhost"  # its key is not there yet
            replace(server["tls_key_file"], authority.folder / "renewed.key")
            await asyncio.sleep(1.1)
            assert await serial(listener, authority) == "renewed"
            assert await old.works()

    run(main())


def test_only_certificates_of_the_authority_connect_and_each_publishes_as_its_name(
    run_on_both, authority, server, tmp_path
):
    stranger = Authority(tmp_path, "stranger")
    stranger.issue("pump-1", "pump-1")
    foreign = client_tls(authority)
    foreign.load_cert_chain(tmp_path / "pump-1.pem", tmp_path / "pump-1.key")

    async def main():
        async with listening(**server, client_ca_file=tmp_path / "ca.pem") as listener:
            async with connected(listener, Connect("x"), ssl=client_tls(authority, "pump-1")) as client:
                mine, other = (
                    Publish(b"sensors/pump-1/t", b"1", 1, 1),
                    Publish(b"sensors/pump-2/t", b"2", 2, 1),
                )
                assert await client.answer(mine) == PublishAck(PacketType.PUBACK, 1)
                assert await client.answer(other) == PublishAck(PacketType.PUBACK, 2, 0x87)
            assert await refused_in_handshake(listener, client_tls(authority))
            assert await refused_in_handshake(listener, foreign)
            await until(lambda: listener.context.counters.closed["tls_handshake"] == 2)

    run_on_both(main())


def test_a_name_can_be_the_dns_name_and_a_certificate_optional(authority, server, tmp_path, passwords):
    async def main():
        keys = {"client_ca_file": tmp_path / "ca.pem", "client_certificate": "optional", "identity": "san"}
        async with listening(**server, **keys, passwords_file=passwords) as listener:
            async with connected(listener, Connect("x"), ssl=client_tls(authority, "pump-1")) as client:
                assert await client.answer(Publish(b"sensors/pump-one/t", b"1", 1, 1)) == PublishAck(
                    PacketType.PUBACK, 1
                )
            async with connected(listener, device("pump-2"), ssl=client_tls(authority)) as client:
                assert await client.answer(Publish(b"sensors/pump-2/t", b"1", 1, 1)) == PublishAck(
                    PacketType.PUBACK, 1
                )
            for context in (
                client_tls(authority),
                client_tls(authority, "pump-2"),
            ):  # nothing shown; no DNS name
                async with connected(listener, ssl=context) as client:
                    assert await client.answer(Connect("x")) == Connack(0x87)

    run(main())


def test_authorities_and_revocations_that_change_count_for_new_connections(authority, server, tmp_path):
    mine, other = Authority(tmp_path, "mine"), Authority(tmp_path, "other")
    one, two, theirs = client_tls(authority), client_tls(authority), client_tls(authority)
    for context, issuer, name in ((one, mine, "one"), (two, mine, "two"), (theirs, other, "theirs")):
        context.load_cert_chain(*issuer.issue(name, name))
    ca, crl = tmp_path / "trusted.pem", tmp_path / "crl.pem"
    replace(ca, mine.certificate)
    replace(crl, mine.revocations())

    async def main():
        async with listening(**server, client_ca_file=ca, client_crl_file=crl) as listener:
            async with connected(listener, Connect("a"), ssl=one), connected(listener, Connect("b"), ssl=two):
                pass
            replace(crl, mine.revocations("two"))
            await asyncio.sleep(1.1)
            assert await refused_in_handshake(listener, two)
            assert await refused_in_handshake(listener, theirs)
            async with connected(listener, Connect("a"), ssl=one):
                pass
            replace(ca, other.certificate)
            replace(crl, other.revocations())
            await asyncio.sleep(1.1)
            assert await refused_in_handshake(listener, one)
            async with connected(listener, Connect("c"), ssl=theirs):
                pass

    run(main())


# Peers that stall


def stalling(authenticator=None, **settings):
    return serving(MqttServer(MqttServerOptions(port=0, **settings), Committing(), authenticator))


def test_a_connect_that_comes_byte_by_byte_has_no_more_time_than_any_other():
    async def main():
        async with stalling(connect_timeout_s=1) as listener, connected(listener, Connect("fine")) as fine:
            async with connected(listener) as slow:
                for byte in encode_packet(Connect("slow" * 20)):
                    slow.send(bytes((byte,)))
                    if slow.reader.at_eof():
                        break
                    await asyncio.sleep(0.1)
                assert slow.reader.at_eof()
            assert listener.context.counters.closed["connect_timeout"] == 1
            assert await fine.works()

    run(main())


def test_a_thousand_half_open_connections_harm_nobody_and_are_gone_after_their_time(
    run_on_both, authority, server
):
    context = Listen(port=0, **server).build_server_options().ssl

    async def main():
        async with (
            stalling(connect_timeout_s=2, ssl=context) as listener,
            connected(listener, Connect("fine"), ssl=client_tls(authority)) as fine,
        ):
            half = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(1000)]
            for _, writer in half[::2]:
                writer.write(b"\x16\x03\x01\x02\x00\x01")  # the beginning of a ClientHello
            await until(lambda: len(listener.context.pending) == 1000)
            assert await fine.works()
            async with connected(listener, Connect("new"), ssl=client_tls(authority)) as new:
                assert await new.works()
            await until(lambda: not listener.context.pending)
            assert listener.context.counters.closed["tls_handshake"] == 1000
            assert await fine.works()
            assert listener.context.counters.connections == 1
            for _, writer in half:
                writer.transport.abort()

    run_on_both(main())


@pytest.mark.parametrize("tls", [False, True])
def test_where_strangers_fill_every_place_devices_get_in_all_the_same(run_on_both, authority, server, tls):
    context = Listen(port=0, **server).build_server_options().ssl if tls else None
    options = {"ssl": client_tls(authority)} if tls else {}

    async def main():
        async with (
            stalling(max_connections=20, connect_timeout_s=30, ssl=context) as listener,
            connected(listener, Connect("fine"), **options) as fine,
        ):
            half = [await asyncio.open_connection("127.0.0.1", listener.port) for _ in range(19)]
            listener.context.now_s += 3
            async with (
                connected(listener, Connect("a"), **options) as a,
                connected(listener, Connect("b"), **options),
            ):
                assert await a.works()
                assert await fine.works()
                assert listener.context.counters.closed["made_room"] == 2
                await until(lambda: half[0][0].at_eof() or half[0][0].exception())
            for _, writer in half:
                writer.transport.abort()

    run_on_both(main())


def test_devices_in_use_never_make_room(run_on_both):
    async def main():
        async with (
            stalling(max_connections=2) as listener,
            connected(listener, Connect("a")) as a,
            connected(listener, Connect("b")) as b,
        ):
            listener.context.now_s += 30
            async with connected(listener) as third:
                with suppress(OSError):
                    assert await third.answer() is None
            assert await a.works()
            assert await b.works()
            assert listener.context.counters.refused["max_connections"] == 1

    run_on_both(main())


def test_wrong_passwords_from_many_addresses_do_not_hold_up_publishes(passwords):
    async def main():
        async with (
            listening(passwords_file=passwords) as listener,
            connected(listener, device("pump-1")) as client,
        ):

            async def guess(n):
                local = (f"127.0.1.{n % 250 + 1}", 0)
                async with connected(listener, local_addr=local) as guesser:
                    return (await guesser.answer(device("pump-2", password=f"guess {n}"))).code

            guessing = asyncio.gather(*(guess(n) for n in range(40)))
            for packet_id in range(1, 201):
                publish = Publish(b"sensors/pump-1/t", b"1", packet_id, 1)
                assert await client.answer(publish) == PublishAck(PacketType.PUBACK, packet_id)
            assert not guessing.done()
            assert set(await guessing) == {0x86}

    run(main())


def test_an_anonymous_listener_asks_nothing(tmp_path):
    template = TopicTemplate(Listen().topic)
    assert type(Listen().build_authenticator(template)).__name__ == "AnonymousAuthenticator"
    (tmp_path / "p").touch()
    assert (
        type(Listen(passwords_file=tmp_path / "p").build_authenticator(template)).__name__
        == "CredentialsAuthenticator"
    )
