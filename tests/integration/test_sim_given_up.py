"""An outage that outgrows a small spool, and a deadband: what is not at the region is explained."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from tests.support.programs import Site, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCENARIO = """
seed = 8
rate = 30000
seconds = 4.5
span = "10h"
readings_per_publish = 100
[[groups]]
name = "pump"
devices = 8
types = ["temperature", "humidity"]
"""
SETTINGS = """
[rollups]
lateness_s = 1
[[report_by_exception]]
series = "pump-0001/*"
absolute = 5
"""


@pytest.fixture
def site(tmp_path: Path, postgres_dsn: str) -> Iterator[Site]:
    made = Site(tmp_path, postgres_dsn)
    config = tmp_path / "gateway.toml"
    text = config.read_text().replace('path = "spool.db"\n', 'path = "spool.db"\nmax_bytes = 1048576\n')
    config.write_text(text.partition('[[destinations]]\nname = "stick"')[0] + SETTINGS)
    made.gateway.start()
    yield made
    made.close()


async def test_what_was_delivered_declared_and_suppressed_is_all_that_was_acknowledged(
    site: Site, tmp_path: Path
):
    (tmp_path / "s.toml").write_text(SCENARIO)
    truth = tmp_path / "truth"
    done = run(
        *("sim", "run", "--broker", site.broker, "--truth", str(truth), "--quiet", "--json"),
        *("--scenario", str(tmp_path / "s.toml"), "--drain-timeout", "40", "--start", "2026-05-01T00:00Z"),
    )
    assert done.returncode == 0, done.stderr
    wait_until(lambda: site.status()["losses"]["readings"], 20, lambda: str(site.status()["spool"]))
    site.ingest.start()
    site.drain()

    def explained() -> bool:
        """What is suppressed and has left the spool is known to the region once its window is closed."""
        found.update(site.verify(truth, "--postgres", site.dsn, "--spool", str(site.spool)))
        return bool(found["ok"])

    found: dict[str, Any] = {}
    wait_until(explained, 20, lambda: str(found["examples"]))
    assert found["declared"] > 10_000
    assert found["suppressed"] > 1_000
    acknowledged = json.loads(done.stdout)["acknowledged"]
    assert found["matched"] + found["declared"] + found["suppressed"] == acknowledged == found["acknowledged"]
    assert ", of 20" in found["examples"]["declared"][0]
    region = await asyncpg.connect(site.dsn)
    await region.execute(
        "UPDATE declared_loss SET from_time = from_time - interval '1 y', to_time = to_time - interval '1 y'"
    )
    await region.close()
    # more than were declared, when suppressed ones have left the spool since and their window is still open
    assert site.verify(truth, "--postgres", site.dsn, "--spool", str(site.spool))["lost"] >= found["declared"]
