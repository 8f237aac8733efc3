"""From a publish to the row: recorded data value for value, and nothing lost through kills and outages."""

from __future__ import annotations

import csv
import random
import shutil
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import asyncpg
import pytest

from tests.support.programs import Program, Site, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def site(tmp_path: Path, postgres_dsn: str) -> Iterator[Site]:
    made = Site(tmp_path, postgres_dsn)
    yield made
    made.close()


EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
ODD_VALUES = [
    0.1 + 0.2,
    -0.0,
    5e-324,
    1.7976931348623157e308,
    -273.15,
    1e-7,
    123456789.123456789,
    2.0**53 + 2,
]
ODD_TIMES_US = [-1, 0, 1, 10**11, 3 * 10**13, 10**14 - 1, 1_262_304_000_000_001, 4_102_444_800_999_999]


async def test_recorded_data_is_found_value_for_value_and_time_for_time(site: Site, tmp_path: Path):
    randomly = random.Random(11)
    rows = [(f"Fühler {s}", t, v) for s in range(5) for t, v in zip(ODD_TIMES_US, ODD_VALUES, strict=True)]
    start = datetime(2019, 3, 31, tzinfo=UTC)
    for s in range(5):
        at = (start - EPOCH) // timedelta(microseconds=1)
        for _ in range(2000):
            at += randomly.randint(1, 90_000_000)
            rows.append(
                (
                    f"Fühler {s}",
                    at,
                    randomly.choice([randomly.gauss(20, 5), round(randomly.uniform(-9, 9), 2)]),
                )
            )
    with (tmp_path / "recorded.csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["timestamp", "device", "metric", "value"])
        for sensor, at, value in rows:
            writer.writerow(
                [(EPOCH + timedelta(microseconds=at)).isoformat(), sensor, "temp, °C", repr(value)]
            )
    site.ingest.start()
    site.gateway.start()
    truth = tmp_path / "truth"
    replay = run(
        *(
            "sim",
            "replay",
            str(tmp_path / "recorded.csv"),
            "--broker",
            site.broker,
            "--truth",
            str(truth),
            "--quiet",
        )
    )
    assert replay.returncode == 0, replay.stderr
    site.drain()
    connection = await asyncpg.connect(site.dsn)
    stored = await connection.fetch(
        "SELECT sensor_id, time, value FROM sensor_data WHERE sensor_type = 'temp, °C'"
    )
    await connection.close()
    found = {(r["sensor_id"], (r["time"] - EPOCH) // timedelta(microseconds=1)): r["value"] for r in stored}
    assert len(stored) == len(rows)
    assert {key: repr(value) for key, value in found.items()} == {(s, t): repr(v) for s, t, v in rows}
    assert site.verify(truth, "--files", str(site.files))["ok"]


@pytest.mark.timeout(180)
def test_kills_at_random_moments_lose_and_double_nothing(site: Site, tmp_path: Path):
    randomly = random.Random(5)
    site.ingest.start()
    site.gateway.start()
    truth = tmp_path / "truth"
    fleet = Program(
        tmp_path,
        "fleet",
        *("sim", "run", "--broker", site.broker, "--truth", str(truth), "--quiet", "--seconds", "0"),
        *("--devices", "10", "--rate", "600", "--readings-per-publish", "2", "--drain-timeout", "20"),
    )
    fleet.start()
    for _ in range(6):
        victim = randomly.choice([site.gateway, site.gateway, site.ingest])
        time.sleep(randomly.uniform(0.3, 2.0))
        victim.kill()
        time.sleep(randomly.uniform(0.0, 1.0))
        victim.start()
    assert fleet.stop(40) == 0
    site.drain()
    at_region = site.verify(truth)
    assert at_region["acknowledged"] > 2000
    assert {k: at_region[k] for k in ("lost", "duplicated", "altered")} == {
        "lost": 0,
        "duplicated": 0,
        "altered": 0,
    }
    on_stick = site.verify(truth, "--files", str(site.files))
    assert {k: on_stick[k] for k in ("lost", "altered", "rewritten")} == {
        "lost": 0,
        "altered": 0,
        "rewritten": 0,
    }
    assert site.gateway.stop() == 0
    assert site.ingest.stop() == 0


def test_a_spool_restored_from_an_older_copy_takes_a_new_epoch_and_loses_nothing(site: Site, tmp_path: Path):
    site.ingest.start()
    site.gateway.start()
    truth = tmp_path / "truth"

    def publish(seed: int) -> None:
        done = run(
            *("sim", "run", "--broker", site.broker, "--truth", str(truth), "--quiet", "--seconds", "1.5"),
            *("--devices", "3", "--rate", "100", "--seed", str(seed)),
        )
        assert done.returncode == 0, done.stderr

    publish(1)
    site.drain()
    assert site.gateway.stop() == 0
    copy = tmp_path / "copy.db"
    shutil.copy(site.spool, copy)
    site.gateway.start()
    publish(2)
    site.drain()
    epoch = site.status()["spool"]["epoch"]
    assert site.gateway.stop() == 0
    for leftover in tmp_path.glob("spool.db-*"):
        leftover.unlink()
    shutil.copy(copy, site.spool)
    site.gateway.start()
    publish(3)
    site.drain()
    assert site.status()["spool"]["epoch"] != epoch
    found = site.verify(truth)
    assert found["acknowledged"] > 300
    assert (found["lost"], found["duplicated"]) == (0, 0)


def test_an_ingest_service_that_is_away_only_makes_the_backlog_grow(site: Site, tmp_path: Path):
    site.gateway.start()
    done = run(
        *(
            "sim",
            "run",
            "--broker",
            site.broker,
            "--truth",
            str(tmp_path / "truth"),
            "--quiet",
            "--seconds",
            "2",
        ),
        *("--devices", "3", "--rate", "100"),
    )
    assert done.returncode == 0, done.stderr
    region, stick = site.status()["destinations"]
    assert region["state"] == "waiting"
    assert region["backlog_readings"] > 150
    assert region["last_error"]
    wait_until(lambda: site.status()["destinations"][1]["backlog_readings"] == 0, 10)
    assert stick["last_error"] == ""
    shown = run("status", "-c", str(tmp_path / "gateway.toml")).stdout
    assert "retrying" in shown
    site.ingest.start()
    site.drain(90)
    assert site.verify(tmp_path / "truth")["ok"]
