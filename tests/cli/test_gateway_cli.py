"""`tidegate gateway` and `status` as a person and as systemd meet them: messages, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from paho.mqtt import publish

from gateway.cli import _GROUPS
from tests.support.free_ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WITHIN_S = 30.0


def tidegate(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "gateway", *map(str, arguments)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
    )


def environment() -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("TIDEGATE_")}
    return {**plain, "COLUMNS": "140"}


class Site:
    """A gateway's configuration in a folder of its own, and the gateway when it runs."""

    def __init__(self, folder: Path, *, port: int = 0, status_port: int = 0, spool: str = "spool.db") -> None:
        self.port = port or free_port()
        self.status_port = status_port or free_port()
        self.config = folder / "gateway.toml"
        folder.mkdir(exist_ok=True)
        self.config.write_text(
            f'gateway_id = "{folder.name}"\nstop_within_s = 10\n\n[spool]\npath = "{spool}"\n\n'
            f"[ingress.listen]\nport = {self.port}\n\n[ingress.host]\nenabled = false\n\n"
            f"[status]\nport = {self.status_port}\n\n"
            '[[destinations]]\nname = "stick"\nkind = "file"\ndirectory = "out"\n'
            "min_free_bytes = 0\nflush_s = 0.1\n"
        )

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[str]]:
        """The gateway, from ready on; killed at the end unless it has ended."""
        with subprocess.Popen(
            (sys.executable, "-m", "gateway", "gateway", "--config", str(self.config)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        ) as process:
            try:
                self._wait_until_ready(process)
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def _wait_until_ready(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + _WITHIN_S
        while time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            try:
                if httpx.get(f"http://127.0.0.1:{self.status_port}/readyz", trust_env=False).is_success:
                    return
            except httpx.HTTPError:
                time.sleep(0.05)
        pytest.fail("the gateway did not become ready")

    def publish(self, payload: bytes, topic: str = "sensors/pump-7/temperature") -> None:
        """Publish with an MQTT library that is not ours; returns once it is acknowledged."""
        publish.single(topic, payload, qos=1, hostname="127.0.0.1", port=self.port)

    def status(self) -> dict[str, Any]:
        outcome = tidegate("status", "--config", self.config, "--json")
        assert outcome.returncode == 0, outcome.stderr
        document: dict[str, Any] = json.loads(outcome.stdout)
        return document


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and log of a gateway that was told to stop."""
    log = process.communicate(timeout=_WITHIN_S)[1]
    return process.returncode, log


def said(outcome: subprocess.CompletedProcess[str]) -> str:
    """The one message of a command that could not go on."""
    assert outcome.returncode == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    messages = [line for line in outcome.stderr.splitlines() if line.startswith("tidegate: ")]
    assert len(messages) == 1, outcome.stderr
    assert outcome.stderr.endswith(messages[0] + "\n")
    return messages[0]


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_gateway_with_exit_code_0_and_what_it_acknowledged_is_kept(
    tmp_path: Path, stop: signal.Signals
) -> None:
    site = Site(tmp_path / "g")
    with site.running() as process:
        site.publish(b'{"value": 21.5}')
        process.send_signal(stop)
        code, log = ended(process)
    assert (code, "Traceback" in log) == (0, False), log
    assert site.status()["spool"]["readings_ever"] == 1


def test_a_gateway_that_is_stopped_and_started_goes_on_with_the_same_spool(tmp_path: Path) -> None:
    site = Site(tmp_path / "g")
    epochs = set()
    for _ in range(2):
        with site.running() as process:
            site.publish(b'{"value": 1}')
            epochs.add(site.status()["spool"]["epoch"])
            process.terminate()
            assert ended(process)[0] == 0
    assert site.status()["spool"]["readings_ever"] == 2
    assert len(epochs) == 1


def test_a_fault_in_the_configuration_is_one_message_and_nothing_is_made(tmp_path: Path) -> None:
    site = Site(tmp_path / "g")
    site.config.write_text(site.config.read_text().replace("path =", "pth ="))
    outcome = tidegate("gateway", "--config", site.config)
    assert outcome.returncode == 2
    assert "spool.path: is missing" in outcome.stderr
    assert "spool.pth: unknown key; did you mean 'path'?" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert list(site.config.parent.iterdir()) == [site.config]


@pytest.mark.parametrize(
    ("given", "instead", "words"),
    [
        ("[[dest", "colour = 1\n[[dest", "status.colour: unknown key"),
        ('kind = "file"', 'kind = "ingest"\nurl = "region:8420"\ntoken_file = "t"', "must be an http:// or"),
        (
            'kind = "file"',
            'kind = "ingest"\nurl = "https://r"\ntoken_file = "t"',
            "No such file or directory",
        ),
    ],
    ids=["unknown key", "bad URL", "missing secret file"],
)
def test_the_gateway_does_not_start_with_a_fault_that_config_check_would_tell(
    tmp_path: Path, given: str, instead: str, words: str
) -> None:
    site = Site(tmp_path / "g")
    text = site.config.read_text()
    if "kind" in given:
        text = text.replace('directory = "out"\nmin_free_bytes = 0\n', "")
    site.config.write_text(text.replace(given, instead, 1))
    started, checked = tidegate("gateway", "--config", site.config), tidegate("config", "check", site.config)
    assert words in said(started)
    assert said(started) == said(checked)


def test_a_port_that_is_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for site in (Site(tmp_path / "a", port=port), Site(tmp_path / "b", status_port=port)):
            message = said(tidegate("gateway", "--config", site.config))
            assert str(port) in message
            assert "address already in use" in message.lower()


def test_a_spool_in_use_by_another_gateway_is_left_alone(tmp_path: Path) -> None:
    first = Site(tmp_path / "a")
    second = Site(tmp_path / "b", spool="../a/spool.db")
    with first.running() as process:
        message = said(tidegate("gateway", "--config", second.config))
        assert "spool.db: another gateway is using this spool" in message
        first.publish(b'{"value": 1}')
        process.terminate()
        assert ended(process)[0] == 0


def test_a_spool_in_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    site = Site(tmp_path / "g", spool="../file/spool.db")
    assert "file/spool.db: " in said(tidegate("gateway", "--config", site.config))


def test_status_of_a_running_gateway_counts_what_came_and_where_it_went(tmp_path: Path) -> None:
    site = Site(tmp_path / "g")
    with site.running():
        site.publish(b'[{"value": 1}, {"value": 2}]')
        site.publish(b"no reading")
        deadline = time.monotonic() + _WITHIN_S
        while (document := site.status())["destinations"][0]["delivered"] < 2:
            assert time.monotonic() < deadline
        shown = tidegate("status", "--url", f"http://127.0.0.1:{site.status_port}").stdout
    ingress, (stick,) = document["ingress"], document["destinations"]
    assert document["running"]
    assert (ingress["publishes"], ingress["acknowledged"], ingress["readings"]) == (2, 2, 2)
    assert ingress["quarantined"] == 1
    assert (stick["name"], stick["state"], stick["backlog_readings"]) == ("stick", "idle", 0)
    assert "gateway g " in shown
    assert "2 of 2 publishes acknowledged" in shown
    assert "stick (file)" in shown


def test_status_of_a_stopped_gateway_is_read_from_its_spool_and_said_to_be(tmp_path: Path) -> None:
    site = Site(tmp_path / "g")
    with site.running() as process:
        site.publish(b'{"value": 1}')
        process.kill()
    document = site.status()
    assert not document["running"]
    assert document["spool"]["readings_ever"] == 1
    assert "not running; read from its spool" in tidegate("status", "--config", site.config).stdout


def test_status_of_a_gateway_that_never_ran_says_that_there_is_no_spool_and_makes_none(
    tmp_path: Path,
) -> None:
    site = Site(tmp_path / "g")
    assert "spool.db: there is no spool here" in said(tidegate("status", "--config", site.config))
    assert list(site.config.parent.iterdir()) == [site.config]


def test_status_says_where_nobody_answers_and_what_to_name_when_nothing_is_named() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert f"{url}: no gateway answers" in said(tidegate("status", "--url", url))
    assert "--config FILE" in said(tidegate("status"))


@pytest.mark.parametrize("group", ["", *_GROUPS])
def test_every_group_explains_itself(group: str) -> None:
    outcome = tidegate(*filter(None, [group]), "--help")
    assert outcome.returncode == 0, outcome.stderr
    assert f"Usage: tidegate {group}".rstrip() in outcome.stdout
    assert not group or len(outcome.stdout.split()) > 20


def test_an_unknown_command_is_refused_in_words() -> None:
    outcome = tidegate("gatway")
    assert outcome.returncode == 2
    assert "No such command 'gatway'" in outcome.stderr
