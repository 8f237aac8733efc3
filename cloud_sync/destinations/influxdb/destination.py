"""InfluxDB over HTTP, by the v2 write path (`/api/v2/write`) or the v1 write path (`/write`).

A batch goes as gzipped line protocol bodies of at most 5,000 lines, one request each, in order; the
receipt is returned after the last one was answered 204. Writing the same points again changes nothing
there, so a batch of which only some bodies got through is simply sent again, whole.

What the answers mean is `cloud_sync.destinations.http_client`, with these exceptions:

    2xx but not 204   RetryLater: a captive portal or a proxy answered, not InfluxDB
    201               Refused: InfluxDB Cloud stored some of the points
    404 405           RetryLater: the bucket or database is not created yet, or the address is wrong: hold
    400 422           Refused, `reason` as `reason_of` tells; a partial write has stored the good lines.
                      `rows` are the lines that the answer names
    413               TooLarge; bodies are half as long from then on
"""

from __future__ import annotations

import asyncio
import gzip
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal

import httpx
import msgspec

from cloud_sync.codec import line_protocol
from cloud_sync.destinations import EncodedBatch
from cloud_sync.destinations.http_client import HttpOptions, build_http_client, error_from_status
from cloud_sync.destinations.influxdb.record_lines import encode_record_lines
from cloud_sync.model.errors import DeliveryError, RefusedError, RetryLaterError, TooLargeError
from cloud_sync.model.records import Receipt
from cloud_sync.runtime.secret_files import redact_text

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from cloud_sync.model.records import Batch

LINES_PER_BODY = 5_000
BODY_MAX_BYTES = 8 << 20
"""Bound on one body before compression: below every server's default (InfluxDB 1.x takes 25 MB)."""

_GZIP_LEVEL = 5
_ANSWER_MAX_BYTES = 64 << 10
_MAX_MESSAGE_CHARS = 1_000
_MISSING_TARGET = frozenset({HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED})
_SUCCESS = range(200, 300)
_DROPPED = re.compile(r"dropped=(\d+)\s*$")
_UNPARSED = re.compile(r"unable to parse '(.*?)': ")
_REASONS = (
    ("field type conflict", "field_type_conflict"),
    ("beyond retention", "beyond_retention"),
    ("outside retention", "beyond_retention"),
    ("max-series-per-database", "series_limit"),
    ("max-values-per-tag", "series_limit"),
    ("unable to parse", "unable_to_parse"),
    ("partial write", "partial_write"),
)


class _ErrorBody(msgspec.Struct):
    """Error bodies of v1 (`error`) and v2 (`code`, `message`)."""

    error: str = ""
    code: str = ""
    message: str = ""


class _LineFault(msgspec.Struct):
    line_number: int = 0


class _LineFaults(msgspec.Struct):
    """Error bodies of v3 that say which lines (`data`)."""

    data: list[_LineFault] = []


