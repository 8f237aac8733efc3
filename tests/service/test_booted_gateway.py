"""The gateway as a service of a real systemd: installed, started, stopped, killed, hung, filled, renewed.

One machine is set up once; the tests go on from what the one before left, in the order of this file.
"""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import sys
from typing import TYPE_CHECKING

import pytest

from tests.service.machine import UNIT, Machine, until
from tests.support.programs import ROOT

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(180)

STATE = "var/lib/private/tidegate"
CONFIG = """\
gateway_id = "box-1"
stop_within_s = 10
[spool]
path = "/var/lib/tidegate/spool.db"
min_free_bytes = 8388608
[ingress.host]
enabled = false
[[destinations]]
name = "regional"
kind = "ingest"
url = "http://127.0.0.1:8420"
token_file = "secrets/regional.token"
flush_s = 0.1
"""


@pytest.fixture(scope="session")
def installed(machine: Machine, wheels: Path) -> Machine:
    """The machine after `tidegate install` from a folder of wheels, without a network."""
    shutil.copytree(wheels, machine.root / "opt/wheels")
    (machine.root / "root/gateway.toml").write_text(CONFIG)
    machine.run("/usr/bin/python3", "-m", "venv", "/root/first", timeout=60)
    pip = ("/root/first/bin/python", "-m", "pip", "-q", "--disable-pip-version-check", "install")
    machine.run(*pip, "--no-index", "--find-links", "/opt/wheels", "tidegate")
    machine.said = machine.run(
        *("/root/first/bin/tidegate", "install", "--wheels", "/opt/wheels"),
        *("--config", "/root/gateway.toml", "--token-file", "-"),
        stdin="the-first-token\n",
    ).stdout
    return machine


def readings_in(machine: Machine) -> int:
    done = machine.run("tidegate", "spool", "info", "--json", "--config", "/etc/tidegate/gateway.toml")
    return int(json.loads(done.stdout)["classes"].get("reading", {"rows": 0})["rows"])


def test_install_leaves_a_service_that_is_ready_and_takes_readings(installed):
    assert installed.property("ActiveState") == "active"
    assert installed.property("UnitFileState") == "enabled"
    assert installed.property("StatusText").startswith("listening on 127.0.0.1:1883")
    assert installed.publish("sensors/a/t", 1)
    assert installed.http("/readyz")[0] == 200
    assert installed.run("tidegate", "--version").stdout.startswith("tidegate ")
    assert "the-first-token" not in installed.said


def test_the_service_is_nobody_and_sees_nothing_that_is_not_its_own(installed):
    pid = int(installed.property("MainPID"))
    status = dict(
        line.split(":\t", 1)
        for line in installed.run("cat", f"/proc/{pid}/status").stdout.splitlines()
        if ":\t" in line
    )
    assert all(61184 <= int(uid) <= 65519 for uid in status["Uid"].split())
    assert status["CapEff"] == "0" * 16
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert str((installed.root / "var/lib/tidegate").readlink()) == "private/tidegate"
    assert (installed.root / STATE / "spool.db").stat().st_uid == int(status["Uid"].split()[0])
    assert (installed.root / "etc/tidegate/secrets").stat().st_mode & 0o777 == 0o700
    assert (installed.root / "etc/tidegate/secrets/regional.token").stat().st_mode & 0o777 == 0o600


def test_what_is_logged_has_a_priority_and_no_second_time(installed):
    def entries() -> list[dict[str, str]]:
        options = ("--no-pager", "--output=json", f"--unit={UNIT}", "_COMM=tidegate")
        return [json.loads(line) for line in installed.run("journalctl", *options).stdout.splitlines()]

    until(
        lambda: any("regional: " in e["MESSAGE"] and e["PRIORITY"] == "4" for e in entries()), 15, installed
    )
    announced = next(e for e in entries() if "gateway box-1 listens" in e["MESSAGE"])
    assert announced["PRIORITY"] == "6"
    assert announced["MESSAGE"].startswith("gateway.agent: ")


def test_installing_again_keeps_what_is_there(installed):
    secret = installed.root / "etc/tidegate/secrets/regional.token"
    before = secret.read_text()
    plan = installed.run("tidegate", "install", "--wheels", "/opt/wheels", "--dry-run").stdout
    assert "would keep the release" in plan
    assert "would keep /etc/tidegate/gateway.toml" in plan
    installed.run("tidegate", "install", "--wheels", "/opt/wheels")
    assert secret.read_text() == before
    assert (installed.root / "etc/tidegate/gateway.toml").read_text() == CONFIG


