"""What every source of readings promises to the agent and the committer, whatever stands behind it."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import aiomqtt
import httpx
import msgspec
import pytest

from gateway.build import build_runtime
from gateway.mqtt.codec.packets import Publish
from gateway.settings.gateway_settings import GatewaySettings
from gateway.spool.database import Database
from tests.support.http_gateway import until
from tests.support.tasks import LooseTasks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from gateway.runtime import Runtime

TOPIC = "sensors/pump-1/temperature"
_seconds = count(1_790_000_000)
LISTEN = {"port": 0, "max_connections": 100}
STATUS_KEYS = {
    "listen": {
        "connections",
        "connections_ever",
        "publishes",
        "wills",
        "bytes_in",
        "protocol_faults",
        "refused",
        "closed",
    },
    "subscribe": {"name", "state", "connects", "sessions_lost", "publishes", "again", "acknowledged"},
    "http": {"requests", "batches", "batches_again", "rejections"},
}


def next_reading() -> dict[str, float]:
    """A reading that was not sent before."""
    return {"ts": next(_seconds), "value": 21.5}


class MemorySource:
    """A source without a network: `read` is what others read from a socket."""

    kind = name = "memory"
    stages = ()
    may_publish_sensor = None

    def __init__(self, sink):
        self._sink, self._waiting, self._held = sink, {}, []
        self._reading = True

    async def start(self, tasks):
        pass

    def read(self):
        """A sender's publish; done once it is acknowledged."""
        acknowledged = asyncio.get_running_loop().create_future()
        publish = Publish(TOPIC.encode(), json.dumps(next_reading()).encode(), len(self._waiting) + 1, qos=1)
        self._waiting[publish.packet_id] = acknowledged
        self._held.append(publish)
        self.resume() if self._reading else None
        return acknowledged

    def acknowledge(self, publishes):
        for publish in publishes:
            self._waiting[publish.packet_id].set_result(None)

    def refuse(self, publishes, reason_code):
        raise AssertionError((publishes, reason_code))

    def pause(self):
        self._reading = False

    def resume(self):
        self._reading = True
        held, self._held = self._held, []
        if held:
            self._sink.submit_publishes(self, held)

    def stop_reading(self):
        self._reading = False

    async def close(self):
        self.stop_reading()

    def status(self):
        return None


@dataclass
class Subject:
    """A started source, and how a sender sends one reading to it: done once that is acknowledged."""

    source: Any
    runtime: Runtime
    send: Callable[[], Awaitable[Any]]


@asynccontextmanager
async def running(tmp_path, kind, **ingress) -> AsyncIterator[tuple[Any, Runtime]]:
    given = {"listen": LISTEN, "host": {"enabled": False}, **ingress}
    settings = GatewaySettings.model_validate(
        {
            "gateway_id": "g",
            "spool": {"path": tmp_path / "spool.db", "min_free_bytes": 0, "commit_interval_ms": 0},
            "ingress": given,
        }
    )
    database = await Database.open(settings.spool.path)
    runtime = await build_runtime(settings, database)
    source: Any = next(
        (each for each in runtime.sources if each.kind == kind), MemorySource(runtime.committer)
    )
    try:
        await source.start(LooseTasks())
        yield source, runtime
    finally:
        await source.close()
        await runtime.commit_consumer.aclose()
        await database.close()


@asynccontextmanager
async def listen(_request, tmp_path):
    async with (
        running(tmp_path, "listen") as (source, runtime),
        aiomqtt.Client("127.0.0.1", source.port) as device,
    ):
        yield Subject(source, runtime, lambda: device.publish(TOPIC, json.dumps(next_reading()), qos=1))


@asynccontextmanager
async def subscribe(request, tmp_path):
    mosquitto = request.getfixturevalue("mosquitto")
    table = {"url": mosquitto.url, "filters": ["sensors/#"], "broker_reviewed": True}
    async with (
        running(tmp_path, "subscribe", subscribe=[table]) as (source, runtime),
        aiomqtt.Client("127.0.0.1", mosquitto.port) as device,
    ):
        await until(lambda: source.status().state == "connected")
        sent = 0

        async def send():
            nonlocal sent
            sent += 1
            expected = sent
            await device.publish(TOPIC, json.dumps(next_reading()), qos=1)
            await until(lambda: source.status().acknowledged >= expected)

        yield Subject(source, runtime, send)


