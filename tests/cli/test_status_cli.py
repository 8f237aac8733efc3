"""`tidegate status`: what the page shows, on a terminal of any width, once or for ever."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from gateway.commands.status_display import render_chart, render_status, sparkline
from gateway.query.series_chart import Chart
from gateway.status.document import (
    Advice,
    Alert,
    AlertsStatus,
    DestinationStatus,
    DevicesStatus,
    FlashWearStatus,
    IngressStatus,
    Loss,
    LossesStatus,
    QuarantineReasonStatus,
    QuarantineStatus,
    RateHistoryStatus,
    SilentDevice,
    SpoolStatus,
    Status,
)
from tests.support.free_ports import free_port
from tests.support.programs import ROOT, Program, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NOW_US = 1_790_000_000_000_000
HOSTILE = "\x1b[31mred\x07[bold]\u202eback"


def everything() -> Status:
    """A document in which every part has something to say, hostile texts in all that devices choose."""
    return Status(
        gateway_id="barn-1",
        version="1.2.3",
        running=True,
        at_us=NOW_US,
        uptime_s=93_784,
        ingress=IngressStatus(7, 1234, 1230, 1300, 4321.5, 12, 3, None, ""),
        spool=SpoolStatus("spool.db", "e", 2_000_000, 9, 3_000_000, 10**10, 39.5, 9 * 10**9, 1_500_000, 77),
        destinations=[
            DestinationStatus(
                "region",
                "ingest",
                "waiting",
                f"no {HOSTILE}",
                10,
                0,
                0,
                0,
                0,
                None,
                480_000,
                5_880_000,
                93_784,
                None,
            ),
            DestinationStatus("cloud", "influxdb", "idle", "", 99, 5, 0, 0, 0, NOW_US, 0, 0, None, 0.0),
        ],
        remarks=[Advice("critical", f"look: {HOSTILE}"), Advice("note", "by the way")],
        devices=DevicesStatus(9, 8, 1, 300, [SilentDevice(HOSTILE, NOW_US - 3_600_000_000, 2)]),
        quarantine=QuarantineStatus(
            5, 6, [QuarantineReasonStatus("not_json", 5, NOW_US, "listen", HOSTILE, "no JSON here")]
        ),
        losses=LossesStatus(
            1, 4242, [Loss(NOW_US, "region", "reading", 4242, "no_room", "rollup 60 s", NOW_US, NOW_US)]
        ),
        alerts=AlertsStatus(1, 1, [Alert("hot", "critical", HOSTILE, "41 > 35", NOW_US, firing=True)]),
        wear=FlashWearStatus("mmcblk0", 86_400, 1.5e9, 2.5e9, 12.3, 6e13, 65.7),
        recent=RateHistoryStatus(20, NOW_US, [0, 10, 20], {"region": [1, 2, 3]}),
    )


def rendered(content: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=False, legacy_windows=False)
    console.print(content)
    return console.file.getvalue()  # type: ignore[attr-defined]  # it is a StringIO


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_nothing_is_wider_than_the_terminal(width: int):
    lines = rendered(render_status(everything(), width), width).splitlines()
    assert max(map(len, lines)) <= width


def test_everything_is_said():
    text = rendered(render_status(everything(), 200), 200)
    for words in (
        *("barn-1", "1 d 2 h", "4,322", "480 k", "5.88 MB", "39 d 12 h", "8 of 9 devices", "4,242"),
        *("no room", "rollup 60 s", "not json", "41 > 35", "critical", "1.5 GB a day", "over 10 years"),
        *("12.3 times", "1 h 0 min ago", "77 readings in damaged", "retrying"),
    ):
        assert words in text, words


def test_texts_of_devices_neither_command_the_terminal_nor_read_as_markup():
    text = rendered(render_status(everything(), 120), 120)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert text.count(r"\x1b[31mred\x07[bold]\u202eback") >= 4


def test_a_wider_terminal_shows_more_columns():
    assert "last receipt" not in rendered(render_status(everything(), 80), 80)
    assert "last receipt" in rendered(render_status(everything(), 120), 120)


def test_bars_are_in_proportion_to_the_greatest():
    assert sparkline([0, 7, 14]) == "▁▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert len(sparkline(list(range(1000)))) == 30


def test_a_chart_reaches_from_corner_to_corner():
    steps = list(range(8))
    chart = Chart(
        sensor_id="a",
        sensor_type=HOSTILE,
        unit="K",
        since_us=0,
        until_us=800,
        step_us=100,
        readings=8,
        complete=True,
        at_us=[100 * step for step in steps],
        mean=[float(step) for step in steps],
        least=[float(step) for step in steps],
        greatest=[float(step) for step in steps],
        count=[1] * 8,
        flagged=[0] * 8,
    )
    narrow = rendered(render_chart(chart, 20), 20)
    lines = [line.partition("│")[2] for line in narrow.splitlines() if "│" in line]
    assert "\u2800" not in {lines[0][-1], lines[-1][0]}
    assert lines[0][0] == lines[-1][-1] == "\u2800"
    text = rendered(render_chart(chart, 80), 80)
    assert "between 0.00 and 7.00 K" in text
    assert "\x1b" not in text


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a running gateway that reads its own host."""
    folder = tmp_path_factory.mktemp("status")
    port, path = free_port(), folder / "gateway.toml"
    path.write_text(
        f'gateway_id = "gw-1"\n[spool]\npath = "spool.db"\n[ingress.listen]\nport = {free_port()}\n'
        f'[ingress.host]\nperiod_s = 0.2\n[status]\nport = {port}\ntokens_file = "tokens"\n'
    )
    token = run("token", "add", "me", "--config", str(path)).stdout
    (folder / "token").write_text(token)
    program = Program(
        folder, "gateway", "gateway", "-c", str(path), ready_url=f"http://127.0.0.1:{port}/readyz"
    )
    program.start()
    try:
        asked = ("status", "-c", str(path), "--series", "gw-1/cpu_percent")
        wait_until(lambda: "latest" in run(*asked).stdout, 20)
        yield path
    finally:
        program.kill()


