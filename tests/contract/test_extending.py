"""The source and the destination of docs/extending.md, run as they stand there."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from types import ModuleType
from typing import Annotated, Any

import pytest
from pydantic import Field, create_model

from gateway.build import build_runtime
from gateway.settings.destinations import FileDestination, InfluxDestination, IngestDestination
from gateway.settings.gateway_settings import GatewaySettings
from gateway.settings.sources import IngressSettings
from gateway.spool.database import Database
from tests.support.programs import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def page():
    """A module with all the code of the page."""
    module = ModuleType("extending")
    sys.modules["extending"] = module
    for block in BLOCKS:
        exec(compile(block, "docs/extending.md", "exec"), module.__dict__)
    yield module
    del sys.modules["extending"]


def settings_with(page, tmp_path, **tables):
    """The gateway's settings with the entries in both registries."""
    ingress = create_model("Ingress", __base__=IngressSettings, udp=(page.Udp, page.Udp()))
    kinds: Any = IngestDestination | InfluxDestination | FileDestination | page.JsonFilesDestination
    tag = Field(discriminator="kind")
    model = create_model(
        "Settings",
        __base__=GatewaySettings,
        ingress=(ingress, ingress()),
        destinations=(list[Annotated[kinds, tag]], []),
    )
    spool = {"path": tmp_path / "spool.db", "min_free_bytes": 0, "commit_interval_ms": 0}
    return model.model_validate({"gateway_id": "g", "spool": spool, **tables})


def test_each_example_is_at_most_60_lines_and_the_page_at_most_200():
    assert len(PAGE.splitlines()) <= 200
    source, source_settings, destination, destination_settings = (len(b.splitlines()) for b in BLOCKS)
    assert source + source_settings <= 66
    assert destination + destination_settings <= 60


class Sender(asyncio.DatagramProtocol):
    def __init__(self):
        self.answers: asyncio.Queue[bytes] = asyncio.Queue()

    def datagram_received(self, data, _address):
        self.answers.put_nowait(data)


async def test_the_source_acknowledges_what_is_durable_and_the_destination_gets_it(page, tmp_path):
    (tmp_path / "out").mkdir()
    table = {"kind": "json_files", "name": "files", "directory": tmp_path / "out", "flush_s": 0}
    settings = settings_with(
        page,
        tmp_path,
        ingress={"udp": {"enabled": True, "port": 0}, "host": {"enabled": False}, "listen": {"port": 0}},
        destinations=[table],
    )
    database = await Database.open(settings.spool.path)
    runtime = await build_runtime(settings, database)
    source: Any
    (source,) = (source for source in runtime.sources if source.kind == "udp")
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        await source.start(tasks)
        sending, sender = await asyncio.get_running_loop().create_datagram_endpoint(
            Sender, remote_addr=("127.0.0.1", source.port)
        )
        sending.sendto(b'sensors/pump-1/temperature {"ts": 1790000000, "value": 21.5}')
        await asyncio.sleep(0.1)
        assert sender.answers.empty()
        committing = tasks.create_task(runtime.committer.run())
        assert await sender.answers.get() == b"ok"
        runtime.shipping.start(tasks)
        while not (found := list((tmp_path / "out").glob("g-*.json"))):  # noqa: ASYNC110 - a file sets no event
            await asyncio.sleep(0.02)
        runtime.shipping.stop()
        source.stop_reading()
        runtime.committer.finish()
        await committing
        await source.close()
        sending.close()
    assert json.loads(found[0].read_bytes()) == [["pump-1", "temperature", 1790000000 * 10**6, 21.5]]
    await runtime.shipping.aclose()
    await runtime.commit_consumer.aclose()
    await database.close()
