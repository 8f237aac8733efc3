"""What a configuration resolves to, how two of them differ, and the trial of a new one.

A value has a concrete path: `ingress.listen.port`, `destinations[regional].url`. Tables of a list are
identified by name where they have one. Secrets are redacted. During a trial these files are beside
`gateway.toml`:

    gateway.toml.previous   the configuration before it
    gateway.toml.pending    the marker, JSON: boot id and deadline (seconds of CLOCK_BOOTTIME)

Each file is replaced as a whole and fsynced, the copy first, the marker second, the configuration last: at
every power cut the active configuration is one or the other. A marker of an earlier boot means that nobody
can confirm any more, so no clock has to be right.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from pydantic import BaseModel
from pydantic_settings import EnvSettingsSource

from cloud_sync.runtime import settings_file
from cloud_sync.runtime.files import fsync_folder, replace_file
from cloud_sync.runtime.secret_files import MASK, redact_text
from gateway.processing.clock import read_boot_id, read_time_since_boot_us
from gateway.settings.gateway_settings import ENV_PREFIX, GatewaySettings, parse_settings_file
from gateway.settings.reference import format_toml_value, list_keys, to_plain_value
from gateway.settings.schema import DEFAULT_RESTART_REASON, Table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

DEFAULT_SOURCE: Final = "default"
_URL_WITH_PATH = re.compile(r"^(https?://[^/]+)/.+")
_SECRET_KEY = re.compile(r"(?i)(^|_)(token|password|passwd|secret|dsn|key|authorization|headers?)$")


class ResolvedValue(NamedTuple):
    """One key: concrete path, value as TOML has it, and "default", the file, or "environment NAME"."""

    key: str
    value: object
    source: str


def resolve_config(path: Path) -> list[ResolvedValue]:
    """Every key of a configuration with its redacted value and where it comes from.

    Files that the settings name are not checked.
    """
    settings = parse_settings_file(path)
    in_file = settings_file.read_toml(path)
    from_environment = EnvSettingsSource(
        type(settings), env_prefix=ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False
    )()

    def find_source(steps: tuple[str | int, ...]) -> str:
        """The environment overrides the file key by key; lists are replaced whole."""
        known = steps[: _matching_depth(from_environment, steps)]
        named = [str(step) for step in takewhile(lambda step: isinstance(step, str), known)]
        if named:
            return f"environment {ENV_PREFIX}{'__'.join(named).upper()}"
        return str(path) if _matching_depth(in_file, steps) else DEFAULT_SOURCE

    return [
        ResolvedValue(key, redact_value(key, value), find_source(steps))
        for key, steps, value in _walk_values(settings, "", ())
    ]


def flatten_settings(settings: BaseModel) -> dict[str, object]:
    """Every key of settings with its value, not redacted: for comparing."""
    return {key: value for key, _, value in _walk_values(settings, "", ())}


def redact_value(key: str, value: object) -> object:
    """A value that may be shown: `MASK` for a secret, an address without user and password."""
    if value in (None, "", [], {}):
        return value
    if _SECRET_KEY.search(key.rpartition(".")[2]):
        return MASK
    if not isinstance(value, str):
        return value
    shown = redact_text(value)  # the path of a webhook is a secret too: who knows it may post there
    return _URL_WITH_PATH.sub(rf"\1/{MASK}", shown) if key.startswith("alerts.channel") else shown


def _matching_depth(table: Any, steps: tuple[str | int, ...]) -> int:
    """How many steps lead to the value in `table` that holds the key; 0 if none does."""
    for position, step in enumerate(steps):
        try:
            table = table[step]
        except (KeyError, IndexError, TypeError):
            return 0
        if not isinstance(table, dict | list):
            return position + 1
    return len(steps)


def _walk_values(
    value: object, key: str, steps: tuple[str | int, ...]
) -> Iterator[tuple[str, tuple[str | int, ...], object]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            leaf = value.configured_value(name) if isinstance(value, Table) else getattr(value, name)
            yield from _walk_values(leaf, f"{key}.{name}" if key else name, (*steps, name))
    elif isinstance(value, list) and value and all(isinstance(entry, BaseModel) for entry in value):
        for position, (name, entry) in enumerate(zip(_label_tables(value), value, strict=True)):
            yield from _walk_values(entry, f"{key}[{name}]", (*steps, position))
    elif isinstance(value, dict) and value and all(isinstance(entry, BaseModel) for entry in value.values()):
        for name, entry in value.items():
            yield from _walk_values(entry, f"{key}{{{name}}}", (*steps, name))
    else:
        yield key, steps, to_plain_value(value)


def _label_tables(tables: list[BaseModel]) -> list[str]:
    """What identifies each table of a list: name or url, else the position."""
    for attribute in ("name", "url"):
        names = [getattr(table, attribute, None) for table in tables]
        if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            return [redact_text(str(name)) for name in names]
    return [str(position) for position in range(len(tables))]


_ABSENT: Final = object()
_TABLE_LABEL = re.compile(r"\[[^\]]*\]|\{[^}]*\}")


class ConfigChange(NamedTuple):
    """One key that differs, with redacted values, None for nothing.

    `added` and `removed`: the key is in one of the two only. `restart`: why a restart is needed, "" when a
    reload suffices.
    """

    key: str
    was: object
    becomes: object
    added: bool
    removed: bool
    restart: str

    def __str__(self) -> str:
        needs = f"restart: {self.restart}" if self.restart else "reload"
        if self.added:
            return f"+ {self.key} = {_format_value(self.becomes)} ({needs})"
        if self.removed:
            return f"- {self.key} = {_format_value(self.was)} ({needs})"
        return f"~ {self.key}: {_format_value(self.was)} -> {_format_value(self.becomes)} ({needs})"


def find_restart_reason(key: str) -> str:
    """Why a change of a key takes a restart; "" when a reload suffices."""
    return _restart_reasons().get(_TABLE_LABEL.sub("", key), DEFAULT_RESTART_REASON)


@cache
def _restart_reasons() -> dict[str, str]:
    return {_TABLE_LABEL.sub("", key.path): key.restart for key in list_keys(GatewaySettings)}


def diff_settings(old: Mapping[str, object], new: Mapping[str, object]) -> list[ConfigChange]:
    """The keys that differ between two flat configurations, in the order of the old one, then the new one."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        was, becomes = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if was == becomes or (_is_empty(was) and _is_empty(becomes)):
            continue
        found.append(
            ConfigChange(
                key,
                None if was is _ABSENT else redact_value(key, was),
                None if becomes is _ABSENT else redact_value(key, becomes),
                added=was is _ABSENT,
                removed=becomes is _ABSENT,
                restart=find_restart_reason(key),
            )
        )
    return found


