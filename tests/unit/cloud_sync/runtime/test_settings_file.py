"""Settings: one file, the environment over it, every fault at once and named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloud_sync.ingest import settings as ingest_settings
from cloud_sync.ingest.settings import Database, IngestSettings, Limits, Listen, Tls
from cloud_sync.runtime.settings_file import InvalidSettingsError, load_settings

PREFIX = "TIDEGATE_EXAMPLE_"


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Web(Table):
    kind: Literal["web"]
    url: str
    token: SecretStr | None = None
    tries: Annotated[int, Field(gt=0)] = 3


class Disk(Table):
    kind: Literal["disk"]
    folder: Path


class Example(BaseSettings):
    model_config = SettingsConfigDict(extra="forbid")

    name: str = Field(description="what this one is called")
    listen: dict[str, int] = {}
    limit: Annotated[int, Field(le=10)] = 5
    targets: list[Annotated[Web | Disk, Field(discriminator="kind")]] = []


@pytest.fixture
def file(tmp_path):
    def write(text: str) -> Path:
        path: Path = tmp_path / "example.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def faults_of(path: Path) -> dict[str, tuple[str, str]]:
    with pytest.raises(InvalidSettingsError) as raised:
        load_settings(Example, path, PREFIX)
    assert str(raised.value).count("\n") == len(raised.value.faults) - 1
    assert all(fault.source == str(path) for fault in raised.value.faults)
    return {fault.key: (fault.what, fault.allowed) for fault in raised.value.faults}


def test_a_file_becomes_settings(file):
    settings = load_settings(Example, file('name = "a"\n[[targets]]\nkind = "disk"\nfolder = "x"'), PREFIX)

    assert isinstance(settings, Example)
    assert (settings.name, settings.limit, settings.targets) == (
        "a",
        5,
        [Disk(kind="disk", folder=Path("x"))],
    )


def test_every_fault_is_named_with_its_key_and_what_is_allowed(file):
    path = file("""
        limit = 11
        nmae = "a"
        [[targets]]
        kind = "web"
        url = 5
        tires = 4
        [[targets]]
        kind = "disk"
        [[targets]]
        kind = "tape"
    """)

    assert faults_of(path) == {
        "name": ("is missing", "what this one is called"),
        "nmae": ("unknown key; did you mean 'name'?", "limit, listen, name, targets"),
        "limit": ("'11': input should be less than or equal to 10", ""),
        "targets[0].url": ("'5': input should be a valid string", ""),
        "targets[0].tires": ("unknown key; did you mean 'tries'?", "kind, token, tries, url"),
        "targets[1].folder": ("is missing", ""),
        "targets[2]": (
            "input tag 'tape' found using 'kind' does not match any of the expected tags: 'web', 'disk'",
            "",
        ),
    }


def test_a_secret_is_never_repeated(file):
    path = file('name = "a"\n[[targets]]\nkind = "web"\nurl = "x"\ntoken = 123456')
    with pytest.raises(InvalidSettingsError) as raised:
        load_settings(Example, path, PREFIX)
    assert "token" in str(raised.value)
    assert "123456" not in str(raised.value)


def test_files_that_cannot_be_read_are_one_clear_fault(tmp_path, file):
    missing = tmp_path / "no.toml"
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"a = '\xff'")
    for path, words in [
        (missing, "there is no such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (binary, "is not UTF-8 text at byte 5"),
        (file("a = = 3"), r"is not valid TOML: Invalid value \(at line 1, column 5\)"),
    ]:
        with pytest.raises(InvalidSettingsError, match=words) as raised:
            load_settings(Example, path, PREFIX)
        assert [(fault.source, fault.key) for fault in raised.value.faults] == [(str(path), "")]


def test_the_environment_overrides_the_file_key_by_key(file, monkeypatch):
    path = file('tokens_file = "t"\n[listen]\nhost = "::1"\nport = 1\n[database]\ndsn = "postgresql://a"')
    monkeypatch.setenv("TIDEGATE_INGEST_LISTEN__PORT", "77")
    monkeypatch.setenv("TIDEGATE_INGEST_LOG_LEVEL", "debug")
    monkeypatch.setenv("HOST", "not.for.us")
    monkeypatch.setenv("PORT", "5")

    settings = ingest_settings.load_settings(path)

    assert (settings.listen.host, settings.listen.port, settings.log_level) == ("::1", 77, "debug")
    assert settings.tokens_file == path.parent / "t"


def test_faults_of_the_environment_name_the_variable(file, monkeypatch):
    path = file('name = "a"')
    monkeypatch.setenv("TIDEGATE_EXAMPLE_LIMIT", "many")
    monkeypatch.setenv("TIDEGATE_EXAMPLE_LIMITS", "7")
    with pytest.raises(InvalidSettingsError) as raised:
        load_settings(Example, path, PREFIX)
    assert [fault.source for fault in raised.value.faults] == [
        "environment TIDEGATE_EXAMPLE_LIMITS",
        "environment TIDEGATE_EXAMPLE_LIMIT",
    ]
    monkeypatch.delenv("TIDEGATE_EXAMPLE_LIMITS")
    monkeypatch.setenv("TIDEGATE_EXAMPLE_LIMIT", "3")
    monkeypatch.setenv("TIDEGATE_EXAMPLE_LISTEN", "{not json")
    with pytest.raises(InvalidSettingsError, match="listen"):
        load_settings(Example, path, PREFIX)


def test_the_example_configuration_shows_every_key_with_its_default(file):
    path = Path(__file__).parents[4] / "config" / "ingest.toml"
    text = path.read_text(encoding="utf-8")
    shown = re.sub(r"^# ([a-z_]+ = [^ ].*)$", r"\1", text.replace("# dsn = ", "# "), flags=re.MULTILINE)

    as_shipped = ingest_settings.load_settings(path).model_dump(
        exclude={"tokens_file": True, "database": {"dsn_file"}}
    )
    with_every_line = ingest_settings.load_settings(file(shown)).model_dump(
        exclude={"tokens_file": True, "database": {"dsn_file"}}
    )

    assert shown.count("\n") == text.count("\n")
    assert as_shipped == with_every_line
    for model in (IngestSettings, Listen, Tls, Database, Limits):
        for key in model.model_fields:
            assert re.search(rf"^(# +)?{key} = ?|^(# )?\[{key}\]", text, re.MULTILINE), key
