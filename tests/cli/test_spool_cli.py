"""`tidegate spool ...` as a person meets it: output, exit codes, a stopped spool and a live one."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import pty
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from paho.mqtt import publish

from gateway.spool.quarantine_items import QuarantineItem
from tests.support.free_ports import free_port
from tests.support.open_spool import NOW_US, open_spool
from tests.support.programs import ROOT, Program, run

_ESCAPE = "\x1b[2J"


async def made(path) -> None:
    async with open_spool(path) as spool:
        for start in range(0, 100, 10):
            await spool.append([(f"s{i % 3}", NOW_US + i, float(i)) for i in range(start, start + 10)])
        items = [
            QuarantineItem.from_payload(
                received_at_us=NOW_US,
                source="listen",
                topic=f"a/{_ESCAPE}",
                reason="not_json",
                detail=_ESCAPE,
                payload=f"{{{_ESCAPE}".encode(),
            )
        ] * 3
        await spool.appender.append(None, items, now_us=NOW_US)
        await spool.deliveries.register("region", "ingest", now_us=NOW_US)


@pytest.fixture(scope="module")
def spool(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("spool") / "spool.db"
    asyncio.run(made(path))
    return str(path)


def test_info_and_check_say_what_is_there(spool):
    shown = run("spool", "info", spool)
    assert shown.returncode == 0
    assert "not in use" in shown.stdout
    assert "region (ingest)" in shown.stdout
    document = json.loads(run("spool", "info", spool, "--json").stdout)
    assert document["classes"]["reading"]["rows"] == 100
    checked = run("spool", "check", spool)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "sound; 100 readings" in checked.stdout


def test_a_damaged_spool_is_exit_1_and_a_missing_one_2(spool, tmp_path):
    damaged = tmp_path / "damaged.db"
    with (
        closing(sqlite3.connect(spool)) as source,
        closing(sqlite3.connect(damaged, isolation_level=None)) as copy,
    ):
        source.backup(copy)
        copy.execute("UPDATE segment SET block = zeroblob(99) WHERE last_commit = 2")
    checked = run("spool", "check", str(damaged), "--json")
    assert checked.returncode == 1
    assert json.loads(checked.stdout)["problems"][0]["where"] == "reading segment 2"
    exported = run("spool", "export", str(damaged), "--out", "-")
    assert exported.returncode == 1
    assert len(exported.stdout.splitlines()) == 91
    assert "10 readings in damaged segments were skipped" in exported.stderr
    for command in (("info",), ("check",), ("read",), ("quarantine", "list"), ("compact",)):
        missing = run("spool", *command, str(tmp_path / "missing.db"))
        assert missing.returncode == 2
        assert missing.stderr.startswith("tidegate: ")
        assert "Traceback" not in missing.stderr
    assert run("spool", "info").returncode == 2


def test_read_prints_the_newest_readings_of_a_series_sorted_by_time(spool):
    done = run("spool", "read", spool, "--series", "s1/t", "--limit", "3", "--format", "csv")
    assert [row["value"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["91.0", "94.0", "97.0"]
    first = run("spool", "read", spool, "--oldest", "--limit", "2", "--json").stdout.splitlines()
    assert [json.loads(line)["value"] for line in first] == [0.0, 1.0]
    none = run("spool", "read", spool, "--since", "2099-01-01")
    assert (none.returncode, none.stdout) == (0, "")
    wrong = run("spool", "read", spool, "--since", "tea time")
    assert wrong.returncode == 2
    assert "--since: 'tea time' is not a time" in wrong.stderr


def test_export_writes_a_file_once_and_a_closed_pipe_is_no_fault(spool, tmp_path):
    out = tmp_path / "o.csv.gz"
    assert run("spool", "export", spool, "-o", str(out)).stdout == f"{out}: 100 readings\n"
    again = run("spool", "export", spool, "-o", str(out))
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert run("spool", "export", spool, "-o", "o.xlsx").returncode == 2
    piped = subprocess.run(
        f"{sys.executable} -m gateway spool export {spool} -o - | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert piped.stdout.startswith("time,")
    assert piped.stderr == ""


def test_quarantine_is_listed_and_shown_without_a_control_character(spool):
    for command in (
        ("list", spool),
        ("show", spool, "1"),
        ("list", spool, "--json"),
        ("show", "1", spool, "--json"),
    ):
        done = run("spool", "quarantine", *command)
        assert done.returncode == 0
        assert done.stdout.replace("\n", "").isprintable()
    assert r"\x1b[2J" in run("spool", "quarantine", "show", spool, "2").stdout
    assert run("spool", "quarantine", "show", spool, "2", "--raw").stdout == "{" + _ESCAPE
    missing = run("spool", "quarantine", "show", spool, "99")
    assert missing.returncode == 1
    assert "no item 99" in missing.stderr


def test_quarantine_is_dropped_only_when_asked_for_and_confirmed(tmp_path):
    path = tmp_path / "spool.db"
    asyncio.run(made(path))
    unsaid = run("spool", "quarantine", "drop", str(path), "1")
    assert unsaid.returncode == 2
    assert "--yes" in unsaid.stderr
    assert run("spool", "quarantine", "drop", str(path), "--yes").returncode == 2
    assert run("spool", "quarantine", "drop", str(path), "1", "99", "--yes").returncode == 1
    assert (
        run("spool", "quarantine", "drop", str(path), "--reason", "not_json", "--yes").stdout
        == "2 items dropped\n"
    )
    assert json.loads(run("spool", "quarantine", "list", str(path), "--json").stdout)["items"] == []


def test_on_a_terminal_drop_asks_and_long_work_shows_how_far_it_is(spool):
    assert "opening" in _on_terminal("spool", "check", spool, answer="")
    asked = _on_terminal("spool", "quarantine", "drop", spool, "1", answer="n\n")
    assert "Drop 1 items permanently?" in asked
    assert len(json.loads(run("spool", "quarantine", "list", spool, "--json").stdout)["items"]) == 3


def _on_terminal(*arguments: str, answer: str) -> str:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    os.write(ours, answer.encode())
    said = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            break
        if not part:
            break
        said += part
    process.wait(30)
    os.close(ours)
    return said.decode()


def test_compact_merges_on_a_stopped_spool_and_leaves_it_sound(tmp_path):
    path = tmp_path / "spool.db"
    asyncio.run(made(path))
    before = run("spool", "export", str(path), "-o", "-").stdout
    done = json.loads(run("spool", "compact", str(path), "--json").stdout)
    assert (done["segments_before"], done["segments_after"], done["rows"]) == (10, 1, 100)
    assert sorted(run("spool", "export", str(path), "-o", "-").stdout.splitlines()) == sorted(
        before.splitlines()
    )
    assert run("spool", "check", str(path)).returncode == 0


def test_every_tool_works_while_the_gateway_runs(tmp_path):
    broker, status = free_port(), free_port()
    config = tmp_path / "gateway.toml"
    config.write_text(
        f'gateway_id = "gw-7"\n[spool]\npath = "spool.db"\n[ingress.listen]\nport = {broker}\n'
        f"[ingress.host]\nenabled = false\n[status]\nport = {status}\n"
    )
    gateway = Program(
        tmp_path, "gateway", "gateway", "-c", str(config), ready_url=f"http://127.0.0.1:{status}/readyz"
    )
    gateway.start()
    try:
        good = [("sensors/a/t", f'{{"value": {i}}}', 1, False) for i in range(20)]
        bad = [("plant/a/t", '{"value": 77}', 1, False)] * 2
        publish.multiple([*good, *bad], hostname="127.0.0.1", port=broker)
        info = json.loads(run("spool", "info", "-c", str(config), "--json").stdout)
        assert (info["live"], info["gateway_id"], info["quarantined"]) == (True, "gw-7", 2)
        assert info["classes"]["reading"]["rows"] == 20
        assert run("spool", "check", "-c", str(config)).returncode == 0
        assert len(run("spool", "export", "-c", str(config), "-o", "-").stdout.splitlines()) == 21
        assert run("spool", "quarantine", "drop", "-c", str(config), "1", "--yes").returncode == 0
        for command in (
            ("compact", str(tmp_path / "spool.db")),
            ("quarantine", "retry", str(tmp_path / "spool.db"), "2"),
        ):
            refused = run("spool", *command)
            assert refused.returncode == 2
            assert "use --config" in refused.stderr
        assert "segments became 1" in run("spool", "compact", "-c", str(config)).stdout
        asked = run("spool", "quarantine", "retry", "--all", "-c", str(config))
        assert (asked.returncode, "2 stays: still bad: unknown_topic" in asked.stdout) == (1, True)
        publish.single("sensors/a/t", '{"value": 20}', qos=1, hostname="127.0.0.1", port=broker)
        assert gateway.stop() == 0
    finally:
        gateway.kill()
    stays = run("spool", "quarantine", "retry", "-c", str(config), "--all")
    assert stays.returncode == 1
    assert "2 stays: still bad: unknown_topic" in stays.stdout
    topic = ("--topic", "plant/{sensor_id}/{sensor_type}")
    done = run("spool", "quarantine", "retry", "-c", str(config), "2", *topic, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["stored"] == 1
    assert len(run("spool", "export", "-c", str(config), "-o", "-").stdout.splitlines()) == 23
    assert run("spool", "check", "-c", str(config)).returncode == 0
