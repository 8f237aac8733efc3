"""The Debian package on a booted machine: installed, upgraded, removed, purged."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service.machine import UNIT, Machine, until
from tests.support.fixtures_machine import ROOT

pytestmark = pytest.mark.timeout(240)
STATE = "var/lib/private/tidegate"


@pytest.fixture(scope="module")
def package(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The package, where the machine finds it; dpkg there knows what is installed here."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    out = tmp_path_factory.mktemp("deb")
    done = subprocess.run(
        [ROOT / "packaging/deb.sh", out],
        env={**os.environ, "COMPRESSION": "-Zgzip -z1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    if done.returncode:
        pytest.skip(f"the package could not be built: {done.stderr.strip()[-200:]}")
    built = Path(done.stdout.strip())
    shutil.copy(built, machine.root / "root/tidegate.deb")
    if not (machine.root / "var/lib/dpkg").exists():
        shutil.copytree("/var/lib/dpkg", machine.root / "var/lib/dpkg", symlinks=True)
        shutil.copytree("/etc/dpkg", machine.root / "etc/dpkg", symlinks=True)
    return "/root/tidegate.deb"


def test_installing_the_package_starts_a_gateway_on_loopback(machine, package):
    machine.run("dpkg", "-i", package)
    assert machine.property("ActiveState") == "active"
    assert machine.property("FragmentPath").endswith("lib/systemd/system/tidegate-gateway.service")
    assert machine.property("StatusText").startswith("listening on 127.0.0.1:1883")
    assert machine.publish("sensors/a/t", 1)
    until(lambda: list((machine.root / STATE / "readings").rglob("*.lp*")) != [], 20, machine)
    assert "regional" not in (machine.root / "etc/tidegate/gateway.toml").read_text().split("#")[0]
    assert machine.property("UnitFileState", "tidegate-ingest.service") == "disabled"


def test_an_upgrade_restarts_it_and_leaves_the_configuration_alone(machine, package):
    config = machine.root / "etc/tidegate/gateway.toml"
    config.write_text(config.read_text() + "\n# mine\n")
    pid = machine.property("MainPID")
    machine.run("dpkg", "-i", package)
    assert machine.property("MainPID") != pid
    assert machine.property("ActiveState") == "active"
    assert config.read_text().endswith("# mine\n")
    assert machine.publish("sensors/a/t", 2)


def test_removing_keeps_the_spool_and_purging_does_not(machine, package):
    machine.run("dpkg", "--remove", "tidegate")
    assert machine.property("ActiveState", UNIT) in ("inactive", "failed")
    assert not (machine.root / "usr/lib/tidegate").exists()
    assert machine.run("ls", "/usr/lib/tidegate", check=False).returncode != 0
    assert (machine.root / STATE / "spool.db").exists()
    machine.run("dpkg", "--purge", "tidegate")
    assert not (machine.root / STATE).exists()
    assert not (machine.root / "etc/tidegate").exists()
