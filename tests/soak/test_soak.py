"""A short soak: `make soak HOURS=n` is the long form, TIDEGATE_SOAK_SECONDS=600 the ten-minute one."""

from __future__ import annotations

import json
import os

import pytest

from tests.soak.run import soak
from tests.support.fixtures_postgres import start_postgres

SECONDS = float(os.environ.get("TIDEGATE_SOAK_SECONDS", "15"))
SEED = int(os.environ.get("TIDEGATE_SOAK_SEED", "20"))


@pytest.mark.timeout(SECONDS * 2 + 300)
async def test_random_faults_on_every_part_break_no_promise(tmp_path):
    start_postgres().close()  # skips where there is none
    verdict, report, watch = await soak(tmp_path, seconds=SECONDS, seed=SEED, rate=300.0)
    assert watch.violations == []
    assert verdict == "ok"
    assert len(report.faults) >= 3
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["verdict"] == "ok"
    last = {check["store"]: check for check in report.checks}
    assert set(last) >= {"region", "stick"}
    assert all(check["acknowledged"] > 1000 for check in last.values())
    assert all(check["lost"] == check["duplicated"] == check["waiting"] == 0 for check in last.values())
