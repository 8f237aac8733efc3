"""No room to write: the gateway holds, says so, keeps serving, and goes on by itself when room returns."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import shutil
import subprocess

import pytest

from tests.crash.fleet import Fleet
from tests.crash.test_kill import Site

_DEVICES = 12


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB, and nothing else on it."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a small file system; the file size limit is tested instead")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tidegate", folder], check=False)
    if done.returncode:
        pytest.skip("this container may not mount")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _fill(folder) -> None:
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (65536, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


async def _stands_still(fleet: Fleet) -> int:
    """Wait until nothing is acknowledged any more; returns how many readings were."""
    before = -1
    async with asyncio.timeout(20):
        while before != fleet.acked:
            before = fleet.acked
            await asyncio.sleep(0.7)
    return before


async def _passes(fleet: Fleet, count: int) -> None:
    async with asyncio.timeout(20):
        while fleet.acked <= count:  # noqa: ASYNC110 - a counter of many connections
            await asyncio.sleep(0.02)


async def _holds(site: Site, fleet: Fleet, process) -> int:
    held_at = await _stands_still(fleet)
    await asyncio.sleep(1.5)  # long enough for a shipper and the retention to meet the fault, too
    assert process.returncode is None, f"the gateway ended with {process.returncode}: {site.log()[-2000:]}"
    assert fleet.acked == held_at
    assert "holding: acknowledgements are withheld" in site.log()
    return held_at


async def test_a_gateway_on_a_full_disk_holds_and_goes_on_when_room_returns(small_disk, tmp_path):
    site = Site.made(small_disk)
    site.move_stick_to(tmp_path / "stick")
    account = site.account(tmp_path / "copy")
    async with Fleet(_DEVICES) as fleet:
        fleet.port = site.port
        async with site.running() as process:
            await _passes(fleet, 200)
            await asyncio.to_thread(_fill, small_disk)
            held_at = await _holds(site, fleet, process)
            assert re.search("no room|disk is full", site.log())
            (small_disk / "ballast").unlink()
            await _passes(fleet, held_at + 200)
            await fleet.settled(20)
            assert "can be written again" in site.log()
        await account.check(fleet)


async def test_a_gateway_that_is_started_on_a_full_disk_holds_until_there_is_room(small_disk, tmp_path):
    site = Site.made(small_disk)
    site.move_stick_to(tmp_path / "stick")
    account = site.account(tmp_path / "copy")
    async with Fleet(_DEVICES) as fleet:
        fleet.port = site.port
        async with site.running():
            await _passes(fleet, 200)
        await asyncio.to_thread(_fill, small_disk)
        async with site.running() as process:
            held_at = await _holds(site, fleet, process)
            (small_disk / "ballast").unlink()
            await _passes(fleet, held_at + 200)
            await fleet.settled(20)
        await account.check(fleet)


async def test_a_gateway_whose_files_may_not_grow_holds_and_goes_on_when_they_may(tmp_path):
    site = Site.made(tmp_path / "site")
    account = site.account()
    async with Fleet(_DEVICES) as fleet:
        fleet.port = site.port
        async with site.running() as process:
            await _passes(fleet, 200)
            wal = site.spool.with_name("spool.db-wal").stat().st_size
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (wal + 20_000, hard))
            held_at = await _holds(site, fleet, process)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
            await _passes(fleet, held_at + 200)
            await fleet.settled(20)
        await account.check(fleet)


async def test_a_gateway_killed_while_it_holds_has_lost_nothing(small_disk, tmp_path):
    site = Site.made(small_disk)
    site.move_stick_to(tmp_path / "stick")
    account = site.account(tmp_path / "copy")
    async with Fleet(_DEVICES) as fleet:
        fleet.port = site.port
        async with site.running() as process:
            await _passes(fleet, 200)
            await asyncio.to_thread(_fill, small_disk)
            await _holds(site, fleet, process)
        (small_disk / "ballast").unlink()
        await account.check(fleet)
        shutil.rmtree(tmp_path / "copy")
        async with site.running():
            await fleet.settled(20)
        await account.check(fleet)
