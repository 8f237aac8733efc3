"""InfluxDB over HTTP, by the v2 write path (`/api/v2/write`) or the v1 write path (`/write`).

A batch goes as gzipped line protocol bodies of at most 5,000 lines, one request each, in order; the
receipt is returned after the last one was answered 204. Writing the same points again changes nothing
there, so a batch of which only some bodies got through is simply sent again, whole.

What the answers mean is `cloud_sync.destinations.http_client`, with these exceptions:

    2xx but not 204   RetryLaterError: a captive portal or a proxy answered, not InfluxDB
    201               RefusedError: InfluxDB Cloud stored some of the points
    404 405           RetryLaterError: the bucket or database is not created yet, or the address is wrong
    400 422           RefusedError, `reason` as `ErrorAnswer.reason` says; a partial write has stored the good
                      lines. `rows` are the lines that the answer names
    413               TooLargeError; bodies are half as long from then on
"""

from __future__ import annotations

import asyncio
import gzip
import re
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, TypeVar

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
    from collections.abc import Callable, Sequence

    from cloud_sync.model.records import Batch

LINES_PER_BODY = 5_000
BODY_MAX_BYTES = 8 << 20
"""Bound on one body before compression: below every server's default (InfluxDB 1.x accepts 25 MB)."""

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


@dataclass(frozen=True, slots=True)
class InfluxOptions:
    """Where and how to write.

    Attributes:
        url: base address, such as `https://influx.example:8086`, without credentials.
        api: the write path; v2 needs `bucket`, v1 `database`.
        retention_policy: for v1; the database's default when empty.
        token: sent as `Authorization: Token ...`; without one, `username` and `password` by basic
            authentication.
        tags: attributes of a series to write as tags.
        timeout_s: for one request, from the first byte sent to the last received.
    """

    url: str
    api: Literal["v2", "v1"] = "v2"
    org: str = ""
    bucket: str = ""
    database: str = ""
    retention_policy: str = ""
    token: str = ""
    username: str = ""
    password: str = ""
    tags: Sequence[str] = line_protocol.DEFAULT_TAGS
    lines_per_body: int = LINES_PER_BODY
    timeout_s: float = 30.0
    http: HttpOptions = field(default_factory=HttpOptions)


