"""Who sends a request: a bearer token with its scope, or a verified client certificate.

A certificate names a gateway by its subject's common name or by a DNS or URI alternative name; uvicorn
does not expose certificates, so the protocol here does.
"""

from __future__ import annotations

import logging
import ssl
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.http.responses import RequestRejectedError
from cloud_sync.http.tokens import TokenFileError
from cloud_sync.http.uvicorn_server import HeadTimeoutProtocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping
    from pathlib import Path

    from starlette.requests import Request

    from cloud_sync.http.tokens import Scope, TokenFile

CERTIFICATE_NAMES = "certificate_names"
"""The key under which a request's state has the names; absent when there was no certificate."""

_ALTERNATIVE_NAMES = ("DNS", "URI")


class CertificateProtocol(HeadTimeoutProtocol):
    """HTTP/1.1 whose requests know the names of the client's certificate."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Read the certificate once for all requests of the connection."""
        super().connection_made(transport)
        names = certificate_names(transport.get_extra_info("peercert") or {})
        if names:
            self.app_state = {**self.app_state, CERTIFICATE_NAMES: names}


def certificate_names(certificate: Mapping[str, Any]) -> frozenset[str]:
    """The names in a certificate, as `SSLSocket.getpeercert` tells it. Verified by TLS before."""
    parts = (pair for part in certificate.get("subject", ()) for pair in part)
    subject = {value for key, value in parts if key == "commonName"}
    others = {value for kind, value in certificate.get("subjectAltName", ()) if kind in _ALTERNATIVE_NAMES}
    return frozenset(subject | others)


def build_server_tls_context(
    cert_file: Path, key_file: Path, client_ca_file: Path | None, *, required: bool
) -> ssl.SSLContext:
    """TLS 1.2 or later for the service; with a CA, clients may show a certificate, or must.

    Raises:
        OSError, ssl.SSLError: a file cannot be read, or does not hold what it should.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert_file, key_file)
    context.verify_mode = ssl.CERT_NONE
    if client_ca_file is not None:
        context.load_verify_locations(client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context


_log = logging.getLogger(__name__)


class Caller(NamedTuple):
    """Who is asking: the names they may act under, and what they may do."""

    names: frozenset[str]
    scope: Scope

    def may_act_for(self, gateway_id: str) -> bool:
        """Whether they speak for that gateway."""
        return gateway_id in self.names

    def __str__(self) -> str:
        return ", ".join(sorted(self.names))


class RequestAuthenticator:
    """Tells callers from the tokens of a file and from certificates that TLS has verified."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    def of(self, request: Request, *scopes: Scope) -> Caller:
        """Who is asking. A token counts before a certificate.

        Raises:
            Rejection: 401 when nobody that is known, 403 when they may not do this.
        """
        caller = self._by_token(request) or _caller_by_certificate(request)
        if caller is None:
            raise RequestRejectedError(401, "no_token", "expected the header Authorization: Bearer TOKEN")
        if caller.scope not in scopes:
            raise RequestRejectedError(
                403, "other_scope", f"{caller} may do {caller.scope}; this needs {' or '.join(scopes)}"
            )
        return caller

    def _by_token(self, request: Request) -> Caller | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise RequestRejectedError(401, "no_token", "expected the header Authorization: Bearer TOKEN")
        try:
            self._tokens.refresh()
        except TokenFileError as fault:
            _log.error("%s; the tokens read before stay in force", fault)
        entry = self._tokens.entry_of(token.strip())
        if entry is None:
            raise RequestRejectedError(401, "unknown_token", "no gateway has this token")
        return Caller(frozenset({entry.name}), entry.scope)


def _caller_by_certificate(request: Request) -> Caller | None:
    names = request.scope.get("state", {}).get(CERTIFICATE_NAMES)
    return None if names is None else Caller(names, "batches")
