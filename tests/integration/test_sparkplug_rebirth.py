"""A Sparkplug node that cannot be understood is asked for a new birth, where it can be reached."""

from __future__ import annotations

import asyncio
import shutil
import subprocess

import pytest
from esio_spb_builder.core import sparkplug_b_pb2 as spb

from gateway.ingress.admission import Identity
from gateway.ingress.committer import Committer
from gateway.ingress.encoder import encode
from gateway.ingress.formats.rule import rule_of
from gateway.ingress.formats.rules import Rules
from gateway.ingress.listener import Listener, ListenSettings
from gateway.ingress.packets import V5, V311, Connect, Publish, Suback, Subscribe, TopicTable, Unsubscribe
from gateway.ingress.parser import Parser
from gateway.ingress.rebirths import Rebirths
from gateway.ingress.served import Served
from gateway.ingress.subscriber import Subscriber
from gateway.ingress.subscription import SubscribeSettings
from gateway.ingress.topics import TopicTemplate
from tests.support.fixtures_mosquitto import mosquitto  # noqa: F401 - a fixture
from tests.support.open_spool import open_spool

RULES = [rule_of("spBv1.0/#", "sparkplug_b")]
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

    def admit(self, *_):
        return Identity("g.n", owns=lambda sensor_id: sensor_id.partition(":")[0] == "g.n")


class Node:
    """A node's connection, packet by packet."""

    def __init__(self, version):
        self.version = version
        self._parser = Parser(max_packet_bytes=1 << 20, topics=TopicTable(), client=True, version=version)
        self._items: list = []

    async def connect(self, port):
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)
        self.send(Connect("n", self.version))
        await self.next()

    def send(self, packet):
        self._writer.write(encode(packet, self.version))

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
        committer = Committer(spool.appender, spool.book, Rules(TEMPLATE, RULES), interval_s=0)
        listener = Listener(ListenSettings(port=0), committer, Owner(), Served(committer.rules))
        rebirths = Rebirths(committer.rules.births, [listener.served.publish])
        committer.on_rebirths = rebirths.ask
        await listener.start()
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
    assert gateway[2].asked_total == 1
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
    assert not listener.served
    node.send(Subscribe(3, ((COMMANDS, 0),)))
    await node.next()
    assert listener.served
    await node.close()
    for _ in range(1_000):
        if listener.counters.connections_open == 0:
            break
        await asyncio.sleep(0.01)
    assert not listener.served
    committer.offer("listen", b"spBv1.0/g/NDATA/n", data())
    assert (rebirths.asked_total, rebirths.unheard_total) == (1, 1)


def test_without_a_rule_for_sparkplug_nothing_is_served():
    assert Served(Rules(TEMPLATE)).answer(Node(V5), [COMMANDS], [0x83], None) == (0x83,)
    assert Served().answer(Node(V5), [COMMANDS], [0x83], None) == (0x83,)


async def test_behind_a_broker_the_command_is_published_there(tmp_path, mosquitto):  # noqa: F811 - a fixture
    listening, publisher = shutil.which("mosquitto_sub"), shutil.which("mosquitto_pub")
    if listening is None or publisher is None:
        pytest.skip("needs mosquitto_sub and mosquitto_pub (Debian package mosquitto-clients)")
    where = ("-p", str(mosquitto.port))
    async with open_spool(tmp_path / "spool.db") as spool:
        committer = Committer(spool.appender, spool.book, Rules(TEMPLATE, RULES), interval_s=0)
        told = SubscribeSettings(
            url=mosquitto.url, client_id="g", filters=("spBv1.0/#",), broker_reviewed=True
        )
        subscriber = Subscriber(told, committer)
        committer.on_rebirths = Rebirths(committer.rules.births, [subscriber.publish]).ask
        stop = asyncio.Event()
        tasks = [asyncio.create_task(committer.run()), asyncio.create_task(subscriber.run(stop))]
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
            committer.rules.births._asked_us.clear()  # the node may not have subscribed yet: ask again
        command, _ = await node.communicate()
        assert is_rebirth(command)
        stop.set()
        subscriber.stop_reading()
        committer.finish()
        await tasks[0]
        await subscriber.close()
        await tasks[1]