def test_a_reload_and_a_start_again_keep_the_process(installed):
    pid = installed.property("MainPID")
    config = installed.root / "etc/tidegate/gateway.toml"
    config.write_text(CONFIG.replace("flush_s = 0.1", "flush_s = 0.2"))
    installed.systemctl("reload", UNIT)
    assert installed.publish("sensors/a/t", 2)
    starts = installed.journal().count("gateway box-1 listens")
    installed.systemctl("kill", "--signal=SIGUSR1", UNIT)
    until(lambda: installed.journal().count("gateway box-1 listens") > starts, 20, installed)
    until(lambda: installed.http("/readyz")[0] == 200, 20, installed)
    assert installed.property("MainPID") == pid
    assert installed.property("ActiveState") == "active"
    assert installed.publish("sensors/a/t", 3)
    config.write_text(CONFIG)
    installed.systemctl("reload", UNIT)


def test_systemd_reloads_what_can_change_and_the_sandbox_lets_it_be_read(installed):
    config = installed.root / "etc/tidegate/gateway.toml"
    config.write_text(CONFIG.replace("flush_s = 0.1", "flush_s = 0.3"))
    installed.systemctl("reload", UNIT)
    until(lambda: "destinations[regional].flush_s" in installed.http("/config")[1]["changed"], 10, installed)
    config.write_text(CONFIG)
    installed.systemctl("reload", UNIT)


def test_a_stop_commits_what_was_read_and_ends_well_within_its_time(installed, tmp_path):
    before = readings_in(installed)
    fleet = installed.beside(
        *(
            sys.executable,
            "-m",
            "gateway",
            "sim",
            "run",
            "--broker",
            "mqtt://127.0.0.1:1883",
            "--seconds",
            "0",
        ),
        *(
            "--devices",
            "5",
            "--rate",
            "500",
            "--truth",
            tmp_path / "truth",
            "--quiet",
            "--drain-timeout",
            "0.5",
        ),
        cwd=ROOT,
    )
    until(lambda: readings_in(installed) > before + 500, 20, installed)
    installed.systemctl("stop", UNIT)
    fleet.send_signal(signal.SIGTERM)
    fleet.wait(20)
    progress = json.loads(next((tmp_path / "truth").rglob("progress.json")).read_text())
    assert readings_in(installed) - before >= progress["acknowledged"] > 500
    assert installed.property("Result") == "success"
    assert installed.property("ExecMainStatus") == "0"
    said = installed.journal()
    assert "did not stop in time" not in said[said.rindex("gateway.agent: stopping") :]
    installed.systemctl("start", UNIT)


def test_after_sigkill_it_is_back_at_once_with_everything_acknowledged(installed):
    acknowledged = sum(installed.publish("sensors/killed/t", n) for n in range(5))
    before, restarts = readings_in(installed), int(installed.property("NRestarts"))
    installed.systemctl("kill", "--signal=SIGKILL", UNIT)
    until(lambda: installed.property("NRestarts") == str(restarts + 1), 10, installed)
    until(lambda: installed.property("SubState") == "running", 20, installed)
    assert acknowledged == 5
    assert readings_in(installed) == before
    assert installed.publish("sensors/killed/t", 6)


def test_a_process_that_is_stopped_dead_is_killed_by_the_watchdog_and_started_again(installed):
    installed.drop_in("hang", "WatchdogSec=2", "TimeoutAbortSec=1")
    installed.systemctl("restart", UNIT)
    restarts = int(installed.property("NRestarts"))
    installed.systemctl("kill", "--signal=SIGSTOP", UNIT)
    until(lambda: int(installed.property("NRestarts")) > restarts, 20, installed)
    until(lambda: installed.property("SubState") == "running", 20, installed)
    assert "Watchdog timeout" in installed.journal()
    assert installed.publish("sensors/after/t", 1)


def test_a_program_that_hangs_says_where_before_the_watchdog_ends_it(installed):
    installed.drop_in(
        "hang", "WatchdogSec=2", "TimeoutAbortSec=2", "Environment=TIDEGATE_HANG_AT=after_ack:1"
    )
    installed.systemctl("restart", UNIT)
    restarts = int(installed.property("NRestarts"))
    installed.publish("sensors/hang/t", 1)
    until(lambda: int(installed.property("NRestarts")) > restarts, 20, installed)
    installed.undo("hang")
    installed.systemctl("restart", UNIT)
    said = installed.journal()
    assert "Fatal Python error: Aborted" in said
    assert "in crash_point" in said


