"""`tidegate config check`, and the example configuration it is given first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from cloud_sync.http import tokens
from cloud_sync.runtime.settings_file import InvalidSettingsError
from gateway.auth import device_passwords
from gateway.settings import gateway_settings
from gateway.settings.alerts import AlertRule, MailSettings, WebhookSettings
from gateway.settings.destinations import FileDestination, InfluxDestination, IngestDestination
from gateway.settings.processing import CheckRule, DeadbandRule
from gateway.settings.sources import Subscribe
from tests.support.certificates import Authority

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLE = Path(__file__).parents[2] / "config" / "gateway.toml"
A_SETTING = re.compile(r"^#(?=\[|[a-z_]+ = )", re.MULTILINE)
CHOSEN_BY_THE_SITE = {"gateway_id", "path", "name", "kind", "url", "directory", "token_file", "password_file"}
SECRETS = (
    "regional.token",
    "cloud.token",
    "old-cloud.password",
    "broker.password",
    "ops.token",
    "mail.password",
)
LISTS = {"destinations", "subscribe", "rule", "report_by_exception", "channel"}

MINIMAL = 'gateway_id = "g"\n[spool]\npath = "spool.db"\n'


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TIDEGATE_"):
            monkeypatch.delenv(name)


def check(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "gateway", "config", "check", str(path)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def written(folder: Path, text: str) -> Path:
    path = folder / "gateway.toml"
    path.write_text(text)
    return path


def told(outcome: subprocess.CompletedProcess[str]) -> list[str]:
    """The faults of a check that found some, one a line."""
    assert outcome.returncode == 2
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    return outcome.stderr.splitlines()


def spoken_example(folder: Path) -> Path:
    """The example with every key that it shows in force, and the secrets it names."""
    for secret in SECRETS:
        (folder / secret).write_text("a secret\n")
    (folder / "ops.url").write_text("https://chat.example/hooks/a-secret\n")
    Authority(folder, "region-ca").issue("gateway", "barn-1")
    authority = Authority(folder, "devices-ca")
    authority.issue("server", "localhost")
    authority.revocations().rename(folder / "devices-crl.pem")
    device_passwords.add_device(folder / "passwords", "pump-1")
    tokens.add_token(folder / "http-tokens", "hut-1")
    tokens.add_token(folder / "status.tokens", "anna", "view")
    return written(folder, A_SETTING.sub("", EXAMPLE.read_text()))


def given_defaults(table: BaseModel, given: dict[str, Any], place: str) -> Iterator[tuple[str, Any, Any]]:
    """Every key of the example with what it says and what the default is."""
    for key, field in type(table).model_fields.items():
        here = f"{place}{key}"
        value = getattr(table, key)
        if isinstance(value, BaseModel):
            yield from given_defaults(value, given.get(key, {}), f"{here}.")
        elif key not in LISTS and key not in CHOSEN_BY_THE_SITE:
            yield here, given.get(key), field.default


def test_the_example_is_a_configuration_that_works_as_it_stands(tmp_path: Path) -> None:
    outcome = check(written(tmp_path, EXAMPLE.read_text()))
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert outcome.stdout.endswith("ok. gateway barn-1, destinations: none\n")


def test_the_example_shows_every_key_with_its_default(tmp_path: Path) -> None:
    path = spoken_example(tmp_path)
    loaded, given = gateway_settings.load_settings(path), tomllib.loads(path.read_text())
    shown = list(given_defaults(loaded, given, ""))
    for destination, table in zip(loaded.destinations, given["destinations"], strict=True):
        shown += given_defaults(destination, table, f"{destination.name}.")
    for subscribe, table in zip(loaded.ingress.subscribe, given["ingress"]["subscribe"], strict=True):
        assert set(table) == set(Subscribe.model_fields)
        free = {
            "url",
            "filters",
            "unsubscribe",
            *(k for k, f in Subscribe.model_fields.items() if f.default is None),
        }
        shown += [s for s in given_defaults(subscribe, table, "") if s[0] not in free]
    for table in given["checks"]["rule"]:
        assert set(table) == set(CheckRule.model_fields)
    assert set(given["report_by_exception"][0]) == set(DeadbandRule.model_fields)
    assert set(given["alerts"]["rule"][0]) == set(AlertRule.model_fields)
    webhook, mail = given["alerts"]["channel"]
    assert set(webhook) == set(WebhookSettings.model_fields)
    assert set(mail) == set(MailSettings.model_fields)
    different = [(key, said, default) for key, said, default in shown if said != default]
    assert [key for key, _, default in different if default is not None] == ["old-cloud.api"]
    assert [key for key, said, _ in shown if said is None and "cloud" not in key] == []
    assert len(shown) > 30


def test_the_example_shows_every_kind_of_destination_with_every_key_it_takes(tmp_path: Path) -> None:
    given = tomllib.loads(spoken_example(tmp_path).read_text())
    keys: dict[str, set[str]] = {}
    for table in given["destinations"]:
        keys.setdefault(table["kind"], set()).update(table)
    assert keys == {
        "ingest": set(IngestDestination.model_fields),
        "influxdb": set(InfluxDestination.model_fields),
        "file": set(FileDestination.model_fields),
    }


def test_faults_in_different_tables_are_told_in_one_go_each_with_file_and_key(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        spol = 1
        gateway_id = "barn 1"
        [spool]
        commit_interval_ms = -1
        [ingress.listen]
        prt = 1883
        topic = "sensors/{sensor}"
        [[destinations]]
        name = "a"
        kind = "ingest"
        url = "ftp://region"
        token_file = "token"
        [[destinations]]
        name = "b"
        kind = "influxdb"
        url = "http://cloud"
        """,
    )
    faults = told(check(path))
    assert all(fault.startswith(f"tidegate: {path}: ") for fault in faults)
    for key in (
        "spol: unknown key; did you mean 'spool'",
        "gateway_id: 'barn 1'",
        "spool.path: is missing",
        "spool.commit_interval_ms: ",
        "ingress.listen.prt: unknown key; did you mean 'port'",
        "ingress.listen.topic: 'sensors/{sensor}': a template needs",
        "destinations[0].url: 'ftp://region': must be an http:// or https:// address",
        'destinations[1]: api = "v2" needs bucket',
    ):
        assert any(f": {key}" in fault for fault in faults), key
    assert len(faults) == 8


