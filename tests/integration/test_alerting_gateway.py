"""The whole gateway as a process: alerts told through kills, readings that wait for the clock."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import aiomqtt
import pytest

from gateway.processing.clock import SyncStatus, read_sync_status
from tests.support.http_stub import Answer, http_stub
from tests.support.programs import Site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path


@pytest.fixture
async def site(tmp_path: Path, postgres_dsn: str) -> AsyncIterator[Site]:
    made = Site(tmp_path, postgres_dsn)
    yield made
    made.close()


async def publish(site: Site, *values: float, name: str = "kiln") -> None:
    async with aiomqtt.Client("127.0.0.1", site.broker_port) as client:
        for value in values:
            await client.publish(f"sensors/{name}/temperature", json.dumps({"value": value}), qos=1)


async def status(site: Site) -> dict:
    return await asyncio.to_thread(site.status)


async def until(true: Callable[[], bool], within_s: float = 20) -> None:
    async with asyncio.timeout(within_s):
        while not true():  # noqa: ASYNC110 - what is watched is in another process
            await asyncio.sleep(0.05)


async def test_an_alert_is_told_delivered_and_ended_across_kills(site: Site, tmp_path: Path) -> None:
    broken = [Answer(503)] * 2
    async with http_stub(lambda _: broken.pop() if broken else Answer(200)) as stub:
        config = tmp_path / "gateway.toml"
        config.write_text(
            config.read_text()
            + "[alerts]\ngroup_wait_s = 0\ngroup_interval_s = 0\n"
            + f'[[alerts.channel]]\nname = "ops"\nkind = "webhook"\nurl = "{stub.url}/hook"\nform = "json"\n'
        )

        def told() -> list[tuple[str, int, int]]:
            """What the webhook took; what it answered 503 to does not count."""
            found = [json.loads(request.body) for request in stub.requests[2:]]
            return [(m["rule"], m["firing"], m["recovered"]) for m in found]

        await asyncio.to_thread(site.gateway.start)
        await publish(site, 36.5)
        await until(lambda: site.status()["alerts"]["firing"] == 1)
        site.gateway.kill()
        await asyncio.to_thread(site.gateway.start)
        await until(lambda: told() == [("temperature", 1, 0)])
        await publish(site, 37)
        assert (await status(site))["alerts"]["firing"] == 1
        site.gateway.kill()
        await asyncio.to_thread(site.gateway.start)
        await publish(site, 20)
        await until(lambda: told() == [("temperature", 1, 0), ("temperature", 0, 1)])
        found = await status(site)
        assert (found["alerts"]["firing"], found["alerts"]["critical"]) == (0, 0)
        assert [a["text"] for a in found["alerts"]["newest"]] == ["value is back at 20"]
        assert await asyncio.to_thread(site.gateway.stop) == 0


async def test_readings_that_wait_for_the_clock_are_acknowledged_and_get_their_times(site: Site, tmp_path):
    if read_sync_status() is SyncStatus.YES:
        pytest.skip("this machine's clock is synchronised")
    config = tmp_path / "gateway.toml"
    before, doubting = config.read_text(), '[clock]\ntrust = "synchronised"\n'
    config.write_text(before + doubting)
    await asyncio.to_thread(site.gateway.start)
    sent_at_us = time.time_ns() // 1000
    await publish(site, 20, 21, 22)
    acknowledged_at_us = time.time_ns() // 1000
    found = await status(site)
    assert (found["clock"]["trusted"], found["clock"]["waiting"]) == (False, 3)
    assert found["spool"]["readings_ever"] == 0
    site.gateway.kill()
    config.write_text(before)
    await asyncio.to_thread(site.gateway.start)
    await until(lambda: site.status()["spool"]["readings_ever"] == 3)
    found = await status(site)
    assert (found["clock"]["trusted"], found["clock"]["waiting"], found["clock"]["restamped"]) == (True, 0, 3)
    await until(lambda: any(site.files.rglob("*.lp*")))
    await until(lambda: sum(p.read_text().count("value=") for p in site.files.rglob("*.lp*")) == 3)
    lines = [line for p in site.files.rglob("*.lp*") for line in p.read_text().splitlines()]
    times = [int(line.rsplit(" ", 1)[1]) for line in lines]
    scale = 1000 if min(times) > 1e17 else 1
    assert all(sent_at_us <= at // scale <= acknowledged_at_us for at in times)
    assert all("flags=528i" in line for line in lines)  # time_assigned, restamped
