"""Plain readings over HTTP: JSON, NDJSON, line protocol or SenML, stored once by series and time.

Invalid input is quarantined item by item, valid readings are stored; readings under another device's name
are neither, because a stranger could fill the quarantine. With an Idempotency-Key a repeated request gets
its first answer, which is stored in the same transaction.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

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
from cloud_sync.model.reading_builder import ColumnBuilder, InvalidReadingError, build_reading
from gateway.ingress.http.batches import KeyedLocks
from gateway.payloads.decoder_registry import decode_payload
from gateway.payloads.rule import PayloadRule
from gateway.payloads.topics import SeriesName, find_series_name_fault
from gateway.spool.quarantine_items import QuarantineItem
from gateway.spool.received_ledger import KeyedRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cloud_sync.http.auth import Caller
    from cloud_sync.http.requests import PlainRequest
    from cloud_sync.model.records import Series
    from gateway.ingress.committer import Committer
    from gateway.spool.received_ledger import IdempotencyKeys
    from gateway.spool.segments import AppendResult

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
    """The readings of a SenML pack, as `plain_readings.parse_readings` returns those of other bodies."""
    measurements, faults = decode_payload(body, _SENML_TOPIC, _SENML_RULE, now_us=now_us)
    if len(measurements) > max_rows:
        raise PlainBodyError("too_many_rows", f"a request may have {max_rows} readings")
    rejected = [RejectedReading(None, fault.reason, fault.part, fault.detail) for fault in faults]
    if not measurements and len(faults) == 1 and faults[0].reason == "not_senml":
        raise PlainBodyError("not_senml", faults[0].detail)
    builder = ColumnBuilder()
    for one in measurements:
        reading = build_reading(one.name, one.time_us, one.value, one)._replace(flags=one.flags)
        fault = fault_of(reading.series)
        if fault is None:
            try:
                builder.add(stamps.assign_time(reading, now_us))
            except InvalidReadingError as bad:
                fault = str(bad)
        if fault is not None:
            rejected.append(RejectedReading(None, fault, b"", "/".join(one.name)))
    return PlainReadings(*builder.build(), rejected)


MEDIA_TYPES = (*plain_readings.MEDIA_TYPES, *SENML_MEDIA_TYPES)
_INLINE_PARSE_MAX_BYTES = 8192
_QUARANTINE_ITEMS_MAX = 100
_QUARANTINED_ROWS_MAX = 100_000
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
    """Stores requests with plain readings, each of at most `max_rows`."""

    def __init__(
        self,
        committer: Committer,
        answers: IdempotencyKeys,
        *,
        max_rows: int,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._committer = committer
        self._resolver = committer.decoder.resolver
        self._answers = answers
        self._max_rows = max_rows
        self._clock_us = clock_us
        self._stamps = AssignedTimes()
        self._locks = KeyedLocks[tuple[str, str]]()

    async def store(self, request: PlainRequest, data: bytes, caller: Caller) -> str:
        """Make the readings of a decompressed body durable; returns the answer, JSON text."""
        if not request.key:
            parsed = await self._parse(request, data, caller)
            return _answer(parsed, await asyncio.shield(self._submit(request, parsed, caller, None)))
        async with self._locks.hold((caller.name, request.key)) as lease:
            keyed = KeyedRequest(caller.name, request.key, request.digest(data))
            earlier = await self._answers.find_answer(keyed, self._clock_us())
            if earlier is not None:
                body_hash, answer = earlier
                if body_hash != keyed.body_hash:
                    message = f"the Idempotency-Key {request.key} was used before with another body"
                    raise RequestRejectedError(422, "key_reused", message)
                return answer
            parsed = await self._parse(request, data, caller)
            lease.until = future = self._submit(request, parsed, caller, keyed)
            return _answer(parsed, await asyncio.shield(future))

    async def _parse(self, request: PlainRequest, data: bytes, caller: Caller) -> PlainReadings:
        has_room = self._resolver.build_room_check()

        def find_fault(series: Series) -> str | None:
            fault = _find_name_fault(series)
            if fault is None and not caller.may_publish_sensor(series.sensor_id):
                fault = "other_device"
            return fault or (None if has_room(series) else "too_many_series")

        def parse() -> PlainReadings:
            rows, stamps = self._max_rows, self._stamps
            if request.media_type not in SENML_MEDIA_TYPES:
                return request.parse(data, max_rows=rows, stamps=stamps, fault_of=find_fault)
            try:
                return parse_senml_body(
                    data, now_us=self._clock_us(), max_rows=rows, stamps=stamps, fault_of=find_fault
                )
            except PlainBodyError as fault:
                status = 413 if fault.reason == "too_many_rows" else 400
                raise RequestRejectedError(status, fault.reason, str(fault)) from fault

        parsed = parse() if len(data) <= _INLINE_PARSE_MAX_BYTES else await asyncio.to_thread(parse)
        reasons = {rejected.reason for rejected in parsed.rejected}
        if not parsed.readings.rows and reasons and reasons <= _NOT_QUARANTINED:
            message = f"{caller.name} may not send readings of these sensors"
            raise RequestRejectedError(403, "other_device", message)
        return parsed

    def _submit(
        self, request: PlainRequest, parsed: PlainReadings, caller: Caller, keyed: KeyedRequest | None
    ) -> asyncio.Future[AppendResult]:
        now_us = self._clock_us()
        note = None
        if keyed is not None:
            note = self._answers.build_note(keyed, lambda result: _answer(parsed, result), now_us)
        items = list(_build_quarantine_items(request, parsed, caller, now_us))
        readings = self._resolver.renumber(parsed.readings, parsed.series, limit_states=True)
        return self._committer.submit_readings(readings, items, note)


def _answer(parsed: PlainReadings, result: AppendResult) -> str:
    return plain_answer_json(parsed, result.stored, result.duplicates, result.conflicts)


def _build_quarantine_items(
    request: PlainRequest, parsed: PlainReadings, caller: Caller, now_us: int
) -> Iterator[QuarantineItem]:
    """A quarantine item for each invalid reading; its topic is the media type, for a retry.

    Of very many the last one stands for the rest, so that one request cannot empty the quarantine of others.
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
    """The readings of a quarantine item of source `http`, whose topic is `kind`; raises PlainBodyError."""
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
