"""Plain readings over HTTP into the spool: JSON, NDJSON, line protocol or SenML, once by series and time.

What is no reading goes to quarantine by itself, its neighbours are stored; a reading under another device's
name is neither, because a stranger could fill the quarantine. With an Idempotency-Key a request that comes
again gets its first answer, which the same transaction keeps: readings without a time are not doubled.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from cloud_sync.errors import RetryLater
from cloud_sync.ingest import plain
from cloud_sync.ingest.answers import Rejection
from cloud_sync.ingest.clients import answer_to
from cloud_sync.ingest.plain import LINES, NotPlain, Stamps
from gateway.ingress.http import senml_body
from gateway.ingress.topics import SeriesName, fault_in
from gateway.spool.answered import Asked
from gateway.spool.quarantine import QuarantineItem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cloud_sync.ingest.clients import PlainRequest
    from cloud_sync.ingest.plain import Plain
    from cloud_sync.records import Readings, Series
    from gateway.ingress.committer import Committer
    from gateway.ingress.http.callers import Caller
    from gateway.spool.answered import Answers
    from gateway.spool.lots import Appended
    from gateway.spool.series import SeriesBook

MEDIA_TYPES = (*plain.MEDIA_TYPES, *senml_body.MEDIA_TYPES)
_INLINE_BYTES = 8192
_ITEMS_MAX = 100
_PARTS_MAX = 100_000
_ATTRIBUTE_STATES_MAX = 100
_STRANGE = frozenset({"other_device"})
_EXPECTED = {
    "not_json": "expected a JSON object",
    "not_utf8": "expected UTF-8",
    "not_line_protocol": "expected a line of InfluxDB line protocol",
    "bad_reading": "a member is of the wrong type",
    "no_sensor_id": "sensor_id is missing or empty",
    "no_sensor_type": "sensor_type (the measurement of a line) is missing or empty",
    "bad_name": "a name is longer than 1024 bytes, or no text",
    "bad_series_name": "sensor_id or sensor_type is longer than 256 characters, or holds control characters",
    "no_value": "value is missing: a finite number, or true or false",
    "bad_value": "value is no finite number",
    "bad_time": "ts is no instant: RFC 3339 text with an offset, or a number",
    "time_out_of_range": "ts lies outside 1677..2262",
    "number_out_of_range": "a number does not fit its column",
    "too_many_series": "the spool knows as many series as it may (spool.max_series)",
}


class ReadingIntake:
    """Takes requests with plain readings.

    Args:
        committer: where they go.
        book: of series.
        answers: kept for requests with a key.
        max_rows: readings in one request.
        clock_us: wall clock, microseconds since 1970.
    """

    def __init__(
        self,
        committer: Committer,
        book: SeriesBook,
        answers: Answers,
        *,
        max_rows: int,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._committer = committer
        self._book = book
        self._answers = answers
        self._max_rows = max_rows
        self._clock_us = clock_us
        self._stamps = Stamps()
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def take(self, request: PlainRequest, data: bytes, caller: Caller) -> str:
        """Make a request's readings durable; returns the answer, JSON text.

        Args:
            request: what the headers say.
            data: the body, decompressed.
            caller: whose it is.

        Raises:
            Rejection: none of it can be taken.
            RetryLater, SpoolError: nothing was taken.
        """
        if not request.key:
            parsed = await self._parsed(request, data, caller)
            taken = await asyncio.shield(self._bring(request, parsed, caller, None))
            return answer_to(parsed, taken.stored, taken.duplicates, taken.conflicts)
        turn = self._turns.setdefault((caller.name, request.key), asyncio.Lock())
        await turn.acquire()
        try:
            digest = hashlib.sha256(f"{request.media_type}\n{request.precision}\n".encode() + data).digest()
            asked = Asked(caller.name, request.key, digest)
            earlier = await self._answers.earlier(asked, self._clock_us())
            if earlier is not None:
                turn.release()
                return _same(asked, *earlier)
            parsed = await self._parsed(request, data, caller)
            promised = self._bring(request, parsed, caller, asked)
        except BaseException:
            if turn.locked():
                turn.release()
            raise
        promised.add_done_callback(lambda _: turn.release())
        taken = await asyncio.shield(promised)
        return answer_to(parsed, taken.stored, taken.duplicates, taken.conflicts)

    async def _parsed(self, request: PlainRequest, data: bytes, caller: Caller) -> Plain:
        new = 0

        def fault_of(series: Series) -> str | None:
            nonlocal new
            if (fault := _name_fault(series) or caller.fault_of(series)) is not None:
                return fault
            if not self._book.has(series):
                new += 1
                if len(self._book) + new > self._book.max_series:
                    return "too_many_series"
            return None

        def parse() -> Plain:
            if request.media_type not in senml_body.MEDIA_TYPES:
                return request.parse(data, max_rows=self._max_rows, stamps=self._stamps, fault_of=fault_of)
            try:
                return senml_body.parse(
                    data,
                    now_us=self._clock_us(),
                    max_rows=self._max_rows,
                    stamps=self._stamps,
                    fault_of=fault_of,
                )
            except NotPlain as fault:
                status = 413 if fault.reason == "too_many_rows" else 400
                raise Rejection(status, fault.reason, str(fault)) from fault

        parsed = parse() if len(data) <= _INLINE_BYTES else await asyncio.to_thread(parse)
        if not parsed.readings.rows and parsed.rejected and {b.reason for b in parsed.rejected} <= _STRANGE:
            raise Rejection(403, "other_device", f"{caller.name} may not bring readings of these sensors")
        return parsed

    def _bring(
        self, request: PlainRequest, parsed: Plain, caller: Caller, asked: Asked | None
    ) -> asyncio.Future[Appended]:
        now_us = self._clock_us()
        note = None
        if asked is not None:

            def worded(taken: Appended) -> str:
                return answer_to(parsed, taken.stored, taken.duplicates, taken.conflicts)

            note = self._answers.note(asked, worded, now_us)
        items = list(_items(request, parsed, caller, now_us))
        return self._committer.bring(self._renumbered(parsed), items, note)

    def _renumbered(self, parsed: Plain) -> Readings:
        numbers = [self._book.number_within(series, _ATTRIBUTE_STATES_MAX) for series in parsed.series]
        if None in numbers:
            raise RetryLater(f"the spool already knows {len(self._book)} series (spool.max_series)")
        readings = parsed.readings
        return readings.with_series(np.array(numbers, np.int32)[readings.series]) if numbers else readings


def _items(request: PlainRequest, parsed: Plain, caller: Caller, now_us: int) -> Iterator[QuarantineItem]:
    """A quarantine item for each that is no reading; its topic is what it was said to be, for a retry.

    Of very many the last one stands for the rest: one request must not push all else out of the quarantine.
    """
    kind = f"{LINES}; precision={request.precision}" if request.media_type == LINES else request.media_type
    kept = [bad for bad in parsed.rejected if bad.reason not in _STRANGE]
    for number, bad in enumerate(kept[:_ITEMS_MAX], start=1):
        where = bad.detail or f"position {bad.index}"
        more = f"; {len(kept) - number} more of this request" if number == _ITEMS_MAX < len(kept) else ""
        yield QuarantineItem.of(
            received_at_us=now_us,
            source="http",
            topic=kind,
            reason=bad.reason,
            detail=f"{_EXPECTED.get(bad.reason, bad.reason)} ({where}, from {caller.name}{more})",
            payload=bytes(bad.part),
        )


def parse_kept(kind: str, payload: bytes, *, now_us: int, stamps: Stamps) -> Plain:
    """The readings of a quarantine item of source `http`: its topic is `kind`.

    Raises:
        NotPlain: nothing of it can be taken.
    """
    media_type, _, precision = kind.partition("; precision=")
    if media_type in senml_body.MEDIA_TYPES:
        return senml_body.parse(
            payload, now_us=now_us, max_rows=_PARTS_MAX, stamps=stamps, fault_of=_name_fault
        )
    return plain.parse(
        payload,
        media_type,
        now_us=now_us,
        max_rows=_PARTS_MAX,
        precision=precision or "ns",
        stamps=stamps,
        fault_of=_name_fault,
    )


def _name_fault(series: Series) -> str | None:
    return None if fault_in(SeriesName(*series[:2])) is None else "bad_series_name"


def _same(asked: Asked, body_hash: bytes, answer: str) -> str:
    if body_hash != asked.body_hash:
        raise Rejection(422, "key_reused", f"the Idempotency-Key {asked.key} came before with another body")
    return answer
