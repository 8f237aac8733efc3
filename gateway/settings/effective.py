"""What a configuration comes to: every key with its value, and where that was said.

A value is known by its concrete path: `ingress.listen.port`, `destinations[regional].url`. Tables of a list
go by their name, where they have one, so that one more in front of them changes no other's path. Nothing here
holds a secret: settings name files, and what an address may carry is masked.
"""

from __future__ import annotations

import re
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import BaseModel
from pydantic_settings import EnvSettingsSource

from cloud_sync import settings_file
from cloud_sync.masking import MASK, masked_text
from gateway import settings as given
from gateway.settings.keys import plain
from gateway.settings.tables import Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

DEFAULT: Final = "default"
_PATH = re.compile(r"^(https?://[^/]+)/.+")
_SECRET = re.compile(r"(?i)([?&;][^=&]*(?:token|secret|passw|key|auth|sig)[^=&]*=)[^&\s]+")
_SECRET = re.compile(r"(?i)(^|_)(token|password|passwd|secret|dsn|key|authorization|headers?)$")


class Value(NamedTuple):
    """One key of a configuration.

    Attributes:
        key: its concrete path.
        value: as TOML knows it; None for nothing.
        source: "default", the file, or "environment NAME".
    """

    key: str
    value: Any
    source: str


def effective(path: Path) -> list[Value]:
    """Every key of a configuration with its masked value and where it was said.

    Raises:
        SettingsFault: with every fault of the settings; files that they name are not looked at.
    """
    settings = given.read(path)
    in_file = settings_file.table_of(path)
    from_environment = EnvSettingsSource(
        type(settings), env_prefix=given.ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False
    )()
    sources = _Sources(str(path), in_file, from_environment)
    return [
        Value(key, masked(key, value), sources.of(steps)) for key, steps, value in _leaves(settings, "", ())
    ]


def flat(settings: BaseModel) -> dict[str, Any]:
    """Every key of settings with its value, unmasked: for comparing."""
    return {key: value for key, _, value in _leaves(settings, "", ())}


def masked(key: str, value: Any) -> Any:
    """A value that may be shown: `MASK` for a secret, an address without what it says of a user."""
    if value in (None, "", [], {}):
        return value
    if _SECRET.search(key.rpartition(".")[2]):
        return MASK
    if key.startswith("alerts.channel") and isinstance(value, str):
        return _PATH.sub(rf"\1/{MASK}", masked_text(value))  # whoever knows a webhook's path may write there
    return masked_text(value) if isinstance(value, str) else value


class _Sources:
    """Where keys were said. The environment comes before the file, key by key; lists are replaced whole."""

    def __init__(self, file: str, in_file: Mapping[str, Any], from_environment: Mapping[str, Any]) -> None:
        self._file, self._in_file, self._environment = file, in_file, from_environment

    def of(self, steps: tuple[str | int, ...]) -> str:
        named = [str(step) for step in takewhile(_is_name, steps[: _depth(self._environment, steps)])]
        if named:
            return f"environment {given.ENV_PREFIX}{'__'.join(named).upper()}"
        return self._file if _depth(self._in_file, steps) else DEFAULT


def _is_name(step: str | int) -> bool:
    return isinstance(step, str)


def _depth(table: Any, steps: tuple[str | int, ...]) -> int:
    """How many steps lead to a value of `table` that holds the key; 0 when none do."""
    for position, step in enumerate(steps):
        try:
            table = table[step]
        except (KeyError, IndexError, TypeError):
            return 0
        if not isinstance(table, dict | list):
            return position + 1
    return len(steps)


def _leaves(
    value: Any, key: str, steps: tuple[str | int, ...]
) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            leaf = value.configured(name) if isinstance(value, Table) else getattr(value, name)
            yield from _leaves(leaf, f"{key}.{name}" if key else name, (*steps, name))
    elif isinstance(value, list) and value and all(isinstance(entry, BaseModel) for entry in value):
        for position, (name, entry) in enumerate(zip(_names(value), value, strict=True)):
            yield from _leaves(entry, f"{key}[{name}]", (*steps, position))
    elif isinstance(value, dict) and value and all(isinstance(entry, BaseModel) for entry in value.values()):
        for name, entry in value.items():
            yield from _leaves(entry, f"{key}{{{name}}}", (*steps, name))
    else:
        yield key, steps, plain(value)


def _names(tables: list[Any]) -> list[str]:
    """How the tables of a list are told apart: by name or url, else by position."""
    for attribute in ("name", "url"):
        names = [getattr(table, attribute, None) for table in tables]
        if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            return [masked_text(str(name)) for name in names]
    return [str(position) for position in range(len(tables))]
