"""Which configuration a running gateway has in force, and what became of the newest: the page `/config`."""

from __future__ import annotations

import hashlib
import os
import time
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.settings.effective import flat, masked

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings


class InForce(msgspec.Struct):
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


class InForceDocument(msgspec.Struct):
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


def document_of(settings: GatewaySettings, in_force: InForce) -> InForceDocument:
    """The page of a running gateway."""
    values = masked_values(settings)
    return InForceDocument(
        gateway_id=settings.gateway_id,
        pid=os.getpid(),
        path=in_force.path,
        loaded_at_us=in_force.loaded_at_us,
        attempts=in_force.attempts,
        refused=in_force.refused,
        changed=in_force.changed,
        fingerprint=fingerprint_of(values),
        values=values,
    )


def masked_values(settings: GatewaySettings) -> dict[str, Any]:
    """Every key with its value, secrets masked."""
    return {key: masked(key, value) for key, value in flat(settings).items()}


def fingerprint_of(values: dict[str, Any]) -> str:
    """A short digest of masked values."""
    return hashlib.sha256(msgspec.json.encode(values, order="sorted")).hexdigest()[:16]
