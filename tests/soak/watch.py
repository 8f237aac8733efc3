"""What a soak checks all the time: each violation is a sentence in `violations`.

Memory: each program stays below a bound, and does not grow (the median of the last third of its samples is
not far above that of the first third). Status: it says "waiting" and counts a backlog while the region cannot
be reached, what it counts only grows, and it reports no empty backlog while the stores lack readings. No
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
GROWTH_FACTOR, GROWTH_MB = 1.3, 25.0
FEWEST_SAMPLES = 60


@dataclass
class Watch:
    """Samples once a second until cancelled."""

    site: SoakSite
    violations: list[str] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    backlog: list[tuple[float, int]] = field(default_factory=list)
    answers: int = 0
    silences: int = 0
    _started_s: float = field(default_factory=time.monotonic)
    _newest_commit: int = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._started_s

    def report_violation(self, what: str) -> None:
        """Record a violation."""
        self.violations.append(f"at {self.elapsed_s:.0f} s: {what}")

    async def run(self) -> None:
        while True:
            await self.sample_once()
            await asyncio.sleep(EVERY_S)

    async def sample_once(self) -> None:
        """Sample memory and status once."""
        fleet = self.site.fleet.process if self.site.fleet else None
        for name, process in (
            ("gateway", self.site.gateway.process),
            ("ingest", self.site.ingest.process),
            ("fleet", fleet),
        ):
            if process is None:
                continue
            if process.poll() is not None:
                self.report_violation(f"the {name} ended by itself with {process.returncode}")
            rss = rss_mb(process)
            if rss:
                self.memory.setdefault(name, []).append((self.elapsed_s, rss))
                if rss > RSS_LIMIT_MB and name != "fleet":
                    self.report_violation(
                        f"the {name} has {rss:.0f} MB resident, more than {RSS_LIMIT_MB:.0f}"
                    )
        status = await self.site.status()
        if status is None:
            self.silences += 1
            return
        self.answers += 1
        self._check_status(status)

    def _check_status(self, status: dict[str, Any]) -> None:
        newest = status["spool"]["newest_commit"]
        if newest < self._newest_commit:
            self.report_violation(f"the newest commit went back from {self._newest_commit} to {newest}")
        self._newest_commit = newest
        backlogs = [d["backlog_readings"] for d in status["destinations"]]
        self.backlog.append((self.elapsed_s, max(backlogs)))
        if max(backlogs) > status["spool"]["readings_ever"]:
            self.report_violation("the status counts a larger backlog than readings ever received")

    def check_memory_growth(self) -> None:
        """Memory over the whole run; reported once, at the end."""
        for name, samples in self.memory.items():
            values = [mb for _, mb in samples]
            if len(values) < FEWEST_SAMPLES:
                continue
            third = len(values) // 3
            before, after = median(values[third // 2 : third]), median(values[-third:])
            if after > before * GROWTH_FACTOR + GROWTH_MB and name != "fleet":
                self.report_violation(f"the {name} grew from {before:.0f} to {after:.0f} MB")


async def wait_until_drained(site: SoakSite, within_s: float) -> float | None:
    """Seconds until no destination has a backlog (or little, while the fleet runs); None: never."""
    started_s = time.monotonic()
    while time.monotonic() - started_s < within_s:
        status = await site.status()
        if status is not None:
            rate = max(1.0, status["ingress"]["readings_per_s"])
            if all(d["backlog_readings"] <= rate * 3 for d in status["destinations"]):
                return time.monotonic() - started_s
        await asyncio.sleep(0.25)
    return None


async def check_outage_status(site: SoakSite, watch: Watch) -> None:
    """Cut the region's link and check the status: waiting, with a backlog of what arrived since."""
    await site.region_link.cut()
    await asyncio.sleep(8)
    status = await site.status()
    if status is None:
        watch.report_violation("no status while the region is away")
    else:
        region = next(d for d in status["destinations"] if d["name"] == "region")
        if region["state"] != "waiting" or not region["last_error"]:
            watch.report_violation(
                f"the region is away, and the status says {region['state']!r}, {region['last_error']!r}"
            )
        if not region["backlog_readings"]:
            watch.report_violation("the region is away, and the status shows no backlog")
        if (region["backlog_oldest_s"] or 0) > 600:
            watch.report_violation(
                f"the status says the oldest reading has waited {region['backlog_oldest_s']} s"
            )
    await site.region_link.up()
