"""What differs between two configurations, and what it takes to bring the change about. Pure."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gateway.settings.effective import masked
from gateway.settings.keys import toml_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ABSENT: Final = object()
_PLACE = re.compile(r"\[[^\]]*\]|\{[^}]*\}")

RELOADED: Final = (
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

_REASONS: Final = {
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
_OTHERWISE: Final = "it is read once, at the start"


class Change(NamedTuple):
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
            return f"+ {self.key} = {_said(self.becomes)} ({needs})"
        if self.removed:
            return f"- {self.key} = {_said(self.was)} ({needs})"
        return f"~ {self.key}: {_said(self.was)} -> {_said(self.becomes)} ({needs})"


def restart_reason(key: str) -> str:
    """Why a change of a key takes a restart; "" when a reload suffices."""
    plain = _PLACE.sub("", key)
    if any(plain == known or plain.startswith(f"{known}.") for known in RELOADED):
        return ""
    found = [known for known in _REASONS if plain == known or plain.startswith(f"{known}.")]
    return _REASONS[max(found, key=len)] if found else _OTHERWISE


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two flat configurations, in the order of the old one, then of the new one."""
    found = []
    for key in dict.fromkeys((*old, *new)):
        was, becomes = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if was == becomes or (_nothing(was) and _nothing(becomes)):
            continue
        found.append(
            Change(
                key,
                None if was is _ABSENT else masked(key, was),
                None if becomes is _ABSENT else masked(key, becomes),
                added=was is _ABSENT,
                removed=becomes is _ABSENT,
                restart=restart_reason(key),
            )
        )
    return found


def refusals(changed: Sequence[Change]) -> list[str]:
    """Why these changes cannot be reloaded, one line a key; empty when they can."""
    return [
        f"{change.key} cannot be changed by a reload: {change.restart}"
        for change in changed
        if change.restart
    ]


def _nothing(value: Any) -> bool:
    return value is _ABSENT or value in (None, [], {})


def _said(value: Any) -> str:
    return "nothing" if value is None else toml_text(value)
