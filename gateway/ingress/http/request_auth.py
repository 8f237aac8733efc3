"""HTTP authentication: a bearer token, a device's password, or the client certificate of its connection.

A device sends readings of its own sensor_id only (`publish_as`), as readings and in batches; a gateway's
token covers all the sensors it gathers.
"""

from __future__ import annotations

import base64
import binascii
import inspect
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.http.auth import client_certificate
from cloud_sync.http.responses import RequestRejectedError
from cloud_sync.http.tokens import SCOPES
from gateway.auth.authenticator import AnonymousAuthenticator, Credentials, Identity, allow_own_sensors
from gateway.mqtt.codec.packets import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from cloud_sync.http.tokens import Scope, TokenFile
    from cloud_sync.model.records import Series
    from gateway.auth.authenticator import Authenticator

_RATE_LIMITED_RETRY_S = 10
ANONYMOUS_NAME = "anonymous"


class Caller(NamedTuple):
    """Who sends a request; `anyone` where no credentials are required, so they may act for every gateway."""

    name: str
    scopes: tuple[Scope, ...]
    may_publish_sensor: Callable[[str], bool]
    anyone: bool = False

    def may_act_for(self, gateway_id: str) -> bool:
        """Whether they may send and see what is of that gateway."""
        return self.anyone or gateway_id == self.name

    def find_fault(self, series: Series) -> str | None:
        """Why they may not send readings of a series, None when they may."""
        return None if self.may_publish_sensor(series.sensor_id) else "other_device"


class RequestAuthenticator:
    """Identifies callers; with `own_only` a client's token is for its own sensor_id only.

    `authenticator` checks passwords and certificates, and callers without either.
    """

    def __init__(self, authenticator: Authenticator, tokens: TokenFile | None, *, own_only: bool) -> None:
        self._authenticator = authenticator
        self._tokens = tokens
        self._own_only = own_only

    async def authenticate(self, request: Request, *scopes: Scope) -> Caller:
        """Who sends the request; rejected with 401, 403, or 429 after too many wrong passwords."""
        header = request.headers.get("Authorization")
        if header is None:
            caller = await self._check_identity(request, None, None)
        else:
            scheme, _, secret = header.partition(" ")
            if scheme.lower() == "bearer" and secret.strip():
                caller = self._by_token(secret.strip())
            elif scheme.lower() == "basic":
                caller = await self._check_identity(request, *_parse_basic_credentials(secret))
            else:
                message = "expected Authorization: Bearer TOKEN, or Basic with a name and password"
                raise RequestRejectedError(401, "no_token", message)
        if not set(caller.scopes) & set(scopes):
            message = f"{caller.name} may do {' or '.join(caller.scopes)}; this needs {' or '.join(scopes)}"
            raise RequestRejectedError(403, "other_scope", message)
        return caller

    def _by_token(self, token: str) -> Caller:
        if self._tokens is None:
            raise RequestRejectedError(
                401, "unknown_token", "no tokens are accepted here (ingress.http.tokens_file)"
            )
        entry = self._tokens.find_entry(token)
        if entry is None:
            raise RequestRejectedError(401, "unknown_token", "nobody has this token")
        own = self._own_only and entry.scope == "readings"
        return Caller(entry.name, (entry.scope,), allow_own_sensors(entry.name) if own else _allow_any_sensor)

    async def _check_identity(self, request: Request, name: str | None, password: bytes | None) -> Caller:
        certificate = client_certificate(request)
        address = request.client.host if request.client else ""
        answer = self._authenticator.authenticate(
            Credentials(name or ANONYMOUS_NAME, name, password, certificate, address)
        )
        verdict = await answer if inspect.isawaitable(answer) else answer
        if not isinstance(verdict, Identity):
            if verdict.reason_code == ReasonCode.CONNECTION_RATE_EXCEEDED:
                message = "wrong passwords too often"
                raise RequestRejectedError(429, "guessing", message, retry_after_s=_RATE_LIMITED_RETRY_S)
            message = "a token, or a name and password that are known, or a certificate is needed"
            raise RequestRejectedError(401, "no_token", message)
        if isinstance(self._authenticator, AnonymousAuthenticator):
            return Caller(verdict.name, SCOPES, _allow_any_sensor, anyone=True)
        scopes: tuple[Scope, ...] = ("readings",)
        if verdict.client_id_scope:  # a named device may send batches as well; an anonymous one is no gateway
            scopes = ("batches", "readings")
        return Caller(verdict.name, scopes, verdict.may_publish_sensor or _allow_any_sensor)


def _allow_any_sensor(_sensor_id: str) -> bool:
    return True


def _parse_basic_credentials(secret: str) -> tuple[str, bytes]:
    """The name and password of a Basic header (RFC 7617)."""
    try:
        name, colon, password = base64.b64decode(secret.strip(), validate=True).partition(b":")
        if colon:
            return name.decode(), password
    except (binascii.Error, UnicodeDecodeError):
        pass
    raise RequestRejectedError(401, "no_token", "the Basic credentials cannot be read")