class InfluxDestination:
    """One bucket (v2) or database (v1) of an InfluxDB, or of a server that speaks its write protocol.

    Raises:
        ValueError: an option that cannot work, with its name.
    """

    def __init__(
        self, name: str, options: InfluxOptions, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        token = options.token
        if not (token.isascii() and token.isprintable()):
            raise ValueError("token: holds a line break or a character that no HTTP header can carry")
        self.name = name
        self._target = options.bucket if options.api == "v2" else options.database
        self._url = _build_write_url(options, self._target)
        self._where = f"{name}: {redact_text(str(self._url.copy_with(query=None)))}"
        self._tags = line_protocol.validate_tags(options.tags)
        self._lines_per_body = options.lines_per_body
        self._timeout_s = options.timeout_s
        self._wall_clock = wall_clock
        basic = options.username and not token
        self._client = build_http_client(
            options.http,
            secure=self._url.scheme == "https",
            auth=httpx.BasicAuth(options.username, options.password) if basic else None,
            headers={
                "content-type": "text/plain; charset=utf-8",
                "content-encoding": "gzip",
                "accept": "application/json",
                "accept-encoding": "identity",
                **({"authorization": f"Token {token}"} if token else {}),
            },
            timeout=options.timeout_s,
        )

    def encode(self, batch: Batch) -> EncodedBatch:
        """Gzipped line protocol with microsecond timestamps; about 2 us a reading."""
        lines = encode_record_lines(batch, tags=self._tags, precision="us")
        parts = line_protocol.split_into_bodies(
            lines, max_lines=self._lines_per_body, max_bytes=BODY_MAX_BYTES
        )
        bodies = tuple(gzip.compress(part, _GZIP_LEVEL, mtime=0) for part in parts)
        return EncodedBatch(batch.range, batch.rows, bodies)

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        """Write every body, in order; see the module for what the answers mean."""
        for number, body in enumerate(encoded_batch.bodies):
            try:
                await self._write(body)
            except TooLargeError:
                self._lines_per_body = max(1, min(self._lines_per_body, len(_decode_lines(body)) // 2))
                raise
            except RefusedError as fault:
                before = sum(len(_decode_lines(sent)) for sent in encoded_batch.bodies[:number])
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
                no_content = response.status_code == HTTPStatus.NO_CONTENT
                answer = ErrorAnswer(b"" if no_content else await _read_capped(response))
        except TimeoutError as fault:
            raise RetryLaterError(f"{self._where} gave no answer in {self._timeout_s:g} s") from fault
        except httpx.HTTPError as fault:
            message = f"{self._where}: {type(fault).__name__}: {fault}"
            raise RetryLaterError(message.rstrip(": ")) from fault
        error = self._find_error(response, answer)
        if isinstance(error, RefusedError):
            error.rows = answer.find_refused_lines(_decode_lines(body))
        if error is not None:
            raise error

    def _find_error(self, response: httpx.Response, answer: ErrorAnswer) -> DeliveryError | None:
        status = response.status_code
        text = f"{self._where}: {answer.message}" if answer.message else self._where
        if status == HTTPStatus.NO_CONTENT:
            return None
        if status == HTTPStatus.CREATED:
            message = f"HTTP 201, some points were rejected: {text}"
            return RefusedError(message, "partial_write", of_rows=True)
        if status in _SUCCESS:
            return RetryLaterError(
                f"HTTP {status} where InfluxDB answers 204; is a proxy or portal in between? {text}"
            )
        if status in _MISSING_TARGET:
            return RetryLaterError(
                f"HTTP {status}: is {self._target!r} created, and is the address right? {text}"
            )
        return error_from_status(
            status,
            text,
            retry_after=response.headers.get("retry-after"),
            now_s=self._wall_clock(),
            reason=answer.reason,
        )


class _ErrorBody(msgspec.Struct):
    """v1 has `error`, v2 `code` and `message`."""

    error: str = ""
    code: str = ""
    message: str = ""


class _LineFault(msgspec.Struct):
    line_number: int = 0


class _LineFaults(msgspec.Struct):
    """v3 says which lines."""

    data: list[_LineFault] = []


class ErrorAnswer:
    """The body of an error answer, or the beginning of it.

    Attributes:
        message: the server's own, else the body as it is, shortened.
        reason: machine-readable: field_type_conflict, beyond_retention, series_limit, unable_to_parse,
            partial_write, or the code of v2 with underscores; "" for none.
    """

    def __init__(self, body: bytes) -> None:
        found = _decode_or(_ErrorBody, body)
        self._body = body
        self._text = found.message or found.error or body.decode("utf-8", "replace")
        message = " ".join(self._text.split())
        if len(message) > _MAX_MESSAGE_CHARS:
            message = f"{message[: _MAX_MESSAGE_CHARS // 2]} ... {message[-_MAX_MESSAGE_CHARS // 2 :]}"
        self.message = message
        known = (reason for phrase, reason in _REASONS if phrase in message)
        self.reason = next(known, found.code.replace(" ", "_"))

    def find_refused_lines(self, lines: Sequence[str]) -> tuple[int, ...]:
        """Which lines of a body were refused, positions from 0; none when the answer does not say.

        InfluxDB 1 and 2 repeat the lines they cannot parse, and count the points they drop, which may be all.
        InfluxDB 3 gives line numbers.
        """
        numbers = {fault.line_number for fault in _decode_or(_LineFaults, self._body).data}
        if numbers:
            return tuple(sorted(number - 1 for number in numbers if 0 < number <= len(lines)))
        dropped = _DROPPED.search(self._text)
        if dropped is not None and int(dropped[1]) == len(lines):
            return tuple(range(len(lines)))
        unparsed = set(_UNPARSED.findall(self._text))
        return tuple(at for at, line in enumerate(lines) if line in unparsed)


AnswerKind = TypeVar("AnswerKind", _ErrorBody, _LineFaults)


def _decode_or(kind: type[AnswerKind], body: bytes) -> AnswerKind:
    """The body as JSON, or an empty struct when it is none of this kind."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return kind()


def _decode_lines(body: bytes) -> list[str]:
    """The lines of a body as it is sent."""
    return gzip.decompress(body).decode().removesuffix("\n").split("\n")


async def _read_capped(response: httpx.Response) -> bytes:
    text = bytearray()
    async for chunk in response.aiter_raw():
        text += chunk
        if len(text) >= _ANSWER_MAX_BYTES:
            break
    return bytes(text[:_ANSWER_MAX_BYTES])


def _build_write_url(options: InfluxOptions, target: str) -> httpx.URL:
    try:
        base = httpx.URL(options.url)
    except httpx.InvalidURL as fault:
        raise ValueError(f"url: {fault}") from fault
    if base.scheme not in ("http", "https") or not base.host:
        raise ValueError("url: expected http://HOST:PORT or https://HOST:PORT")
    if base.userinfo:
        raise ValueError("url: holds credentials; give them as token, or username and password")
    if base.query or base.fragment:
        raise ValueError("url: holds a query; give only scheme, host, port and, behind a proxy, a path")
    if options.api == "v2":
        key, path = "bucket", "/api/v2/write"
        params = {"org": options.org, "bucket": target, "precision": "us"}
    elif options.api == "v1":
        key, path = "database", "/write"
        params = {"db": target, "rp": options.retention_policy, "precision": "u"}
    else:
        raise ValueError(f"api: {options.api!r}; expected v2 or v1")
    if not target:
        raise ValueError(f"{key}: required with api {options.api}")
    given = {name: text for name, text in params.items() if text}
    return base.copy_with(path=base.path.rstrip("/") + path, params=given)
