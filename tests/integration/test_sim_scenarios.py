"""Every scenario that is shipped, in a short form, through a real gateway: nothing acknowledged is lost."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from firmware_sim.ground_truth import load_ground_truth
from firmware_sim.verify.comparison import compare_readings
from firmware_sim.verify.stored_files import read_line_files
from tests.support.free_ports import free_port
from tests.support.programs import ROOT, Program, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCENARIOS = sorted(path.stem for path in (ROOT / "config" / "scenarios").glob("*.toml"))
SECONDS = "1.5"
RATES = {"firmware-rollout": "4000", "returning-fleet": "7000", "sensor-faults-day": "2500"}


class Gateway(Program):
    """A gateway that writes line protocol files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, status = folder, free_port(), free_port()
        self.status_url = f"http://127.0.0.1:{status}/status"
        config = folder / "gateway.toml"
        config.write_text(
            'gateway_id = "g"\n[spool]\npath = "spool.db"\n'
            f"[ingress.listen]\nport = {self.port}\n[ingress.host]\nenabled = false\n"
            f"[status]\nport = {status}\n"
            '[[destinations]]\nname = "stick"\nkind = "file"\ndirectory = "files"\ncompress = false\n'
            "min_free_bytes = 0\nflush_s = 0.2\n"
        )
        super().__init__(
            folder, "gateway", "gateway", "-c", str(config), ready_url=f"http://127.0.0.1:{status}/readyz"
        )

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(self.status_url, timeout=5, trust_env=False).json()
        return answer

    def drain(self) -> None:
        wait_until(lambda: not self.status()["destinations"][0]["backlog_readings"], 40)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = Gateway(tmp_path_factory.mktemp("scenarios"))
    made.start()
    yield made
    made.kill()


def simulate(gateway: Gateway, truth: Path, *arguments: str) -> dict[str, Any]:
    broker = f"mqtt://127.0.0.1:{gateway.port}"
    done = run(
        *("sim", "run", "--broker", broker, "--truth", str(truth), "--json", "--quiet"),
        *("--drain-timeout", "30", "--connect-timeout", "10", *arguments),
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout)
    return outcome


def verify(gateway: Gateway, truth: Path) -> dict[str, Any]:
    """What `tidegate sim verify --files` finds, without starting a process for it."""
    gateway.drain()
    record = load_ground_truth(truth)
    stored = read_line_files(gateway.folder / "files", record, precision="ns", on_rows=lambda _: None)
    return asdict(compare_readings(record, stored))


def test_all_that_are_promised_are_there():
    assert set(SCENARIOS) >= {
        "quiet-site",
        "factory-burst",
        "satellite-link",
        "solar-site",
        "returning-fleet",
        "firmware-rollout",
        "sensor-faults-day",
        "hostile-device",
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_short_form_arrives_whole(gateway: Gateway, tmp_path: Path, name: str):
    scenario = ROOT / "config" / "scenarios" / f"{name}.toml"
    rate = ("--rate", RATES[name]) if name in RATES else ()
    outcome = simulate(gateway, tmp_path, "--scenario", str(scenario), "--seconds", SECONDS, *rate)
    assert outcome["acknowledged"] > 0
    assert outcome["outstanding_publishes"] == 0
    assert outcome["produced"] == sum(outcome[k] for k in ("acknowledged", "overrun", "forgotten"))
    found = verify(gateway, tmp_path)
    assert {k: found[k] for k in ("lost", "duplicated", "altered", "unknown")} == {
        "lost": 0,
        "duplicated": 0,
        "altered": 0,
        "unknown": 0,
    }, found["examples"]
    assert found["acknowledged"] > 0
    expected = {
        "returning-fleet": outcome["produced"] >= 9000,
        "firmware-rollout": outcome["reboots"] >= 100,
        "sensor-faults-day": outcome["malformed_publishes"] > 0 and found["repeated"] < outcome["produced"],
        "solar-site": outcome["reconnects"] > 20,
        "hostile-device": outcome["attacks"] >= 4 and outcome["malformed_publishes"] > 0,
        "factory-burst": outcome["produced"] > 300 * float(SECONDS),
    }
    assert expected.get(name, True), outcome


def test_a_service_of_a_scenario_is_paused_and_comes_back(gateway: Gateway, tmp_path: Path):
    """The gateway itself stands for the service: readings wait in the devices while it is away."""
    assert gateway.process is not None
    scenario = tmp_path / "away.toml"
    scenario.write_text(
        'rate = 100\nseconds = 3\n[[groups]]\nname = "away"\ndevices = 3\n'
        '[[outages]]\nservice = "gateway"\nat = 0.5\nlasts = 1.5\n'
    )
    begin_s = time.monotonic()
    outcome = simulate(
        gateway,
        tmp_path / "t",
        *("--scenario", str(scenario), "--service", f"gateway={gateway.process.pid}"),
    )
    assert time.monotonic() - begin_s >= 3
    assert outcome["acknowledged"] == outcome["produced"] >= 290
    assert outcome["services_down"] == []
    assert verify(gateway, tmp_path / "t")["lost"] == 0


def test_the_full_rate_sends_what_was_encoded_ahead_and_records_each_acknowledgement(
    gateway: Gateway, tmp_path: Path
):
    outcome = simulate(
        gateway,
        tmp_path,
        *("--rate", "max", "--readings", "20000", "--devices", "20", "--readings-per-publish", "5"),
    )
    assert outcome["produced"] == outcome["acknowledged"] >= 20_000
    found = verify(gateway, tmp_path)
    assert (found["acknowledged"], found["lost"], found["altered"]) == (outcome["acknowledged"], 0, 0)
