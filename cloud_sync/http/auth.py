"""Who sends a request: a bearer token of a file, or a client certificate that TLS has verified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.http.responses import RequestRejectedError
from cloud_sync.http.uvicorn_server import HeadTimeoutProtocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping

    from starlette.requests import Request

    from cloud_sync.http.tokens import Scope, TokenFile

_CERTIFICATE = "certificate"
_ALTERNATIVE_NAMES = ("DNS", "URI")


class ClientCertificateProtocol(HeadTimeoutProtocol):
    """HTTP/1.1 whose requests have the client's verified certificate, which uvicorn alone does not expose."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Read the certificate once for all requests of the connection."""
        super().connection_made(transport)
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self.app_state = {**self.app_state, _CERTIFICATE: certificate}


def client_certificate(request: Request) -> Mapping[str, Any] | None:
    """The client's verified certificate as `SSLSocket.getpeercert` gives it, None when it showed none."""
    found: Mapping[str, Any] | None = request.scope.get("state", {}).get(_CERTIFICATE)
    return found


def certificate_names(certificate: Mapping[str, Any]) -> frozenset[str]:
    """The subject's common name and the DNS and URI alternative names."""
    parts = (pair for part in certificate.get("subject", ()) for pair in part)
    subject = {value for key, value in parts if key == "commonName"}
    others = {value for kind, value in certificate.get("subjectAltName", ()) if kind in _ALTERNATIVE_NAMES}
    return frozenset(subject | others)


class Caller(NamedTuple):
    """Who sends a request: the names they may act for, and what they may do."""

    names: frozenset[str]
    scope: Scope

    def may_act_for(self, gateway_id: str) -> bool:
        """Whether they may send and see what is of that gateway."""
        return gateway_id in self.names

    def __str__(self) -> str:
        return ", ".join(sorted(self.names))


class RequestAuthenticator:
    """Identifies callers by the tokens of a file, or by certificates that TLS has verified."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    def authenticate(self, request: Request, *scopes: Scope) -> Caller:
        """Who sends the request. A token counts before a certificate.

        Raises:
            RequestRejectedError: 401 when nobody known does, 403 when they may not do this.
        """
        header = request.headers.get("Authorization")
        certificate = client_certificate(request)
        if header is not None:
            scheme, _, token = header.partition(" ")
            if scheme.lower() != "bearer" or not token.strip():
                raise _no_token_error()
            entry = self._tokens.find_entry(token.strip())
            if entry is None:
                raise RequestRejectedError(401, "unknown_token", "no gateway has this token")
            caller = Caller(frozenset({entry.name}), entry.scope)
        elif certificate and (names := certificate_names(certificate)):
            caller = Caller(names, "batches")
        else:
            raise _no_token_error()
        if caller.scope not in scopes:
            raise RequestRejectedError(
                403, "other_scope", f"{caller} may do {caller.scope}; this needs {' or '.join(scopes)}"
            )
        return caller


def _no_token_error() -> RequestRejectedError:
    return RequestRejectedError(401, "no_token", "expected the header Authorization: Bearer TOKEN")
