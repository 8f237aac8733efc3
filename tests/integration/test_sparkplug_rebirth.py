"""A Sparkplug node that cannot be understood is asked for a new birth, where it can be reached."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable

import pytest
from esio_spb_builder.core import sparkplug_b_pb2 as spb

from gateway.auth.authenticator import Identity
from gateway.mqtt.broker_session import SubscriberOptions
from gateway.mqtt.codec.packet_codec import encode_packet
from gateway.mqtt.codec.packets import V5, V311, Connect, Publish, Suback, Subscribe, TopicCache, Unsubscribe
from gateway.mqtt.codec.parser import PacketParser
from gateway.mqtt.context import MqttServerOptions
from gateway.mqtt.server import MqttServer
from gateway.mqtt.session_state import CommandSubscriptions
from gateway.mqtt.subscriber import Subscriber
from gateway.payloads.decoder_registry import RuleSet, encode_rebirth_command
from gateway.payloads.formats.sparkplug_births import RebirthRequester
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import TopicTemplate
from tests.support.committers import build_committer
from tests.support.fixtures_mosquitto import mosquitto  # noqa: F401 - a fixture
from tests.support.open_spool import open_spool
from tests.support.tasks import LooseTasks

RULES = [PayloadRule("spBv1.0/#", "sparkplug_b")]
TEMPLATE = TopicTemplate("sensors/{sensor_id}/{sensor_type}")
COMMANDS = "spBv1.0/g/NCMD/n"


def data(alias=4):
    message = spb.Payload(timestamp=1, seq=1)
    message.metrics.add(alias=alias, float_value=1)
    return message.SerializeToString()


def is_rebirth(payload):
    (metric,) = spb.Payload.FromString(payload).metrics
    return (metric.name, metric.boolean_value) == ("Node Control/Rebirth", True)


class Owner:
    """Admits everyone as the node g.n."""

    def authenticate(self, *_):
        return Identity("g.n", may_publish_sensor=lambda sensor_id: sensor_id.partition(":")[0] == "g.n")


class Nobody:
    def publish(self, topic, payload):
        raise NotImplementedError


class Node:
    """A node's connection, packet by packet."""

    def __init__(self, version):
        self.version = version
        self._parser = PacketParser(
            max_packet_bytes=1 << 20, topics=TopicCache(), client=True, version=version
        )
        self._items: list = []

    async def connect(self, port):
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        self.send(Connect("n", self.version))
        await self.next()

    def send(self, packet):
        self._writer.write(encode_packet(packet, self.version))

    async def next(self):
        while not self._items:
            async with asyncio.timeout(5):
                received = await self._reader.read(4096)
            assert received, "closed"
            for item in self._parser.feed(received):
                self._items += item if isinstance(item, list) else [item]
        return self._items.pop(0)

    def deliver(self, topic, payload):
        raise AssertionError((topic, payload))

    async def close(self):
        self._writer.close()
        await self._writer.wait_closed()


@pytest.fixture
async def gateway(tmp_path):
    async with open_spool(tmp_path / "spool.db") as spool:
        rules, publishers = RuleSet(TEMPLATE, RULES), list[Callable[[bytes, bytes], bool]]()
        rebirths = RebirthRequester(rules.births, encode_rebirth_command, publishers)
        committer = build_committer(spool, rules, on_rebirths_due=rebirths.send_requests)
        listener = MqttServer(MqttServerOptions(port=0), committer, Owner(), CommandSubscriptions(rules))
        publishers.append(listener.publish)
        await listener.start(LooseTasks())
        running = asyncio.create_task(committer.run())
        yield committer, listener, rebirths
        listener.stop_reading()
        committer.finish()
        await running
        await listener.close()


