"""`tidegate install --dry-run` says every step and does none; what is wrong is one message."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gateway.setup.installation import UNIT_FILES, Layout, read_shipped_file
from tests.support.programs import run

if TYPE_CHECKING:
    from pathlib import Path


def planned(root: Path, *options: str) -> list[str]:
    done = run("install", "--dry-run", "--root", str(root), *options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_dry_run_names_every_file_and_makes_none(tmp_path):
    said = planned(tmp_path, "--gateway-id", "barn-1")
    assert said[0] == f"would make a virtual environment in {tmp_path}/opt/tidegate/releases/{release()}"
    for path in (
        "etc/systemd/system/tidegate-gateway.service",
        "etc/tidegate/gateway.toml",
        "etc/tmpfiles.d",
    ):
        assert any(f"{tmp_path}/{path}" in line for line in said), path
    assert said[-1] == f"would run systemctl --root={tmp_path} enable tidegate-gateway.service"
    assert list(tmp_path.iterdir()) == []


def release() -> str:
    return run("--version").stdout.split()[1]


def test_an_instance_and_the_region_have_names_of_their_own(tmp_path):
    assert any("tidegate-gateway@north.service" in line for line in planned(tmp_path, "--instance", "north"))
    said = planned(tmp_path, "--role", "ingest", "--token-for", "barn-1")
    assert f"would write a token for barn-1 to {tmp_path}/etc/tidegate/tls/barn-1.token" in said


def test_what_is_there_is_kept_and_a_release_that_was_not_finished_is_made_again(tmp_path):
    (tmp_path / "etc/tidegate").mkdir(parents=True)
    (tmp_path / "etc/tidegate/gateway.toml").write_text("")
    half = tmp_path / f"opt/tidegate/releases/{release()}"
    half.mkdir(parents=True)
    said = planned(tmp_path)
    assert f"would keep {tmp_path}/etc/tidegate/gateway.toml" in said
    assert said[0] == f"would remove {half}"
    (half / "complete").write_text("\n")
    assert planned(tmp_path)[0] == f"would keep the release in {half}"


def test_uninstalling_keeps_the_spool_unless_told_to_purge(tmp_path):
    for folder in ("opt/tidegate", "var/lib/tidegate", "etc/tidegate"):
        (tmp_path / folder).mkdir(parents=True)
    kept = run("uninstall", "--dry-run", "--root", str(tmp_path)).stdout.splitlines()
    assert f"would remove {tmp_path}/opt/tidegate" in kept
    assert kept[-1].startswith(f"would keep {tmp_path}/etc/tidegate, {tmp_path}/var/lib/tidegate;")
    gone = run("uninstall", "--dry-run", "--purge", "--root", str(tmp_path)).stdout.splitlines()
    assert f"would remove {tmp_path}/var/lib/tidegate" in gone


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--wheels", "/nowhere"), "/nowhere: expected one tidegate-VERSION-py3-none-any.whl, found none"),
        (("--instance", "north", "--role", "ingest"), "--instance is for gateways"),
        (("--token-for", "barn-1"), "--token-for is for --role ingest"),
        (("--token-file", "/nowhere"), "/nowhere"),
    ],
)
def test_what_is_in_the_way_is_one_message(tmp_path, options, word):
    done = run("install", "--dry-run", "--root", str(tmp_path), *options)
    assert done.returncode == 2
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_every_shipped_file_is_found_and_starts_the_program_that_is_replaced():
    for names in UNIT_FILES.values():
        for name in names:
            assert "ExecStart=/usr/bin/tidegate " in read_shipped_file(name)
    assert str(Layout().program) == "/opt/tidegate/current/bin/tidegate"
