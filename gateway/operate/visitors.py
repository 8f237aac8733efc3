"""Who may look at the endpoint, and who may do something there.

This machine may do both: a request from an address of this machine that names the endpoint by one
(a page of another site that was led here by its name server does not), and that no proxy has handed on.
Everybody else may look with a token of the tokens file, as a bearer or in the cookie that signing in sets,
and may do nothing. Only hashes of tokens are stored, and they are compared in constant time.
"""

from __future__ import annotations

import ipaddress
import logging
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cloud_sync.ingest.tokens import TokenFile, TokensFault

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.requests import Request

_log = logging.getLogger(__name__)
_HANDED_ON = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_TOKEN_MAX = 256


class Visitors:
    """Knows them by a file of tokens that may change at any time; without one there is only this machine."""

    def __init__(self, tokens_file: Path | None, cookie: str) -> None:
        self.cookie = cookie
        self._tokens = None if tokens_file is None else TokenFile(tokens_file, "tidegate token add NAME")
        self._said = ""

    @property
    def by_token(self) -> bool:
        """Whether a token would help."""
        return self._tokens is not None

    def may_look(self, request: Request) -> bool:
        """Whether the answer may hold what the gateway knows."""
        return is_local(request) or self.knows(_presented(request, self.cookie))

    def knows(self, token: str) -> bool:
        """Whether it is a token for looking."""
        if self._tokens is None or not token or len(token) > _TOKEN_MAX:
            return False
        try:
            self._tokens.refresh()
        except TokensFault as fault:
            if str(fault) != self._said:
                _log.error("the tokens read before stay in force: %s", fault)
            self._said = str(fault)
        entry = self._tokens.entry_of(token)
        return entry is not None and entry.scope == "view"


def is_local(request: Request) -> bool:
    """Whether a request comes from this machine, meant for it."""
    if request.client is None or any(name in request.headers for name in _HANDED_ON):
        return False
    server, _ = request.scope.get("server") or ("", 0)
    own = (server, request.client.host) if server == request.client.host else ()
    named = _host_in(request.headers.get("host", ""))
    return all(host in own or _is_loopback(host) for host in (request.client.host, named))


def _host_in(authority: str) -> str:
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _presented(request: Request, cookie: str) -> str:
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else request.cookies.get(cookie, "")
