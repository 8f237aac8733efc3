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
from typing import TYPE_CHECKING, cast

from cloud_sync.progress import Stage
from cloud_sync.rates import Rate
from cloud_sync.records import ATTRIBUTE_NAMES, Series
from gateway.ingress.formats import json_reading
from gateway.ingress.group import BadReading, Group
from gateway.ingress.topics import SeriesName, TopicTemplate, fault_in
from gateway.spool.crashpoints import point
from gateway.spool.errors import SpoolError, SpoolFull
from gateway.spool.quarantine import QuarantineItem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cloud_sync.records import Readings
    from gateway.ingress.formats.json_reading import JsonReading
    from gateway.ingress.intake import Acknowledger
    from gateway.ingress.packets import Publish
    from gateway.spool.appender import Appender
    from gateway.spool.lots import Appended, Note
    from gateway.spool.series import SeriesBook

_log = logging.getLogger(__name__)
QUOTA_EXCEEDED = 0x97  # MQTT 5 section 3.4.2.1
_RETRY_S = 1.0
_COMMIT_WITHIN_S = 120.0  # storage that needs longer is taken for dead
_MANY = 8  # readings in one payload that are worth taking column by column
_INLINE_ROWS = 4096
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
        self.rate.add(appended.stored, time.monotonic())


@dataclass(slots=True)
class _Topic:
    """What is known of one topic: its series, by the attributes last seen with it."""

    text: str
    name: SeriesName | None
    fault: tuple[str, str] | None = None
    numbers: dict[tuple[str | None, ...], int] = field(default_factory=dict)
    last_assigned_us: int = 0


class Committer:
    """Implements `Intake`. `run` is its loop; `commit_once` is the step that tests call."""

    def __init__(
        self,
        appender: Appender,
        book: SeriesBook,
        template: TopicTemplate,
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
        self._template = template
        self._interval_s = interval_s
        self._max_pending_bytes = max_pending_bytes
        self.on_pressure = on_pressure
        self._check = check
        self._clock_us = clock_us
        self._topics: dict[bytes, _Topic] = {}
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

    def publishes(self, source: Acknowledger, batch: list[Publish]) -> None:
        """Take all publishes of one read of a connection. Never blocks, never raises for their content."""
        now_us = self._clock_us()
        size = 0
        for publish in batch:
            payload, publish.payload = publish.payload, b""  # what waits for the commit is its identifier
            size += len(payload) + _OVERHEAD_BYTES
            self._take(source.name, publish.topic, payload, now_us)
        self.counters.publishes += len(batch)
        self._owed.append((source, batch))
        self._grow(size)

    def offer(self, source: str, topic: bytes, payload: bytes) -> None:
        """Take one payload nobody waits for, such as the gateway's own metrics."""
        self._take(source, topic, payload, self._clock_us())
        self._grow(len(payload))

    def bring(
        self,
        readings: Readings,
        items: Sequence[QuarantineItem] = (),
        note: Note | None = None,
    ) -> asyncio.Future[Appended]:
        """Take what one request brought, as a lot; the future tells what became of it once it is durable.

        Args:
            readings: in columns, their series by the spool's numbers; may be none.
            items: bad input that came with them.
            note: writes what is to be remembered of the lot, in the same transaction.

        The lot is committed whether or not anyone waits. The future may raise SpoolFull: nothing was taken.
        """
        promised: asyncio.Future[Appended] = asyncio.get_running_loop().create_future()
        promised.add_done_callback(_look_at)
        self._group.add_lot(readings, note)
        self._group.items += items
        self._promised.append(promised)
        self._grow(readings.rows * _ROW_BYTES + len(items) * _OVERHEAD_BYTES)
        return promised

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
        for future, of_lot in zip(promised, appended.lots, strict=True):
            if not future.done():  # its request was given up
                future.set_result(of_lot)
        point("after_ack")
        self.counters.committed(
            group, appended, sum(len(batch) for _, batch in owed), time.perf_counter() - started
        )
        self._shrink(pending)
        return appended.stored

    async def _append(self, group: Group) -> Appended:
        """Check, then append for as long as it takes."""
        readings = await self._checked(group) if group.rows else None
        while True:
            self.stage.works(within_s=_RETRY_S + _COMMIT_WITHIN_S)
            try:
                appended = await self._appender.append(
                    readings,
                    group.items,
                    now_us=self._clock_us(),
                    lots=group.lots,
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

    async def _checked(self, group: Group) -> Readings:
        """The readings of a group with their flags: once a group, whatever the spool says of it."""
        now_us = self._clock_us()
        if group.rows <= _INLINE_ROWS:
            return self._check(group.readings(), now_us)
        work = partial(self._check, group.readings(), now_us)
        return await asyncio.get_running_loop().run_in_executor(None, work)

    def _take(self, source: str, topic: bytes, payload: bytes, now_us: int) -> None:
        known = self._topics.get(topic) or self._learn(topic)
        if known.fault is not None:
            self._quarantine(source, known.text, known.fault, payload, now_us)
            return
        readings, faults = json_reading.decode(payload)
        if len(readings) < _MANY or not self._take_many(known, readings):
            for reading in readings:
                self._take_one(source, known, reading, payload, now_us)
        for bad in faults:
            self._quarantine(source, known.text, (bad.reason, bad.detail), bad.part, now_us)

    def _take_many(self, known: _Topic, readings: Sequence[JsonReading]) -> bool:
        """Take an array the fast way; False when it has to be taken one by one."""
        find = known.numbers.get
        numbers = [find((r.location, r.manufacturer, r.firmware_version, r.unit)) for r in readings]
        return None not in numbers and self._group.extend(cast("list[int]", numbers), readings)

    def _take_one(
        self, source: str, known: _Topic, reading: JsonReading, payload: bytes, now_us: int
    ) -> None:
        try:
            if reading.ts is None:
                assigned_us = max(now_us, known.last_assigned_us + 1)
                self._group.add(self._number(known, reading), reading, assigned_us=assigned_us)
                known.last_assigned_us = assigned_us
            else:
                self._group.add(self._number(known, reading), reading, assigned_us=now_us)
        except BadReading as fault:
            self._quarantine(source, known.text, (fault.reason, str(fault)), payload, now_us)

    def _learn(self, topic: bytes) -> _Topic:
        text = topic.decode("utf-8", "backslashreplace")
        name = self._template.match(text)
        known = _Topic(text, name)
        if name is None:
            known.fault = ("unknown_topic", f"the topic does not fit {self._template.template!r}")
        elif (detail := fault_in(name)) is not None:
            known.fault = ("bad_series_name", detail)
        if len(self._topics) < _KNOWN_TOPICS_MAX:
            self._topics[topic] = known
        return known

    def _number(self, known: _Topic, reading: JsonReading) -> int:
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

    def _quarantine(
        self, source: str, topic: str, fault: tuple[str, str], payload: bytes, now_us: int
    ) -> None:
        self._group.items.append(
            QuarantineItem.of(
                received_at_us=now_us,
                source=source,
                topic=topic,
                reason=fault[0],
                detail=fault[1],
                payload=payload,
            )
        )

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


def _text(value: object) -> str:
    """An attribute as text: bounded, without control characters."""
    text = str(value)[:256]
    return "".join(character if character.isprintable() else "?" for character in text)
