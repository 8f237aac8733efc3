"""The status page: who may view it, and the assets and queries it is made of.

Requests from this machine may view and change; others may view with a token of the tokens file (as a
bearer token or in the cookie that sign-in sets). Only hashes of tokens are stored. All assets are served
from here, and the content security policy says so to the browser; what devices sent reaches the page as
JSON and is inserted as text, never as HTML.
"""

from __future__ import annotations

import asyncio
import hashlib
import html
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qs, urlsplit

import msgspec
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from cloud_sync.http.responses import RequestRejectedError
from cloud_sync.http.tokens import TokenFile
from gateway.query import series_chart
from gateway.settings.schema import is_loopback

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.requests import Request

    from gateway.runtime import Runtime

T = TypeVar("T")


def json_response(content: object, status: int = 200) -> Response:
    """A document as JSON that nobody may cache."""
    body = msgspec.json.encode(content)
    return Response(body, status, {"cache-control": "no-store"}, media_type="application/json")


async def read_body(request: Request, max_bytes: int) -> bytes | None:
    """The body of a request; None, without reading further, when it is larger."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            return None
    return bytes(body)


_PROXY_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_TOKEN_MAX_CHARS = 256


class StatusAuth:
    """Who may view: this machine, and whoever has a token of the tokens file, if there is one."""

    def __init__(self, tokens_file: Path | None, cookie: str) -> None:
        self.cookie = cookie
        self.tokens = None if tokens_file is None else TokenFile(tokens_file, "tidegate token add NAME")

    def may_view(self, request: Request) -> bool:
        """Whether the answer may hold details of the gateway."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        token = token.strip() if kind.lower() == "bearer" else request.cookies.get(self.cookie, "")
        return is_local_request(request) or self.is_valid(token)

    def require_view(self, request: Request) -> None:
        """Raise `RequestRejectedError` unless the request may view."""
        if not self.may_view(request):
            message = "requests from another machine need a token of [status] tokens_file, as a bearer token"
            raise RequestRejectedError(401, "unauthorised", message)

    def is_valid(self, token: str) -> bool:
        """Whether it is a token of the scope view."""
        if self.tokens is None or not token or len(token) > _TOKEN_MAX_CHARS:
            return False
        entry = self.tokens.find_entry(token)
        return entry is not None and entry.scope == "view"


def is_local_request(request: Request) -> bool:
    """Whether a request comes from this machine, and by its Host header is meant for it."""
    if request.client is None or any(name in request.headers for name in _PROXY_HEADERS):
        return False
    server, _ = request.scope.get("server") or ("", 0)
    own = (server, request.client.host) if server == request.client.host else ()
    try:
        named = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return False
    return all(host in own or is_loopback(host) for host in (request.client.host, named))


CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_ASSETS = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "series.js": "text/javascript",
    "chart.js": "text/javascript",
    "words.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
_SERIES_MAX = 200
_COOKIE_S = 30 * 86_400
_DAY_US = 86_400_000_000
_FORM_MAX_BYTES = 4096


class _ChartQuery(msgspec.Struct):
    sensor_id: str
    sensor_type: str
    until_us: int | None = None
    span_us: int = _DAY_US
    steps: int = 288


class _SeriesQuery(msgspec.Struct):
    match: str = ""
    limit: int = 50


def _parse_query(request: Request, query: type[T]) -> T:
    try:
        return msgspec.convert(dict(request.query_params), query, strict=False)
    except msgspec.ValidationError as error:
        raise RequestRejectedError(400, "malformed", str(error)) from error