def test_a_full_disk_holds_and_lets_go_when_room_returns(installed):
    installed.systemctl("stop", UNIT)
    installed.run("mv", f"/{STATE}", f"/{STATE}.kept")
    installed.run("mkdir", f"/{STATE}")
    installed.run("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", f"/{STATE}")
    installed.systemctl("start", UNIT)
    before = readings_in(installed)
    assert installed.publish("sensors/full/t", 1)
    installed.run("/bin/sh", "-c", f"cat /dev/zero >/{STATE}/filler", check=False)
    until(lambda: not installed.publish("sensors/full/t", 2, timeout=2), 15, installed)
    until(lambda: installed.property("StatusText").startswith("HOLDING"), 15, installed)
    code, answer = installed.http("/readyz")
    assert (code, answer["status"]) == (503, "holding")
    assert installed.property("SubState") == "running"
    installed.run("rm", f"/{STATE}/filler")
    until(lambda: installed.http("/readyz")[0] == 200, 15, installed)
    assert installed.publish("sensors/full/t", 3)
    assert readings_in(installed) >= before + 2
    installed.systemctl("stop", UNIT)
    installed.run("umount", f"/{STATE}")
    installed.run("rmdir", f"/{STATE}")
    installed.run("mv", f"/{STATE}.kept", f"/{STATE}")
    installed.systemctl("start", UNIT)


def test_a_new_token_is_used_after_a_restart_and_root_checks_what_the_service_reads(installed):
    stub = (
        "import http.server\n"
        "class H(http.server.BaseHTTPRequestHandler):\n"
        " def do_POST(self):\n"
        "  open('/root/seen','a').write(self.headers.get('Authorization','')+'\\n')\n"
        "  self.rfile.read(int(self.headers.get('Content-Length',0)))\n"
        "  self.send_response(401);self.send_header('Content-Length','0');self.end_headers()\n"
        " do_GET=do_POST\n"
        " def log_message(self,*a): pass\n"
        "http.server.ThreadingHTTPServer(('127.0.0.1',8420),H).serve_forever()\n"
    )
    (installed.root / "root/stub.py").write_text(stub)
    installed.run("systemd-run", "--unit=region", "/usr/bin/python3", "/root/stub.py")
    seen = installed.root / "root/seen"
    installed.systemctl("restart", UNIT)
    until(lambda: seen.exists() and "Bearer the-first-token" in seen.read_text(), 20, installed)
    until(lambda: "regional blocked" in installed.property("StatusText"), 20, installed)
    (installed.root / "etc/tidegate/secrets/regional.token").write_text("the-second-token\n")
    assert ": ok." in installed.run("tidegate", "config", "check", "/etc/tidegate/gateway.toml").stdout
    seen.unlink()
    installed.systemctl("restart", UNIT)
    until(lambda: seen.exists() and "Bearer the-second-token" in seen.read_text(), 20, installed)
    assert "the-first-token" not in seen.read_text()
    assert "-token" not in installed.journal().replace("regional.token", "")
    installed.systemctl("stop", "region")


def test_an_upgrade_keeps_the_backlog_and_the_release_before(installed, tmp_path):
    backlog = readings_in(installed)
    assert backlog > 500
    older = (installed.root / "opt/tidegate/current").readlink().name
    newer = wheel_of_a_later_release(installed, tmp_path)
    installed.run("tidegate", "install", "--wheels", newer)
    assert installed.run("tidegate", "--version").stdout.strip() == "tidegate 99.0"
    assert installed.http("/status")[1]["version"] == "99.0"
    assert readings_in(installed) == backlog
    assert installed.http("/status")[1]["destinations"][0]["backlog_readings"] == backlog
    releases = sorted(p.name for p in (installed.root / "opt/tidegate/releases").iterdir())
    assert releases == sorted([older, "99.0"])
    installed.run("ln", "-sfn", f"releases/{older}", "/opt/tidegate/current")
    installed.systemctl("restart", UNIT)
    assert installed.http("/status")[1]["version"] == older


