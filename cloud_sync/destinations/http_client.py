"""HTTP destinations: how they connect, and what an answer means for the batch that was sent.

TLS, client certificate and proxy come from the configuration, never from the environment.

2xx                     accepted (the caller still reads the receipt)
408 425 429 5xx         RetryLaterError, with Retry-After where given
413                     TooLargeError; so is a 400 whose reason is too_large
401 403                 UnauthorisedError
3xx                     RetryLaterError: a captive portal or a proxy, not the destination
400 422                 RefusedError, because of some of the rows unless the reason is the request itself
every other 4xx         RefusedError
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from cloud_sync.model.errors import (
    DeliveryError,
    RefusedError,
    RetryLaterError,
    TooLargeError,
    UnauthorisedError,
)

if TYPE_CHECKING:
    from pathlib import Path

    import httpx

_TRANSIENT = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})
_CLIENT_ERRORS = range(400, 500)
_SUCCESS = range(200, 300)
_REQUEST_REASONS = frozenset(
    {"bad_checksum", "bad_magic", "media_type", "truncated", "unsupported_class", "unsupported_version"}
)


def error_from_status(
    status: int, text: str, *, retry_after: str | None = None, now_s: float, reason: str = ""
) -> DeliveryError | None:
    """The error an answer stands for, or None when it was accepted."""
    if status in _SUCCESS:
        return None
    message = f"HTTP {status}: {text}" if text else f"HTTP {status}"
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return UnauthorisedError(message)
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE or (
        status == HTTPStatus.BAD_REQUEST and reason == "too_large"
    ):
        return TooLargeError(message)
    if status in _CLIENT_ERRORS and status not in _TRANSIENT:
        about_content = status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY)
        of_rows = about_content and reason not in _REQUEST_REASONS
        return RefusedError(message, reason or f"http_{status}", of_rows=of_rows)
    return RetryLaterError(message, parse_retry_after(retry_after, now_s=now_s))


def parse_retry_after(retry_after: str | None, *, now_s: float) -> float | None:
    """Seconds a Retry-After header asks for (RFC 9110 section 10.2.3), or None when absent or unreadable."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(int(retry_after)))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - now_s)
    except ValueError:
        return None


_KEEPALIVE_S = 60.0  # the ingest service hangs up after 75 s of silence


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How to reach a destination: the system's trust without `tls`; no proxy with "".

    At most `connections` at a time; they are kept and used again.
    """

    tls: ssl.SSLContext | None = None
    proxy: str = ""
    connections: int = 4


def build_client_tls_context(
    ca_file: Path | None = None, cert_file: Path | None = None, key_file: Path | None = None
) -> ssl.SSLContext:
    """Trust and identity for TLS 1.2 and later."""
    context = ssl.create_default_context(cafile=ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert_file is not None:
        context.load_cert_chain(cert_file, key_file, password="")  # else OpenSSL asks on the terminal
    return context


def build_http_client(
    options: HttpOptions,
    *,
    secure: bool,
    timeout: httpx.Timeout | float,
    headers: dict[str, str] | None = None,
    auth: httpx.Auth | None = None,
) -> httpx.AsyncClient:
    """A client that keeps its connections, with HTTP/2 where TLS lets it be agreed on."""
    import httpx  # noqa: PLC0415 - megabytes, for those who speak HTTP

    context = options.tls or (
        build_client_tls_context() if secure or options.proxy.startswith("https") else False
    )
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
        headers=headers,
        auth=auth,
    )