def test_every_secret_file_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    path = written(
        tmp_path,
        MINIMAL
        + '[[destinations]]\nname = "a"\nkind = "ingest"\nurl = "https://region"\ntoken_file = "absent"\n'
        + '[[destinations]]\nname = "b"\nkind = "ingest"\nurl = "https://region"\ntoken_file = "empty"\n',
    )
    absent, empty = told(check(path))
    assert f"destinations[0].token_file: {tmp_path / 'absent'} cannot be read: No such file" in absent
    assert f"destinations[1].token_file: {tmp_path / 'empty'} is empty" in empty


REGION = '[[destinations]]\nname = "a"\nkind = "ingest"\ntoken_file = "secret"\nurl = '
INFLUX_1 = (
    '[[destinations]]\nname = "a"\nkind = "influxdb"\napi = "v1"\ndatabase = "d"\nusername = "u"\n'
    'password_file = "secret"\nurl = '
)
BROKER = '[[ingress.subscribe]]\nfilters = ["#"]\nusername = "u"\npassword_file = "secret"\nurl = '
HOOK = '[[alerts.channel]]\nname = "ops"\nkind = "webhook"\ntoken_file = "secret"\nurl = '
HIDDEN_HOOK = '[[alerts.channel]]\nname = "ops"\nkind = "webhook"\nurl_file = '


@pytest.mark.parametrize(
    ("table", "plain", "encrypted", "here"),
    [
        (REGION, "http://region:8420", "https://region:8420", "http://127.0.0.1:8420"),
        (INFLUX_1, "http://10.0.0.7:8086", "https://10.0.0.7:8086", "http://localhost:8086"),
        (BROKER, "mqtt://broker", "mqtts://broker", "mqtt://[::1]:1883"),
        (HOOK, "http://chat/hook", "https://chat/hook", "http://127.0.0.1/hook"),
        (HIDDEN_HOOK, "plain.url", "tls.url", "here.url"),
    ],
)
def test_a_secret_that_would_cross_the_network_readable_is_refused_unless_that_is_meant(
    tmp_path: Path, table: str, plain: str, encrypted: str, here: str
) -> None:
    (tmp_path / "secret").write_text("s3cr3t-s3cr3t\n")
    for name, url in (("plain", "http://chat/h"), ("tls", "https://chat/h"), ("here", "http://[::1]/h")):
        (tmp_path / f"{name}.url").write_text(f"{url}\n")
    with pytest.raises(
        InvalidSettingsError, match=r"would cross the network readable: use .* allow_plain = true"
    ):
        gateway_settings.load_settings(written(tmp_path, f'{MINIMAL}{table}"{plain}"\n'))
    for url, meant in ((encrypted, "false"), (here, "false"), (plain, "true")):
        gateway_settings.load_settings(written(tmp_path, f'{MINIMAL}{table}"{url}"\nallow_plain = {meant}\n'))