def test_a_day_of_a_series_is_drawn_on_request_live_and_stopped(config: Path, tmp_path: Path):
    live = run("status", "-c", str(config), "--series", "gw-1/cpu_percent")
    assert (live.returncode, "gw-1/cpu_percent  latest" in live.stdout) == (0, True), live.stderr
    assert "no series is called" in run("status", "-c", str(config), "--series", "gw-1/none").stdout
    assert run("status", "-c", str(config), "--series", "gw-1").returncode == 2
    elsewhere = tmp_path / "gateway.toml"
    elsewhere.write_text(
        f'gateway_id = "gw-1"\n[spool]\npath = "{config.parent / "spool.db"}"\n[status]\nenabled = false\n'
    )
    stopped = run("status", "-c", str(elsewhere), "--series", "gw-1/cpu_percent")
    assert "not running" in stopped.stdout
    assert "gw-1/cpu_percent  latest" in stopped.stdout


def test_watching_goes_on_until_interrupted(config: Path):
    watching = subprocess.Popen(
        [sys.executable, "-m", "gateway", "status", "-c", str(config), "--watch", "--every", "0.2", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert watching.stdout is not None
    seen = [json.loads(watching.stdout.readline())["at_us"] for _ in range(4)]
    assert seen == sorted(seen)
    assert seen[0] < seen[-1]
    watching.send_signal(signal.SIGINT)
    _, errors = watching.communicate(timeout=10)
    assert (watching.returncode, errors) == (0, b"")


def test_on_a_terminal_it_is_watched_in_place_and_the_screen_is_given_back(config: Path):
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "gateway", "status", "-c", str(config), "--watch", "--every", "0.2"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"},
    )
    os.close(theirs)
    screen = read_until(ours, lambda text: text.count(b"ingress") >= 3)
    assert b"\x1b[?1049h" in screen
    watching.send_signal(signal.SIGINT)
    rest = read_until(ours, lambda text: b"\x1b[?1049l" in text)
    assert b"\x1b[?25h" in rest
    assert b"Traceback" not in screen + rest
    assert watching.wait(10) == 0
    os.close(ours)


def test_from_another_machine_it_takes_a_token(config: Path):
    port = next(line for line in config.read_text().splitlines()[::-1] if line.startswith("port")).split()[-1]
    url = f"http://localhost:{port}"
    assert run("status", "--url", url, "--token-file", str(config.parent / "token")).returncode == 0
    missing = run("status", "--url", url, "--token-file", str(config.parent / "none"))
    assert (missing.returncode, "cannot be read" in missing.stderr) == (2, True)
    assert run("status", "--url", f"http://127.0.0.1:{free_port()}").returncode == 2


def read_until(descriptor: int, enough: object) -> bytes:
    text, deadline = b"", time.monotonic() + 20
    while not enough(text) and time.monotonic() < deadline:  # type: ignore[operator]  # a function of bytes
        ready, _, _ = select.select([descriptor], [], [], 0.5)
        if ready:
            try:
                text += os.read(descriptor, 65_536)
            except OSError:  # the other end is closed
                break
    return text
