"""The soak itself: random faults, a check after every few, and a last check at rest."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

from tests.soak.faults import build_faults
from tests.soak.report import Report
from tests.soak.site import SoakSite
from tests.soak.watch import Watch, check_outage_status, wait_until_drained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FAULTS_A_ROUND = (2, 5)
DRAIN_WITHIN_S = 90.0
DIFFERENCES = ("lost", "duplicated", "altered")
AT_REST = ("unknown", "waiting")
"""Differences that there are while the fleet runs: stored after the record was read, not delivered yet."""
COUNTED = ("acknowledged", "stored", *DIFFERENCES, *AT_REST, "quarantined", "declared")


async def soak(
    folder: Path, *, seconds: float, seed: int, rate: float, log: Callable[[str], None] = print
) -> tuple[str, Report, Watch]:
    """Run one; the verdict, the report and the watch. Its files are in `folder`, which must be empty."""
    rng = random.Random(seed)
    report = Report(seed, rate, seconds)
    site = SoakSite(folder, seed=seed, rate=rate)
    watch = Watch(site)
    try:
        await site.start()
        faults, report.missing = build_faults(site)
        watching = asyncio.create_task(watch.run())
        ends_at_s = time.monotonic() + seconds
        order: list[str] = []
        await asyncio.sleep(2)
        while time.monotonic() < ends_at_s and not watch.violations:
            for _ in range(rng.randint(*FAULTS_A_ROUND)):
                order = order or rng.sample(sorted(faults), len(faults))
                name = order.pop()
                at_s = watch.elapsed_s
                what = await faults[name](site, rng)
                report.faults.append((at_s, name, what))
                log(f"soak: {at_s:6.0f} s  {name}, {what}")
                await asyncio.sleep(rng.uniform(0.2, 2))
            if rng.random() < 0.3:
                await check_outage_status(site, watch)
                report.faults.append((watch.elapsed_s, "region away, status asked", "for 8 s"))
            await check(site, watch, report, log, running=True)
        watching.cancel()
        await stop_and_check(site, watch, report, log)
    except (AssertionError, RuntimeError, OSError) as fault:
        watch.report_violation(f"{type(fault).__name__}: {fault}")
    finally:
        watch.check_memory_growth()
        await site.close()
    return report.write(folder, watch), report, watch


async def stop_and_check(site: SoakSite, watch: Watch, report: Report, log: Callable[[str], None]) -> None:
    """Everything at rest: the fleet stops, all that was acknowledged must be in every store."""
    assert site.fleet is not None
    code = await asyncio.to_thread(site.fleet.stop, 120)
    if code:
        watch.report_violation(f"the fleet ended with {code}")
    report.fleet = site.progress()
    await check(site, watch, report, log, running=False)
    status = await site.status()
    if status is None or any(d["backlog_readings"] for d in status["destinations"]):
        watch.report_violation(f"a backlog is left at the end: {status and status['destinations']}")
    else:
        ever = status["spool"]["readings_ever"]
        rows, stored, there = await site.ledger()
        if (rows, stored) != (ever, there):
            watch.report_violation(
                f"the status counts {ever} readings ever; the region has applied {rows}, stored {stored}; "
                f"{there} rows are there"
            )
    for name, part in (("gateway", site.gateway), ("ingest service", site.ingest)):
        code = await asyncio.to_thread(part.stop, 60)
        if code:
            watch.report_violation(f"the {name} ended with {code} on SIGTERM")


async def check(
    site: SoakSite, watch: Watch, report: Report, log: Callable[[str], None], *, running: bool
) -> None:
    """Backlogs drain, and nothing that was acknowledged is lost, doubled or altered.

    While the fleet runs, what is not in a store yet must be in the spool; at the end it must be in the store.
    """
    drained_s = await wait_until_drained(site, DRAIN_WITHIN_S)
    if drained_s is None:
        status = await site.status()
        watch.report_violation(
            f"the backlog did not drain within {DRAIN_WITHIN_S:.0f} s: {status and status['destinations']}"
        )
    if not running:
        await asyncio.sleep(1.5)
        await _wait_until_empty(site)
    for store, where in site.stores().items():
        found = await site.verify(*where, "--spool", str(site.spool))
        line = {"at_s": round(watch.elapsed_s), "store": store, "drained_s": round(drained_s or -1, 1)}
        report.checks.append({**line, **{name: found[name] for name in COUNTED}})
        kinds = DIFFERENCES if running else (*DIFFERENCES, *AT_REST)
        wrong = {name: found[name] for name in kinds if found[name]}
        if wrong:
            watch.report_violation(f"{store}: {wrong}: {found['examples']}")
        log(
            f"soak: {watch.elapsed_s:6.0f} s  {store}: {found['acknowledged']:,} acknowledged, "
            f"{found['stored']:,} stored, {wrong or 'nothing lost, duplicated or altered'}"
        )


async def _wait_until_empty(site: SoakSite) -> None:
    """Wait until the last readings are delivered."""
    for _ in range(200):
        status = await site.status()
        if status is not None and not any(d["backlog_readings"] for d in status["destinations"]):
            return
        await asyncio.sleep(0.1)