class InfluxDestination:
    """One bucket (v2) or database (v1) of an InfluxDB, or of a server that speaks its write protocol."""

    def __init__(
        self,
        name: str,
        url: str,
        *,
        api: Literal["v2", "v1"] = "v2",
        org: str = "",
        bucket: str = "",
        database: str = "",
        retention_policy: str = "",
        token: str = "",
        username: str = "",
        password: str = "",
        tags: Sequence[str] = line_protocol.DEFAULT_TAGS,
        lines_per_body: int = LINES_PER_BODY,
        timeout_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
        proxy: str = "",
        transport: httpx.AsyncBaseTransport | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare connections; nothing is sent yet.

        Args:
            name: of this destination, for messages.
            url: base address, such as `https://influx.example:8086`, without credentials.
            api: which write path to use.
            org: of the bucket, for v2.
            bucket: required for v2.
            database: required for v1.
            retention_policy: for v1; the database's default when empty.
            token: sent as `Authorization: Token ...`, by either path.
            username: sent by basic authentication when there is no token.
            password: sent with `username`.
            tags: attributes of a series to write as tags.
            lines_per_body: most lines in one request.
            timeout_s: for one request, from the first byte sent to the last received.
            tls: trust and client certificate; the system's trust when None.
            proxy: an http:// or https:// address, "" for none; the environment is not asked.
            transport: replaces the network, for tests.
            wall_clock: seconds since 1970, to read a Retry-After date.
        """
        if not (token.isascii() and token.isprintable()):
            raise ValueError("token: holds a line break or a character that no HTTP header can carry")
        self.name = name
        self._target = bucket if api == "v2" else database
        self._url = _build_write_url(url, api, org, self._target, retention_policy)
        self._tags = line_protocol.validate_tags(tags)
        self._lines_per_body = lines_per_body
        self._timeout_s = timeout_s
        self._wall_clock = wall_clock
        self._client = build_http_client(
            HttpOptions(tls, proxy),
            secure=self._url.scheme == "https",
            auth=httpx.BasicAuth(username, password) if username and not token else None,
            headers={
                "content-type": "text/plain; charset=utf-8",
                "content-encoding": "gzip",
                "accept": "application/json",
                "accept-encoding": "identity",
                **({"authorization": f"Token {token}"} if token else {}),
            },
            timeout=timeout_s,
            transport=transport,
        )

    def encode(self, batch: Batch) -> EncodedBatch:
        """Gzipped line protocol with microsecond timestamps. Pure; about 2 us a reading."""
        lines = encode_record_lines(batch, tags=self._tags, precision="us")
        parts = line_protocol.split_into_bodies(
            lines, max_lines=self._lines_per_body, max_bytes=BODY_MAX_BYTES
        )
        return EncodedBatch(
            batch.range, batch.rows, tuple(gzip.compress(part, _GZIP_LEVEL, mtime=0) for part in parts)
        )

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        """Write every body of `parcel`; see the module for what the answers mean."""
        for number, body in enumerate(encoded_batch.bodies):
            try:
                await self._write(body)
            except TooLargeError:
                self._lines_per_body = max(1, min(self._lines_per_body, len(_decode_body_lines(body)) // 2))
                raise
            except RefusedError as fault:
                before = sum(len(_decode_body_lines(sent)) for sent in encoded_batch.bodies[:number])
                fault.rows = tuple(before + line for line in fault.rows)
                raise
        return Receipt(rows=encoded_batch.rows, stored=encoded_batch.rows)

    async def aclose(self) -> None:
        """Close the connections. May be called again."""
        await self._client.aclose()

    async def _write(self, body: bytes) -> None:
        if self._client.is_closed:
            raise RetryLaterError(f"{self.name}: closed")
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._client.stream("POST", self._url, content=body) as response,
            ):
                text = await _read_capped(response) if response.status_code != HTTPStatus.NO_CONTENT else b""
        except TimeoutError as fault:
            raise RetryLaterError(
                f"{self.name}: {self._address} gave no answer in {self._timeout_s:g} s"
            ) from fault
        except httpx.HTTPError as fault:
            kind = type(fault).__name__
            raise RetryLaterError(f"{self.name}: {self._address}: {kind}: {fault}".rstrip(": ")) from fault
        verdict = error_from_response(
            response.status_code,
            text,
            where=f"{self.name}: {self._address}",
            target=self._target,
            retry_after=response.headers.get("retry-after"),
            now_s=self._wall_clock(),
        )
        if isinstance(verdict, RefusedError):
            verdict.rows = find_refused_lines(_decode_body_lines(body), text)
        if verdict is not None:
            raise verdict

    @property
    def _address(self) -> str:
        """Scheme, host, port and path, for messages: no query."""
        return redact_text(str(self._url.copy_with(query=None)))


def error_from_response(
    status: int, body: bytes, *, where: str, target: str, retry_after: str | None, now_s: float
) -> DeliveryError | None:
    """What an answer to a write means, or None when every line is durable. Pure.

    Args:
        status: the HTTP status code.
        body: the answer's body, or the beginning of it.
        where: destination and address, to begin the message.
        target: the bucket or database, for the message.
        retry_after: the Retry-After header.
        now_s: wall clock, seconds since 1970.
    """
    words, code = parse_error_body(body)
    said = f"{where}: {words}" if words else where
    if status == HTTPStatus.NO_CONTENT:
        return None
    if status == HTTPStatus.CREATED:
        return RefusedError(f"HTTP 201, some points were rejected: {said}", "partial_write", of_rows=True)
    if status in _SUCCESS:
        return RetryLaterError(
            f"HTTP {status} where InfluxDB answers 204; is a proxy or portal in between? {said}"
        )
    if status in _MISSING_TARGET:
        return RetryLaterError(f"HTTP {status}: is {target!r} created, and is the address right? {said}")
    return error_from_status(
        status, said, retry_after=retry_after, now_s=now_s, reason=classify_refusal(words, code)
    )


def parse_error_body(body: bytes) -> tuple[str, str]:
    """The server's own words and, from v2, its code; plain text as it is, shortened. Pure."""
    try:
        answer = msgspec.json.decode(body, type=_ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        answer = _ErrorBody()
    words = answer.message or answer.error or body.decode("utf-8", "replace")
    words = " ".join(words.split())
    if len(words) > _MAX_MESSAGE_CHARS:
        words = f"{words[: _MAX_MESSAGE_CHARS // 2]} ... {words[-_MAX_MESSAGE_CHARS // 2 :]}"
    return words, answer.code


def classify_refusal(words: str, code: str = "") -> str:
    """A machine-readable reason of a refusal from the server's words, else its code, else empty. Pure.

    One of field_type_conflict, beyond_retention, series_limit, unable_to_parse, partial_write, or the
    v2 code with underscores.
    """
    for phrase, reason in _REASONS:
        if phrase in words:
            return reason
    return code.replace(" ", "_")


def find_refused_lines(lines: Sequence[str], answer: bytes) -> tuple[int, ...]:
    """Which lines of a body an answer says were refused, positions from 0; none when it does not say. Pure.

    InfluxDB 1 and 2 repeat the lines they cannot parse, and count the points they drop: when that is all of
    them, it is all of them. InfluxDB 3 gives line numbers. Refusals that only count have to be searched for.
    """
    try:
        numbered = msgspec.json.decode(answer, type=_LineFaults).data
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        numbered = []
    if numbered:
        return tuple(sorted({n.line_number - 1 for n in numbered if 0 < n.line_number <= len(lines)}))
    words = _error_text(answer)
    dropped = _DROPPED.search(words)
    if dropped is not None and int(dropped[1]) == len(lines):
        return tuple(range(len(lines)))
    unparsed = set(_UNPARSED.findall(words))
    return tuple(at for at, line in enumerate(lines) if line in unparsed)


def _error_text(answer: bytes) -> str:
    try:
        fault = msgspec.json.decode(answer, type=_ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return answer.decode("utf-8", "replace")
    return fault.message or fault.error


def _decode_body_lines(body: bytes) -> list[str]:
    """The lines of a body as it is sent."""
    return gzip.decompress(body).decode().removesuffix("\n").split("\n")


async def _read_capped(response: httpx.Response) -> bytes:
    """The body, cut at a bound: what answers may not be what we think it is."""
    text = bytearray()
    async for chunk in response.aiter_raw():
        text += chunk
        if len(text) >= _ANSWER_MAX_BYTES:
            break
    return bytes(text[:_ANSWER_MAX_BYTES])


def _build_write_url(url: str, api: str, org: str, target: str, retention_policy: str) -> httpx.URL:
    try:
        base = httpx.URL(url)
    except httpx.InvalidURL as fault:
        raise ValueError(f"url: {fault}") from fault
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError("url: expected http://HOST:PORT or https://HOST:PORT")
    if base.userinfo:
        raise ValueError("url: holds credentials; give them as token, or username and password")
    if base.query or base.fragment:
        raise ValueError("url: holds a query; give only scheme, host, port and, behind a proxy, a path")
    path = base.path.rstrip("/")
    if api == "v2":
        if not target:
            raise ValueError("bucket: required with api v2")
        params = {"org": org, "bucket": target, "precision": "us"}
        return base.copy_with(path=f"{path}/api/v2/write", params={k: v for k, v in params.items() if v})
    if api == "v1":
        if not target:
            raise ValueError("database: required with api v1")
        params = {"db": target, "rp": retention_policy, "precision": "u"}
        return base.copy_with(path=f"{path}/write", params={k: v for k, v in params.items() if v})
    raise ValueError(f"api: {api!r}; expected v2 or v1")