def test_two_destinations_of_one_name_are_refused(tmp_path: Path) -> None:
    one = '[[destinations]]\nname = "a"\nkind = "file"\ndirectory = "out"\n'
    (fault,) = told(check(written(tmp_path, MINIMAL + one + one)))
    assert "destinations: two destinations are called a" in fault


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"gateway_id = \n", "is not valid TOML"),
        (b"\xff\xfe", "is not UTF-8 text at byte 0"),
        (b"", "gateway_id: is missing"),
    ],
)
def test_a_file_that_is_no_configuration_is_said_to_be_none(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "gateway.toml"
    path.write_bytes(content)
    assert any(words in fault for fault in told(check(path)))


@pytest.mark.parametrize(
    ("name", "words"), [("absent.toml", "there is no such file"), (".", "cannot be read")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, words: str) -> None:
    (fault,) = told(check(tmp_path / name))
    assert fault == f"tidegate: {tmp_path / name}: {words}" or words in fault


def test_the_environment_overrides_the_file_and_is_named_when_it_is_wrong(tmp_path: Path) -> None:
    path = written(tmp_path, MINIMAL)
    assert "gateway other" in check(path, TIDEGATE_GATEWAY_GATEWAY_ID="other").stdout
    (fault,) = told(check(path, TIDEGATE_GATEWAY_STATUS__PORT="70000"))
    assert fault.startswith("tidegate: environment TIDEGATE_GATEWAY_STATUS__PORT: status.port: '70000'")


def test_a_secret_written_where_a_file_is_expected_is_not_repeated(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        MINIMAL
        + '[[destinations]]\nname = "a"\nkind = "ingest"\nurl = "https://region"\ntoken = "s3cr3t-s3cr3t"\n',
    )
    faults = told(check(path))
    assert any("destinations[0].token: unknown key; did you mean 'token_file'?" in fault for fault in faults)
    assert not any("s3cr3t" in fault for fault in faults)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            "[[checks.rule]]\nseries = 'temperature'",
            "checks.rule[0].series: 'temperature': must be SENSOR_ID/SENSOR_TYPE",
        ),
        (
            "[[checks.rule]]\nseries = '*/t'\nminimum = 2\nmaximum = 1",
            "checks.rule[0]: minimum is above maximum",
        ),
        ("[checks]\nlate_s = -1", "checks.late_s: "),
        ("[rollups]\nlateness_s = -1", "rollups.lateness_s: "),
        (
            "[rollups]\nwindows_s = [60, 90]",
            "rollups.windows_s: a window of 90 s is not a multiple of 60 s; for example [60, 300,",
        ),
        ("[rollups]\nwindows_s = [300, 60]", "rollups.windows_s: windows must be in rising order"),
        ("[rollups]\nwindows_s = []", "rollups.windows_s: there must be at least one window"),
        ("[rollups]\nwindows_s = [0]", "rollups.windows_s[0]: "),
        ("[processing]\ninterval_s = -1", "processing.interval_s: "),
        ("[checks]\nnot_before = '2000'", "checks.not_before: '2000': must be a time with its offset"),
        ("[[report_by_exception]]\nseries = '*/t'", "report_by_exception[0]: needs absolute or percent"),
        (
            "[[alerts.rule]]\nname = 'a'\non = 'humidity'\nabove = 1",
            "alerts.rule[0].on: 'humidity': nothing that",
        ),
        ("[[alerts.rule]]\nname = 'a'", "alerts.rule[0]: needs above, below or both"),
        ("[[alerts.rule]]\nname = 'a'\nabove = 1\nbelow = 2", "alerts.rule[0]: above is less than below"),
        ("[[alerts.rule]]\nname = 'a'\non = 'silence'\nbelow = 2", "alerts.rule[0]: silence needs above"),
        ("[[alerts.rule]]\nname = 'a'\non = 'flag.late'\nabove = 2", "alerts.rule[0]: a flag is set or not"),
        (
            "[[alerts.rule]]\nname = 'a'\non = 'rollup.mean'\nabove = 2\nwindow_s = 61",
            "there are no rollups of 61 s; allowed for window_s: 60, 300",
        ),
        (
            "[[alerts.rule]]\nname = 'a'\nabove = 2\nchannels = ['ops']",
            "rule a: there is no channel ops; allowed: log",
        ),
        (
            "[[alerts.channel]]\nname = 'ops'\nkind = 'webhook'\nurl = 'chat.example/hook'",
            "alerts.channel[0].url: 'chat.example/hook': must be an http:// or https:// address",
        ),
        ("[[alerts.channel]]\nname = 'ops'\nkind = 'webhook'", "alerts.channel[0]: needs url or url_file"),
        (
            "[[alerts.channel]]\nname = 'ops'\nkind = 'webhook'\nurl_file = 'bad.url'",
            "bad.url holds no address; allowed: an http:// or https:// address",
        ),
        (
            "[[alerts.channel]]\nname = 'm'\nkind = 'email'\nhost = 'h'\nsender = 'a@b'\nto = ['nobody']",
            "alerts.channel[0].to[0]: 'nobody': must be an e-mail address",
        ),
        (
            "[[alerts.channel]]\nname = 'log'\nkind = 'webhook'\nurl = 'http://h'",
            "alerts: two channels are called log",
        ),
    ],
)
def test_a_fault_of_checks_and_alerts_is_told_with_what_is_allowed(
    tmp_path: Path, table: str, words: str
) -> None:
    (tmp_path / "bad.url").write_text("s3cret.example/hook\n")
    (fault,) = told(check(written(tmp_path, f"{MINIMAL}{table}\n")))
    assert words in fault
    assert "s3cret" not in fault
