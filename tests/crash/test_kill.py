"""The gateway killed under load: at random moments, and at every named point.

`TORTURE=n` in the environment makes the random part n times as long (`make torture`).
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import gateway
from tests.crash.account import Account, counts_of_files
from tests.crash.fleet import Fleet

TORTURE = int(os.environ.get("TORTURE", "1"))
KILLS = 40
CRASH_AT = "TIDEGATE_CRASH_AT"
POINTS = sorted(
    name
    for source in Path(gateway.__path__[0]).rglob("*.py")
    for name in re.findall(r'\bcrash_point\("(\w+)"\)', source.read_text())
    if name != "in_eviction"  # what is given up is not kept: test_giving_up_killed.py
)
_DEVICES = 24

_CONFIG = """\
gateway_id = "g1"
[spool]
path = "spool.db"
commit_interval_ms = {interval_ms}
keep_delivered_h = {keep_h}
min_free_bytes = 0
[ingress.listen]
port = {port}
[ingress.host]
enabled = false
[status]
enabled = false
[[destinations]]
name = "stick"
kind = "file"
directory = "stick"
compress = false
flush_s = 0.05
min_free_bytes = 0
"""


@dataclass
class Site:
    """A gateway's folder and the command that runs it; `running` starts it once."""

    folder: Path
    port: int

    @classmethod
    def made(cls, folder, *, interval_ms: float = 5, keep_h: float = 24):
        folder.mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        text = _CONFIG.format(port=port, interval_ms=interval_ms, keep_h=keep_h)
        (folder / "gateway.toml").write_text(text)
        return cls(folder, port)

    @property
    def spool(self):
        return self.folder / "spool.db"

    @property
    def stick(self):
        return self.folder / "stick"

    def account(self, work: Path | None = None) -> Account:
        return Account(self.spool, work or self.folder / "copy")

    def move_stick_to(self, folder: Path) -> None:
        """Have the destination on another disk than the spool."""
        config = self.folder / "gateway.toml"
        config.write_text(config.read_text().replace('"stick"\ncompress', f'"{folder}"\ncompress'))

    def log(self) -> str:
        return (self.folder / "gateway.log").read_text()

    @asynccontextmanager
    async def running(self, crash_at: str = ""):
        """The process; killed at the end of the block if it still runs."""
        command = (sys.executable, "-m", "gateway", "gateway", "--config", str(self.folder / "gateway.toml"))
        plain = {k: v for k, v in os.environ.items() if not k.upper().startswith("TIDEGATE_")}
        with (self.folder / "gateway.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=log, env={**plain, **({CRASH_AT: crash_at} if crash_at else {})}
            )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def until_it_listens(self) -> float:
        """Wait until the gateway accepts connections; returns seconds."""
        started = time.monotonic()
        async with asyncio.timeout(60):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return time.monotonic() - started

    async def until_killed_after(self, seconds: float) -> None:
        async with self.running() as process:
            try:
                async with asyncio.timeout(seconds):
                    await process.wait()
            except TimeoutError:
                return
            pytest.fail(f"the gateway ended by itself with {process.returncode}: {self.log()[-2000:]}")


async def _progress(fleet: Fleet, more: int, within_s: float = 20) -> None:
    """Wait until `more` further readings are acknowledged."""
    aim = fleet.acked + more
    async with asyncio.timeout(within_s):
        while fleet.acked < aim:  # noqa: ASYNC110 - a counter of many connections
            await asyncio.sleep(0.02)


@pytest.mark.timeout(120 + 60 * TORTURE)
async def test_a_gateway_killed_at_random_moments_under_load_keeps_all_it_acknowledged(tmp_path):
    chance = random.Random(20)
    for round_number in range(TORTURE):
        site = Site.made(tmp_path / f"site{round_number}")
        account = site.account()
        async with Fleet(_DEVICES) as fleet:
            fleet.port = site.port
            async with site.running():
                start_s = await site.until_it_listens()
            for _ in range(KILLS):
                await site.until_killed_after(chance.uniform(0.05, start_s + 0.7))
                await account.check(fleet)
            async with site.running() as process:
                await site.until_it_listens()
                await fleet.settled(60)
                process.send_signal(signal.SIGTERM)
                assert await process.wait() == 0, site.log()[-2000:]
            await account.check(fleet)
        assert fleet.acked > 10 * KILLS, "there was hardly any load"


async def test_what_was_acknowledged_arrives_downstream_exactly_once_after_kills(tmp_path):
    chance = random.Random(21)
    site = Site.made(tmp_path / "site")
    async with Fleet(_DEVICES) as fleet:
        fleet.port = site.port
        for _ in range(5):
            await site.until_killed_after(chance.uniform(0.6, 1.0))
        async with site.running():
            await fleet.settled(20)
            async with asyncio.timeout(20):
                while True:
                    counts = counts_of_files(site.stick, fleet)
                    if all((counts[d.name][d.acked[: d.next_reading]] > 0).all() for d in fleet.devices):
                        break
                    await asyncio.sleep(0.2)
    assert all((counts[d.name] <= 1).all() for d in fleet.devices)


def test_there_are_named_points_where_it_matters():
    assert {"in_migration", "before_append", "after_append", "after_ack", "after_claim"} <= set(POINTS)
    assert {"before_settle", "in_compaction", "in_prune"} <= set(POINTS)


@pytest.mark.parametrize("name", POINTS)
async def test_a_gateway_killed_at_a_named_point_keeps_all_it_acknowledged(tmp_path, name):
    prunes = name.endswith("_prune")
    site = Site.made(tmp_path / "site", interval_ms=0.5, keep_h=0 if prunes else 24)
    account = site.account()
    delivered = site.stick if prunes else None
    async with Fleet(_DEVICES) as fleet:
        fleet.port = site.port
        if name != "in_migration":
            async with site.running():
                await _progress(fleet, 200)
                await asyncio.sleep(0.2)
            await account.check(fleet, delivered=delivered)
        async with site.running(crash_at=name) as process, asyncio.timeout(30):
            assert await process.wait() == -signal.SIGKILL, site.log()[-2000:]
        await account.check(fleet, delivered=delivered)
        async with site.running():
            await _progress(fleet, 200)
            await fleet.settled(20)
        await account.check(fleet, delivered=delivered)
