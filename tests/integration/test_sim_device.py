"""What a device records as acknowledged is what the server acknowledged, whatever the connection does.

The server here is a stub of a few packets that writes down what it took and what it answered, and that
breaks connections on purpose. The broker of `test_sim_commands` is a real one.
"""

import asyncio
import contextlib
import gc
import json
import random
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from firmware_sim.devices.device import Device, RadioSettings
from firmware_sim.devices.mqtt_connection import BrokerAddress
from firmware_sim.ground_truth import Publish

CONNACK = b"\x20\x03\x00\x00\x00"
TIMEOUT_S = 20


class StubServer:
    """Takes QoS 1 publishes over MQTT 5. `answer` decides about each: a reason code, None to stay silent,
    or "drop" to close the connection."""

    def __init__(self):
        self.taken = []
        self.acknowledged = []
        self.connects = 0
        self.kinds = set()
        self.most_unanswered = 0
        self.connack: bytes | None = CONNACK
        self.answer: Any = lambda _: 0
        self._server: asyncio.Server
        self._writers = set()
        self.port = 0

    async def start(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self):
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()
        await asyncio.sleep(0)

    async def _serve(self, reader, writer):
        self._writers.add(writer)
        unanswered = 0
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, body = await self._packet(reader)
                self.kinds.add(kind)
                if kind == 1:
                    self.connects += 1
                    if self.connack is None:
                        break
                    writer.write(self.connack)
                elif kind == 3:
                    topic_bytes = struct.unpack_from(">H", body)[0]
                    packet_id = struct.unpack_from(">H", body, 2 + topic_bytes)[0]
                    payload = body[2 + topic_bytes + 3 :]
                    self.taken.append(payload)
                    verdict = self.answer(payload)
                    if isinstance(verdict, str):
                        break
                    if verdict is None:
                        unanswered += 1
                        self.most_unanswered = max(self.most_unanswered, unanswered)
                        continue
                    self.acknowledged += [payload] if verdict < 128 else []
                    writer.write(b"\x40\x03" + struct.pack(">HB", packet_id, verdict))
                elif kind == 12:
                    writer.write(b"\xd0\x00")
        self._writers.discard(writer)
        writer.transport.abort()

    @staticmethod
    async def _packet(reader):
        head = (await reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 128:
                return head >> 4, await reader.readexactly(length)


@pytest.fixture
async def server():
    server = StubServer()
    await server.start()
    yield server
    await server.stop()


class Recorder:
    def __init__(self):
        self.settled = []

    def __call__(self, publish, reason_code):
        self.settled.append((publish.payload, reason_code))

    @property
    def acknowledged(self):
        return [payload for payload, reason_code in self.settled if reason_code < 128]


@contextlib.asynccontextmanager
async def running(server, recorder, **options):
    radio = RadioSettings(
        BrokerAddress("127.0.0.1", server.port), backoff_base_s=0.02, backoff_cap_s=0.1, **options
    )
    device = Device("d1", radio, recorder, random.Random(1))
    task = asyncio.create_task(device.run())
    try:
        yield device, radio.counters
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - the condition is the test's own
            await asyncio.sleep(0.005)


def publishes(count):
    return [Publish("sensors/d1/t", json.dumps({"value": n}).encode(), n, 1) for n in range(count)]


async def test_everything_offered_is_acknowledged_once(server):
    recorder = Recorder()
    async with running(server, recorder) as (device, counters):
        for publish in publishes(200):
            device.offer(publish)
        await until(lambda: device.outstanding == 0)
    assert recorder.acknowledged == server.taken == [p.payload for p in publishes(200)]
    assert (counters.published, counters.acknowledged, counters.publishes_resent) == (200, 200, 0)


async def test_connections_that_break_at_random_lose_nothing_and_claim_nothing(server):
    rng = random.Random(5)
    server.answer = lambda _: rng.choices([0, None, "drop"], [90, 5, 5])[0]
    recorder = Recorder()
    async with running(server, recorder, window=7) as (device, counters):
        for publish in publishes(300):
            device.offer(publish)
        for _ in range(1000):
            await asyncio.sleep(0.005)
            assert set(recorder.acknowledged) <= set(server.acknowledged)
            if counters.reconnects >= 10:
                break
        server.answer = lambda _: 0
        await server.stop()
        await server.start()
        await until(lambda: device.outstanding == 0)
    assert counters.reconnects >= 10
    assert counters.publishes_resent > 0
    assert sorted(recorder.acknowledged) == sorted(p.payload for p in publishes(300))
    assert counters.acknowledged == 300


async def test_what_was_not_acknowledged_is_sent_again_first_and_in_order(server):
    server.answer = lambda _: None
    recorder = Recorder()
    async with running(server, recorder, window=5) as (device, counters):
        for publish in publishes(8):
            device.offer(publish)
        await until(lambda: len(server.taken) == 5)
        assert recorder.settled == []
        await server.stop()
        server.taken.clear()
        server.answer = lambda _: 0
        await server.start()
        await until(lambda: device.outstanding == 0)
    assert server.taken == [p.payload for p in publishes(8)]
    assert counters.publishes_resent == 5


async def test_a_server_that_is_away_for_a_while_is_found_again(server):
    recorder = Recorder()
    async with running(server, recorder) as (device, counters):
        await until(lambda: counters.devices_connected == 1)
        await server.stop()
        for publish in publishes(10):
            device.offer(publish)
        await asyncio.sleep(0.5)
        assert "refused" in counters.last_fault
        await server.start()
        await until(lambda: device.outstanding == 0)
    assert len(recorder.acknowledged) == 10


async def test_a_refused_publish_is_not_acknowledged_and_not_sent_again(server):
    server.answer = lambda payload: 0x97 if payload == publishes(3)[1].payload else 0
    recorder = Recorder()
    async with running(server, recorder) as (device, counters):
        for publish in publishes(3):
            device.offer(publish)
        await until(lambda: device.outstanding == 0)
    assert [code for _, code in recorder.settled] == [0, 0x97, 0]
    assert (counters.acknowledged, counters.refused) == (2, 1)
    assert "0x97" in counters.last_fault


async def test_the_servers_receive_maximum_is_kept(server):
    server.connack = b"\x20\x06\x00\x00\x03\x21\x00\x03"
    server.answer = lambda _: None
    async with running(server, Recorder(), window=20) as (device, _):
        for publish in publishes(10):
            device.offer(publish)
        await until(lambda: len(server.taken) >= 3)
        await asyncio.sleep(0.1)
    assert server.most_unanswered == 3


@pytest.mark.parametrize(
    "connack", [None, b"\x20\x03\x00\x87\x00"], ids=["closed before CONNACK", "not authorised"]
)
async def test_a_refused_connection_is_tried_again_soon_and_leaks_no_socket(server, connack):
    server.connack = connack
    async with running(server, Recorder()) as (device, counters):
        device.offer(publishes(1)[0])
        await until(lambda: server.connects >= 10)
        assert counters.last_fault
        assert counters.devices_connected == 0
        server.connack = CONNACK
        await until(lambda: device.outstanding == 0)
    assert len(server._writers) <= 1


async def test_a_full_ring_drops_the_oldest_and_counts_it():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        radio = RadioSettings(BrokerAddress("127.0.0.1", probe.getsockname()[1]), ring_publishes=5)
        device = Device("d1", radio, Recorder(), random.Random(1))
        for publish in publishes(8):
            device.offer(publish)
    assert device.outstanding == 5
    assert radio.counters.overrun == 3


async def test_at_most_once_publishes_are_never_called_acknowledged(server):
    recorder = Recorder()
    async with running(server, recorder, qos=0) as (device, counters):
        for publish in publishes(5):
            device.offer(publish)
        await until(lambda: counters.published == 5)
    assert recorder.settled == []
    assert (counters.acknowledged, device.outstanding) == (0, 0)


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_servers_that_never_answer_leave_no_sockets_behind(server, monkeypatch):
    monkeypatch.setattr("firmware_sim.devices.mqtt_connection.CONNECT_TIMEOUT_S", 0.02)
    server.connack = b""
    async with running(server, Recorder()):
        await until(lambda: server.connects >= 3)
        gc.disable()
        try:
            before = open_files()
            await until(lambda: server.connects >= 15)
            after = open_files()
        finally:
            gc.enable()
    assert after <= before + 2


async def test_a_device_whose_network_is_away_keeps_everything_and_sends_it_when_it_is_back(server):
    recorder = Recorder()
    async with running(server, recorder) as (device, counters):
        await until(lambda: counters.devices_connected == 1)
        device.switch(on=False)
        await until(lambda: counters.devices_connected == 0)
        for publish in publishes(5):
            device.offer(publish)
        await asyncio.sleep(0.3)
        assert (server.taken, device.outstanding, server.connects) == ([], 5, 1)
        device.switch(on=True)
        await until(lambda: device.outstanding == 0)
    assert len(recorder.acknowledged) == 5


async def test_a_device_that_goes_to_sleep_says_goodbye(server):
    async with running(server, Recorder()) as (device, counters):
        await until(lambda: counters.devices_connected == 1)
        device.switch(on=False, send_disconnect=True)
        await until(lambda: 14 in server.kinds)
        await until(lambda: counters.devices_connected == 0)


async def test_a_restart_keeps_what_is_in_flash_and_forgets_what_is_in_memory(server):
    server.answer = lambda _: None
    recorder = Recorder()
    async with running(server, recorder, window=2) as (device, counters):
        for publish in publishes(6):
            device.offer(publish)
        await until(lambda: len(server.taken) == 2)
        device.restart(forget=False)
        assert (device.outstanding, counters.reboots, counters.forgotten) == (6, 1, 0)
        await until(lambda: server.connects >= 2)
        device.restart(forget=True)
        assert (device.outstanding, counters.reboots, counters.forgotten) == (0, 2, 6)
        server.answer = lambda _: 0
        device.offer(publishes(7)[6])
        await until(lambda: recorder.settled)
    assert recorder.acknowledged == [publishes(7)[6].payload]