def wheel_of_a_later_release(machine: Machine, folder: Path) -> str:
    """The same program under another version, in a folder of wheels of its own."""
    wheels = machine.root / "opt/wheels"
    later = machine.root / "opt/later"
    later.mkdir()
    for wheel in wheels.glob("*.whl"):
        if not wheel.name.startswith("tidegate-"):
            (later / wheel.name).hardlink_to(wheel)
    wheel = next(wheels.glob("tidegate-*.whl"))
    version = wheel.name.split("-")[1]
    tree = folder / "tree"
    shutil.unpack_archive(wheel, tree, "zip")
    info = tree / f"tidegate-{version}.dist-info"
    (info / "METADATA").write_text(
        (info / "METADATA").read_text().replace(f"Version: {version}", "Version: 99.0")
    )
    record = (info / "RECORD").read_text().replace(f"tidegate-{version}.dist-info", "tidegate-99.0.dist-info")
    lines = [",".join([line.split(",")[0], "", ""]) for line in record.splitlines()]
    (info / "RECORD").write_text("\n".join([*lines, ""]))
    info.rename(tree / "tidegate-99.0.dist-info")
    archive = shutil.make_archive(str(folder / "later"), "zip", tree)
    shutil.move(archive, later / "tidegate-99.0-py3-none-any.whl")
    return "/opt/later"


def test_a_spool_of_a_later_release_is_refused_with_a_word_and_left_alone(installed):
    installed.systemctl("stop", UNIT)
    spool = installed.root / STATE / "spool.db"
    with sqlite3.connect(spool) as connection:
        before = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    installed.systemctl("start", UNIT, check=False)
    until(lambda: "format version 99" in installed.journal(), 15, installed)
    said = installed.journal()
    assert f"this release reads up to {before}" in said
    assert "Install the release that wrote it" in said
    assert "Traceback" not in said[said.rindex("format version 99") - 400 :]
    until(lambda: "format version 99" in installed.property("StatusText"), 15, installed)
    installed.systemctl("stop", UNIT)
    with sqlite3.connect(spool) as connection:
        connection.execute(f"PRAGMA user_version = {before}")
    connection.close()
    installed.systemctl("start", UNIT)
    assert readings_in(installed) > 500


def test_a_second_gateway_and_the_region_run_beside_the_first(installed):
    other = CONFIG.replace("box-1", "north").replace("lib/tidegate/", "lib/tidegate@north/")
    other += "[ingress.listen]\nport = 1884\n[status]\nport = 8422\n"
    (installed.root / "root/north.toml").write_text(other.replace("[ingress.host]\nenabled = false\n", ""))
    installed.run(
        *("tidegate", "install", "--instance", "north", "--wheels", "/opt/wheels"),
        *("--config", "/root/north.toml", "--token-file", "-"),
        stdin="north-token\n",
    )
    assert installed.publish("sensors/n/t", 1, port=1884)
    assert (installed.root / "var/lib/private/tidegate@north/spool.db").exists()
    assert installed.publish("sensors/a/t", 9)
    installed.run(
        *("tidegate", "install", "--role", "ingest", "--wheels", "/opt/wheels"),
        *("--token-for", "box-1", "--dsn-file", "-"),
        stdin="postgresql://tidegate@127.0.0.1:1/tidegate\n",
    )
    assert installed.property("ActiveState", "tidegate-ingest.service") == "active"
    assert installed.property("StatusText", "tidegate-ingest.service").startswith("listening")
    tokens = installed.root / "etc/tidegate/tls"
    assert len((tokens / "box-1.token").read_text()) > 20
    assert (tokens / "ingest-tokens").stat().st_mode & 0o777 == 0o640
    assert "has no token" not in installed.journal("tidegate-ingest.service")


def test_uninstall_keeps_spools_and_configuration_unless_told_to_purge(installed):
    installed.run("/root/first/bin/tidegate", "uninstall")
    assert installed.property("ActiveState") == "inactive"
    assert not (installed.root / "opt/tidegate").exists()
    assert list((installed.root / "etc/systemd/system").glob("tidegate*.service")) == []
    assert (installed.root / STATE / "spool.db").exists()
    assert (installed.root / "etc/tidegate/gateway.toml").exists()
    installed.run("/root/first/bin/tidegate", "uninstall", "--purge")
    assert not (installed.root / STATE).exists()
    assert not (installed.root / "etc/tidegate").exists()
    assert [p for p in (installed.root / "var/lib").iterdir() if p.name.startswith("tidegate")] == []
