"""What a soak holds the parts to, all the time: each broken promise is a sentence in `broken`.

Memory: each program stays below a bound, and does not creep (the median of the last third of its samples is
not far above that of the first third). Status: it says "waiting" and counts a backlog while the region cannot
be reached, what it counts only grows, and it claims no empty backlog that the stores do not bear out. No
program ends by itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from tests.soak.site import rss_mb

if TYPE_CHECKING:
    from tests.soak.site import SoakSite

EVERY_S = 1.0
RSS_LIMIT_MB = 250.0
CREEP_FACTOR, CREEP_MB = 1.3, 25.0
FEWEST_SAMPLES = 60


@dataclass
class Watch:
    """Samples once a second until cancelled."""

    site: SoakSite
    broken: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    backlog: list[tuple[float, int]] = field(default_factory=list)
    answers: int = 0
    silences: int = 0
    _begun_s: float = field(default_factory=time.monotonic)
    _newest_commit: int = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._begun_s

    def break_(self, what: str) -> None:
        """Note a broken promise."""
        self.broken.append(f"at {self.elapsed_s:.0f} s: {what}")

    async def run(self) -> None:
        while True:
            await self.look_once()
            await asyncio.sleep(EVERY_S)

    async def look_once(self) -> None:
        """One look at everything."""
        fleet = self.site.fleet.process if self.site.fleet else None
        for name, process in (
            ("gateway", self.site.gateway.process),
            ("ingest", self.site.ingest.process),
            ("fleet", fleet),
        ):
            if process is None:
                continue
            if process.poll() is not None:
                self.break_(f"the {name} ended by itself with {process.returncode}")
            rss = rss_mb(process)
            if rss:
                self.memory.setdefault(name, []).append((self.elapsed_s, rss))
                if rss > RSS_LIMIT_MB and name != "fleet":
                    self.break_(f"the {name} has {rss:.0f} MB resident, more than {RSS_LIMIT_MB:.0f}")
        status = await self.site.status()
        if status is None:
            self.silences += 1
            return
        self.answers += 1
        self._look_at_status(status)

    def _look_at_status(self, status: dict[str, Any]) -> None:
        newest = status["spool"]["newest_commit"]
        if newest < self._newest_commit:
            self.break_(f"the newest commit went back from {self._newest_commit} to {newest}")
        self._newest_commit = newest
        backlogs = [d["backlog_readings"] for d in status["destinations"]]
        self.backlog.append((self.elapsed_s, max(backlogs)))
        if max(backlogs) > status["spool"]["readings_ever"]:
            self.break_("the backlog is said to be larger than all that ever came in")

    def look_at_creep(self) -> None:
        """Memory over the whole time; said once, at the end."""
        for name, samples in self.memory.items():
            values = [mb for _, mb in samples]
            if len(values) < FEWEST_SAMPLES:
                continue
            third = len(values) // 3
            before, after = median(values[third // 2 : third]), median(values[-third:])
            if after > before * CREEP_FACTOR + CREEP_MB and name != "fleet":
                self.break_(f"the {name} crept from {before:.0f} to {after:.0f} MB")


async def drained(site: SoakSite, within_s: float) -> float | None:
    """Seconds until every destination said that nothing waits (or very little, while the fleet goes on);
    None: never.
    """
    begun_s = time.monotonic()
    while time.monotonic() - begun_s < within_s:
        status = await site.status()
        if status is not None:
            rate = max(1.0, status["ingress"]["readings_per_s"])
            if all(d["backlog_readings"] <= rate * 3 for d in status["destinations"]):
                return time.monotonic() - begun_s
        await asyncio.sleep(0.25)
    return None


async def tells_of_an_outage(site: SoakSite, watch: Watch) -> None:
    """Cut the region's link and hold the status to it: waiting, with a backlog that counts what came in
    since.
    """
    await site.region_link.cut()
    await asyncio.sleep(8)
    status = await site.status()
    if status is None:
        watch.break_("no status while the region is away")
    else:
        region = next(d for d in status["destinations"] if d["name"] == "region")
        if region["state"] != "waiting" or not region["last_error"]:
            watch.break_(
                f"the region is away, and the status says {region['state']!r}, {region['last_error']!r}"
            )
        if not region["backlog_readings"]:
            watch.break_("the region is away, and the status knows of no backlog")
        if (region["backlog_oldest_s"] or 0) > 600:
            watch.break_(f"the oldest waiting reading is said to be {region['backlog_oldest_s']} s old")
    await site.region_link.up()