@asynccontextmanager
async def http(_request, tmp_path):
    async with (
        running(tmp_path, "http", http={"enabled": True, "port": 0}) as (source, runtime),
        httpx.AsyncClient(timeout=20, trust_env=False) as client,
    ):
        url = f"http://127.0.0.1:{source.port}/v1/readings"

        async def send():
            reading = {"sensor_id": "pump-1", "sensor_type": "temperature", **next_reading()}
            while True:
                answer = await client.post(url, json=reading)
                if answer.status_code != 503:
                    return answer.raise_for_status()
                await asyncio.sleep(0.05)

        yield Subject(source, runtime, send)


@asynccontextmanager
async def host(_request, tmp_path):
    table = {"enabled": True, "period_s": 0.1}
    async with running(tmp_path, "host", host=table) as (source, runtime):

        async def send():
            counted = runtime.committer.counters
            before = counted.readings
            await until(lambda: counted.readings > before)

        yield Subject(source, runtime, send)


@asynccontextmanager
async def memory(_request, tmp_path):
    async with running(tmp_path, "memory") as (source, runtime):
        yield Subject(source, runtime, source.read)


KINDS = {each.__name__: each for each in (listen, subscribe, http, host, memory)}


@pytest.fixture(params=KINDS)
async def subject(request, tmp_path):
    async with KINDS[request.param](request, tmp_path) as subject:
        yield subject


@pytest.fixture
async def committing(subject):
    """The committer's loop; it runs until the test ends unless that finishes it."""
    task = asyncio.create_task(subject.runtime.committer.run())
    yield task
    subject.source.stop_reading()
    subject.runtime.committer.finish()
    await task


async def test_a_reading_is_acknowledged_only_after_its_commit(subject):
    sending = asyncio.ensure_future(subject.send())
    await until(subject.runtime.committer._pending)
    await asyncio.sleep(0.05)
    assert not sending.done()
    assert subject.runtime.committer.counters.readings == 0
    while not sending.done():
        await subject.runtime.committer.commit_once()
        await asyncio.sleep(0.01)
    await sending
    assert subject.runtime.committer.counters.readings > 0


async def test_pause_stops_reading_and_resume_continues_without_a_loss(subject, committing):
    await subject.send()
    subject.source.pause()
    subject.source.pause()
    await until(lambda: not subject.runtime.committer._pending())
    before = subject.runtime.committer.counters.readings
    sending = asyncio.ensure_future(subject.send())
    await asyncio.sleep(0.3)
    assert subject.runtime.committer.counters.readings == before
    assert not sending.done()
    subject.source.resume()
    await sending
    assert subject.runtime.committer.counters.readings > before


async def test_what_was_read_before_the_stop_is_still_acknowledged_and_nothing_more_is_read(subject):
    sending = asyncio.ensure_future(subject.send())
    await until(subject.runtime.committer._pending)
    subject.source.stop_reading()
    subject.source.resume() if subject.source.kind != "memory" else None
    subject.runtime.committer.finish()
    await subject.runtime.committer.run()
    await sending
    after = subject.runtime.committer.counters.readings
    assert after > 0
    await asyncio.sleep(0.2)
    assert not subject.runtime.committer._pending()


async def test_closing_can_be_repeated(subject):
    await subject.source.close()
    await subject.source.close()


@pytest.mark.parametrize("kind", ["listen", "http", "host"])
async def test_closing_before_the_start_is_harmless(tmp_path, kind):
    settings = GatewaySettings.model_validate(
        {
            "gateway_id": "g",
            "spool": {"path": tmp_path / "spool.db", "min_free_bytes": 0},
            "ingress": {"http": {"enabled": True}},
        }
    )
    database = await Database.open(settings.spool.path)
    runtime = await build_runtime(settings, database)
    (source,) = (each for each in runtime.sources if each.kind == kind)
    await source.close()
    await runtime.commit_consumer.aclose()
    await database.close()


async def test_a_source_says_its_kind_its_name_its_progress_and_its_status(subject):
    source = subject.source
    assert source.kind in {*STATUS_KEYS, "host", "memory"}
    assert source.name
    assert all(stage.late_s() == 0 for stage in source.stages)
    assert bool(source.stages) is (source.kind in ("subscribe", "host"))
    status = source.status()
    assert (status is None) is (source.kind not in STATUS_KEYS)
    if status is not None:
        assert set(msgspec.structs.asdict(status)) >= STATUS_KEYS[source.kind]