class StatusPage:
    """The routes of one gateway's page."""

    def __init__(self, runtime: Runtime, auth: StatusAuth) -> None:
        self._runtime = runtime
        self._auth = auth
        self.chart_executor = ThreadPoolExecutor(1, "chart")
        folder = files("gateway.web").joinpath("static")
        self._assets = {name: folder.joinpath(name).read_bytes() for name in _ASSETS}
        stamp = hashlib.sha256(b"".join(self._assets.values())).hexdigest()[:16]
        fill = {"gateway_id": html.escape(runtime.settings.gateway_id), "stamp": stamp}

        def page(name: str, sign_out: str = "") -> str:
            text = folder.joinpath(name).read_text(encoding="utf-8")
            return text.format(**fill, sign_out=sign_out)

        self._local_page, self._remote_page = page("index.html", " hidden"), page("index.html")
        self._sign_in_page = page("sign-in.html")

    def routes(self) -> list[Route]:
        """The page, its assets and its queries."""
        return [
            Route("/", self._index),
            Route("/page/{name}", self._asset),
            Route("/series", self._series),
            Route("/chart", self._chart),
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
        ]

    async def _index(self, request: Request) -> Response:
        if self._auth.may_view(request):
            return _html_response(self._local_page if is_local_request(request) else self._remote_page)
        if self._auth.tokens is None:
            self._auth.require_view(request)
        return _html_response(self._sign_in_page, 401)

    async def _asset(self, request: Request) -> Response:
        """Style and script are public: the sign-in page needs them too."""
        name = request.path_params["name"]
        if name not in self._assets:
            raise RequestRejectedError(404, "no_such_request", "Not Found")
        caching = "public, max-age=31536000, immutable" if "v" in request.query_params else "no-cache"
        return Response(
            self._assets[name],
            media_type=_ASSETS[name],
            headers={"cache-control": caching, "content-security-policy": "default-src 'none'"},
        )

    async def _series(self, request: Request) -> Response:
        """Series to pick from: `?match=text&limit=50`."""
        self._auth.require_view(request)
        query = _parse_query(request, _SeriesQuery)
        limit = max(1, min(query.limit, _SERIES_MAX))
        named, total = series_chart.search_series(self._runtime.spool.catalog, query.match, limit)
        return json_response({"series": named, "total": total})

    async def _chart(self, request: Request) -> Response:
        """A day of a series: `?sensor_id=a&sensor_type=b`; optional `until_us`, `span_us`, `steps`."""
        self._auth.require_view(request)
        query = _parse_query(request, _ChartQuery)
        spool = self._runtime.spool
        known = spool.catalog.find(query.sensor_id, query.sensor_type)
        if known is None:
            raise RequestRejectedError(404, "no_such_series", "the spool does not know it")
        until_us = time.time_ns() // 1000 if query.until_us is None else query.until_us
        until_us = max(-(1 << 61), min(until_us, 1 << 61))
        span_us = max(1_000_000, min(query.span_us, series_chart.MAX_SPAN_US))
        step_count = max(1, min(query.steps, series_chart.MAX_STEPS))
        steps = series_chart.ChartSteps(until_us - span_us, until_us, step_count)
        chart = await asyncio.get_running_loop().run_in_executor(
            self.chart_executor, series_chart.read_chart, spool.database.path, known, steps
        )
        return json_response(chart)

    async def _sign_in(self, request: Request) -> Response:
        body = await read_body(request, _FORM_MAX_BYTES)
        form = {} if body is None else parse_qs(body.decode("utf-8", "replace"), max_num_fields=8)
        token = form.get("token", [""])[0].strip()
        if not self._auth.is_valid(token):
            await asyncio.sleep(1)
            failed = '<p class="fault" role="alert">This token is not valid.</p>'
            return _html_response(self._sign_in_page.replace("<!-- fault -->", failed), 401)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        cookie = self._auth.cookie
        answer.set_cookie(cookie, token, _COOKIE_S, httponly=True, samesite="strict", secure=secure)
        return answer

    async def _sign_out(self, _: Request) -> Response:
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(self._auth.cookie, httponly=True, samesite="strict")
        return answer


def _html_response(text: str, status: int = 200) -> Response:
    headers = {"content-security-policy": CONTENT_SECURITY_POLICY, "cache-control": "no-store"}
    return Response(text, status, headers, media_type="text/html")
