"""The configuration a running gateway uses and the outcome of the last reload: the document at `/config`."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.settings.config_changes import flatten_settings, redact_value

if TYPE_CHECKING:
    from gateway.settings.gateway_settings import GatewaySettings


class ActiveConfig(msgspec.Struct):
    """The configuration of a gateway since its start.

    Attributes:
        path: the file; "" when it was not made from one.
        loaded_at_us: when what is in force was read.
        attempts: reloads that were asked for, refused ones included.
        refused: why the newest one was refused, one line a reason; empty when it was not.
        changed: keys that the newest one changed.
    """

    path: str = ""
    loaded_at_us: int = 0
    attempts: int = 0
    refused: list[str] = []
    changed: list[str] = []

    def taken(self, changed: list[str]) -> None:
        """A configuration came into force."""
        self.loaded_at_us = time.time_ns() // 1000
        self.refused, self.changed = [], changed


class ActiveConfigDocument(msgspec.Struct):
    """What `/config` answers. Secrets are masked; `fingerprint` tells whether two are the same."""

    gateway_id: str
    pid: int
    path: str
    loaded_at_us: int
    attempts: int
    refused: list[str]
    changed: list[str]
    fingerprint: str
    values: dict[str, Any]


def build_config_document(settings: GatewaySettings, active_config: ActiveConfig) -> ActiveConfigDocument:
    """The page of a running gateway."""
    values = mask_settings(settings)
    return ActiveConfigDocument(
        gateway_id=settings.gateway_id,
        pid=os.getpid(),
        path=active_config.path,
        loaded_at_us=active_config.loaded_at_us,
        attempts=active_config.attempts,
        refused=active_config.refused,
        changed=active_config.changed,
        fingerprint=fingerprint_values(values),
        values=values,
    )


def mask_settings(settings: GatewaySettings) -> dict[str, Any]:
    """Every key with its value, secrets masked."""
    return {key: redact_value(key, value) for key, value in flatten_settings(settings).items()}


def fingerprint_values(values: dict[str, Any]) -> str:
    """A short digest of masked values."""
    return hashlib.sha256(msgspec.json.encode(values, order="sorted")).hexdigest()[:16]
