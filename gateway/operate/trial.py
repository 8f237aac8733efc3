"""Whether a gateway does as well with a new configuration as it did with the old one. Asked from outside."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import httpx
import msgspec

from gateway.operate.doctor import Level, upstream
from gateway.operate.in_force import InForceDocument
from gateway.operate.own_endpoint import own_client, own_url

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings

_ANSWER_S: Final = 3.0


def in_force_at(settings: GatewaySettings) -> InForceDocument | None:
    """What the gateway with these settings has in force; None when none answers."""
    answer = _get(settings, "/config")
    if answer is None or not answer.is_success:
        return None
    try:
        return msgspec.json.decode(answer.content, type=InForceDocument)
    except msgspec.DecodeError:
        return None


def faults_of(settings: GatewaySettings, before: dict[str, str]) -> list[str]:
    """Everything that is worse than before.

    Args:
        settings: that the gateway runs with now.
        before: destinations that were out of reach with the old settings; they may be so still.
    """
    found = []
    for path in ("/healthz", "/readyz"):
        answer = _get(settings, path)
        if answer is None:
            found.append(f"{path}: no answer")
        elif not answer.is_success:
            found.append(f"{path}: {' '.join(answer.text.split())[:200]}")
    away = unreachable(settings)
    return found + [f"destination {name}: {why}" for name, why in away.items() if name not in before]


def unreachable(settings: GatewaySettings) -> dict[str, str]:
    """Destinations that cannot be reached or do not accept this gateway, each with the reason."""

    async def ask() -> dict[str, str]:
        found = await asyncio.gather(
            *(upstream.check_destination(d, settings.gateway_id) for d in settings.destinations)
        )
        return {f.subject: f.what for each in found for f in each if f.level is Level.FAULT}

    return asyncio.run(ask())


def _get(settings: GatewaySettings, path: str) -> httpx.Response | None:
    try:
        with own_client(_ANSWER_S) as client:
            return client.get(own_url(settings.status) + path)
    except (httpx.HTTPError, httpx.InvalidURL):
        return None
