"""A booted machine with a gateway installed from wheels, for tests/service."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.service.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
SYSTEM_PYTHON = Path("/usr/bin/python3")


@pytest.fixture(scope="session")
def wheels() -> Path:
    """A folder with the wheel of this source and of everything that gateway and ingest need."""
    folder = ROOT / ".build" / "wheels"
    done = subprocess.run(
        [ROOT / "packaging/wheels.sh", folder, "[ingest]"],
        env={**os.environ, "PYTHON": str(SYSTEM_PYTHON)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        pytest.skip(f"wheels could not be gathered: {done.stderr.strip()[-200:]}")
    return folder


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which nothing is installed yet."""
    if os.geteuid() != 0 or shutil.which("systemd-nspawn") is None:
        pytest.skip("booting a container takes root and systemd-nspawn")
    if (
        not SYSTEM_PYTHON.exists()
        or subprocess.run([SYSTEM_PYTHON, "-c", "import ensurepip"], check=False).returncode
    ):
        pytest.skip("the container runs /usr/bin/python3, which has no venv here")
    box = Machine(tmp_path_factory.mktemp("machine"))
    try:
        box.boot()
    except (AssertionError, OSError) as fault:
        box.power_off()
        pytest.skip(f"systemd does not boot in a container here: {str(fault)[-300:]}")
    yield box
    box.power_off()
