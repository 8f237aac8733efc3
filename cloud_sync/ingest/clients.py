"""`POST /v1/readings`: plain readings of clients that are no gateways, stored once by series and time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from typing import TYPE_CHECKING

from cloud_sync.database.clients import AnswerMemory, Asked
from cloud_sync.ingest import plain
from cloud_sync.ingest.answers import Rejection
from cloud_sync.ingest.decompression import ENCODINGS, CannotDecompress, TooMuch, decompressed
from cloud_sync.line_protocol_reader import PRECISIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request

    from cloud_sync.ingest.intake import Body
    from cloud_sync.ingest.plain import Plain
    from cloud_sync.records import Receipt, Series

_KEY_MAX_CHARACTERS = 255
_REJECTED_SHOWN = 1000


class PlainRequest:
    """One request as its headers describe it.

    Raises:
        Rejection: 415 or 400, for what no body could mend.
    """

    def __init__(self, request: Request, media_types: Sequence[str] = plain.MEDIA_TYPES) -> None:
        self.media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if self.media_type not in media_types:
            expected = ", ".join(media_types)
            raise Rejection(415, "media_type", f"expected {expected}, not {self.media_type or 'nothing'}")
        self.encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
        if self.encoding not in ENCODINGS:
            raise Rejection(415, "content_encoding", f"expected {', '.join(ENCODINGS)}")
        self.precision = request.query_params.get("precision", "ns")
        if self.precision not in PRECISIONS:
            raise Rejection(400, "bad_precision", f"expected {', '.join(PRECISIONS)}")
        self.key = request.headers.get("Idempotency-Key", "").strip()
        if len(self.key) > _KEY_MAX_CHARACTERS or not self.key.isprintable():
            raise Rejection(400, "bad_key", f"an Idempotency-Key has up to {_KEY_MAX_CHARACTERS} characters")

    def parse(
        self,
        body: bytes,
        *,
        max_rows: int,
        stamps: plain.Stamps | None = None,
        fault_of: Callable[[Series], str | None] = lambda _: None,
    ) -> Plain:
        """The readings of the decompressed body, as `plain.parse` says.

        Raises:
            Rejection: 400 or 413.
        """
        try:
            return plain.parse(
                body,
                self.media_type,
                now_us=time.time_ns() // 1000,
                max_rows=max_rows,
                precision=self.precision,
                stamps=stamps,
                fault_of=fault_of,
            )
        except plain.NotPlain as fault:
            raise Rejection(400 if fault.reason == "not_json" else 413, fault.reason, str(fault)) from fault

    async def decompress(self, data: bytes, body: Body, max_bytes: int) -> bytes:
        """The body without its content encoding, accounted for.

        Raises:
            Rejection: 400, 413 or 503.
        """
        if self.encoding == "identity":
            return data
        try:
            found = await asyncio.to_thread(decompressed, data, self.encoding, max_bytes=max_bytes)
        except CannotDecompress as fault:
            raise Rejection(400, "bad_encoding", str(fault)) from fault
        except TooMuch as fault:
            raise Rejection(413, "body_too_large", str(fault)) from fault
        body.hold(len(found))
        return found

    def asked(self, client: str, body: bytes) -> Asked:
        """What identifies the request."""
        digest = hashlib.sha256(f"{self.media_type}\n{self.precision}\n".encode() + body).digest()
        return Asked(client, self.key, digest)


def memory_of(asked: Asked, parsed: Plain, count: Callable[[Receipt], None]) -> AnswerMemory:
    """The answer to a request, made from its receipt once and kept for its key."""

    def worded(receipt: Receipt) -> str:
        count(receipt)
        return answer_to(parsed, receipt.stored, receipt.duplicates, receipt.conflicts)

    return AnswerMemory(asked, worded)


def answer_to(parsed: Plain, stored: int, duplicates: int, conflicts: int) -> str:
    """The answer to plain readings as JSON, with the first of those that were not taken."""
    answer = {
        "stored": stored,
        "duplicates": duplicates,
        "conflicts": conflicts,
        "rejected": [_told(bad) for bad in parsed.rejected[:_REJECTED_SHOWN]],
    }
    more = len(parsed.rejected) - _REJECTED_SHOWN
    return json.dumps(answer | ({"rejected_more": more} if more > 0 else {}))


def _told(bad: plain.Bad) -> dict[str, int | str]:
    index = {} if bad.index is None else {"index": bad.index}
    return {**index, "reason": bad.reason, **({"detail": bad.detail} if bad.detail else {})}
