"""Requests with a body: how many at a time, how much memory, and plain readings with their Idempotency-Key.

Bodies arrive over slow links, so many are received at once while few are applied; the bound that matters
is the bytes they hold. A request over a bound is rejected with Retry-After rather than kept waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloud_sync.codec import plain_readings
from cloud_sync.http.responses import RequestRejectedError, require_media_type
from cloud_sync.model.reading_builder import UNIT_SCALES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from starlette.requests import Request

    from cloud_sync.codec.plain_readings import PlainReadings
    from cloud_sync.model.records import Series


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Bounds on requests; `max_plain_*` of decompressed plain readings, `max_requests_each` of one caller."""

    max_body_bytes: int = 32 << 20
    max_plain_bytes: int = 32 << 20
    max_plain_rows: int = 100_000
    max_requests: int = 64
    max_requests_each: int = 8
    max_buffered_bytes: int = 256 << 20
    body_idle_s: float = 30.0
    retry_after_s: int = 5


class RequestAdmission:
    """Counts what is in progress."""

    def __init__(self, limits: RequestLimits) -> None:
        self.limits = limits
        self.requests = 0
        self.buffered_bytes = 0
        self._requests_by_caller: Counter[str] = Counter()

    @contextmanager
    def admit(self, caller: str, retry_after_s: int | None = None) -> Iterator[RequestBody]:
        """Admit one request for the block; 503 when too many are in progress, 429 for one caller."""
        wait_s = self.limits.retry_after_s if retry_after_s is None else retry_after_s
        if self.requests >= self.limits.max_requests:
            raise _busy_error(f"{self.requests} requests are in progress", wait_s)
        if self._requests_by_caller[caller] >= self.limits.max_requests_each:
            message = f"{self._requests_by_caller[caller]} requests of {caller} are in progress"
            raise RequestRejectedError(429, "busy", message, retry_after_s=wait_s)
        self.requests += 1
        self._requests_by_caller[caller] += 1
        body = RequestBody(self)
        try:
            yield body
        finally:
            self.requests -= 1
            self.buffered_bytes -= body.held_bytes
            self._requests_by_caller[caller] -= 1
            if not self._requests_by_caller[caller]:
                del self._requests_by_caller[caller]


class RequestBody:
    """The body of one admitted request."""

    def __init__(self, admission: RequestAdmission) -> None:
        self._admission = admission
        self.held_bytes = 0

    async def read_request(self, request: Request) -> bytes:
        """The whole body of a request, as `read` reads it."""
        declared = request.headers.get("Content-Length")
        return await self.read((piece async for piece in request.stream() if piece), int(declared or 0))

    async def read(self, pieces: AsyncIterator[bytes], declared_bytes: int | None) -> bytes:
        """The whole body; RequestRejectedError: 413 too long, 408 too slow, 503 no room."""
        limits = self._admission.limits
        self._check(declared_bytes or 0, hang_up=False)
        body = bytearray()
        while True:
            try:
                async with asyncio.timeout(limits.body_idle_s):
                    piece = await anext(pieces, None)
            except TimeoutError as fault:
                message = f"nothing came for {limits.body_idle_s:g} s after {len(body)} bytes"
                raise RequestRejectedError(408, "body_too_slow", message, hang_up=True) from fault
            if piece is None:
                return bytes(body)
            self._check(len(body) + len(piece), hang_up=True)
            self.hold(len(piece))
            body += piece

    def hold(self, more_bytes: int) -> None:
        """Account for bytes of this request about to be kept in memory."""
        admission, limits = self._admission, self._admission.limits
        if admission.buffered_bytes + more_bytes > limits.max_buffered_bytes:
            message = f"{admission.buffered_bytes} bytes of other requests are being worked on"
            raise _busy_error(message, limits.retry_after_s)
        admission.buffered_bytes += more_bytes
        self.held_bytes += more_bytes

    def _check(self, size: int, *, hang_up: bool) -> None:
        limit = self._admission.limits.max_body_bytes
        if size > limit:
            raise RequestRejectedError(
                413, "body_too_large", f"a body may have {limit} bytes", hang_up=hang_up
            )


def _busy_error(message: str, wait_s: int) -> RequestRejectedError:
    return RequestRejectedError(503, "busy", message, retry_after_s=wait_s)


_MAX_KEY_CHARACTERS = 255
_MAX_REJECTED_LISTED = 1000


class PlainRequest:
    """A request with plain readings, as its headers describe it."""

    def __init__(self, request: Request, media_types: Sequence[str] = plain_readings.MEDIA_TYPES) -> None:
        self.media_type = require_media_type(request, media_types)
        self.encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if self.encoding not in plain_readings.CONTENT_ENCODINGS:
            expected = ", ".join(plain_readings.CONTENT_ENCODINGS)
            raise RequestRejectedError(415, "content_encoding", f"expected {expected}")
        self.precision = request.query_params.get("precision", "ns")
        if self.precision not in UNIT_SCALES:
            raise RequestRejectedError(400, "bad_precision", f"expected {', '.join(UNIT_SCALES)}")
        self.key = request.headers.get("Idempotency-Key", "").strip()
        if len(self.key) > _MAX_KEY_CHARACTERS or not self.key.isprintable():
            raise RequestRejectedError(
                400, "bad_key", f"an Idempotency-Key has up to {_MAX_KEY_CHARACTERS} characters"
            )

    def parse(
        self,
        body: bytes,
        *,
        max_rows: int,
        stamps: plain_readings.AssignedTimes | None = None,
        fault_of: Callable[[Series], str | None] = lambda _: None,
    ) -> PlainReadings:
        """The readings of the decompressed body, as `parse_readings` returns them."""
        try:
            return plain_readings.parse_readings(
                body,
                self.media_type,
                now_us=time.time_ns() // 1000,
                max_rows=max_rows,
                precision=self.precision,
                stamps=stamps,
                fault_of=fault_of,
            )
        except plain_readings.PlainBodyError as fault:
            raise RequestRejectedError(
                400 if fault.reason == "not_json" else 413, fault.reason, str(fault)
            ) from fault

    async def decompress(self, data: bytes, body: RequestBody, max_bytes: int) -> bytes:
        """The body without its content encoding, accounted for; rejected with 400, 413 or 503."""
        if self.encoding == "identity":
            return data
        try:
            found = await asyncio.to_thread(
                plain_readings.decompress, data, self.encoding, max_bytes=max_bytes
            )
        except plain_readings.DecompressionError as fault:
            raise RequestRejectedError(400, "bad_encoding", str(fault)) from fault
        except plain_readings.DecompressedSizeError as fault:
            raise RequestRejectedError(413, "body_too_large", str(fault)) from fault
        body.hold(len(found))
        return found

    def digest(self, body: bytes) -> bytes:
        """What identifies the readings of the request."""
        return hashlib.sha256(f"{self.media_type}\n{self.precision}\n".encode() + body).digest()


def plain_answer_json(parsed: PlainReadings, stored: int, duplicates: int, conflicts: int) -> str:
    """The answer to plain readings as JSON, with the first of those that were rejected."""
    answer = {
        "stored": stored,
        "duplicates": duplicates,
        "conflicts": conflicts,
        "rejected": [
            ({} if bad.index is None else {"index": bad.index})
            | {"reason": bad.reason}
            | ({"detail": bad.detail} if bad.detail else {})
            for bad in parsed.rejected[:_MAX_REJECTED_LISTED]
        ],
    }
    more = len(parsed.rejected) - _MAX_REJECTED_LISTED
    return json.dumps(answer | ({"rejected_more": more} if more > 0 else {}))