def find_reload_obstacles(changed: Sequence[ConfigChange]) -> list[str]:
    """Why these changes cannot be reloaded, one line for each key; empty when they can."""
    return [
        f"{change.key} cannot be changed by a reload: {change.restart}"
        for change in changed
        if change.restart
    ]


def _is_empty(value: object) -> bool:
    return value is _ABSENT or value in (None, [], {})


def _format_value(value: object) -> str:
    return "nothing" if value is None else format_toml_value(value)


class TrialMarker(msgspec.Struct):
    """When the trial ends, in seconds of CLOCK_BOOTTIME, and of which boot."""

    boot_id: str
    deadline_s: float


def previous_config_path(config: Path) -> Path:
    """The copy of the configuration before this one."""
    return config.with_name(config.name + ".previous")


def trial_marker_path(config: Path) -> Path:
    """The marker, which exists while the configuration is on trial."""
    return config.with_name(config.name + ".pending")


def begin_trial(config: Path, text: bytes, *, probe_s: float) -> None:
    """Replace the configuration by a new one, on trial for `probe_s`, and keep a copy of the old one.

    After an OSError the active configuration is unchanged.
    """
    _replace_file(previous_config_path(config), config.read_bytes(), like=config)
    marker = TrialMarker(read_boot_id(), _seconds_since_boot() + probe_s)
    _replace_file(trial_marker_path(config), msgspec.json.encode(marker), like=config)
    _replace_file(config, text, like=config)


def replace_config(config: Path, text: bytes) -> None:
    """Replace the configuration without a trial, and keep a copy of the old one."""
    if config.exists():
        _replace_file(previous_config_path(config), config.read_bytes(), like=config)
    _replace_file(config, text, like=config)


def confirm_trial(config: Path) -> None:
    """Keep the new configuration."""
    trial_marker_path(config).unlink(missing_ok=True)
    fsync_folder(config.parent)


def restore_previous_config(config: Path) -> None:
    """Put the previous configuration back; after an OSError the marker still exists: try again."""
    _replace_file(config, previous_config_path(config).read_bytes(), like=config)
    confirm_trial(config)


def trial_time_left_s(config: Path) -> float | None:
    """How long the trial lasts, negative when it ended unconfirmed; None without a trial."""
    try:
        marker = msgspec.json.decode(trial_marker_path(config).read_bytes(), type=TrialMarker)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return -1.0
    return marker.deadline_s - _seconds_since_boot() if marker.boot_id == read_boot_id() else -1.0


def active_config_path(config: Path) -> Path:
    """The file to use: the configuration, or the previous one when its trial ended unconfirmed."""
    left_s, previous = trial_time_left_s(config), previous_config_path(config)
    return previous if left_s is not None and left_s < 0 and previous.exists() else config


def _seconds_since_boot() -> float:
    return read_time_since_boot_us() / 1e6


def _replace_file(path: Path, content: bytes, *, like: Path) -> None:
    """Replace a file durably, with mode and owner of `like` if that exists."""
    status = like.stat() if like.exists() else None
    replace_file(path, content, 0o644 if status is None else status.st_mode & 0o777, owner=status)
