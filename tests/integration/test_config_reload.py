"""A running gateway and its configuration: reload, refusal, trial, rollback; its backlog stays whole."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import aiomqtt
import httpx
import msgspec
import pytest

from gateway.settings import config_changes, gateway_settings
from gateway.status.active_config import mask_settings
from tests.support.free_ports import free_port
from tests.support.http_stub import Answer, http_stub
from tests.support.programs import ROOT, Program, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DEAD_STICK = (
    '[[destinations]]\nname = "stick"\nkind = "file"\ndirectory = "{0}"\ncreate = {1}\ncompress = false\n'
    "min_free_bytes = 0\nflush_s = 0.1\n"
)


class Running:
    """A gateway that takes readings over HTTP, with a file destination whose folder is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "gateway.toml"
        self.status_port, self.http_port, self.mqtt_port = free_port(), free_port(), free_port()
        self.config.write_text(self.text())
        self.program = Program(
            folder, "gateway", "gateway", "-c", str(self.config), ready_url=f"{self.url}/readyz"
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.status_port}"

    @property
    def pid(self) -> int:
        assert self.program.process is not None
        return self.program.process.pid

    def text(
        self, more: str = "", destinations: str = DEAD_STICK.format("absent", "false"), **ports: int
    ) -> str:
        given = {"status": self.status_port, "http": self.http_port, "listen": self.mqtt_port, **ports}
        return (
            f'gateway_id = "g"\nstop_within_s = 5\n{more}\n[spool]\npath = "spool.db"\n'
            f"[status]\nport = {given['status']}\n[ingress.host]\nenabled = false\n"
            f"[ingress.listen]\nport = {given['listen']}\n"
            f"[ingress.http]\nenabled = true\nport = {given['http']}\n{destinations}"
        )

    def send(self, first: int, count: int) -> None:
        body = [
            {"sensor_id": "s", "sensor_type": "t", "ts": 1_790_000_000 + n, "value": n}
            for n in range(first, first + count)
        ]
        answer = httpx.post(
            f"http://127.0.0.1:{self.http_port}/v1/readings", json=body, trust_env=False, timeout=10
        )
        assert answer.is_success, answer.text

    def active_config(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/config", trust_env=False, timeout=5).json()

    def status(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/status", trust_env=False, timeout=5).json()

    def backlog(self) -> int:
        return sum(d["backlog_readings"] for d in self.status()["destinations"])

    def hang_up(self, text: str) -> dict[str, Any]:
        """Write a configuration, send SIGHUP, and wait for what becomes of it."""
        before = self.active_config()["attempts"]
        self.config.write_text(text)
        os.kill(self.pid, signal.SIGHUP)
        wait_until(lambda: self.active_config()["attempts"] > before and not self.is_reloading(), 10)
        return self.active_config()

    def is_reloading(self) -> bool:
        said = self.active_config()
        return not said["refused"] and not said["changed"]

    def delivered(self, folder: str) -> list[int]:
        """The values in the files of a folder."""
        found = []
        for path in (self.folder / folder).rglob("*"):
            if path.is_file() and ".lp" in path.name:
                data = path.read_bytes()
                text = gzip.decompress(data).decode() if path.suffix == ".gz" else data.decode()
                found += [
                    int(float(line.split("value=")[1].split(",")[0].split(" ")[0]))
                    for line in text.splitlines()
                ]
        return sorted(found)

    def apply(self, text: str, probe: str = "8s", settle: str = "0.3s") -> subprocess.CompletedProcess[str]:
        new = self.folder / "new.toml"
        new.write_text(text)
        return run("config", "apply", str(new), "-c", str(self.config), "--probe", probe, "--settle", settle)

    def apply_in_background(self, text: str, probe: str) -> subprocess.Popen[bytes]:
        new = self.folder / "new.toml"
        new.write_text(text)
        words = ("config", "apply", str(new), "-c", str(self.config), "--probe", probe, "--settle", "0.5s")
        return subprocess.Popen(
            (sys.executable, "-m", "gateway", *words),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    running.program.start()
    yield running
    running.program.kill()


def unreachable_region(folder: Path) -> str:
    (folder / "token").write_text("x\n")
    url = f"http://127.0.0.1:{free_port()}"
    return f'[[destinations]]\nname = "region"\nkind = "ingest"\nurl = "{url}"\ntoken_file = "token"\n'


def test_a_reload_changes_limits_and_destinations_and_loses_no_backlog(gateway: Running) -> None:
    gateway.send(0, 50)
    assert gateway.backlog() == 50
    pid = gateway.pid
    said = gateway.hang_up(gateway.text('log_level = "debug"', DEAD_STICK.format("out", "true")))
    assert said["refused"] == []
    assert set(said["changed"]) >= {"log_level", "destinations[stick].directory"}
    gateway.send(50, 50)
    wait_until(lambda: gateway.backlog() == 0, 15)
    assert gateway.delivered("out") == list(range(100))
    other = DEAD_STICK.format("out", "true") + DEAD_STICK.format("second", "true").replace("stick", "more")
    assert gateway.hang_up(gateway.text("", other))["refused"] == []
    wait_until(
        lambda: gateway.delivered("second") == list(range(100)), 15, lambda: str(gateway.delivered("second"))
    )
    assert gateway.pid == pid
    assert run("config", "diff", str(gateway.config), "--running").returncode == 0


def test_a_reload_of_what_cannot_change_is_refused_with_a_reason_and_nothing_of_it_is_taken(
    gateway: Running,
) -> None:
    gateway.send(0, 10)
    text = gateway.text("stop_within_s_ = 1", DEAD_STICK.format("out", "true")).replace(
        "stop_within_s_ = 1", ""
    )
    said = gateway.hang_up(text.replace(str(gateway.mqtt_port), str(free_port())).replace('"g"', '"h"'))
    assert len(said["refused"]) == 2
    assert "ingress.listen.port cannot be changed by a reload: the port is bound" in said["refused"]
    assert said["values"]["gateway_id"] == "g"
    assert gateway.backlog() == 10
    told = run("config", "diff", str(gateway.config), "--running")
    assert told.returncode == 1
    assert "need a restart" in told.stdout
    assert gateway.hang_up("no toml [")["refused"][0].endswith("(at line 1, column 4)")
    gateway.send(10, 1)


def test_a_reload_takes_rules_for_payloads_and_alerts_and_tells_new_channels(gateway: Running) -> None:
    async def scenario() -> None:
        told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        def hook(request: Any) -> Answer:
            told.put_nowait(msgspec.json.decode(request.body))
            return Answer(200)

        async with (
            http_stub(hook) as stub,
            aiomqtt.Client("127.0.0.1", gateway.mqtt_port) as device,
        ):
            alerts = "[alerts]\nbuiltin = false\ngroup_wait_s = 0\ngroup_interval_s = 0\n"
            channel = (
                f'[[alerts.channel]]\nname = "ops"\nkind = "webhook"\nform = "json"\nurl = "{stub.url}"\n'
            )
            hot = '[[alerts.rule]]\nname = "hot"\nseries = "*/temp"\non = "value"\nabove = 30\n'
            rule = '[[ingress.rule]]\ntopic = "up/{sensor_id}"\nformat = "fields"\n'
            more = DEAD_STICK.format("absent", "false") + alerts + channel
            other = "[processing]\ninterval_s = 0.1\n[rollups]\nlateness_s = 5\nkeep_d = 7\n"
            await device.publish("up/dev", '{"temp": 40}', qos=1)
            text = gateway.text("", more + hot + rule + other)
            assert (await asyncio.to_thread(gateway.hang_up, text))["refused"] == []
            await device.publish("up/dev", '{"temp": 41}', qos=1)
            first = await asyncio.wait_for(told.get(), 10)
            assert (first["rule"], first["firing"], first["alerts"][0]["value"]) == ("hot", 1, 41)
            assert gateway.status()["quarantine"]["items"] == 1
            text = gateway.text("", more + rule + other)
            assert (await asyncio.to_thread(gateway.hang_up, text))["refused"] == []
            await asyncio.to_thread(wait_until, lambda: gateway.status()["alerts"]["firing"] == 0, 10)
            ended = gateway.status()["alerts"]["newest"][0]
            assert (ended["rule"], ended["text"]) == ("hot", "the rule is no longer in the configuration")
            text = text.replace(channel, "")
            assert (await asyncio.to_thread(gateway.hang_up, text))["refused"] == []
            await asyncio.to_thread(
                wait_until, lambda: [c["name"] for c in gateway.status()["channels"]] == ["log"], 10
            )
            said = await asyncio.to_thread(
                gateway.hang_up, text.replace("lateness_s = 5", "windows_s = [60]")
            )
            assert "rollups.windows_s cannot" in said["refused"][0]

    asyncio.run(scenario())


def test_a_restart_with_another_configuration_keeps_backlog_and_progress(gateway: Running) -> None:
    gateway.hang_up(gateway.text("", DEAD_STICK.format("out", "true")))
    gateway.send(0, 20)
    wait_until(lambda: gateway.backlog() == 0, 15)
    gateway.hang_up(gateway.text())
    gateway.send(20, 20)
    gateway.config.write_text(gateway.text("", DEAD_STICK.format("out", "true"), listen=free_port()))
    os.kill(gateway.pid, signal.SIGUSR1)
    wait_until(lambda: gateway.delivered("out") == list(range(40)), 30, lambda: str(gateway.delivered("out")))
    assert gateway.program.process is not None
    assert gateway.program.process.poll() is None


def test_a_token_that_is_replaced_is_used_without_a_restart_or_a_signal(gateway: Running) -> None:
    async def scenario() -> None:
        seen: dict[str, asyncio.Event] = defaultdict(asyncio.Event)

        def region(request: Any) -> Answer:
            seen[request.headers.get("authorization", "")].set()
            return Answer(401, '{"error": "unauthorised"}')

        async with http_stub(region) as stub:
            (gateway.folder / "token").write_text("old-token\n")
            table = f'[[destinations]]\nname = "r"\nkind = "ingest"\nurl = "{stub.url}"\n'
            await asyncio.to_thread(gateway.send, 0, 5)
            await asyncio.to_thread(gateway.hang_up, gateway.text("", table + 'token_file = "token"\n'))
            await asyncio.wait_for(seen["Bearer old-token"].wait(), 10)
            (gateway.folder / "token").write_text("new-token-is-here\n")
            await asyncio.wait_for(seen["Bearer new-token-is-here"].wait(), 20)
        log = gateway.program.log.read_text()
        assert "read again: token or certificate of r" in log
        assert "old-token" not in log
        assert "new-token" not in log

    asyncio.run(scenario())


# apply: on trial, confirmed or rolled back


def test_apply_confirms_what_works_and_keeps_what_was(gateway: Running) -> None:
    old = gateway.config.read_text()
    done = gateway.apply(gateway.text('log_level = "warning"'))
    assert done.returncode == 0, done.stderr
    assert "active and confirmed" in done.stdout
    assert gateway.active_config()["values"]["log_level"] == "warning"
    assert config_changes.previous_config_path(gateway.config).read_text() == old
    assert not config_changes.trial_marker_path(gateway.config).exists()
    assert sorted(p.name for p in gateway.folder.glob("gateway.toml*")) == [
        "gateway.toml",
        "gateway.toml.previous",
    ]


def test_apply_refuses_what_has_faults_and_touches_nothing(gateway: Running) -> None:
    old = gateway.config.read_text()
    done = gateway.apply(gateway.text("nonsense = 1"))
    assert done.returncode == 2
    assert "new.toml: nonsense: unknown key" in done.stderr
    assert gateway.config.read_text() == old
    assert not config_changes.previous_config_path(gateway.config).exists()


def test_apply_says_at_once_that_a_gateway_without_its_endpoint_cannot_be_tried(gateway: Running) -> None:
    old = gateway.config.read_text()
    done = gateway.apply(gateway.text().replace("[status]", "[status]\nenabled = false"))
    assert done.returncode == 2
    assert "status.enabled = false" in done.stderr
    assert gateway.config.read_text() == old
    assert not config_changes.trial_marker_path(gateway.config).exists()


def test_a_secret_that_systemd_hands_over_is_no_other_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text(
        'gateway_id = "g"\n[spool]\npath = "s"\n[[destinations]]\nname = "r"\nkind = "ingest"\n'
        'url = "https://r"\ntoken_file = "secrets/r.token"\n'
    )
    said = mask_settings(gateway_settings.parse_settings_file(config))
    copies = tmp_path / "credentials"
    copies.mkdir()
    (copies / "secret_r.token").write_text("t\n")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(copies))
    service = gateway_settings.parse_settings_file(config)
    assert service.destinations[0].token_file == copies / "secret_r.token"  # type: ignore[union-attr]  # of kind ingest
    assert mask_settings(service) == said


def test_apply_goes_back_when_a_destination_cannot_be_reached(gateway: Running) -> None:
    old = gateway.config.read_text()
    gateway.send(0, 5)
    done = gateway.apply(gateway.text("", unreachable_region(gateway.folder)), probe="3s")
    assert done.returncode == 1, done.stderr
    assert "rolling back: destination region" in done.stderr
    assert gateway.config.read_text() == old
    assert set(gateway.active_config()["values"]) >= {"destinations[stick].name"}
    assert gateway.backlog() == 5


def test_apply_goes_back_when_the_gateway_cannot_even_start_with_it(gateway: Running) -> None:
    old = gateway.config.read_text()
    gateway.send(0, 5)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = gateway.apply(gateway.text(listen=taken.getsockname()[1]), probe="6s")
    assert done.returncode == 1, done.stderr
    assert "by a restart" in done.stdout
    assert gateway.config.read_text() == old
    assert gateway.active_config()["values"]["ingress.listen.port"] == gateway.mqtt_port
    assert gateway.backlog() == 5


def test_the_gateway_goes_back_by_itself_when_the_command_is_killed(gateway: Running) -> None:
    old = gateway.config.read_text()
    applying = gateway.apply_in_background(gateway.text("", unreachable_region(gateway.folder)), "4s")
    wait_until(lambda: "destinations[region].name" in gateway.active_config()["values"], 10)
    applying.kill()
    applying.wait()
    assert config_changes.trial_marker_path(gateway.config).exists()
    wait_until(lambda: "destinations[stick].name" in gateway.active_config()["values"], 15)
    assert gateway.config.read_text() == old
    assert not config_changes.trial_marker_path(gateway.config).exists()


def test_after_a_power_cut_during_a_trial_the_old_configuration_is_in_force(gateway: Running) -> None:
    old = gateway.config.read_text()
    gateway.send(0, 5)
    applying = gateway.apply_in_background(gateway.text("", unreachable_region(gateway.folder)), "60s")
    wait_until(lambda: "destinations[region].name" in gateway.active_config()["values"], 10)
    applying.kill()
    applying.wait()
    gateway.program.kill()
    marker = msgspec.json.decode(config_changes.trial_marker_path(gateway.config).read_bytes())
    config_changes.trial_marker_path(gateway.config).write_bytes(
        msgspec.json.encode({**marker, "boot_id": "an earlier one"})
    )
    gateway.program.start()
    assert "destinations[stick].name" in gateway.active_config()["values"]
    assert gateway.config.read_text() == old
    assert gateway.backlog() == 5


def test_an_interrupted_apply_goes_back_at_once(gateway: Running) -> None:
    old = gateway.config.read_text()
    applying = gateway.apply_in_background(gateway.text("", unreachable_region(gateway.folder)), "60s")
    wait_until(lambda: "destinations[region].name" in gateway.active_config()["values"], 10)
    applying.send_signal(signal.SIGTERM)
    assert applying.wait(20) == 1
    assert gateway.config.read_text() == old
    assert "destinations[stick].name" in gateway.active_config()["values"]


@pytest.mark.parametrize("stage", ["copied", "marked", "swapped"])
def test_wherever_the_power_fails_one_of_the_two_configurations_is_whole(tmp_path: Path, stage: str) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("old")
    config_changes.begin_trial(config, b"new", probe_s=60)
    assert (config_changes.active_config_path(config), config.read_text()) == (config, "new")
    if stage != "swapped":
        config.write_text("old")
    if stage == "copied":
        config_changes.trial_marker_path(config).unlink()
    else:
        marker = msgspec.json.decode(config_changes.trial_marker_path(config).read_bytes())
        config_changes.trial_marker_path(config).write_bytes(
            msgspec.json.encode({**marker, "boot_id": "other"})
        )
    assert config_changes.active_config_path(config).read_text() == "old"
    if stage != "copied":
        config_changes.restore_previous_config(config)
    assert (config.read_text(), config_changes.trial_time_left_s(config)) == ("old", None)


def test_a_trial_is_over_at_its_deadline_and_a_damaged_marker_is_one_that_is_over(tmp_path: Path) -> None:
    config = tmp_path / "gateway.toml"
    config.write_text("old")
    config_changes.begin_trial(config, b"new", probe_s=0.05)
    time.sleep(0.1)
    assert config_changes.active_config_path(config) == config_changes.previous_config_path(config)
    config_changes.trial_marker_path(config).write_text("{")
    assert config_changes.active_config_path(config) == config_changes.previous_config_path(config)
    config_changes.confirm_trial(config)
    assert config_changes.active_config_path(config) == config
