"""Devices, a gateway, one behind it, then region and cloud: each link fails in turn and nothing is lost."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx

from cloud_sync.http import tokens
from cloud_sync.model.records import Flag
from tests.support.fault_proxy import DROP_ANSWER, PASS, RESET, FaultProxy, fault_proxy
from tests.support.free_ports import free_port
from tests.support.programs import Program, Site, wait_until

if TYPE_CHECKING:
    from pathlib import Path

AT = 1_750_000_000_000_000
HOT = {"sensor_id": "app-1", "sensor_type": "temperature", "value": 300, "ts": AT, "location": "roof"}
FLAGS = Flag.OUT_OF_RANGE | Flag.LATE


class Hut:
    """The gateway that devices reach; its only destination is the other gateway."""

    def __init__(self, folder: Path, upstream: str, token: str) -> None:
        folder.mkdir()
        self.mqtt_port, self.http_port, self.status_port = free_port(), free_port(), free_port()
        (folder / "token").write_text(token)
        (folder / "gateway.toml").write_text(
            f'gateway_id = "hut"\n[spool]\npath = "spool.db"\n[ingress.listen]\nport = {self.mqtt_port}\n'
            f"[ingress.http]\nenabled = true\nport = {self.http_port}\n[ingress.host]\nenabled = false\n"
            f"[status]\nport = {self.status_port}\n"
            f'[[destinations]]\nname = "hall"\nkind = "ingest"\nurl = "{upstream}"\ntoken_file = "token"\n'
            "flush_s = 0.2\ntimeout_s = 2\n"
        )
        arguments = ("gateway", "-c", str(folder / "gateway.toml"))
        ready = f"http://127.0.0.1:{self.status_port}/readyz"
        self.gateway = Program(folder, "hut", *arguments, ready_url=ready)


def prepare_hall(folder: Path, site: Site, region: str, cloud: str, database: str) -> tuple[int, str]:
    """Have the site's gateway take batches and deliver to a cloud too; its HTTP port and the hut's token."""
    port = free_port()
    path = folder / "gateway.toml"
    text = path.read_text().replace(f"http://127.0.0.1:{site.ingest_port}", region)
    path.write_text(
        f'{text}[[destinations]]\nname = "cloud"\nkind = "influxdb"\nurl = "{cloud}"\napi = "v1"\n'
        f'database = "{database}"\nflush_s = 0.2\ntimeout_s = 2\n'
        f'[ingress.http]\nenabled = true\nport = {port}\ntokens_file = "http-tokens"\n'
    )
    return port, tokens.add_token(folder / "http-tokens", "hut")


async def broken_in_turn(links: list[FaultProxy]) -> None:
    """Each link is cut for a while, and loses an answer when it is back."""
    for link in links:
        link.default = RESET
        await asyncio.sleep(1.2)
        link.script = [DROP_ANSWER]
        link.default = PASS
        await asyncio.sleep(0.8)


async def test_each_link_of_a_chain_may_fail_and_nothing_is_lost_or_doubled(tmp_path, postgres_dsn, influxd):
    (tmp_path / "hall").mkdir()
    site = Site(tmp_path / "hall", postgres_dsn, gateway_id="hall")
    database = influxd.new_database()
    async with AsyncExitStack() as stack:
        region = await stack.enter_async_context(fault_proxy("127.0.0.1", site.ingest_port))
        cloud = await stack.enter_async_context(fault_proxy("127.0.0.1", int(influxd.url.rpartition(":")[2])))
        port, token = prepare_hall(tmp_path / "hall", site, region.url, cloud.url, database)
        hall = await stack.enter_async_context(fault_proxy("127.0.0.1", port))
        hut = Hut(tmp_path / "hut", hall.url, token)
        stack.callback(site.close)
        stack.callback(hut.gateway.kill)
        for program in (site.ingest, site.gateway, hut.gateway):
            await asyncio.to_thread(program.start)
        truth = tmp_path / "truth"
        fleet = Program(
            tmp_path,
            "fleet",
            *("sim", "run", "--broker", f"mqtt://127.0.0.1:{hut.mqtt_port}", "--truth", str(truth)),
            *("--quiet", "--seconds", "0", "--devices", "5", "--rate", "300", "--drain-timeout", "20"),
        )
        fleet.start()
        stack.callback(fleet.kill)
        async with httpx.AsyncClient(trust_env=False) as http:
            answer = await http.post(f"http://127.0.0.1:{hut.http_port}/v1/readings", json=HOT)
        assert answer.json()["stored"] == 1
        await broken_in_turn([hall, region, cloud])
        for program in (hut.gateway, site.gateway):  # the devices' own link, and the chain's middle
            await asyncio.to_thread(program.kill)
            await asyncio.sleep(0.5)
            await asyncio.to_thread(program.start)
        assert await asyncio.to_thread(fleet.stop, 40) == 0
        for status_port in (hut.status_port, site.status_port):
            await asyncio.to_thread(drained, status_port)
        at_region = await asyncio.to_thread(site.verify, truth)
        at_cloud = await asyncio.to_thread(
            site.verify, truth, "--influx", influxd.url, "--database", database
        )
        for found in (at_region, at_cloud):
            assert found["acknowledged"] > 1000
            assert (found["lost"], found["duplicated"], found["altered"]) == (0, 0, 0)
        assert await told_at(postgres_dsn) == [("hall", 300.0, FLAGS, "roof")]
        (point,) = [p for p in influxd.points(database) if p["sensor_id"] == "app-1" and "value" in p]
        assert (point["value"], point["flags"], point["time"]) == (300, FLAGS, AT * 1000)
        progress = await ranges_of(port, token)
        assert [gap for epoch in progress["epochs"] for gap in epoch["gaps"]] == []
        assert {epoch["class"] for epoch in progress["epochs"]} >= {"reading"}


def drained(status_port: int) -> None:
    def backlog() -> list[int]:
        url = f"http://127.0.0.1:{status_port}/status"
        status = httpx.get(url, timeout=5, trust_env=False).json()
        return [d["backlog_readings"] for d in status["destinations"]]

    wait_until(lambda: not any(backlog()), 60, lambda: str(backlog()))


async def told_at(dsn: str) -> list[tuple[Any, ...]]:
    """What the region has of the one reading that came over HTTP, and the gateways it knows."""
    connection = await asyncpg.connect(dsn)
    try:
        query = (
            "SELECT (SELECT string_agg(gateway_id, ',') FROM gateway), value, flags, location "
            "FROM sensor_data WHERE sensor_id = 'app-1'"
        )
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()


async def ranges_of(port: int, token: str) -> dict[str, Any]:
    """What the second gateway says of the first."""
    async with httpx.AsyncClient(trust_env=False) as http:
        headers = {"Authorization": f"Bearer {token}"}
        answer = await http.get(f"http://127.0.0.1:{port}/v1/gateways/hut", headers=headers)
    return json.loads(answer.text)
