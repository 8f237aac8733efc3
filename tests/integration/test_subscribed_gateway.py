"""A gateway that reads an existing broker: acknowledged to the broker only once it is in the spool."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from tests.support.programs import Program, Site, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.fixtures_mosquitto import Mosquitto


@pytest.fixture
def site(tmp_path: Path, postgres_dsn: str) -> Iterator[Site]:
    made = Site(tmp_path, postgres_dsn)
    yield made
    made.close()


def test_readings_of_a_broker_survive_a_killed_gateway(site: Site, tmp_path: Path, mosquitto: Mosquitto):
    config = tmp_path / "gateway.toml"
    table = f'[[ingress.subscribe]]\nurl = "mqtt://127.0.0.1:{mosquitto.port}"\nfilters = ["sensors/#"]\n'
    config.write_text(config.read_text() + table)
    site.ingest.start()
    site.gateway.start()
    truth = tmp_path / "truth"
    fleet = Program(
        tmp_path,
        "fleet",
        *("sim", "run", "--broker", f"mqtt://127.0.0.1:{mosquitto.port}", "--truth", str(truth), "--quiet"),
        *("--seconds", "0", "--devices", "5", "--rate", "300", "--drain-timeout", "20"),
    )
    time.sleep(1)
    fleet.start()
    for _ in range(2):
        time.sleep(1.5)
        site.gateway.kill()
        time.sleep(0.5)
        site.gateway.start()
    time.sleep(1)
    assert fleet.stop(40) == 0
    deadline = time.monotonic() + 20
    while (found := site.verify(truth))["lost"] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found["acknowledged"] > 500
    assert (found["lost"], found["duplicated"]) == (0, 0)
    assert run("config", "check", str(config)).returncode == 0
