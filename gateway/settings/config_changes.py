"""What a configuration resolves to, how two of them differ, and the trial of a new one.

A value has a concrete path: `ingress.listen.port`, `destinations[regional].url`. Tables of a list are
identified
by name where they have one. Secrets are redacted. During a trial these files are beside `gateway.toml`:

    gateway.toml.previous   the configuration before it
    gateway.toml.pending    the marker, JSON: boot id and deadline (seconds of CLOCK_BOOTTIME)

Each file is replaced as a whole and fsynced, the copy first, the marker second, the configuration last:
whenever the power fails, the active configuration is one or the other. A marker of an earlier boot means that
nobody can confirm any more, so no clock has to be right.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from pydantic import BaseModel
from pydantic_settings import EnvSettingsSource

from cloud_sync.runtime import settings_file
from cloud_sync.runtime.secret_files import MASK, redact_text
from gateway.settings import gateway_settings as given
from gateway.settings.schema import Table, format_toml_value, to_plain_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DEFAULT_SOURCE: Final = "default"
_URL_WITH_PATH = re.compile(r"^(https?://[^/]+)/.+")
_SECRET_KEY = re.compile(r"(?i)(^|_)(token|password|passwd|secret|dsn|key|authorization|headers?)$")


class ResolvedValue(NamedTuple):
    """One key of a configuration.

    Attributes:
        key: its concrete path.
        value: as TOML knows it; None for nothing.
        source: "default", the file, or "environment NAME".
    """

    key: str
    value: Any
    source: str


def resolve_config(path: Path) -> list[ResolvedValue]:
    """Every key of a configuration with its masked value and where it was said.

    Raises:
        SettingsFault: with every fault of the settings; files that they name are not looked at.
    """
    settings = given.parse_settings_file(path)
    in_file = settings_file.read_toml(path)
    from_environment = EnvSettingsSource(
        type(settings), env_prefix=given.ENV_PREFIX, env_nested_delimiter="__", case_sensitive=False
    )()
    sources = _SourceLookup(str(path), in_file, from_environment)
    return [
        ResolvedValue(key, redact_value(key, value), sources.of(steps))
        for key, steps, value in _walk_values(settings, "", ())
    ]


def flatten_settings(settings: BaseModel) -> dict[str, Any]:
    """Every key of settings with its value, unmasked: for comparing."""
    return {key: value for key, _, value in _walk_values(settings, "", ())}


def redact_value(key: str, value: Any) -> Any:
    """A value that may be shown: `MASK` for a secret, an address without what it says of a user."""
    if value in (None, "", [], {}):
        return value
    if _SECRET_KEY.search(key.rpartition(".")[2]):
        return MASK
    if key.startswith("alerts.channel") and isinstance(value, str):
        return _URL_WITH_PATH.sub(
            rf"\1/{MASK}", redact_text(value)
        )  # whoever knows a webhook's path may write there
    return redact_text(value) if isinstance(value, str) else value


class _SourceLookup:
    """Where keys were said. The environment comes before the file, key by key; lists are replaced whole."""

    def __init__(self, file: str, in_file: Mapping[str, Any], from_environment: Mapping[str, Any]) -> None:
        self._file, self._in_file, self._environment = file, in_file, from_environment

    def of(self, steps: tuple[str | int, ...]) -> str:
        named = [
            str(step) for step in takewhile(_is_name, steps[: _matching_depth(self._environment, steps)])
        ]
        if named:
            return f"environment {given.ENV_PREFIX}{'__'.join(named).upper()}"
        return self._file if _matching_depth(self._in_file, steps) else DEFAULT_SOURCE


def _is_name(step: str | int) -> bool:
    return isinstance(step, str)


def _matching_depth(table: Any, steps: tuple[str | int, ...]) -> int:
    """How many steps lead to a value of `table` that holds the key; 0 when none do."""
    for position, step in enumerate(steps):
        try:
            table = table[step]
        except (KeyError, IndexError, TypeError):
            return 0
        if not isinstance(table, dict | list):
            return position + 1
    return len(steps)


def _walk_values(
    value: Any, key: str, steps: tuple[str | int, ...]
) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            leaf = value.configured(name) if isinstance(value, Table) else getattr(value, name)
            yield from _walk_values(leaf, f"{key}.{name}" if key else name, (*steps, name))
    elif isinstance(value, list) and value and all(isinstance(entry, BaseModel) for entry in value):
        for position, (name, entry) in enumerate(zip(_label_tables(value), value, strict=True)):
            yield from _walk_values(entry, f"{key}[{name}]", (*steps, position))
    elif isinstance(value, dict) and value and all(isinstance(entry, BaseModel) for entry in value.values()):
        for name, entry in value.items():
            yield from _walk_values(entry, f"{key}{{{name}}}", (*steps, name))
    else:
        yield key, steps, to_plain_value(value)


def _label_tables(tables: list[Any]) -> list[str]:
    """How the tables of a list are told apart: by name or url, else by position."""
    for attribute in ("name", "url"):
        names = [getattr(table, attribute, None) for table in tables]
        if all(isinstance(name, str) for name in names) and len(set(names)) == len(names):
            return [redact_text(str(name)) for name in names]
    return [str(position) for position in range(len(tables))]


_ABSENT: Final = object()
_TABLE_LABEL = re.compile(r"\[[^\]]*\]|\{[^}]*\}")

RELOADABLE_KEYS: Final = (
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
"""Keys, or tables of keys, that a running gateway takes over when it is told to reload."""

_RESTART_REASONS: Final = {
    "gateway_id": "what was delivered is remembered under this name",
    "spool.path": "the spool is open, and readings are in it",
    "ingress.listen.host": "the port is bound",
    "ingress.listen.port": "the port is bound",
    "ingress.listen": "devices are connected under the terms they were admitted by",
    "ingress.listen.topic": "devices are connected under what it lets each of them publish",
    "ingress.http": "the port is bound, and clients are connected under the terms they were admitted by",
    "ingress.host.enabled": "it begins and ends with the gateway",
    "clock": "readings may be waiting for the clock under the terms they were parked by",
    "rollups.enabled": "rollups begin and end with the gateway, so that no window is rolled up in part",
    "rollups.windows_s": "windows of the old lengths are open; they are passed on at the start",
    "ingress.subscribe": "the session with the broker is open",
    "status": "the port is bound",
}
_DEFAULT_RESTART_REASON: Final = "it is read once, at the start"


class ConfigChange(NamedTuple):
    """One key that differs; `was` and `becomes` are None for nothing, and masked.

    Attributes:
        added, removed: the key is in one of the two only.
        restart: why a restart is needed, "" when a reload suffices.
    """

    key: str
    was: Any
    becomes: Any
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
    plain = _TABLE_LABEL.sub("", key)
    if any(plain == known or plain.startswith(f"{known}.") for known in RELOADABLE_KEYS):
        return ""
    found = [known for known in _RESTART_REASONS if plain == known or plain.startswith(f"{known}.")]
    return _RESTART_REASONS[max(found, key=len)] if found else _DEFAULT_RESTART_REASON


def diff_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[ConfigChange]:
    """What differs between two flat configurations, in the order of the old one, then of the new one."""
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
    """Why these changes cannot be reloaded, one line a key; empty when they can."""
    return [
        f"{change.key} cannot be changed by a reload: {change.restart}"
        for change in changed
        if change.restart
    ]


def _is_empty(value: Any) -> bool:
    return value is _ABSENT or value in (None, [], {})


def _format_value(value: Any) -> str:
    return "nothing" if value is None else format_toml_value(value)


_BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")


class TrialMarker(msgspec.Struct):
    """Until when, and of which boot. `deadline_s` is seconds of CLOCK_BOOTTIME."""

    boot_id: str
    deadline_s: float


def previous_config_path(config: Path) -> Path:
    """Where the configuration before this one is kept."""
    return config.with_name(config.name + ".previous")


def trial_marker_path(config: Path) -> Path:
    """Where the marker is while the configuration is on trial."""
    return config.with_name(config.name + ".pending")


def begin_trial(config: Path, text: bytes, *, probe_s: float) -> None:
    """Keep the configuration, mark the new one as on trial for `probe_s`, and put it in its place.

    Raises:
        OSError: a file cannot be written; what is in force is unchanged.
    """
    _replace_file(previous_config_path(config), config.read_bytes(), like=config)
    marker = TrialMarker(read_boot_id(), seconds_since_boot() + probe_s)
    _replace_file(trial_marker_path(config), msgspec.json.encode(marker), like=config)
    _replace_file(config, text, like=config)


def replace_config(config: Path, text: bytes) -> None:
    """Keep the configuration and put a new one in its place, without a trial."""
    if config.exists():
        _replace_file(previous_config_path(config), config.read_bytes(), like=config)
    _replace_file(config, text, like=config)


def confirm_trial(config: Path) -> None:
    """The new configuration stays."""
    trial_marker_path(config).unlink(missing_ok=True)
    _fsync_folder(config.parent)


def restore_previous_config(config: Path) -> None:
    """Put the configuration before back in its place; can be repeated until it has succeeded.

    Raises:
        OSError: it cannot be written; the marker is still there then.
    """
    _replace_file(config, previous_config_path(config).read_bytes(), like=config)
    confirm_trial(config)


def trial_time_left_s(config: Path) -> float | None:
    """How long the trial goes on, negative when it is over without a confirmation; None without a trial."""
    try:
        marker = msgspec.json.decode(trial_marker_path(config).read_bytes(), type=TrialMarker)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return -1.0
    return marker.deadline_s - seconds_since_boot() if marker.boot_id == read_boot_id() else -1.0


def active_config_path(config: Path) -> Path:
    """Which file is in force: the configuration, or the one before it when its trial is over unconfirmed."""
    left = trial_time_left_s(config)
    return (
        previous_config_path(config)
        if left is not None and left < 0 and previous_config_path(config).exists()
        else config
    )


def seconds_since_boot() -> float:
    """Seconds since this boot, sleep included; no clock has to be set for it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def read_boot_id() -> str:
    """What tells this boot from others; "" where the system does not say."""
    try:
        return _BOOT_ID_FILE.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _replace_file(path: Path, content: bytes, *, like: Path) -> None:
    """Write a file beside and move it into place, durably; with mode and owner of `like` if that exists."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            with contextlib.suppress(FileNotFoundError):
                status = like.stat()
                os.fchmod(fd, status.st_mode & 0o777)
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, status.st_uid, status.st_gid)
            left = memoryview(content)
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
