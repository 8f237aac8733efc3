"""The unit files: what systemd itself says of them, and that the template does not drift from the unit."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).parents[3] / "systemd"
NAMES = [
    "tidegate-gateway.service",
    "tidegate-gateway@.service",
    "tidegate-ingest.service",
    "tidegate-sim.service",
]
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")


def settings_of(name: str) -> list[str]:
    lines = (UNITS / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_the_template_is_the_unit_with_other_names():
    plain, template = settings_of(NAMES[0]), settings_of(NAMES[1])
    named = [line.replace("@%i", "").replace(" %i", "").replace("/%i", "") for line in template]
    assert named == plain
    assert sum("%i" in line for line in template) == 6


@needs_systemd
@pytest.mark.parametrize(("name", "most"), [*((name, "1.6") for name in NAMES)])
def test_the_sandbox_leaves_little_exposed(name, most):
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            f"--threshold={float(most) * 10:.0f}",
            UNITS / name,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


@needs_systemd
def test_systemd_understands_every_line(tmp_path):
    for name in NAMES:
        text = (UNITS / name).read_text().replace("/usr/bin/tidegate", "/bin/true")
        (tmp_path / name.replace("@.", "@north.")).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *sorted(tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=False,
    )
    of_ours = [line for line in done.stderr.splitlines() if "tidegate" in line]
    assert (done.returncode, of_ours) == (0, [])


@pytest.mark.parametrize("name", NAMES)
def test_every_service_says_when_it_is_ready_and_is_watched(name):
    settings = settings_of(name)
    assert "Type=notify" in settings
    assert any(re.fullmatch(r"WatchdogSec=\d+", line) for line in settings)
    assert "DynamicUser=yes" in settings
