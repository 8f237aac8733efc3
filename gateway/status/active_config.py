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
    """The active configuration's file ("": none), the number of reloads, and why the newest of them was
    refused, or which keys it changed.
    """

    path: str = ""
    loaded_at_us: int = 0
    attempts: int = 0
    refused: list[str] = []
    changed: list[str] = []

    def activate(self, changed: list[str]) -> None:
        """Record that a configuration became active now."""
        self.loaded_at_us = time.time_ns() // 1000
        self.refused, self.changed = [], changed


class ActiveConfigDocument(ActiveConfig, kw_only=True):
    """The answer at `/config`. Secrets are masked; equal fingerprints mean equal values."""

    gateway_id: str
    pid: int
    fingerprint: str
    values: dict[str, Any]


def build_config_document(settings: GatewaySettings, active_config: ActiveConfig) -> ActiveConfigDocument:
    """The document as of now."""
    values = mask_settings(settings)
    return ActiveConfigDocument(
        **msgspec.structs.asdict(active_config),
        gateway_id=settings.gateway_id,
        pid=os.getpid(),
        fingerprint=fingerprint_values(values),
        values=values,
    )


def mask_settings(settings: GatewaySettings) -> dict[str, Any]:
    """Every key with its value, secrets masked."""
    return {key: redact_value(key, value) for key, value in flatten_settings(settings).items()}


def fingerprint_values(values: dict[str, Any]) -> str:
    """A short digest of masked values."""
    return hashlib.sha256(msgspec.json.encode(values, order="sorted")).hexdigest()[:16]
