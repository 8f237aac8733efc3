"""How destinations that speak HTTP connect: TLS with a private CA and a client certificate, a proxy, reuse.

Everything comes from the configuration and nothing from the environment: a proxy variable set for something
else must not turn a gateway's readings aside.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

_KEEPALIVE_S = 60.0  # the ingest service hangs up after 75 s of silence


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How to reach a destination.

    Attributes:
        tls: trust and client certificate; the system's trust when None.
        proxy: an http:// or https:// address, "" for none.
        connections: at most at a time; they are kept and used again.
    """

    tls: ssl.SSLContext | None = None
    proxy: str = ""
    connections: int = 4


def tls_context(
    ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
) -> ssl.SSLContext:
    """Trust and identity for TLS 1.2 and later.

    Args:
        ca_file: PEM of the only authorities to trust; the system's when None.
        cert_file: PEM of the client's certificate, with those that lead to its authority.
        key_file: PEM of its key, without a password; None when it is in `cert_file`.

    Raises:
        OSError: a file cannot be read or used (`ssl.SSLError` is one).
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file, password=_no_password)
    return context


def http_client(
    options: HttpOptions,
    *,
    secure: bool,
    timeout: httpx.Timeout | float,
    transport: httpx.AsyncBaseTransport | None = None,
    headers: dict[str, str] | None = None,
    auth: httpx.Auth | None = None,
) -> httpx.AsyncClient:
    """A client that keeps its connections, with HTTP/2 where TLS lets it be agreed on.

    Args:
        options: from the configuration.
        secure: whether the destination's own address is https.
        timeout: of one request.
        transport: replaces the network, for tests.
        headers: of every request.
        auth: of every request.
    """
    import httpx  # noqa: PLC0415 - megabytes, for those who speak HTTP

    context = options.tls or (tls_context() if secure or options.proxy.startswith("https") else False)
    return httpx.AsyncClient(
        http2=secure,
        verify=context,
        proxy=options.proxy or None,
        trust_env=False,
        follow_redirects=False,
        timeout=timeout,
        limits=httpx.Limits(
            max_connections=options.connections,
            max_keepalive_connections=options.connections,
            keepalive_expiry=_KEEPALIVE_S,
        ),
        transport=transport,
        headers=headers,
        auth=auth,
    )


def _no_password() -> str:
    """Called for a key that has a password: without it OpenSSL would ask on the terminal."""
    return ""
