"""Plain readings over HTTP: JSON, NDJSON, line protocol or SenML, stored once by series and time.

Invalid input is quarantined item by item, valid readings are stored; readings under another device's name
are neither, because a stranger could fill the quarantine. With an Idempotency-Key a repeated request gets
its first answer, which is stored in the same transaction.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import numpy as np

from cloud_sync.codec import plain_readings
from cloud_sync.codec.plain_readings import (
    LINES,
    AssignedTimes,
    PlainBodyError,
    PlainReadings,
    RejectedReading,
)
from cloud_sync.http.requests import plain_answer_json
from cloud_sync.http.responses import RequestRejectedError
from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.reading_builder import ColumnBuilder, InvalidReadingError, Reading
from cloud_sync.model.records import ATTRIBUTE_NAMES, Flag, Series
from gateway.payloads.decoder_registry import decode_payload
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import SeriesName, find_series_name_fault
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spool.received_ledger import KeyedRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cloud_sync.http.requests import PlainRequest
    from cloud_sync.model.records import Readings
    from gateway.ingress.committer import Committer
    from gateway.ingress.http.request_auth import Caller
    from gateway.payloads.measurement import Measurement
    from gateway.spool.received_ledger import IdempotencyKeys
    from gateway.spool.segments import AppendResult
    from gateway.spool.series_catalog import SeriesCatalog

SENML_MEDIA_TYPES = ("application/senml+json", "application/senml+cbor")
_SENML_TOPIC = "http"
_SENML_RULE = PayloadRule(_SENML_TOPIC, "senml")


def parse_senml_body(
    body: bytes,
    *,
    now_us: int,
    max_rows: int,
    stamps: AssignedTimes,
    fault_of: Callable[[Series], str | None],
) -> PlainReadings:
    """The readings of a pack, as `plain_readings.parse_readings` gives those of other bodies.

    Raises:
        NotPlain: nothing of it can be taken.
    """
    measurements, faults = decode_payload(body, _SENML_TOPIC, _SENML_RULE, now_us=now_us)
    if len(measurements) > max_rows:
        raise PlainBodyError("too_many_rows", f"a request may have {max_rows} readings")
    rejected = [RejectedReading(None, fault.reason, fault.part, fault.detail) for fault in faults]
    if not measurements and len(faults) == 1 and faults[0].reason == "not_senml":
        raise PlainBodyError("not_senml", faults[0].detail)
    builder = ColumnBuilder()
    for one in measurements:
        series = Series(*one.name, _series_attributes(one))
        flags, time_us = one.flags, one.time_us
        fault = fault_of(series)
        if fault is None:
            if time_us is None:
                time_us, flags = stamps.stamp(series, now_us), flags | Flag.TIME_ASSIGNED
            try:
                builder.add(Reading(series, time_us, one.value, *_companion_values(one), one.seq, flags))
            except InvalidReadingError as bad:
                fault = str(bad)
        if fault is not None:
            rejected.append(RejectedReading(None, fault, b"", f"{series.sensor_id}/{series.sensor_type}"))
    return PlainReadings(*builder.build(), rejected)


def _series_attributes(one: Measurement) -> tuple[tuple[str, str], ...]:
    return tuple((name, text) for name in sorted(ATTRIBUTE_NAMES) if (text := getattr(one, name)))


def _companion_values(one: Measurement) -> tuple[float, float, float]:
    quality, battery_level, signal_strength = (
        math.nan if number is None else number
        for number in (one.quality, one.battery_level, one.signal_strength)
    )
    return quality, battery_level, signal_strength


MEDIA_TYPES = (*plain_readings.MEDIA_TYPES, *SENML_MEDIA_TYPES)
_INLINE_PARSE_MAX_BYTES = 8192
_QUARANTINE_ITEMS_MAX = 100
_QUARANTINED_ROWS_MAX = 100_000
_ATTRIBUTE_STATES_MAX = 100
_NOT_QUARANTINED = frozenset({"other_device"})
_EXPECTED_BY_REASON = {
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


class ReadingReceiver:
    """Takes requests with plain readings.

    Args:
        committer: where they go.
        catalog: of series.
        answers: kept for requests with a key.
        max_rows: readings in one request.
        clock_us: wall clock, microseconds since 1970.
    """

    def __init__(
        self,
        committer: Committer,
        catalog: SeriesCatalog,
        answers: IdempotencyKeys,
        *,
        max_rows: int,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._committer = committer
        self._catalog = catalog
        self._answers = answers
        self._max_rows = max_rows
        self._clock_us = clock_us
        self._stamps = AssignedTimes()
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
            taken = await asyncio.shield(self._submit_readings(request, parsed, caller, None))
            return plain_answer_json(parsed, taken.stored, taken.duplicates, taken.conflicts)
        turn = self._turns.setdefault((caller.name, request.key), asyncio.Lock())
        await turn.acquire()
        try:
            digest = hashlib.sha256(f"{request.media_type}\n{request.precision}\n".encode() + data).digest()
            asked = KeyedRequest(caller.name, request.key, digest)
            earlier = await self._answers.earlier(asked, self._clock_us())
            if earlier is not None:
                turn.release()
                return _repeat_answer(asked, *earlier)
            parsed = await self._parsed(request, data, caller)
            promised = self._submit_readings(request, parsed, caller, asked)
        except BaseException:
            if turn.locked():
                turn.release()
            raise
        promised.add_done_callback(lambda _: turn.release())
        taken = await asyncio.shield(promised)
        return plain_answer_json(parsed, taken.stored, taken.duplicates, taken.conflicts)

    async def _parsed(self, request: PlainRequest, data: bytes, caller: Caller) -> PlainReadings:
        new = 0

        def fault_of(series: Series) -> str | None:
            nonlocal new
            if (fault := _find_name_fault(series) or caller.fault_of(series)) is not None:
                return fault
            if series not in self._catalog:
                new += 1
                if len(self._catalog) + new > self._catalog.max_series:
                    return "too_many_series"
            return None

        def parse() -> PlainReadings:
            if request.media_type not in SENML_MEDIA_TYPES:
                return request.parse(data, max_rows=self._max_rows, stamps=self._stamps, fault_of=fault_of)
            try:
                return parse_senml_body(
                    data,
                    now_us=self._clock_us(),
                    max_rows=self._max_rows,
                    stamps=self._stamps,
                    fault_of=fault_of,
                )
            except PlainBodyError as fault:
                status = 413 if fault.reason == "too_many_rows" else 400
                raise RequestRejectedError(status, fault.reason, str(fault)) from fault

        parsed = parse() if len(data) <= _INLINE_PARSE_MAX_BYTES else await asyncio.to_thread(parse)
        if (
            not parsed.readings.rows
            and parsed.rejected
            and {b.reason for b in parsed.rejected} <= _NOT_QUARANTINED
        ):
            raise RequestRejectedError(
                403, "other_device", f"{caller.name} may not bring readings of these sensors"
            )
        return parsed

    def _submit_readings(
        self, request: PlainRequest, parsed: PlainReadings, caller: Caller, asked: KeyedRequest | None
    ) -> asyncio.Future[AppendResult]:
        now_us = self._clock_us()
        note = None
        if asked is not None:

            def worded(taken: AppendResult) -> str:
                return plain_answer_json(parsed, taken.stored, taken.duplicates, taken.conflicts)

            note = self._answers.note(asked, worded, now_us)
        items = list(_build_quarantine_items(request, parsed, caller, now_us))
        return self._committer.submit_readings(self._with_spool_series(parsed), items, note)

    def _with_spool_series(self, parsed: PlainReadings) -> Readings:
        numbers = [
            self._catalog.assign_number_with_state_limit(series, _ATTRIBUTE_STATES_MAX)
            for series in parsed.series
        ]
        if None in numbers:
            raise RetryLaterError(f"the spool already knows {len(self._catalog)} series (spool.max_series)")
        readings = parsed.readings
        return readings.with_series(np.array(numbers, np.int32)[readings.series]) if numbers else readings


def _build_quarantine_items(
    request: PlainRequest, parsed: PlainReadings, caller: Caller, now_us: int
) -> Iterator[QuarantineItem]:
    """A quarantine item for each that is no reading; its topic is what it was said to be, for a retry.

    Of very many the last one stands for the rest: one request must not push all else out of the quarantine.
    """
    kind = f"{LINES}; precision={request.precision}" if request.media_type == LINES else request.media_type
    kept = [bad for bad in parsed.rejected if bad.reason not in _NOT_QUARANTINED]
    for number, bad in enumerate(kept[:_QUARANTINE_ITEMS_MAX], start=1):
        where = bad.detail or f"position {bad.index}"
        more = (
            f"; {len(kept) - number} more of this request"
            if number == _QUARANTINE_ITEMS_MAX < len(kept)
            else ""
        )
        yield QuarantineItem.from_payload(
            received_at_us=now_us,
            source="http",
            topic=kind,
            reason=bad.reason,
            detail=f"{_EXPECTED_BY_REASON.get(bad.reason, bad.reason)} ({where}, from {caller.name}{more})",
            payload=bytes(bad.part),
        )


def parse_quarantined_body(kind: str, payload: bytes, *, now_us: int, stamps: AssignedTimes) -> PlainReadings:
    """The readings of a quarantine item of source `http`: its topic is `kind`.

    Raises:
        NotPlain: nothing of it can be taken.
    """
    media_type, _, precision = kind.partition("; precision=")
    if media_type in SENML_MEDIA_TYPES:
        return parse_senml_body(
            payload, now_us=now_us, max_rows=_QUARANTINED_ROWS_MAX, stamps=stamps, fault_of=_find_name_fault
        )
    return plain_readings.parse_readings(
        payload,
        media_type,
        now_us=now_us,
        max_rows=_QUARANTINED_ROWS_MAX,
        precision=precision or "ns",
        stamps=stamps,
        fault_of=_find_name_fault,
    )


def _find_name_fault(series: Series) -> str | None:
    return None if find_series_name_fault(SeriesName(*series[:2])) is None else "bad_series_name"


def _repeat_answer(asked: KeyedRequest, body_hash: bytes, answer: str) -> str:
    if body_hash != asked.body_hash:
        raise RequestRejectedError(
            422, "key_reused", f"the Idempotency-Key {asked.key} came before with another body"
        )
    return answer
