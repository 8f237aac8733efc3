"""`tidegate config init | show | explain | diff`: the configuration as a person meets it."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from cloud_sync.runtime.secret_files import MASK
from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.cli import app
from gateway.settings import gateway_settings
from gateway.settings.config_changes import (
    diff_settings,
    find_restart_reason,
    flatten_settings,
    redact_value,
)
from gateway.settings.reference import format_toml_value, list_keys
from tests.support.programs import run

if TYPE_CHECKING:
    from typer.testing import Result

A_SETTING = re.compile(r"^#(?=\[|[a-z_]+ = )", re.MULTILINE)
STANDS_ALONE = {"preset", "base"}
"""Keys of a rule for payloads that exclude every other one."""
ALONE = re.compile(rf"^({'|'.join(STANDS_ALONE)}) = .*$", re.MULTILINE)
KEYS = list_keys(gateway_settings.GatewaySettings)
SITES = ("barn", "broker", "cloud", "stick", "trial")
SECRET = "s3cr3t-0f-th3-s1te"


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TIDEGATE_"):
            monkeypatch.delenv(name)


def config(*words: str | Path) -> Result:
    outcome = CliRunner().invoke(app, ["config", *map(str, words)], terminal_width=200)
    assert outcome.exception is None or isinstance(outcome.exception, SystemExit), outcome.exception
    return outcome


def values(path: Path) -> dict[str, tuple[Any, str]]:
    shown = json.loads(config("show", path, "--json").stdout)
    return {entry["key"]: (entry["value"], entry["source"]) for entry in shown}


def written(folder: Path, text: str, name: str = "gateway.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def minimal(folder: Path, more: str = "", name: str = "gateway.toml") -> Path:
    return written(folder, f'gateway_id = "g"\n{more}\n[spool]\npath = "spool.db"\n', name)


# init, and the way round: everything that init shows is taken, and show tells it again


@pytest.mark.parametrize("site", SITES)
def test_what_init_writes_is_a_configuration_but_for_files_that_only_the_site_has(
    tmp_path: Path, site: str
) -> None:
    path = tmp_path / "gateway.toml"
    outcome = config("init", path, "--site", site, "--spool", tmp_path / "spool.db")
    assert outcome.exit_code == 0
    given = gateway_settings.parse_settings_file(path)
    assert len(given.destinations) == 1
    if site == "trial":
        gateway_settings.load_settings(path)
        return
    with pytest.raises(InvalidSettingsError) as missing:
        gateway_settings.load_settings(path)
    assert {f.key.rpartition("_")[2] for f in missing.value.faults} == {"file"}
    assert all(f.key in outcome.stdout for f in missing.value.faults)


def test_init_writes_every_key_there_is_and_show_reads_each_of_them_back(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    config("init", path, "--site", "trial")
    path.write_text(ALONE.sub("", A_SETTING.sub("", path.read_text())))
    read = values(path)
    missing = []
    for key in KEYS:
        if key.is_table:
            continue
        places = [
            place
            for place in read
            if re.sub(r"\{[^}]*\}", "{}", re.sub(r"\[[^]]*\]", "[]", place)) == key.path
        ]
        expected = {str(path)}
        if key.name not in STANDS_ALONE and (not places or {read[p][1] for p in places} - expected):
            missing.append(key.path)
    assert missing == []
    table = tomllib.loads(path.read_text())
    for key in KEYS:
        if not key.is_table and "[]" not in key.path and key.path not in ("gateway_id", "spool.path"):
            value: Any = table
            for step in key.path.split("."):
                value = value[step]
            assert value == key.example, key.path


def test_init_does_not_write_over_what_is_there_unless_forced_and_asks_nothing_without_a_terminal(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, "mine")
    refused = run("config", "init", str(path))
    assert (refused.returncode, path.read_text()) == (2, "mine")
    assert "exists already" in refused.stderr
    assert run("config", "init", str(path), "--force").returncode == 0
    assert 'kind = "ingest"' in path.read_text()


def test_init_to_standard_output_is_nothing_but_the_file() -> None:
    outcome = config(
        "init", "-", "--site", "broker", "--gateway-id", "barn-7", "--broker", "mqtts://b.example"
    )
    table = tomllib.loads(outcome.stdout)
    assert (table["gateway_id"], table["ingress"]["subscribe"][0]["url"]) == ("barn-7", "mqtts://b.example")


# show


def test_show_tells_for_every_value_whether_file_environment_or_default_said_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_GATEWAY_INGRESS__LISTEN__PORT", "1999")
    monkeypatch.setenv("tidegate_gateway_log_level", "debug")
    path = minimal(tmp_path, "stop_within_s = 7")
    read = values(path)
    assert read["ingress.listen.port"] == (1999, "environment TIDEGATE_GATEWAY_INGRESS__LISTEN__PORT")
    assert read["stop_within_s"] == (7.0, str(path))
    assert read["status.port"] == (8421, "default")
    assert read["spool.path"] == (str(tmp_path / "spool.db"), str(path))
    assert "1999" in config("show", path).stdout
    assert "status.port" not in config("show", path, "--changed").stdout


def test_a_list_from_the_environment_is_named_as_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "TIDEGATE_GATEWAY_DESTINATIONS", '[{"kind": "file", "name": "stick", "directory": "out"}]'
    )
    read = values(minimal(tmp_path))
    assert read["destinations[stick].directory"][1] == "environment TIDEGATE_GATEWAY_DESTINATIONS"
    assert read["destinations[stick].compress"] == (True, "default")


def test_no_tool_repeats_what_an_address_or_a_secret_file_holds(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(SECRET)
    destination = (
        f'[[destinations]]\nname = "a"\nkind = "ingest"\nurl = "https://u:{SECRET}@region/x?token={SECRET}"\n'
        f'token_file = "token"\nproxy = "http://me:{SECRET}@proxy:3128"\n'
    )
    one = written(tmp_path, f'gateway_id = "g"\n[spool]\npath = "s"\n{destination}')
    two = minimal(tmp_path, name="two.toml")
    faulty = written(
        tmp_path, f'gateway_id = "g"\n[spool]\npath = "s"\n{destination}token = "{SECRET}"\n', "three"
    )
    badly = written(
        tmp_path,
        f'gateway_id = "g"\n[spool]\npath = "s"\n{destination.replace("http://me", "ftp://me")}',
        "four",
    )
    for words in (
        ("check", one),
        ("show", one),
        ("show", one, "--json"),
        ("diff", one, two),
        ("diff", two, one, "--json"),
        ("check", faulty),
        ("show", badly),
        ("check", badly),
    ):
        outcome = config(*words)
        assert SECRET not in outcome.output, words
    assert f"http://{MASK}@proxy:3128" in config("show", one).stdout


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("a.token", "x", MASK),
        ("a.webhook_headers", {"Authorization": "x"}, MASK),
        ("a.password", "", ""),
        ("a.token_file", "/etc/t", "/etc/t"),
        ("a.url", "https://u@h/p?api_key=1&x=2", f"https://{MASK}@h/p?api_key={MASK}&x=2"),
        ("a.keep_delivered_h", 3, 3),
        ("alerts.channel[ops].url", "https://chat.example/hooks/T0/B1/x", f"https://chat.example/{MASK}"),
        (
            "alerts.channel[ops].url",
            "https://u:p@chat.example/hooks/x",
            f"https://{MASK}@chat.example/{MASK}",
        ),
        ("alerts.channel[ops].sender", "a@b.example", "a@b.example"),
    ],
)
def test_what_looks_like_a_secret_is_masked(key: str, value: object, shown: object) -> None:
    assert redact_value(key, value) == shown


# explain


@pytest.mark.parametrize(
    "key", [key for key in KEYS if not key.is_table], ids=lambda k: f"{k.path}-{k.kinds}"
)
def test_every_key_is_explained_with_a_sentence_a_type_and_an_example_that_the_model_takes(key: Any) -> None:
    (told,) = [
        entry
        for entry in json.loads(config("explain", key.path, "--json").stdout)
        if entry["kinds"] == list(key.kinds) and entry["key"] == key.path
    ]
    assert len(told["description"].split()) >= 2
    assert told["type"]
    assert told["change"] in ("reload", "restart")
    assert tomllib.loads(f"x = {format_toml_value(key.example)}")["x"] == key.example


def test_explain_finds_a_key_by_its_last_part_a_table_by_its_name_and_offers_what_is_close() -> None:
    assert "ingress.listen.port" in config("explain", "port").stdout
    assert "period_s" in config("explain", "ingress.host").stdout
    words = config("explain", "spool.commit_interval_ms").stdout
    assert all(part in words for part in ("milliseconds", "default 5", "at most 60000", "needs a reload"))
    lost = config("explain", "spool.comit_interval")
    assert lost.exit_code == 2
    assert "did you mean spool.commit_interval_ms" in lost.output


# diff


def test_diff_says_what_a_reload_brings_about_and_what_takes_a_restart(tmp_path: Path) -> None:
    old = minimal(tmp_path, name="old.toml")
    new = minimal(tmp_path, 'log_level = "debug"', name="new.toml")
    assert config("diff", old, old).exit_code == 0
    outcome = config("diff", old, new)
    assert outcome.exit_code == 1
    assert '~ log_level: "info" -> "debug" (reload)' in outcome.stdout
    assert "a reload is enough" in outcome.stdout
    new.write_text(new.read_text() + "[status]\nport = 1\n")
    told = json.loads(config("diff", old, new, "--json").stdout)
    assert told["needs"] == "restart"
    assert [(c["key"], c["restart"]) for c in told["changes"]] == [
        ("status.port", "the port is bound"),
        ("log_level", ""),
    ]
    assert config("diff", old, tmp_path / "absent").exit_code == 2


def test_a_destination_put_in_front_of_others_does_not_change_them() -> None:
    def given(*names: str) -> dict[str, Any]:
        tables = [{"kind": "file", "name": name, "directory": Path(name)} for name in names]
        return flatten_settings(
            gateway_settings.GatewaySettings.model_validate(
                {"gateway_id": "g", "spool": {"path": "s"}, "destinations": tables}
            )
        )

    found = diff_settings(given("b"), given("a", "b"))
    assert {change.key.partition("]")[0] for change in found} == {"destinations[a"}
    assert all(change.added and not change.restart for change in found)


RELOADABLE = (
    "alerts",
    "checks",
    "destinations",
    "ingress.host.period_s",
    "ingress.listen.max_connections",
    "ingress.listen.max_packet_bytes",
    "ingress.rule",
    "log_level",
    "processing",
    "report_by_exception",
    "rollups.close_every_s",
    "rollups.idle_s",
    "rollups.keep_d",
    "rollups.lateness_s",
    "rollups.max_open_windows",
    "spool.commit_interval_ms",
    "spool.give_up",
    "spool.keep_delivered_h",
    "spool.max_age_d",
    "spool.max_bytes",
    "spool.max_pending_bytes",
    "spool.max_series",
    "spool.min_free_bytes",
    "spool.on_full",
    "stop_within_s",
)


def test_exactly_these_keys_and_tables_can_be_reloaded() -> None:
    for key in KEYS:
        path = key.path.replace("[]", "").replace("{}", "")
        expected = any(path == known or path.startswith(f"{known}.") for known in RELOADABLE)
        assert (not key.restart) is expected, path
        assert key.restart == find_restart_reason(path)
    assert find_restart_reason("spool.path")
    assert find_restart_reason("something.new") == "it is read once, at the start"
