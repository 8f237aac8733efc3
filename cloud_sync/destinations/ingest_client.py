"""The client of the regional ingest service: wire batches out, receipts in.

A batch counts as delivered only when the answer is a receipt for exactly what was sent. Anything else that
says 200 (a captive portal, a proxy's page) is a reason to try again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote
from uuid import UUID  # noqa: TC003 - msgspec reads the annotations

import httpx
import msgspec

from cloud_sync.codec import wire
from cloud_sync.destinations import EncodedBatch
from cloud_sync.destinations.http_client import (
    HttpOptions,
    build_http_client,
    error_from_status,
    parse_retry_after,
)
from cloud_sync.model.errors import RefusedError, RetryLaterError
from cloud_sync.model.records import Batch, BatchRange, Credit, Receipt, RecordClass
from cloud_sync.runtime.secret_files import redact_text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_MAX_ANSWER_BYTES = 4 << 20  # enough for the ranges of a gateway with tens of thousands of gaps
_MAX_FAULT_BYTES = 64 << 10
_SHOWN_CHARACTERS = 300
_CONNECT_TIMEOUT_S = 10.0
_DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _CreditAnswer(msgspec.Struct):
    rows_per_s: float
    valid_s: float


class _ReceiptAnswer(msgspec.Struct, rename={"record_class": "class"}):
    status: Literal["applied", "duplicate"]
    gateway_id: str
    epoch: UUID
    record_class: str
    first_commit: int
    last_commit: int
    rows: int
    stored: int
    duplicates: int
    conflicts: int
    part: int = 1
    parts: int = 1
    credit: _CreditAnswer | None = None


class _EpochAnswer(msgspec.Struct, rename={"record_class": "class"}):
    epoch: UUID
    record_class: str
    ranges: list[tuple[int, int]]


class _ProgressAnswer(msgspec.Struct):
    gateway_id: str
    epochs: list[_EpochAnswer]


class _FaultAnswer(msgspec.Struct):
    error: str = ""
    message: str = ""
    rows: list[int] = []


class IngestClient:
    """One ingest service, at `url` without `/v1`, as a destination.

    `token` is "" where the client certificate identifies the gateway; `timeout_s` bounds its silence.
    A client given as `http` is not closed here. `wall_clock` is for a Retry-After that is a date.
    """

    def __init__(
        self,
        name: str,
        url: str,
        token: str,
        *,
        timeout_s: float = 60.0,
        options: HttpOptions = HttpOptions(),  # noqa: B008 - an immutable value
        http: httpx.AsyncClient | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.name = name
        self._url = url.rstrip("/")
        self._address = redact_text(self._url)
        self._headers = {"Accept-Encoding": "identity"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._own_http = http is None
        self._timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        self._http = http or build_http_client(
            options, secure=url.startswith("https:"), timeout=self._timeout
        )
        self._wall_clock = wall_clock

    def encode(self, batch: Batch) -> EncodedBatch:
        """The batch in wire form, one body."""
        return EncodedBatch(batch.range, batch.rows, (wire.encode(batch),))

    async def send(self, encoded_batch: EncodedBatch) -> Receipt:
        """Deliver one batch and read its receipt; raises as `Destination.send` says."""
        answer, wait_s = await self._request("POST", "/v1/batches", content=encoded_batch.bodies[0])
        try:
            receipt = msgspec.json.decode(answer, type=_ReceiptAnswer)
        except _DECODE_ERRORS as fault:
            raise RetryLaterError(
                f"{self._address}: HTTP 200, but no receipt: {_shorten_body(answer)}"
            ) from fault
        return _check_receipt(encoded_batch, receipt, wait_s)

    async def applied_ranges(self, gateway_id: str, epoch: UUID) -> list[BatchRange]:
        """The ranges of an epoch that the region has applied, merged and in order, for each class."""
        answer, _ = await self._request(
            "GET", f"/v1/gateways/{quote(gateway_id, safe='')}", params={"epoch": str(epoch)}
        )
        try:
            progress = msgspec.json.decode(answer, type=_ProgressAnswer)
            return [
                BatchRange(gateway_id, epoch, RecordClass[entry.record_class.upper()], first, last)
                for entry in progress.epochs
                if entry.epoch == epoch
                for first, last in entry.ranges
            ]
        except (*_DECODE_ERRORS, KeyError) as fault:
            raise RetryLaterError(
                f"{self._address}: HTTP 200, but no list of ranges: {_shorten_body(answer)}"
            ) from fault

    async def aclose(self) -> None:
        """Close the connections, unless the client was given."""
        if self._own_http:
            await self._http.aclose()

    async def _request(
        self, method: str, path: str, *, content: bytes | None = None, params: Mapping[str, str] | None = None
    ) -> tuple[bytes, float | None]:
        """The body of a successful answer and the wait it asks for; other outcomes are raised."""
        if self._http.is_closed:
            raise RetryLaterError(f"{self._address}: the connection was closed by this program")
        headers = self._headers if content is None else self._headers | {"Content-Type": wire.MEDIA_TYPE}
        try:
            url, timeout = self._url + path, self._timeout
            async with self._http.stream(
                method, url, content=content, headers=headers, params=params, timeout=timeout
            ) as response:
                body, limit = bytearray(), _MAX_ANSWER_BYTES if response.is_success else _MAX_FAULT_BYTES
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > limit:
                        break
        except httpx.TimeoutException as fault:
            raise RetryLaterError(f"{self._address}: no answer within {self._timeout.read:g} s") from fault
        except (httpx.HTTPError, httpx.StreamError) as fault:
            raise RetryLaterError(f"{self._address}: {str(fault) or type(fault).__name__}") from fault
        words = _parse_fault(bytes(body))
        fault_found = error_from_status(
            response.status_code,
            words.message or words.error,
            retry_after=response.headers.get("Retry-After"),
            now_s=self._wall_clock(),
            reason=words.error,
        )
        if isinstance(fault_found, RefusedError) and fault_found.of_rows and words.rows:
            raise RefusedError(str(fault_found), fault_found.reason, rows=words.rows)
        if fault_found is not None:
            raise fault_found
        return bytes(body), parse_retry_after(response.headers.get("Retry-After"), now_s=self._wall_clock())


def _check_receipt(encoded_batch: EncodedBatch, answer: _ReceiptAnswer, wait_s: float | None) -> Receipt:
    """The receipt, if it is one for this batch. A Retry-After asks for no backlog for so long."""
    sent = encoded_batch.range
    commits = (answer.first_commit, answer.last_commit, answer.part, answer.parts)
    named = (answer.gateway_id, answer.epoch, answer.record_class, *commits)
    expected = (sent.gateway_id, sent.epoch, sent.record_class.name.lower(), *sent[3:])
    counts = (answer.stored, answer.duplicates, answer.conflicts)
    if named != expected or not answer.rows == sum(counts) == encoded_batch.rows or min(counts) < 0:
        raise RetryLaterError(f"the answer is a receipt for something else than {sent}")
    credit = None if answer.credit is None else Credit(answer.credit.rows_per_s, answer.credit.valid_s)
    if wait_s and credit is None:
        credit = Credit(0.0, wait_s)
    return Receipt(answer.rows, *counts, applied_before=answer.status == "duplicate", credit=credit)


def _parse_fault(body: bytes) -> _FaultAnswer:
    """The service's own code and message, or the beginning of whatever else answered."""
    try:
        words = msgspec.json.decode(body, type=_FaultAnswer)
    except _DECODE_ERRORS:
        return _FaultAnswer(message=_shorten_body(body))
    return _FaultAnswer(words.error[:_SHOWN_CHARACTERS], words.message[:_SHOWN_CHARACTERS], words.rows)


def _shorten_body(body: bytes) -> str:
    return " ".join(body[: 4 * _SHOWN_CHARACTERS].decode(errors="replace").split())[:_SHOWN_CHARACTERS]
