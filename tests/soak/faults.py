"""Faults of a soak; each is over when its function returns. A seeded source decides which and how long."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    import subprocess
    from collections.abc import Awaitable, Callable

    from tests.soak.site import SoakSite

    Fault = Callable[[SoakSite, random.Random], Awaitable[str]]


async def kill_gateway(site: SoakSite, rng: random.Random) -> str:
    site.gateway.kill()
    await asyncio.sleep(away_s := rng.uniform(0, 3))
    await asyncio.to_thread(site.gateway.start)
    return f"away for {away_s:.1f} s"


async def stop_gateway(site: SoakSite, rng: random.Random) -> str:
    code = await asyncio.to_thread(site.gateway.stop)
    assert code == 0, f"the gateway ended with {code} on SIGTERM"
    await asyncio.sleep(away_s := rng.uniform(0, 2))
    await asyncio.to_thread(site.gateway.start)
    return f"SIGTERM, away for {away_s:.1f} s"


async def freeze_gateway(site: SoakSite, rng: random.Random) -> str:
    return await _freeze(site.gateway.process, rng)


async def kill_ingest(site: SoakSite, rng: random.Random) -> str:
    site.ingest.kill()
    await asyncio.sleep(away_s := rng.uniform(0, 4))
    await asyncio.to_thread(site.ingest.start)
    return f"away for {away_s:.1f} s"


async def freeze_ingest(site: SoakSite, rng: random.Random) -> str:
    return await _freeze(site.ingest.process, rng)


async def freeze_fleet(site: SoakSite, rng: random.Random) -> str:
    return await _freeze(site.fleet.process if site.fleet else None, rng)


async def restart_database(site: SoakSite, rng: random.Random) -> str:
    await asyncio.to_thread(site.postgres.kill)
    await asyncio.sleep(away_s := rng.uniform(0, 3))
    await asyncio.to_thread(site.postgres.start)
    return f"killed, away for {away_s:.1f} s"


async def kill_influx(site: SoakSite, rng: random.Random) -> str:
    assert site.influx is not None
    site.influx.kill()
    await asyncio.sleep(away_s := rng.uniform(0, 3))
    await asyncio.to_thread(site.influx.start)
    return f"away for {away_s:.1f} s"


async def cut_region(site: SoakSite, rng: random.Random) -> str:
    await site.region_link.cut()
    await asyncio.sleep(away_s := rng.uniform(0.5, 8))
    await site.region_link.up()
    return f"for {away_s:.1f} s"


async def silence_region(site: SoakSite, rng: random.Random) -> str:
    site.region_link.silence()
    await asyncio.sleep(away_s := rng.uniform(0.5, 8))
    await site.region_link.up()
    return f"for {away_s:.1f} s"


async def cut_devices(site: SoakSite, rng: random.Random) -> str:
    await site.device_link.cut()
    await asyncio.sleep(away_s := rng.uniform(0.5, 5))
    await site.device_link.up()
    return f"for {away_s:.1f} s"


async def fill_disk(site: SoakSite, rng: random.Random) -> str:
    ballast = site.disk / "ballast"
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65_536))
        await asyncio.sleep(full_s := rng.uniform(1, 6))
    finally:
        ballast.unlink(missing_ok=True)
    return f"full for {full_s:.1f} s"


async def step_clock(site: SoakSite, rng: random.Random) -> str:
    offset_s = rng.choice([-86_400, -3_600, -30, 30, 3_600, 86_400 * 30])
    site.clock.step(offset_s)
    await asyncio.sleep(rng.uniform(1, 5))
    site.clock.step(0)
    return f"by {offset_s:+} s and back"


def build_faults(site: SoakSite) -> tuple[dict[str, Fault], list[str]]:
    """The faults that are possible here, and why others are not."""
    faults: dict[str, Fault] = {
        "gateway killed": kill_gateway,
        "gateway stopped": stop_gateway,
        "gateway frozen": freeze_gateway,
        "ingest killed": kill_ingest,
        "ingest frozen": freeze_ingest,
        "fleet frozen": freeze_fleet,
        "database restarted": restart_database,
        "region link cut": cut_region,
        "region link silent": silence_region,
        "device link cut": cut_devices,
    }
    missing = []
    if site.influx is not None:
        faults["influxdb killed"] = kill_influx
    else:
        missing.append("influxdb killed: there is no influxd here (Debian package influxdb)")
    if site.small_disk:
        faults["disk full"] = fill_disk
    else:
        missing.append("disk full: only root can mount a small file system, and this machine does not let it")
    if site.clock.available:
        faults["clock stepped"] = step_clock
    else:
        missing.append("clock stepped: there is no C compiler here for the clock that is preloaded")
    return faults, missing


async def _freeze(process: subprocess.Popen[bytes] | None, rng: random.Random) -> str:
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(away_s := rng.uniform(0.5, 6))
    finally:
        process.send_signal(signal.SIGCONT)
    return f"for {away_s:.1f} s"
