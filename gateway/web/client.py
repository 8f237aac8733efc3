"""HTTP client for the endpoint of a gateway on the same machine."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from gateway.settings.listeners import StatusSettings


def local_endpoint_url(status: StatusSettings) -> str:
    """The address of the endpoint as this machine itself reaches it."""
    host = status.host
    try:
        if ipaddress.ip_address(host).is_unspecified:
            host = "::1" if ":" in host else "127.0.0.1"
    except ValueError:
        host = host or "127.0.0.1"
    shown = f"[{host}]" if ":" in host else host
    return f"{'http' if status.tls_files is None else 'https'}://{shown}:{status.port}"


def local_client(timeout_s: float) -> httpx.Client:
    """A client for `own_url`. The certificate names what others call it, and nobody is on the way."""
    return httpx.Client(timeout=timeout_s, trust_env=False, verify=False)  # noqa: S501 - this machine only
