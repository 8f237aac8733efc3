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

Readings are written as `cloud_sync.codec.line_protocol` says, other records as

    rollup,gateway_id=barn-1,sensor_id=t-17,sensor_type=temperature,window_s=60 count=60i,mean=21.5,...
    alert,gateway_id=barn-1,rule=too_hot,sensor_id=t-17,sensor_type=temperature,severity=critical state=...
    declared_loss,class=reading,first_commit=11,gateway_id=barn-1,reason=max_bytes rows=100i,...

Their tags are what identifies a record, so that a newer revision of a window overwrites the older one;
attributes of the sensor are not among them, for they may change within a window. Times, also of fields,
are microseconds since 1970. Values that are not there (NaN) are left out.
"""

from __future__ import annotations

import asyncio
import gzip
import math
import re
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Literal, TypeVar

import httpx
import msgspec

from cloud_sync.codec import line_protocol
from cloud_sync.codec.line_protocol import escape_tag
from cloud_sync.destinations import EncodedBatch
from cloud_sync.destinations.http_client import HttpOptions, build_http_client, error_from_status
from cloud_sync.model.errors import DeliveryError, RefusedError, RetryLaterError, TooLargeError
from cloud_sync.model.records import Alerts, AlertState, Declarations, Receipt, RecordClass, Rollups, Severity
from cloud_sync.runtime.secret_files import redact_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
    """Where and how to write: `url` without credentials and path; v2 needs `bucket`, v1 `database`.

    Without a `token`, `username` and `password` are sent by basic authentication. `timeout_s` bounds a whole
    request. `tags` are attributes of a series to write as tags.
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

    ValueError for an option that cannot work, with its name.
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
        lines = encode_record_lines(batch, tags=self._tags)
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
    """The body of an error answer, or the beginning of it; `message` is the server's own, shortened.

    `reason`: field_type_conflict, beyond_retention, series_limit, unable_to_parse, partial_write, or the code
    of v2 with underscores; "" for none.
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

        InfluxDB 1 and 2 repeat lines they cannot parse and count those dropped; 3 gives line numbers.
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


_FLOATS = ("mean", "m2", "minimum", "maximum", "first", "last")
_INTEGERS = ("count", "flagged", "excluded", "suppressed", "revision", "first_at_us", "last_at_us")


def encode_record_lines(batch: Batch, *, tags: Sequence[str]) -> Iterator[str]:
    """One line a record of a batch of any class, in its order, without line ends; `tags` are of readings."""
    records = batch.records
    if isinstance(records, Rollups):
        return _rollup_lines(batch, records)
    if isinstance(records, Alerts):
        return _alert_lines(batch, records)
    if isinstance(records, Declarations):
        return _declaration_lines(batch, records)
    return line_protocol.iter_lines(batch, tags=tags, precision="us")


def _rollup_lines(batch: Batch, rollups: Rollups) -> Iterator[str]:
    gateway_id = batch.range.gateway_id
    keys = [
        _line_key("rollup", gateway_id=gateway_id, sensor_id=s.sensor_id, sensor_type=s.sensor_type)
        for s in batch.series
    ]
    integers = [getattr(rollups, name).tolist() for name in _INTEGERS]
    floats = [getattr(rollups, name).tolist() for name in _FLOATS]
    for row, (series, window_s, time_us) in enumerate(
        zip(rollups.series.tolist(), rollups.window_s.tolist(), rollups.time_us.tolist(), strict=True)
    ):
        fields = [f"{name}={column[row]}i" for name, column in zip(_INTEGERS, integers, strict=True)]
        fields += [
            f"{name}={column[row]!r}"
            for name, column in zip(_FLOATS, floats, strict=True)
            if math.isfinite(column[row])
        ]
        yield f"{keys[series]},window_s={window_s} {','.join(fields)} {time_us}"


def _alert_lines(batch: Batch, alerts: Alerts) -> Iterator[str]:
    for row in range(alerts.rows):
        series = batch.series[int(alerts.series[row])]
        key = _line_key(
            "alert",
            gateway_id=batch.range.gateway_id,
            rule=str(alerts.rule[row]),
            sensor_id=series.sensor_id,
            sensor_type=series.sensor_type,
            severity=Severity(int(alerts.severity[row])).name.lower(),
        )
        fields = [
            f"state={_quote_string(AlertState(int(alerts.state[row])).name.lower())}",
            f"count={alerts.count[row]}i",
            f"detail={_quote_string(str(alerts.detail[row]))}",
        ]
        for name in ("value", "threshold"):
            number = float(getattr(alerts, name)[row])
            if math.isfinite(number):
                fields.append(f"{name}={number!r}")
        yield f"{key} {','.join(fields)} {int(alerts.time_us[row])}"


def _declaration_lines(batch: Batch, declared: Declarations) -> Iterator[str]:
    for row in range(declared.rows):
        number = int(declared.of_class[row])
        known = number in set(RecordClass)
        key = _line_key(
            "declared_loss",
            **{"class": RecordClass(number).name.lower() if known else str(number)},
            first_commit=str(declared.first_commit[row]),
            gateway_id=batch.range.gateway_id,
            reason=str(declared.reason[row]),
        )
        fields = (
            f"rows={declared.lost[row]}i",
            f"last_commit={declared.last_commit[row]}i",
            f"from_us={declared.from_us[row]}i",
            f"to_us={declared.to_us[row]}i",
            f"epoch={_quote_string(str(batch.range.epoch))}",
            f"survives={_quote_string(str(declared.survives[row]))}",
        )
        yield f"{key} {','.join(fields)} {int(declared.time_us[row])}"


def _line_key(measurement: str, **tags: str) -> str:
    """Measurement and tags, which are given in the order of their names."""
    return ",".join((measurement, *(f"{name}={escape_tag(text)}" for name, text in tags.items() if text)))


def _quote_string(text: str) -> str:
    """A field of text. A line break in it would end the line for some readers: it becomes a space."""
    escaped = " ".join(text.splitlines()).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
