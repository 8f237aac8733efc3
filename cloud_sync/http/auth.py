"""Who sends a request: a bearer token of a file, or a client certificate that TLS has verified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.http.responses import RequestRejectedError
from cloud_sync.http.uvicorn_server import CERTIFICATE_KEY

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.requests import Request

    from cloud_sync.http.tokens import Scope, TokenFile


def client_certificate(request: Request) -> Mapping[str, Any] | None:
    """The client's verified certificate as `SSLSocket.getpeercert` gives it, None when it showed none."""
    found: Mapping[str, Any] | None = request.scope.get("state", {}).get(CERTIFICATE_KEY)
    return found


def certificate_names(certificate: Mapping[str, Any]) -> frozenset[str]:
    """The subject's common name and the DNS and URI alternative names."""
    parts = (pair for part in certificate.get("subject", ()) for pair in part)
    subject = {value for key, value in parts if key == "commonName"}
    others = {value for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "URI")}
    return frozenset(subject | others)


def allow_any_sensor(_sensor_id: str) -> bool:
    """Readings of every sensor_id may be sent."""
    return True


class Caller(NamedTuple):
    """Who sends a request: the gateways they may act for (None: every one), and what they may do."""

    name: str
    scopes: tuple[Scope, ...]
    gateways: frozenset[str] | None
    may_publish_sensor: Callable[[str], bool] = allow_any_sensor

    def may_act_for(self, gateway_id: str) -> bool:
        """Whether they may send and see what is of that gateway."""
        return self.gateways is None or gateway_id in self.gateways


async def identify_by_certificate(request: Request, header: str | None) -> Caller:
    """The gateway that a client certificate names; an Authorization header would have to be a token."""
    certificate = client_certificate(request)
    names = certificate_names(certificate) if certificate and header is None else frozenset()
    if not names:
        raise RequestRejectedError(401, "no_token", "expected the header Authorization: Bearer TOKEN")
    return Caller(", ".join(sorted(names)), ("batches",), names)


class RequestAuthenticator:
    """Identifies callers by the tokens of a file; `identify` those whose Authorization header is no token.

    `allow_sensors` says which sensor_ids a client with a token for readings may send.
    """

    def __init__(
        self,
        tokens: TokenFile | None,
        identify: Callable[[Request, str | None], Awaitable[Caller]] = identify_by_certificate,
        allow_sensors: Callable[[str], Callable[[str], bool]] = lambda _: allow_any_sensor,
    ) -> None:
        self._tokens = tokens
        self._identify = identify
        self._allow_sensors = allow_sensors

    async def authenticate(self, request: Request, *scopes: Scope) -> Caller:
        """Who sends the request; rejected with 401 when nobody known does, 403 when they may not do this."""
        header = request.headers.get("Authorization")
        scheme, _, token = (header or "").partition(" ")
        is_token = scheme.lower() == "bearer" and token.strip()
        caller = self._by_token(token.strip()) if is_token else await self._identify(request, header)
        if not set(caller.scopes) & set(scopes):
            message = f"{caller.name} may do {' or '.join(caller.scopes)}; this needs {' or '.join(scopes)}"
            raise RequestRejectedError(403, "other_scope", message)
        return caller

    def _by_token(self, token: str) -> Caller:
        if self._tokens is None:
            message = "no tokens are accepted here (ingress.http.tokens_file)"
            raise RequestRejectedError(401, "unknown_token", message)
        entry = self._tokens.find_entry(token)
        if entry is None:
            raise RequestRejectedError(401, "unknown_token", "no gateway or client has this token")
        allow = self._allow_sensors(entry.name) if entry.scope == "readings" else allow_any_sensor
        return Caller(entry.name, (entry.scope,), frozenset({entry.name}), allow)
