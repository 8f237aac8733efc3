"""Independent MQTT clients publish to the listener: aiomqtt (paho), gmqtt and mosquitto_pub."""

import asyncio
import os
import shutil

import aiomqtt
import gmqtt
import pytest
from gmqtt.mqtt.constants import MQTTv50, MQTTv311
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from gateway.mqtt.context import MqttServerOptions
from gateway.mqtt.server import MqttServer
from tests.support.tasks import LooseTasks

TIMEOUT_S = 30


class Committing:
    """An intake that acknowledges a moment later, as a committer does."""

    def __init__(self):
        self.taken = []
        self._owed = []

    def submit_publishes(self, source, batch):
        self.taken += batch
        self._owed.append((source, batch))
        if len(self._owed) == 1:
            asyncio.get_running_loop().call_later(0.002, self._commit)

    def _commit(self):
        owed, self._owed = self._owed, []
        for source, batch in owed:
            source.acknowledge(batch)


@pytest.fixture
async def listener():
    listener = MqttServer(MqttServerOptions(port=0), Committing())
    await listener.start(LooseTasks())
    yield listener
    await listener.close(0.5)


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - what is awaited has no event of its own
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("version", [aiomqtt.ProtocolVersion.V5, aiomqtt.ProtocolVersion.V311])
@pytest.mark.parametrize("qos", [0, 1, 2])
async def test_aiomqtt_publishes(listener, version, qos):
    async with aiomqtt.Client("127.0.0.1", listener.port, identifier="dev", protocol=version) as client:
        for number in range(100):
            await client.publish("sensors/dev/temperature", b"%d" % number, qos=qos, retain=number % 2 == 0)
        await until(lambda: len(listener.context.sink.taken) == 100)
    assert [p.payload for p in listener.context.sink.taken] == [b"%d" % n for n in range(100)]
    assert {(p.topic, p.qos) for p in listener.context.sink.taken} == {(b"sensors/dev/temperature", qos)}
    assert listener.context.counters.protocol_faults.total() == 0


async def test_aiomqtt_publishes_with_properties_and_learns_that_it_may_not_subscribe(listener):
    properties = Properties(PacketTypes.PUBLISH)
    properties.ContentType = "application/json"
    properties.UserProperty = [("unit", "°C")]
    properties.TopicAlias = 3
    async with aiomqtt.Client("127.0.0.1", listener.port, protocol=aiomqtt.ProtocolVersion.V5) as client:
        await client.publish("sensors/a/t", b"1", qos=1, properties=properties)
        granted = await client.subscribe("sensors/#")
        assert list(map(str, granted)) == ["Wildcard subscription not supported"]
        await client.publish("sensors/a/t", b"2", qos=1)
    assert [p.payload for p in listener.context.sink.taken] == [b"1", b"2"]
    assert ("unit", "°C") in listener.context.sink.taken[0].properties[0x26]


@pytest.mark.parametrize("version", [MQTTv50, MQTTv311])
async def test_gmqtt_publishes(listener, version):
    client = gmqtt.Client("gm", clean_session=True)
    await client.connect("127.0.0.1", listener.port, version=version)
    for number in range(100):
        client.publish("sensors/gm/humidity", b"%d" % number, qos=1)
    await until(lambda: len(listener.context.sink.taken) == 100)
    await client.disconnect()
    assert {p.payload for p in listener.context.sink.taken} == {b"%d" % n for n in range(100)}
    assert listener.context.counters.protocol_faults.total() == 0


@pytest.mark.parametrize("version", ["mqttv5", "mqttv311"])
@pytest.mark.parametrize("qos", ["0", "1", "2"])
async def test_mosquitto_pub_publishes_line_by_line(listener, version, qos):
    program = shutil.which("mosquitto_pub")
    if program is None:
        if os.environ.get("TIDEGATE_REQUIRE_REAL"):
            pytest.fail("mosquitto_pub is not installed (Debian package mosquitto-clients)")
        pytest.skip("mosquitto_pub is not installed (Debian package mosquitto-clients)")
    lines = [b"%d" % number for number in range(2000)]
    process = await asyncio.create_subprocess_exec(
        *(program, "-h", "127.0.0.1", "-p", str(listener.port), "-V", version, "-q", qos),
        *("-t", "sensors/dev/t", "-l"),
        stdin=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        await process.communicate(b"\n".join(lines) + b"\n")
    assert process.returncode == 0
    await until(lambda: len(listener.context.sink.taken) >= 2000)
    assert [p.payload for p in listener.context.sink.taken] == lines
    assert listener.context.counters.protocol_faults.total() == 0


async def test_mosquitto_pub_of_version_3_1_is_told_so(listener):
    program = shutil.which("mosquitto_pub")
    if program is None:
        pytest.skip("mosquitto_pub is not installed (Debian package mosquitto-clients)")
    process = await asyncio.create_subprocess_exec(
        *(program, "-h", "127.0.0.1", "-p", str(listener.port), "-V", "mqttv31", "-t", "a", "-m", "1"),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(TIMEOUT_S):
        _, said = await process.communicate()
    assert process.returncode != 0
    assert b"unacceptable protocol version" in said.lower()
