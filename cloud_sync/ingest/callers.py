"""Who is asking, and whether they may: a bearer token with its scope, or a gateway's client certificate."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.ingest.answers import Rejection
from cloud_sync.ingest.certificates import NAMES
from cloud_sync.ingest.tokens import TokensFault

if TYPE_CHECKING:
    from starlette.requests import Request

    from cloud_sync.ingest.tokens import Scope, TokenFile

_log = logging.getLogger(__name__)


class Caller(NamedTuple):
    """Who is asking: the names they may act under, and what they may do."""

    names: frozenset[str]
    scope: Scope

    def may_be(self, gateway_id: str) -> bool:
        """Whether they speak for that gateway."""
        return gateway_id in self.names

    def __str__(self) -> str:
        return ", ".join(sorted(self.names))


class Callers:
    """Tells callers from the tokens of a file and from certificates that TLS has verified."""

    def __init__(self, tokens: TokenFile) -> None:
        self._tokens = tokens

    def of(self, request: Request, *scopes: Scope) -> Caller:
        """Who is asking. A token counts before a certificate.

        Raises:
            Rejection: 401 when nobody that is known, 403 when they may not do this.
        """
        caller = self._by_token(request) or _by_certificate(request)
        if caller is None:
            raise Rejection(401, "no_token", "expected the header Authorization: Bearer TOKEN")
        if caller.scope not in scopes:
            raise Rejection(
                403, "other_scope", f"{caller} may do {caller.scope}; this needs {' or '.join(scopes)}"
            )
        return caller

    def _by_token(self, request: Request) -> Caller | None:
        header = request.headers.get("Authorization")
        if header is None:
            return None
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise Rejection(401, "no_token", "expected the header Authorization: Bearer TOKEN")
        try:
            self._tokens.refresh()
        except TokensFault as fault:
            _log.error("%s; the tokens read before stay in force", fault)
        entry = self._tokens.entry_of(token.strip())
        if entry is None:
            raise Rejection(401, "unknown_token", "no gateway has this token")
        return Caller(frozenset({entry.name}), entry.scope)


def _by_certificate(request: Request) -> Caller | None:
    names = request.scope.get("state", {}).get(NAMES)
    return None if names is None else Caller(names, "batches")
