"""The committer: decodes publishes into a group, commits groups, acknowledges what is fsynced.

While one commit is in flight the next group gathers. A publish is acknowledged only after the
transaction that holds its readings, or its quarantine rows, has returned (promise 1). What waits in
memory is bounded: beyond `max_pending_bytes` the listener stops reading its sockets (promise 7). When the
spool cannot take a group the group is kept, acknowledgements are withheld and the append is tried again
until it succeeds: hold, never forget. With `refuse_when_full` a full spool is answered with quota exceeded.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from cloud_sync.progress import Stage
from cloud_sync.rates import Rate
from cloud_sync.records import ATTRIBUTE_NAMES, Readings, Series
from gateway.ingress.formats import json_reading
from gateway.ingress.formats.measurement import Fault, bounded
from gateway.ingress.formats.rules import Rules
from gateway.ingress.group import BadReading, Group
from gateway.ingress.topics import fault_in
from gateway.spool.crashpoints import point
from gateway.spool.errors import SpoolError, SpoolFull
from gateway.spool.lots import Lot
from gateway.spool.quarantine import QuarantineItem

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from gateway.ingress.formats.json_reading import JsonReading
    from gateway.ingress.formats.measurement import Decoded, Measurement
    from gateway.ingress.formats.rule import Rule
    from gateway.ingress.formats.shapes import Decoder
    from gateway.ingress.intake import Acknowledger
    from gateway.ingress.packets import Publish
    from gateway.ingress.topics import SeriesName, TopicTemplate
    from gateway.spool.appender import Appender
    from gateway.spool.lots import Appended, Note
    from gateway.spool.series import SeriesBook

_log = logging.getLogger(__name__)
QUOTA_EXCEEDED = 0x97  # MQTT 5 section 3.4.2.1
_RETRY_S = 1.0
_COMMIT_WITHIN_S = 120.0  # storage that needs longer is taken for dead
_MANY = 8  # readings in one payload that are worth taking column by column
_INLINE_ROWS = 4096
_STEP_BACK_US = 10_000_000
_KNOWN_TOPICS_MAX = 200_000
_ATTRIBUTE_STATES_MAX = 100

_OVERHEAD_BYTES = 256  # what one waiting publish costs beside its payload
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
    rate: Rate = field(default_factory=Rate)

    def committed(self, group: Group, appended: Appended, publishes: int, commit_s: float) -> None:
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
class _Topic:
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
        if self.last_assigned_us - now_us > _STEP_BACK_US:
            self.last_assigned_us = 0
        self.last_assigned_us = max(now_us, self.last_assigned_us + 1)
        return self.last_assigned_us


class _Source(Protocol):
    """What the committer asks of where a publish came from; see `Acknowledger`."""

    @property
    def name(self) -> str: ...

    @property
    def owns(self) -> Callable[[str], bool] | None: ...


class _Parking(Protocol):
    """Readings of a group that wait for the clock: which, and what keeps them within the transaction."""

    @property
    def rows(self) -> NDArray[np.bool_]: ...

    @property
    def note(self) -> Callable[[sqlite3.Connection], None]: ...


class _Insider(NamedTuple):
    """The gateway itself as a source."""

    name: str
    owns: None = None


class Committer:
    """Implements `Intake`. `run` is its loop; `commit_once` is the step that tests call."""

    def __init__(
        self,
        appender: Appender,
        book: SeriesBook,
        template: TopicTemplate | Rules,
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
        self._book = book
        self.rules = template if isinstance(template, Rules) else Rules(template)
        self._interval_s = interval_s
        self._max_pending_bytes = max_pending_bytes
        self.on_pressure = on_pressure
        self.on_rebirths: Callable[[], None] = lambda: None
        self.on_commit: Callable[[], None] = lambda: None
        self.check = check
        self.park: Callable[[Readings, int], _Parking | None] = lambda *_: None
        self._clock_us = clock_us
        self._topics: dict[bytes, _Topic] = {}
        self._names: dict[SeriesName, _Topic] = {}
        self._group = Group()
        self._owed: list[tuple[Acknowledger, list[Publish]]] = []
        self._promised: list[asyncio.Future[Appended]] = []
        self._wake = asyncio.Event()
        self._pressed = False
        self._pending_bytes = 0
        self._finishing = False
        self._last_commit_at = 0.0
        self.counters = CommitterCounters()
        self.stage = Stage("committer")

    def retune(self, *, interval_s: float, max_pending_bytes: int, refuse_when_full: bool) -> None:
        """Go on with other limits, from the next commit on."""
        self._interval_s = interval_s
        self._max_pending_bytes = max_pending_bytes
        self._refuse_when_full = refuse_when_full

    def change_rules(self, rules: Sequence[Rule]) -> None:
        """Decode by other rules, from the next publish on; the listener's topic stays."""
        self.rules.replace(rules)
        self._topics.clear()

    def publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Take all publishes of one read of a connection. Never blocks, never raises for their content."""
        now_us = self._clock_us()
        size = 0
        for publish in batch:
            payload, publish.payload = publish.payload, b""  # what waits for the commit is its identifier
            size += len(payload) + _OVERHEAD_BYTES
            self._take(source, publish.topic, payload, now_us)
        self.counters.publishes += len(batch)
        self._owed.append((source, batch))
        self._grow(size)

    def offer(self, source: str, topic: bytes, payload: bytes) -> None:
        """Take one payload nobody waits for, such as one that comes out of the quarantine."""
        self._take(_Insider(source), topic, payload, self._clock_us())
        self._grow(len(payload))

    def bring(
        self,
        readings: Readings,
        items: Sequence[QuarantineItem] = (),
        note: Note | None = None,
        *,
        checked: bool = False,
    ) -> asyncio.Future[Appended]:
        """Take what one request brought, as a lot; the future tells what became of it once it is durable.

        Args:
            readings: in columns, their series by the spool's numbers; may be none.
            items: bad input that came with them.
            note: writes what is to be remembered of the lot, in the same transaction.
            checked: whether their flags are set already, by the gateway they come from.

        The lot is committed whether or not anyone waits. The future may raise SpoolFull: nothing was taken.
        """
        promised: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        promised.add_done_callback(_look_at)
        self._group.add_lot(readings, note, checked=checked)
        self._group.items += items
        self._promised.append(promised)
        self._grow(readings.rows * _ROW_BYTES + len(items) * _OVERHEAD_BYTES)
        return promised

    def measured(self, source: str, measurements: Sequence[Measurement]) -> None:
        """Take measurements nobody waits for, such as the gateway's own metrics."""
        self._take_measurements(_Insider(source), "", (measurements, []), b"", self._clock_us())
        self._grow(len(measurements) * _OVERHEAD_BYTES)

    async def run(self) -> None:
        """Commit groups until `finish` is called and nothing is left to commit."""
        while True:
            if not self._wake.is_set():
                self.stage.rests()
            await self._wake.wait()
            await self.commit_once()
            if self._finishing and not self._pending():
                self.stage.rests()
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
        self.stage.works(within_s=self._interval_s + _COMMIT_WITHIN_S)
        since_last_s = time.monotonic() - self._last_commit_at
        if since_last_s < self._interval_s:
            await asyncio.sleep(self._interval_s - since_last_s)
        self._last_commit_at = time.monotonic()
        group, owed, pending = self._group, self._owed, self._pending_bytes
        promised = self._promised
        self._group, self._owed, self._promised = Group(), [], []
        started = time.perf_counter()
        try:
            appended = await self._append(group)
        except SpoolFull as fault:
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
        for future, of_lot in zip(promised, appended.lots, strict=False):  # the last may be of what is parked
            if not future.done():  # its request was given up
                future.set_result(of_lot)
        point("after_ack")
        self.counters.committed(
            group, appended, sum(len(batch) for _, batch in owed), time.perf_counter() - started
        )
        self._shrink(pending)
        self.on_commit()
        return appended.stored

    async def _append(self, group: Group) -> Appended:
        """Check, then append for as long as it takes."""
        readings, lots = None, group.lots()
        if group.rows:
            readings, parking = await self._checked(group)
            if parking is not None:
                note = parking.note
                lots.append(Lot(slice(0, 0), lambda connection, _: note(connection)))
        while True:
            self.stage.works(within_s=_RETRY_S + _COMMIT_WITHIN_S)
            try:
                appended = await self._appender.append(
                    readings,
                    group.items,
                    now_us=self._clock_us(),
                    lots=lots,
                )
            except SpoolError as fault:
                if not self.counters.holding_reason:
                    _log.error(
                        "holding: acknowledgements are withheld until the spool can be written: %s", fault
                    )
                    self.counters.holding_since_us = self._clock_us()
                self.counters.holding_reason = str(fault)
                if self._refuse_when_full and isinstance(fault, SpoolFull):
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                break
        if self.counters.holding_reason:
            _log.warning("the spool can be written again")
            self.counters.holding_since_us, self.counters.holding_reason = None, ""
        return appended

    async def _checked(self, group: Group) -> tuple[Readings, _Parking | None]:
        """The readings of a group with their flags: once a group, whatever the spool says of it.

        And those that wait for the clock instead.
        """
        elsewhere, here = group.checked(), group.unchecked()
        parking = self.park(here, here.rows - group.single_rows)
        if parking is not None:
            here = here.take(~parking.rows)
        if not here.rows:
            return elsewhere, parking
        work = partial(self.check, here, self._clock_us())
        if here.rows <= _INLINE_ROWS:
            here = work()
        else:
            here = await asyncio.get_running_loop().run_in_executor(None, work)
        return (Readings.concat([elsewhere, here]) if elsewhere.rows else here), parking

    def _take(self, source: _Source, topic: bytes, payload: bytes, now_us: int) -> None:
        known = self._topics.get(topic) or self._learn(topic)
        if known.decode is not None:
            self._take_measurements(source, known.text, known.decode(payload, now_us), payload, now_us)
            return
        readings, faults = json_reading.decode(payload)
        if len(readings) < _MANY or not self._take_many(known, readings):
            for reading in readings:
                self._take_one(source, known, reading, payload, now_us)
        if faults:
            self._quarantine(source, known.text, bounded(faults, payload), now_us)

    def _take_measurements(
        self, source: _Source, topic: str, decoded: Decoded, payload: bytes, now_us: int
    ) -> None:
        """Take readings that bring the names of their series along, and quarantine what is none."""
        measurements, faults = decoded
        untaken: list[Fault] = []
        for measurement in measurements:
            try:
                self._take_measurement(source.owns, measurement, now_us)
            except BadReading as fault:
                detail = f"{measurement.name.sensor_id} {measurement.name.sensor_type}: {fault}"
                untaken.append(Fault(fault.reason, detail, payload))
        if self.rules.births.rebirths:
            self.on_rebirths()
        if faults or untaken:
            self._quarantine(source, topic, [*faults, *bounded(untaken, payload)], now_us)

    def _take_measurement(
        self, owns: Callable[[str], bool] | None, measurement: Measurement, now_us: int
    ) -> None:
        name = measurement.name
        known = self._names.get(name) or self._learn_name(name)
        if known.fault is not None:
            raise BadReading(*known.fault)
        if owns is not None and not owns(name.sensor_id):
            raise BadReading("not_its_own", f"{name.sensor_id!r} is not this device's to publish as")
        number = self._number(known, measurement)
        if measurement.time_us is None:
            self._group.take(number, measurement, assigned_us=known.assigned_us(now_us))
        else:
            self._group.take(number, measurement, assigned_us=now_us)

    def _take_many(self, known: _Topic, readings: Sequence[JsonReading]) -> bool:
        """Take an array the fast way; False when it has to be taken one by one."""
        find = known.numbers.get
        numbers = [find((r.location, r.manufacturer, r.firmware_version, r.unit)) for r in readings]
        return None not in numbers and self._group.extend(cast("list[int]", numbers), readings)

    def _take_one(
        self, source: _Source, known: _Topic, reading: JsonReading, payload: bytes, now_us: int
    ) -> None:
        try:
            if reading.ts is None:
                number = self._number(known, reading)
                self._group.add(number, reading, assigned_us=known.assigned_us(now_us))
            else:
                self._group.add(self._number(known, reading), reading, assigned_us=now_us)
        except BadReading as fault:
            self._quarantine(source, known.text, [Fault(fault.reason, str(fault), payload)], now_us)

    def _learn(self, topic: bytes) -> _Topic:
        text = topic.decode("utf-8", "backslashreplace")
        decode = self.rules.decoder_for(text)
        name = None
        if decode is None:
            name = self.rules.template.match(text)
            detail = f"the topic does not fit {self.rules.template.template!r}"
            if name is None:
                decode = _always("unknown_topic", detail)
            elif (fault := fault_in(name)) is not None:
                decode = _always("bad_series_name", fault)
        known = _Topic(text, name, decode)
        if len(self._topics) < _KNOWN_TOPICS_MAX:
            self._topics[topic] = known
        return known

    def _learn_name(self, name: SeriesName) -> _Topic:
        known = _Topic("", name)
        if (detail := fault_in(name)) is not None:
            known.fault = ("bad_name", detail)
        if len(self._names) < _KNOWN_TOPICS_MAX:
            self._names[name] = known
        return known

    def _number(self, known: _Topic, reading: JsonReading | Measurement) -> int:
        attributes = (reading.location, reading.manufacturer, reading.firmware_version, reading.unit)
        number = known.numbers.get(attributes)
        if number is None:
            number = known.numbers[attributes] = self._new_number(known, attributes)
        return number

    def _new_number(self, known: _Topic, attributes: tuple[str | None, ...]) -> int:
        """The number of a series in a state of its attributes not seen since start.

        A device whose attributes change without end (a position written as location) keeps the last state
        it had before `_ATTRIBUTE_STATES_MAX`, so that it cannot fill the book.
        """
        if len(known.numbers) >= _ATTRIBUTE_STATES_MAX:
            known.numbers.pop(next(reversed(known.numbers)))
            return next(reversed(known.numbers.values()))
        assert known.name is not None
        present = tuple(
            (name, _text(value))
            for name, value in zip(ATTRIBUTE_NAMES, attributes, strict=True)
            if value is not None
        )
        number = self._book.number_of(Series(*known.name, tuple(sorted(present))))
        if number is None:
            raise BadReading(
                "too_many_series", f"the spool already knows {len(self._book)} series (spool.max_series)"
            )
        return number

    def _quarantine(self, source: _Source, topic: str, faults: Sequence[Fault], now_us: int) -> None:
        self._group.items += [
            QuarantineItem.of(
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
        return bool(self._group.rows or self._group.items or self._owed or self._promised)

    def _grow(self, size: int) -> None:
        self._pending_bytes += size
        self._wake.set()
        if not self._pressed and self._pending_bytes > self._max_pending_bytes:
            self._pressed = True
            self.on_pressure(True)

    def _shrink(self, size: int) -> None:
        self._pending_bytes -= size
        if self._pressed and self._pending_bytes <= self._max_pending_bytes // 2:
            self._pressed = False
            self.on_pressure(False)


def _look_at(promised: asyncio.Future[Appended]) -> None:
    """Retrieve what a future holds, so that one nobody waits for any more is not complained about."""
    if not promised.cancelled():
        promised.exception()


def _always(reason: str, detail: str) -> Decoder:
    """Of topics whose payloads cannot be read, whatever they hold."""
    return lambda payload, _: ((), [Fault(reason, detail, payload)])


def _text(value: object) -> str:
    """An attribute as text: bounded, without control characters."""
    text = str(value)[:256]
    return "".join(character if character.isprintable() else "?" for character in text)
