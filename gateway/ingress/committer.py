"""The committer: decodes publishes into a commit group, commits groups, acknowledges what is fsynced.

While one commit is in flight the next group fills. A publish is acknowledged only after the transaction
with its readings or quarantine rows has returned (promise 1). Memory is bounded: above `max_pending_bytes`
sources stop reading (promise 7). When the spool cannot be written, the group is kept, acknowledgements are
withheld and the append is retried until it succeeds. With `refuse_when_full` publishes to a full spool are
rejected with quota exceeded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from cloud_sync.model.records import ATTRIBUTE_NAMES, Readings, Series
from cloud_sync.runtime.rates import RateMeter
from cloud_sync.runtime.watchdog import StageProgress
from gateway.ingress.commit_group import CommitGroup, InvalidReadingError
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.formats import json_reading
from gateway.payloads.measurement import Fault, limit_faults
from gateway.payloads.topics import find_series_name_fault
from gateway.spool.appender import Submission
from gateway.spool.database import crash_point
from gateway.spool.errors import SpoolError, SpoolFullError
from gateway.spool.quarantine_items import QuarantineItem

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from gateway.ingress.source import Acknowledger
    from gateway.mqtt.codec.packets import Publish
    from gateway.payloads.decoder_registry import Decoder
    from gateway.payloads.formats.json_reading import JsonReading
    from gateway.payloads.measurement import DecodeResult, Measurement
    from gateway.payloads.rule import PayloadRule
    from gateway.payloads.topics import SeriesName, TopicTemplate
    from gateway.spool.appender import Appender
    from gateway.spool.segments import AppendResult, CommitNote
    from gateway.spool.series_catalog import SeriesCatalog

_log = logging.getLogger(__name__)
QUOTA_EXCEEDED = 0x97  # MQTT 5 section 3.4.2.1
_RETRY_S = 1.0
_COMMIT_WATCHDOG_S = 120.0  # storage that needs longer is taken for dead
_BULK_READINGS_MIN = 8  # readings in one payload that are worth taking column by column
_INLINE_CHECK_ROWS_MAX = 4096
_CLOCK_STEP_BACK_US = 10_000_000
_KNOWN_TOPICS_MAX = 200_000
_ATTRIBUTE_STATES_MAX = 100

_PUBLISH_OVERHEAD_BYTES = 256  # what one waiting publish costs beside its payload
_ROW_BYTES = 48  # of a reading in columns


@dataclass(slots=True)
class CommitterCounters:
    """What has happened since start."""

    publishes: int = 0
    readings: int = 0
    duplicates: int = 0
    conflicts: int = 0
    quarantined: int = 0
    commits: int = 0
    acknowledged_publishes: int = 0
    refused_publishes: int = 0
    holding_since_us: int | None = None
    holding_reason: str = ""
    commit_s: float = 0.0
    commits_s: float = 0.0
    rate: RateMeter = field(default_factory=RateMeter)

    def committed(self, group: CommitGroup, appended: AppendResult, publishes: int, commit_s: float) -> None:
        """Count one group commit."""
        self.commits += 1
        self.acknowledged_publishes += publishes
        self.readings += appended.stored
        self.duplicates += appended.duplicates
        self.conflicts += appended.conflicts
        self.quarantined += len(group.items) + appended.conflicts
        self.commit_s = commit_s
        self.commits_s += commit_s
        self.rate.add(appended.stored, time.monotonic())


@dataclass(slots=True)
class _KnownTopic:
    """What is known of one topic (or of one name in payloads): its series, by the attributes seen with it.

    `decode` is of topics that carry anything but readings of one series in the default shape.
    """

    text: str
    name: SeriesName | None
    decode: Decoder | None = None
    fault: tuple[str, str] | None = None
    numbers: dict[tuple[str | None, ...], int] = field(default_factory=dict)
    last_assigned_us: int = 0

    def assigned_us(self, now_us: int) -> int:
        """The time of receipt, each reading its own; a clock that steps back is followed."""
        if self.last_assigned_us - now_us > _CLOCK_STEP_BACK_US:
            self.last_assigned_us = 0
        self.last_assigned_us = max(now_us, self.last_assigned_us + 1)
        return self.last_assigned_us


class _SourceInfo(Protocol):
    """What the committer asks of where a publish came from; see `Acknowledger`."""

    @property
    def name(self) -> str: ...

    @property
    def may_publish_sensor(self) -> Callable[[str], bool] | None: ...


class _PendingClockRows(Protocol):
    """Readings of a group that wait for the clock: which, and what keeps them within the transaction."""

    @property
    def rows(self) -> NDArray[np.bool_]: ...

    @property
    def note(self) -> Callable[[sqlite3.Connection], None]: ...


class _InternalSource(NamedTuple):
    """The gateway itself as a source."""

    name: str
    may_publish_sensor: None = None


class Committer:
    """Implements `Intake`. `run` is its loop; `commit_once` is the step that tests call."""

    def __init__(
        self,
        appender: Appender,
        catalog: SeriesCatalog,
        template: TopicTemplate | RuleSet,
        *,
        refuse_when_full: bool = False,
        interval_s: float = 0.005,
        max_pending_bytes: int = 32 << 20,
        on_pressure: Callable[[bool], None] = lambda _: None,
        check: Callable[[Readings, int], Readings] = lambda readings, _: readings,
        clock_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self._appender = appender
        self._refuse_when_full = refuse_when_full
        self._catalog = catalog
        self.rules = template if isinstance(template, RuleSet) else RuleSet(template)
        self._interval_s = interval_s
        self._max_pending_bytes = max_pending_bytes
        self.on_pressure = on_pressure
        self.on_rebirth_needed: Callable[[], None] = lambda: None
        self.on_commit: Callable[[], None] = lambda: None
        self.check = check
        self.park: Callable[[Readings, int], _PendingClockRows | None] = lambda *_: None
        self._clock_us = clock_us
        self._topics: dict[bytes, _KnownTopic] = {}
        self._names: dict[SeriesName, _KnownTopic] = {}
        self._group = CommitGroup()
        self._owed: list[tuple[Acknowledger, list[Publish]]] = []
        self._submission_futures: list[asyncio.Future[AppendResult]] = []
        self._wake = asyncio.Event()
        self._over_pending_limit = False
        self._pending_bytes = 0
        self._finishing = False
        self._last_commit_at = 0.0
        self.counters = CommitterCounters()
        self.stage = StageProgress("committer")

    def reconfigure(self, *, interval_s: float, max_pending_bytes: int, refuse_when_full: bool) -> None:
        """Go on with other limits, from the next commit on."""
        self._interval_s = interval_s
        self._max_pending_bytes = max_pending_bytes
        self._refuse_when_full = refuse_when_full

    def replace_rules(self, rules: Sequence[PayloadRule]) -> None:
        """Decode by other rules, from the next publish on; the listener's topic stays."""
        self.rules.replace(rules)
        self._topics.clear()

    def publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Take all publishes of one read of a connection. Never blocks, never raises for their content."""
        now_us = self._clock_us()
        size = 0
        for publish in batch:
            payload, publish.payload = publish.payload, b""  # what waits for the commit is its identifier
            size += len(payload) + _PUBLISH_OVERHEAD_BYTES
            self._take(source, publish.topic, payload, now_us)
        self.counters.publishes += len(batch)
        self._owed.append((source, batch))
        self._grow(size)

    def offer(self, source: str, topic: bytes, payload: bytes) -> None:
        """Take one payload nobody waits for, such as one that comes out of the quarantine."""
        self._take(_InternalSource(source), topic, payload, self._clock_us())
        self._grow(len(payload))

    def submit_readings(
        self,
        readings: Readings,
        items: Sequence[QuarantineItem] = (),
        note: CommitNote | None = None,
        *,
        checked: bool = False,
    ) -> asyncio.Future[AppendResult]:
        """Take what one request brought, as a lot; the future tells what became of it once it is durable.

        Args:
            readings: in columns, their series by the spool's numbers; may be none.
            items: bad input that came with them.
            note: writes what is to be remembered of the lot, in the same transaction.
            checked: whether their flags are set already, by the gateway they come from.

        It is committed whether or not anyone waits. The future may raise SpoolFullError: nothing was stored.
        """
        promised: asyncio.Future[AppendResult] = asyncio.get_running_loop().create_future()
        promised.add_done_callback(_retrieve_exception)
        self._group.add_submission(readings, note, checked=checked)
        self._group.items += items
        self._submission_futures.append(promised)
        self._grow(readings.rows * _ROW_BYTES + len(items) * _PUBLISH_OVERHEAD_BYTES)
        return promised

    def measured(self, source: str, measurements: Sequence[Measurement]) -> None:
        """Take measurements nobody waits for, such as the gateway's own metrics."""
        self._add_measurements(_InternalSource(source), "", (measurements, []), b"", self._clock_us())
        self._grow(len(measurements) * _PUBLISH_OVERHEAD_BYTES)

    async def run(self) -> None:
        """Commit groups until `finish` is called and nothing is left to commit."""
        while True:
            if not self._wake.is_set():
                self.stage.set_idle()
            await self._wake.wait()
            await self.commit_once()
            if self._finishing and not self._pending():
                self.stage.set_idle()
                return

    def finish(self) -> None:
        """Let `run` end once everything taken so far is committed and acknowledged."""
        self._finishing = True
        self._wake.set()

    async def commit_once(self) -> int:
        """Commit the group gathered so far and acknowledge it; returns its readings.

        Waits for as long as the spool cannot be written.
        """
        self._wake.clear()
        if not self._pending():
            return 0
        self.stage.begin_step(within_s=self._interval_s + _COMMIT_WATCHDOG_S)
        since_last_s = time.monotonic() - self._last_commit_at
        if since_last_s < self._interval_s:
            await asyncio.sleep(self._interval_s - since_last_s)
        self._last_commit_at = time.monotonic()
        group, owed, pending = self._group, self._owed, self._pending_bytes
        promised = self._submission_futures
        self._group, self._owed, self._submission_futures = CommitGroup(), [], []
        started = time.perf_counter()
        try:
            appended = await self._append(group)
        except SpoolFullError as fault:
            for source, batch in owed:
                source.refuse(batch, QUOTA_EXCEEDED)
                self.counters.refused_publishes += len(batch)
            for future in promised:
                if not future.done():
                    future.set_exception(fault)
            self._shrink(pending)
            return 0
        for source, batch in owed:
            source.acknowledge(batch)
        for future, submission_result in zip(
            promised, appended.submissions, strict=False
        ):  # the last may be of what is parked
            if not future.done():  # its request was given up
                future.set_result(submission_result)
        crash_point("after_ack")
        self.counters.committed(
            group, appended, sum(len(batch) for _, batch in owed), time.perf_counter() - started
        )
        self._shrink(pending)
        self.on_commit()
        return appended.stored

    async def _append(self, group: CommitGroup) -> AppendResult:
        """Check, then append for as long as it takes."""
        readings, submissions = None, group.submissions()
        if group.rows:
            readings, parking = await self._checked(group)
            if parking is not None:
                note = parking.note
                submissions.append(Submission(slice(0, 0), lambda connection, _: note(connection)))
        while True:
            self.stage.begin_step(within_s=_RETRY_S + _COMMIT_WATCHDOG_S)
            try:
                appended = await self._appender.append(
                    readings,
                    group.items,
                    now_us=self._clock_us(),
                    submissions=submissions,
                )
            except SpoolError as fault:
                if not self.counters.holding_reason:
                    _log.error(
                        "holding: acknowledgements are withheld until the spool can be written: %s", fault
                    )
                    self.counters.holding_since_us = self._clock_us()
                self.counters.holding_reason = str(fault)
                if self._refuse_when_full and isinstance(fault, SpoolFullError):
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                break
        if self.counters.holding_reason:
            _log.warning("the spool can be written again")
            self.counters.holding_since_us, self.counters.holding_reason = None, ""
        return appended

    async def _checked(self, group: CommitGroup) -> tuple[Readings, _PendingClockRows | None]:
        """The readings of a group with their flags: once a group, whatever the spool says of it.

        And those that wait for the clock instead.
        """
        elsewhere, here = group.checked(), group.unchecked()
        parking = self.park(here, here.rows - group.single_rows)
        if parking is not None:
            here = here.select(~parking.rows)
        if not here.rows:
            return elsewhere, parking
        work = partial(self.check, here, self._clock_us())
        if here.rows <= _INLINE_CHECK_ROWS_MAX:
            here = work()
        else:
            here = await asyncio.get_running_loop().run_in_executor(None, work)
        return (Readings.concat([elsewhere, here]) if elsewhere.rows else here), parking

    def _take(self, source: _SourceInfo, topic: bytes, payload: bytes, now_us: int) -> None:
        known = self._topics.get(topic) or self._learn(topic)
        if known.decode is not None:
            self._add_measurements(source, known.text, known.decode(payload, now_us), payload, now_us)
            return
        readings, faults = json_reading.decode_readings(payload)
        if len(readings) < _BULK_READINGS_MIN or not self._add_reading_list(known, readings):
            for reading in readings:
                self._add_reading(source, known, reading, payload, now_us)
        if faults:
            self._quarantine(source, known.text, limit_faults(faults, payload), now_us)

    def _add_measurements(
        self, source: _SourceInfo, topic: str, decoded: DecodeResult, payload: bytes, now_us: int
    ) -> None:
        """Take readings that bring the names of their series along, and quarantine what is none."""
        measurements, faults = decoded
        item_faults: list[Fault] = []
        for measurement in measurements:
            try:
                self._add_measurement(source.may_publish_sensor, measurement, now_us)
            except InvalidReadingError as fault:
                detail = f"{measurement.name.sensor_id} {measurement.name.sensor_type}: {fault}"
                item_faults.append(Fault(fault.reason, detail, payload))
        if self.rules.births.rebirths:
            self.on_rebirth_needed()
        if faults or item_faults:
            self._quarantine(source, topic, [*faults, *limit_faults(item_faults, payload)], now_us)

    def _add_measurement(
        self, may_publish_sensor: Callable[[str], bool] | None, measurement: Measurement, now_us: int
    ) -> None:
        name = measurement.name
        known = self._names.get(name) or self._register_name(name)
        if known.fault is not None:
            raise InvalidReadingError(*known.fault)
        if may_publish_sensor is not None and not may_publish_sensor(name.sensor_id):
            raise InvalidReadingError("not_its_own", f"{name.sensor_id!r} is not this device's to publish as")
        number = self._number(known, measurement)
        if measurement.time_us is None:
            self._group.take(number, measurement, assigned_us=known.assigned_us(now_us))
        else:
            self._group.take(number, measurement, assigned_us=now_us)

    def _add_reading_list(self, known: _KnownTopic, readings: Sequence[JsonReading]) -> bool:
        """Take an array the fast way; False when it has to be taken one by one."""
        find = known.numbers.get
        numbers = [find((r.location, r.manufacturer, r.firmware_version, r.unit)) for r in readings]
        return None not in numbers and self._group.extend(cast("list[int]", numbers), readings)

    def _add_reading(
        self, source: _SourceInfo, known: _KnownTopic, reading: JsonReading, payload: bytes, now_us: int
    ) -> None:
        try:
            if reading.ts is None:
                number = self._number(known, reading)
                self._group.add(number, reading, assigned_us=known.assigned_us(now_us))
            else:
                self._group.add(self._number(known, reading), reading, assigned_us=now_us)
        except InvalidReadingError as fault:
            self._quarantine(source, known.text, [Fault(fault.reason, str(fault), payload)], now_us)

    def _learn(self, topic: bytes) -> _KnownTopic:
        text = topic.decode("utf-8", "backslashreplace")
        decode = self.rules.decoder_for(text)
        name = None
        if decode is None:
            name = self.rules.template.match(text)
            detail = f"the topic does not fit {self.rules.template.template!r}"
            if name is None:
                decode = _build_failing_decoder("unknown_topic", detail)
            elif (fault := find_series_name_fault(name)) is not None:
                decode = _build_failing_decoder("bad_series_name", fault)
        known = _KnownTopic(text, name, decode)
        if len(self._topics) < _KNOWN_TOPICS_MAX:
            self._topics[topic] = known
        return known

    def _register_name(self, name: SeriesName) -> _KnownTopic:
        known = _KnownTopic("", name)
        if (detail := find_series_name_fault(name)) is not None:
            known.fault = ("bad_name", detail)
        if len(self._names) < _KNOWN_TOPICS_MAX:
            self._names[name] = known
        return known

    def _number(self, known: _KnownTopic, reading: JsonReading | Measurement) -> int:
        attributes = (reading.location, reading.manufacturer, reading.firmware_version, reading.unit)
        number = known.numbers.get(attributes)
        if number is None:
            number = known.numbers[attributes] = self._assign_series_number(known, attributes)
        return number

    def _assign_series_number(self, known: _KnownTopic, attributes: tuple[str | None, ...]) -> int:
        """The number of a series in a state of its attributes not seen since start.

        A device whose attributes change without end (a position written as location) keeps the last state
        it had before `_ATTRIBUTE_STATES_MAX`, so that it cannot fill the catalog.
        """
        if len(known.numbers) >= _ATTRIBUTE_STATES_MAX:
            known.numbers.pop(next(reversed(known.numbers)))
            return next(reversed(known.numbers.values()))
        assert known.name is not None
        present = tuple(
            (name, _printable_attribute(value))
            for name, value in zip(ATTRIBUTE_NAMES, attributes, strict=True)
            if value is not None
        )
        number = self._catalog.assign_number(Series(*known.name, tuple(sorted(present))))
        if number is None:
            raise InvalidReadingError(
                "too_many_series", f"the spool already knows {len(self._catalog)} series (spool.max_series)"
            )
        return number

    def _quarantine(self, source: _SourceInfo, topic: str, faults: Sequence[Fault], now_us: int) -> None:
        self._group.items += [
            QuarantineItem.from_payload(
                received_at_us=now_us,
                source=source.name,
                topic=topic,
                reason=fault.reason,
                detail=fault.detail,
                payload=fault.part,
            )
            for fault in faults
        ]

    def _pending(self) -> bool:
        return bool(self._group.rows or self._group.items or self._owed or self._submission_futures)

    def _grow(self, size: int) -> None:
        self._pending_bytes += size
        self._wake.set()
        if not self._over_pending_limit and self._pending_bytes > self._max_pending_bytes:
            self._over_pending_limit = True
            self.on_pressure(True)

    def _shrink(self, size: int) -> None:
        self._pending_bytes -= size
        if self._over_pending_limit and self._pending_bytes <= self._max_pending_bytes // 2:
            self._over_pending_limit = False
            self.on_pressure(False)


def _retrieve_exception(promised: asyncio.Future[AppendResult]) -> None:
    """Retrieve what a future holds, so that one nobody waits for any more is not complained about."""
    if not promised.cancelled():
        promised.exception()


def _build_failing_decoder(reason: str, detail: str) -> Decoder:
    """Of topics whose payloads cannot be read, whatever they hold."""
    return lambda payload, _: ((), [Fault(reason, detail, payload)])


def _printable_attribute(value: object) -> str:
    """An attribute as text: bounded, without control characters."""
    text = str(value)[:256]
    return "".join(character if character.isprintable() else "?" for character in text)