@pytest.mark.parametrize("version", [V5, V311])
@pytest.mark.parametrize("name", [COMMANDS, COMMANDS + "/#"])
async def test_a_node_that_subscribed_gets_the_command(gateway, version, name):
    node = Node(version)
    await node.connect(gateway[1].port)
    node.send(Subscribe(1, ((name, 0),)))
    assert (await node.next()).codes == (0,)
    node.send(Publish(b"spBv1.0/g/NDATA/n", data(), 7, 1))
    command = await node.next()
    assert (command.topic, command.qos) == (COMMANDS.encode(), 0)
    assert is_rebirth(command.payload)
    assert gateway[2].requested_total == 1
    await node.close()


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("spBv1.0/g/NCMD/other", 0x87),
        ("spBv1.0/other/NCMD/n", 0x87),
        ("spBv1.0/g/DCMD/n/#", 0xA2),
        ("spBv1.0/g/NCMD/+", 0xA2),
        ("sensors/a/t", 0x83),
    ],
)
async def test_nobody_subscribes_to_anything_else(gateway, name, code):
    node = Node(V5)
    await node.connect(gateway[1].port)
    node.send(Subscribe(1, ((name, 0), (COMMANDS, 0))))
    assert await node.next() == Suback(1, (code, 0))
    await node.close()


async def test_a_subscription_ends_when_it_is_withdrawn_and_with_its_connection(gateway):
    committer, listener, rebirths = gateway
    node = Node(V5)
    await node.connect(listener.port)
    node.send(Subscribe(1, ((COMMANDS, 0),)))
    await node.next()
    node.send(Unsubscribe(2, (COMMANDS, "other")))
    assert (await node.next()).codes == (0, 0x11)
    assert not listener.context.commands
    node.send(Subscribe(3, ((COMMANDS, 0),)))
    await node.next()
    assert listener.context.commands
    await node.close()
    for _ in range(1_000):
        if listener.context.counters.connections == 0:
            break
        await asyncio.sleep(0.01)
    assert not listener.context.commands
    committer.submit_payload("listen", b"spBv1.0/g/NDATA/n", data())
    assert (rebirths.requested_total, rebirths.undelivered_total) == (1, 1)


def test_without_a_rule_for_sparkplug_nothing_is_served():
    for commands in (CommandSubscriptions(RuleSet(TEMPLATE)), CommandSubscriptions()):
        subscribe = Subscribe(1, ((COMMANDS, 0), (COMMANDS + "/#", 0)))
        assert commands.subscribe(Nobody(), subscribe, V5, None) == (0x83, 0xA2)


async def test_behind_a_broker_the_command_is_published_there(tmp_path, mosquitto):  # noqa: F811 - a fixture
    listening, publisher = shutil.which("mosquitto_sub"), shutil.which("mosquitto_pub")
    if listening is None or publisher is None:
        pytest.skip("needs mosquitto_sub and mosquitto_pub (Debian package mosquitto-clients)")
    where = ("-p", str(mosquitto.port))
    async with open_spool(tmp_path / "spool.db") as spool:
        rules, publishers = RuleSet(TEMPLATE, RULES), list[Callable[[bytes, bytes], bool]]()
        requester = RebirthRequester(rules.births, encode_rebirth_command, publishers)
        committer = build_committer(spool, rules, on_rebirths_due=requester.send_requests)
        told = SubscriberOptions(
            url=mosquitto.url, client_id="g", filters=("spBv1.0/#",), broker_reviewed=True
        )
        subscriber = Subscriber(told, committer)
        publishers.append(subscriber.publish)
        committing = asyncio.create_task(committer.run())
        await subscriber.start(LooseTasks())
        node = await asyncio.create_subprocess_exec(
            listening, *where, "-t", COMMANDS, "-C", "1", "-N", "-W", "30", stdout=asyncio.subprocess.PIPE
        )
        payload = tmp_path / "data"
        for alias in range(60):
            payload.write_bytes(data(alias))
            arguments = [publisher, *where, "-q", "1", "-t", "spBv1.0/g/NDATA/n", "-f", str(payload)]
            await asyncio.to_thread(subprocess.run, arguments, check=True)
            await asyncio.sleep(0.5)
            if node.returncode is not None:
                break
            rules.births._requested_us.clear()  # the node may not have subscribed yet: ask again
        command, _ = await node.communicate()
        assert is_rebirth(command)
        subscriber.stop_reading()
        committer.finish()
        await committing
        await subscriber.close()
