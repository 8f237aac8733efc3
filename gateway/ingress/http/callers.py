"""Who is asking, and what they may bring: a token, a device's password, or its certificate.

`Authorization: Bearer TOKEN` is looked up in the tokens file, `Basic` asks the doorkeeper as an MQTT CONNECT
does, and without the header the client's certificate speaks, or nobody. A device brings readings of its own
sensor_id only (`publish_as`), in readings and in batches alike; a gateway's token stands for all it gathers.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import logging
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.ingest.answers import Rejection
from cloud_sync.ingest.tokens import SCOPES, TokensFault
from gateway.ingress.admission import Anonymous, Identity, owned_by
from gateway.ingress.http.protocol import CERTIFICATE
from gateway.ingress.packets import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request

    from cloud_sync.ingest.tokens import Scope, TokenFile
    from cloud_sync.records import Series
    from gateway.ingress.admission import Authenticator

_log = logging.getLogger(__name__)
_GUESSED_RETRY_S = 10
NOBODY = "anonymous"


class Caller(NamedTuple):
    """Who is asking.

    Attributes:
        name: theirs, also the gateway they may speak for.
        scopes: what they may do.
        may_bring: whether they may bring readings of a sensor_id.
        anyone: whether nothing was asked of them, so that they may speak for every gateway.
    """

    name: str
    scopes: tuple[Scope, ...]
    may_bring: Callable[[str], bool]
    anyone: bool = False

    def may_be(self, gateway_id: str) -> bool:
        """Whether they speak for that gateway."""
        return self.anyone or gateway_id == self.name

    def fault_of(self, series: Series) -> str | None:
        """Why they may not bring readings of a series, None when they may."""
        return None if self.may_bring(series.sensor_id) else "other_device"


class Callers:
    """Tells callers apart.

    Args:
        authenticator: decides on passwords, certificates, and on who shows neither.
        tokens: of gateways and clients; None where there are none.
        own_only: whether a client's token is for its own sensor_id only.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        tokens: TokenFile | None,
        *,
        own_only: bool,
    ) -> None:
        self._authenticator = authenticator
        self._tokens = tokens
        self._own_only = own_only

    async def of(self, request: Request, *scopes: Scope) -> Caller:
        """Who is asking.

        Raises:
            Rejection: 401 when nobody that is known, 403 when they may not do this, 429 when they guess.
        """
        header = request.headers.get("Authorization")
        if header is None:
            caller = await self._admitted(request, None, None)
        else:
            scheme, _, secret = header.partition(" ")
            if scheme.lower() == "bearer" and secret.strip():
                caller = self._by_token(secret.strip())
            elif scheme.lower() == "basic":
                caller = await self._admitted(request, *_credentials(secret))
            else:
                raise _unknown("expected Authorization: Bearer TOKEN, or Basic with a name and password")
        if not set(caller.scopes) & set(scopes):
            allowed = " or ".join(caller.scopes)
            needed = " or ".join(scopes)
            raise Rejection(403, "other_scope", f"{caller.name} may do {allowed}; this needs {needed}")
        return caller

    def _by_token(self, token: str) -> Caller:
        if self._tokens is None:
            raise Rejection(401, "unknown_token", "no tokens are taken here (ingress.http.tokens_file)")
        try:
            self._tokens.refresh()
        except TokensFault as fault:
            _log.error("%s; the tokens read before stay in force", fault)
        entry = self._tokens.entry_of(token)
        if entry is None:
            raise Rejection(401, "unknown_token", "nobody has this token")
        own = self._own_only and entry.scope == "readings"
        return Caller(entry.name, (entry.scope,), owned_by(entry.name) if own else _everything)

    async def _admitted(self, request: Request, name: str | None, password: bytes | None) -> Caller:
        certificate = request.scope.get("state", {}).get(CERTIFICATE)
        address = request.client.host if request.client else ""
        answer = self._authenticator.admit(name or NOBODY, name, password, certificate, address)
        verdict = await answer if inspect.isawaitable(answer) else answer
        if not isinstance(verdict, Identity):
            if verdict.reason_code == ReasonCode.CONNECTION_RATE_EXCEEDED:
                message = "wrong passwords too often"
                raise Rejection(429, "guessing", message, retry_after_s=_GUESSED_RETRY_S)
            raise _unknown("a token, or a name and password that are known, or a certificate is needed")
        if isinstance(self._authenticator, Anonymous):
            return Caller(verdict.name, SCOPES, _everything, anyone=True)
        return Caller(verdict.name, _scopes_of(verdict), verdict.owns or _everything)


def _scopes_of(identity: Identity) -> tuple[Scope, ...]:
    """A device with a name may do all a device does; who shows nothing brings readings, for no gateway."""
    return ("batches", "readings") if identity.scope else ("readings",)


def _everything(_sensor_id: str) -> bool:
    return True


def _credentials(secret: str) -> tuple[str, bytes]:
    """The name and password of a Basic header (RFC 7617)."""
    try:
        name, colon, password = base64.b64decode(secret.strip(), validate=True).partition(b":")
        if colon:
            return name.decode(), password
    except (binascii.Error, UnicodeDecodeError):
        pass
    raise _unknown("the Basic credentials cannot be read")


def _unknown(message: str) -> Rejection:
    return Rejection(401, "no_token", message)
