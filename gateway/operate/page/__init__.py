"""The status page: one page with its style and its script, and what the script asks for.

Everything is served from here: no other host is asked, and the content security policy says so to the
browser. What devices sent reaches the page as JSON and is put into it as text, never as HTML.
"""

from __future__ import annotations

import asyncio
import hashlib
import html
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

import msgspec
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from gateway.operate import series_chart
from gateway.operate.answers import bounded_body, json_answer, refusal
from gateway.operate.visitors import is_local
from gateway.spool.errors import SpoolError

if TYPE_CHECKING:
    from starlette.requests import Request

    from gateway.operate.visitors import Visitors
    from gateway.parts import Parts

POLICY = (
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
_LISTED_MAX = 200
_COOKIE_S = 30 * 86_400
_DAY_US = 86_400_000_000
_FORM_BYTES = 4096


class _ChartQuery(msgspec.Struct):
    sensor_id: str
    sensor_type: str
    until_us: int | None = None
    span_us: int = _DAY_US
    steps: int = 288


class _SeriesQuery(msgspec.Struct):
    match: str = ""
    limit: int = 50


class Page:
    """The routes of the page, on one gateway's parts."""

    def __init__(self, parts: Parts, visitors: Visitors) -> None:
        self._parts = parts
        self._visitors = visitors
        self._charts = ThreadPoolExecutor(1, "chart")
        folder = files("gateway.operate.page")
        self._assets = {name: folder.joinpath(name).read_bytes() for name in _ASSETS}
        stamp = hashlib.sha256(b"".join(self._assets.values())).hexdigest()[:16]
        fill = {"gateway_id": html.escape(parts.settings.gateway_id), "stamp": stamp}

        def page(name: str, sign_out: str = "") -> str:
            text = folder.joinpath(name).read_text(encoding="utf-8")
            return text.format(**fill, sign_out=sign_out)

        self._page_here, self._page_away = page("index.html", " hidden"), page("index.html")
        self._sign_in_page = page("sign-in.html")

    def routes(self) -> list[Route]:
        """What is served."""
        return [
            Route("/", self._index),
            Route("/page/{name}", self._asset),
            Route("/series", self._series),
            Route("/chart", self._chart),
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
        ]

    def close(self) -> None:
        """Let go of the thread that reads charts."""
        self._charts.shutdown(wait=False, cancel_futures=True)

    async def _index(self, request: Request) -> Response:
        if self._visitors.may_look(request):
            return _html(self._page_here if is_local(request) else self._page_away)
        if self._visitors.by_token:
            return _html(self._sign_in_page, 401)
        return refusal()

    async def _asset(self, request: Request) -> Response:
        """Style and script hold no secret: the page that asks for a token needs them too."""
        name = request.path_params["name"]
        if name not in self._assets:
            return json_answer({"error": "no_such_request", "message": "Not Found"}, 404)
        lasting = "public, max-age=31536000, immutable" if "v" in request.query_params else "no-cache"
        return Response(
            self._assets[name],
            media_type=_ASSETS[name],
            headers={"cache-control": lasting, "content-security-policy": "default-src 'none'"},
        )

    async def _series(self, request: Request) -> Response:
        """Series to pick from: `?match=text&limit=50`."""
        if not self._visitors.may_look(request):
            return refusal()
        try:
            asked = msgspec.convert(dict(request.query_params), _SeriesQuery, strict=False)
        except msgspec.ValidationError as fault:
            return json_answer({"error": "malformed", "message": str(fault)}, 400)
        limit = max(1, min(asked.limit, _LISTED_MAX))
        named, total = series_chart.series_named(self._parts.book, asked.match, limit)
        return json_answer({"series": named, "total": total})

    async def _chart(self, request: Request) -> Response:
        """A day of a series: `?sensor_id=a&sensor_type=b`, and if need be `until_us`, `span_us`, `steps`."""
        if not self._visitors.may_look(request):
            return refusal()
        try:
            asked = msgspec.convert(dict(request.query_params), _ChartQuery, strict=False)
        except msgspec.ValidationError as fault:
            return json_answer({"error": "malformed", "message": str(fault)}, 400)
        found = series_chart.numbers_of(self._parts.book, asked.sensor_id, asked.sensor_type)
        if found is None:
            return json_answer({"error": "no_such_series", "message": "the spool does not know it"}, 404)
        until_us = time.time_ns() // 1000 if asked.until_us is None else asked.until_us
        until_us = max(-(1 << 61), min(until_us, 1 << 61))
        span_us = max(1_000_000, min(asked.span_us, series_chart.MAX_SPAN_US))
        steps = series_chart.Steps(
            until_us - span_us, until_us, max(1, min(asked.steps, series_chart.MAX_STEPS))
        )
        name, numbers = found
        try:
            chart = await asyncio.get_running_loop().run_in_executor(
                self._charts, series_chart.chart_of, self._parts.database.path, name, numbers, steps
            )
        except SpoolError as fault:
            return json_answer({"error": "spool", "message": str(fault)}, 503)
        return json_answer(chart)

    async def _sign_in(self, request: Request) -> Response:
        body = await bounded_body(request, _FORM_BYTES)
        form = {} if body is None else parse_qs(body.decode("utf-8", "replace"), max_num_fields=8)
        token = form.get("token", [""])[0].strip()
        if not self._visitors.knows(token):
            await asyncio.sleep(1)
            return _html(self._sign_in_page.replace("<!-- fault -->", _UNKNOWN), 401)
        answer = RedirectResponse("/", 303)
        secure = request.url.scheme == "https"
        answer.set_cookie(
            self._visitors.cookie, token, _COOKIE_S, httponly=True, samesite="strict", secure=secure
        )
        return answer

    async def _sign_out(self, _: Request) -> Response:
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(self._visitors.cookie, httponly=True, samesite="strict")
        return answer


_UNKNOWN = '<p class="fault" role="alert">This token is not known here.</p>'


def _html(text: str, status: int = 200) -> Response:
    return Response(
        text,
        status,
        media_type="text/html",
        headers={"content-security-policy": POLICY, "cache-control": "no-store"},
    )
