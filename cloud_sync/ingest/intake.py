"""Taking in request bodies: how many at a time, how long each, how many bytes in memory together.

Bodies come over slow links, so many are received at once while few are applied; the bound that matters is the
bytes they hold. A request over a bound is told to come back rather than kept waiting.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloud_sync.ingest.answers import Rejection

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@dataclass(frozen=True, slots=True)
class IntakeLimits:
    """Bounds on requests with a body.

    Attributes:
        body_bytes: of one body.
        plain_bytes: of one body of plain readings, decompressed.
        plain_rows: of one such body.
        requests: in progress at a time.
        requests_each: of one caller at a time.
        buffered_bytes: of all bodies in memory together.
        idle_s: longest silence within a body.
        retry_after_s: what a request over a bound is asked to wait.
    """

    body_bytes: int = 32 << 20
    plain_bytes: int = 32 << 20
    plain_rows: int = 100_000
    requests: int = 64
    requests_each: int = 8
    buffered_bytes: int = 256 << 20
    idle_s: float = 30.0
    retry_after_s: int = 5


class Intake:
    """Counts what is in progress. Used from one event loop."""

    def __init__(self, limits: IntakeLimits) -> None:
        self.limits = limits
        self.requests = 0
        self.buffered_bytes = 0
        self._of_caller: Counter[str] = Counter()

    @contextmanager
    def admitted(self, caller: str, retry_after_s: int | None = None) -> Iterator[Body]:
        """Admit one request, until its answer is made.

        Args:
            caller: whose it is.
            retry_after_s: what it is asked to wait when there is no room; the limits' own by default.

        Raises:
            Rejection: 503 when too many are in progress, 429 when too many of this caller's are.
        """
        wait_s = self.limits.retry_after_s if retry_after_s is None else retry_after_s
        if self.requests >= self.limits.requests:
            raise _busy(f"{self.requests} requests are in progress", wait_s)
        if self._of_caller[caller] >= self.limits.requests_each:
            message = f"{self._of_caller[caller]} requests of {caller} are in progress"
            raise Rejection(429, "busy", message, retry_after_s=wait_s)
        self.requests += 1
        self._of_caller[caller] += 1
        body = Body(self)
        try:
            yield body
        finally:
            self.requests -= 1
            self.buffered_bytes -= body.held_bytes
            self._of_caller[caller] -= 1
            if not self._of_caller[caller]:
                del self._of_caller[caller]

    def hold(self, more_bytes: int) -> None:
        """Account for bytes about to be kept in memory.

        Raises:
            Rejection: 503 when there is no room for them.
        """
        if self.buffered_bytes + more_bytes > self.limits.buffered_bytes:
            message = f"{self.buffered_bytes} bytes of other requests are being worked on"
            raise _busy(message, self.limits.retry_after_s)
        self.buffered_bytes += more_bytes


class Body:
    """The body of one admitted request."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self.held_bytes = 0

    async def read(self, pieces: AsyncIterator[bytes], declared_bytes: int | None) -> bytes:
        """The whole body.

        Args:
            pieces: as they arrive.
            declared_bytes: the Content-Length, None when the body is chunked.

        Raises:
            Rejection: 413 too long, 408 too slow, 503 no room.
        """
        limits = self._intake.limits
        self._check(declared_bytes or 0, hang_up=False)
        body = bytearray()
        while True:
            try:
                async with asyncio.timeout(limits.idle_s):
                    piece = await anext(pieces, None)
            except TimeoutError as fault:
                message = f"nothing came for {limits.idle_s:g} s after {len(body)} bytes"
                raise Rejection(408, "body_too_slow", message, hang_up=True) from fault
            if piece is None:
                return bytes(body)
            self._check(len(body) + len(piece), hang_up=True)
            self.hold(len(piece))
            body += piece

    def hold(self, more_bytes: int) -> None:
        """Account for bytes of this request about to be kept in memory; raises as `Intake.hold`."""
        self._intake.hold(more_bytes)
        self.held_bytes += more_bytes

    def _check(self, size: int, *, hang_up: bool) -> None:
        limit = self._intake.limits.body_bytes
        if size > limit:
            raise Rejection(413, "body_too_large", f"a body may have {limit} bytes", hang_up=hang_up)


def _busy(message: str, wait_s: int) -> Rejection:
    return Rejection(503, "busy", message, retry_after_s=wait_s)
