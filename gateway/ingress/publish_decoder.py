"""Publishes decoded into a commit group: readings into rows, everything else into quarantine items.

How to decode is resolved once per topic, and a series number once per name and state of its attributes. A
sender whose attributes change without end (a position written as location) stays at its newest number after
`_ATTRIBUTE_STATES_MAX` states, so that it cannot fill the series catalog. Never raises for what a payload
holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from cloud_sync.model.errors import RetryLaterError
from cloud_sync.model.reading_builder import (
    MAX_TIME_US,
    MICROSECONDS_FROM,
    MICROSECONDS_TO,
    MIN_TIME_US,
    TimestampError,
    parse_timestamp,
)
from cloud_sync.model.records import ATTRIBUTE_NAMES, Flag, Records, Series
from gateway.payloads.decoder_registry import SingleSeriesDecoder, build_failing_decoder
from gateway.payloads.measurement import Fault, PayloadDecodeError, limit_faults
from gateway.payloads.topics import SeriesName, find_series_name_fault
from gateway.spool.quarantine_items import QuarantineItem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.ingress.commit_group import AttributeTexts, CommitGroup
    from gateway.ingress.source import PublishSource
    from gateway.payloads.decoder_registry import RuleSet
    from gateway.payloads.formats.json_reading import JsonReading
    from gateway.payloads.measurement import Decoder, Measurement
    from gateway.payloads.rule import PayloadRule
    from gateway.spool.series_catalog import SeriesCatalog

R = TypeVar("R", bound=Records)

_ATTRIBUTE_STATES_MAX = 100
_ATTRIBUTE_MAX_CHARACTERS = 256
_CACHED_NAMES_MAX = 200_000
_CLOCK_STEP_BACK_US = 10_000_000
_BULK_READINGS_MIN = 8  # readings in one payload that are worth packing together
_CACHED_TOPICS_MAX = 200_000
_TIME_ASSIGNED_FLAG = int(Flag.TIME_ASSIGNED)


@dataclass(slots=True)
class SeriesEntry:
    """A name, why readings of it cannot be stored, and its number in each state of its attributes."""

    name: SeriesName
    fault: str | None
    numbers: dict[AttributeTexts, int] = field(default_factory=dict)
    last_assigned_us: int = 0

    def assign_time_us(self, now_us: int) -> int:
        """A time of receipt that no other reading of the series has; follows a clock that steps back."""
        if self.last_assigned_us - now_us > _CLOCK_STEP_BACK_US:
            self.last_assigned_us = 0
        self.last_assigned_us = max(now_us, self.last_assigned_us + 1)
        return self.last_assigned_us


class SeriesResolver:
    """Finds series numbers, and gives new series theirs."""

    def __init__(self, catalog: SeriesCatalog) -> None:
        self._catalog = catalog
        self._entries: dict[SeriesName, SeriesEntry] = {}

    def find_entry(self, name: SeriesName) -> SeriesEntry:
        """The entry of a name, whether or not it can be stored."""
        entry = self._entries.get(name)
        if entry is None:
            entry = SeriesEntry(name, find_series_name_fault(name))
            if len(self._entries) < _CACHED_NAMES_MAX:
                self._entries[name] = entry
        return entry

    def renumber(self, records: R, series: Sequence[Series], *, limit_states: bool) -> R:
        """Records whose series are positions in `series`, by the spool's; RetryLaterError when it is full."""
        catalog = self._catalog
        if limit_states:
            numbers = [catalog.assign_number_with_state_limit(one, _ATTRIBUTE_STATES_MAX) for one in series]
        else:
            numbers = [catalog.assign_number(one) for one in series]
        if None in numbers:
            raise RetryLaterError(self._full_catalog_message())
        return records.with_series(np.array(numbers, np.int32)[records.series]) if records.rows else records

    def build_room_check(self) -> Callable[[Series], bool]:
        """Whether there is room for the series of one request, all of them together."""
        new = 0

        def has_room(series: Series) -> bool:
            nonlocal new
            if series in self._catalog:
                return True
            new += 1
            return len(self._catalog) + new <= self._catalog.max_series

        return has_room

    def assign_number(self, entry: SeriesEntry, attributes: AttributeTexts) -> int:
        """The number of a series in a state new since start; PayloadDecodeError when there is no room."""
        present = sorted(
            (name, "".join(sign if sign.isprintable() else "?" for sign in text[:_ATTRIBUTE_MAX_CHARACTERS]))
            for name, text in zip(ATTRIBUTE_NAMES, attributes, strict=True)
            if text is not None
        )
        series = Series(*entry.name, tuple(present))
        number = self._catalog.assign_number_with_state_limit(series, _ATTRIBUTE_STATES_MAX)
        if number is None:
            raise PayloadDecodeError("too_many_series", self._full_catalog_message())
        if len(entry.numbers) >= _ATTRIBUTE_STATES_MAX:
            entry.numbers.clear()
        entry.numbers[attributes] = number
        return number

    def _full_catalog_message(self) -> str:
        return f"the spool already knows {len(self._catalog)} series (spool.max_series)"


class InternalSource(NamedTuple):
    """The gateway itself as a source."""

    name: str
    may_publish_sensor: None = None


class _Topic:
    """How payloads on one topic are decoded; `series` is set when all of its readings are of one."""

    __slots__ = ("decode", "decode_readings", "series", "text")

    def __init__(self, text: str, decoder: Decoder | SingleSeriesDecoder, resolver: SeriesResolver) -> None:
        self.text = text
        self.series: SeriesEntry | None = None
        if isinstance(decoder, SingleSeriesDecoder):
            entry = resolver.find_entry(decoder.name)
            if entry.fault is None:
                self.series, self.decode_readings = entry, decoder.decode
                return
            decoder = build_failing_decoder("bad_series_name", entry.fault)
        self.decode = decoder


class PublishDecoder:
    """Decodes by a set of rules; `on_rebirths_due` is called when Sparkplug nodes are to be asked for one."""

    def __init__(
        self, rules: RuleSet, resolver: SeriesResolver, on_rebirths_due: Callable[[], None] = lambda: None
    ) -> None:
        self.rules = rules
        self.resolver = resolver
        self._on_rebirths_due = on_rebirths_due
        self._topics: dict[bytes, _Topic] = {}

    def replace_rules(self, rules: Sequence[PayloadRule]) -> None:
        """Decode by other rules from the next publish on; the listener's topic template stays."""
        self.rules.replace(rules)
        self._topics.clear()

    def decode_into(
        self, group: CommitGroup, source: PublishSource, topic_bytes: bytes, payload: bytes, now_us: int
    ) -> None:
        """Add what one publish holds to a group."""
        topic = self._topics.get(topic_bytes) or self._resolve_topic(topic_bytes)
        series = topic.series
        if series is None:
            measurements, faults = topic.decode(payload, now_us)
            permission = source.may_publish_sensor
            faults += self._add_measurements(group, permission, measurements, payload, now_us)
            if self.rules.births.rebirths:
                self._on_rebirths_due()
        else:
            readings, faults = topic.decode_readings(payload, now_us)
            if len(readings) < _BULK_READINGS_MIN or not group.extend(series.numbers, readings):
                faults += self._add_readings(group, series, readings, payload, now_us)
        if faults:
            _quarantine(group, source.name, topic.text, faults, now_us)

    def add_measurements(
        self, group: CommitGroup, source: PublishSource, measurements: Sequence[Measurement], now_us: int
    ) -> None:
        """Add measurements that were no publish."""
        faults = self._add_measurements(group, source.may_publish_sensor, measurements, b"", now_us)
        _quarantine(group, source.name, "", faults, now_us)

    def _resolve_topic(self, topic_bytes: bytes) -> _Topic:
        text = topic_bytes.decode("utf-8", "backslashreplace")
        topic = _Topic(text, self.rules.decoder_for(text), self.resolver)
        if len(self._topics) < _CACHED_TOPICS_MAX:
            self._topics[topic_bytes] = topic
        return topic

    def _add_readings(
        self,
        group: CommitGroup,
        series: SeriesEntry,
        readings: Sequence[JsonReading],
        payload: bytes,
        now_us: int,
    ) -> list[Fault]:
        faults = []
        for reading in readings:
            ts, flags = reading.ts, 0
            try:
                attributes = (reading.location, reading.manufacturer, reading.firmware_version, reading.unit)
                number = series.numbers.get(attributes)
                if number is None:
                    number = self.resolver.assign_number(series, attributes)
                if type(ts) is int and MICROSECONDS_FROM <= ts < MICROSECONDS_TO:
                    time_us = ts
                elif ts is None:
                    time_us, flags = series.assign_time_us(now_us), _TIME_ASSIGNED_FLAG
                else:
                    time_us = parse_timestamp(ts)
                group.add(number, reading, time_us, flags)
            except TimestampError as fault:
                faults.append(Fault("bad_time", f"ts: {fault}", payload))
            except PayloadDecodeError as fault:
                faults.append(fault.fault(payload))
        return limit_faults(faults, payload) if faults else faults

    def _add_measurements(
        self,
        group: CommitGroup,
        permission: Callable[[str], bool] | None,
        measurements: Sequence[Measurement],
        payload: bytes,
        now_us: int,
    ) -> list[Fault]:
        faults = []
        for measurement in measurements:
            try:
                self._add_measurement(group, permission, measurement, now_us)
            except PayloadDecodeError as fault:
                sensor_id, sensor_type = measurement.name
                detail = f"{sensor_id} {sensor_type}: {fault}"
                faults.append(Fault(fault.reason, detail, payload))
        return limit_faults(faults, payload)

    def _add_measurement(
        self,
        group: CommitGroup,
        permission: Callable[[str], bool] | None,
        measurement: Measurement,
        now_us: int,
    ) -> None:
        series = self.resolver.find_entry(measurement.name)
        if series.fault is not None:
            raise PayloadDecodeError("bad_name", series.fault)
        if permission is not None and not permission(series.name.sensor_id):
            raise PayloadDecodeError("not_its_own", "the device may not publish as this sensor")
        m = measurement
        attributes = (m.location, m.manufacturer, m.firmware_version, m.unit)
        number = series.numbers.get(attributes) or self.resolver.assign_number(series, attributes)
        time_us, flags = measurement.time_us, measurement.flags
        if time_us is None:
            time_us, flags = series.assign_time_us(now_us), flags | _TIME_ASSIGNED_FLAG
        elif not MIN_TIME_US <= time_us <= MAX_TIME_US:
            raise PayloadDecodeError("bad_time", "the time lies outside 1677..2262")
        if not math.isfinite(measurement.value):
            raise PayloadDecodeError("bad_value", f"{measurement.value!r} is not a finite number")
        group.add(number, measurement, time_us, flags)


def _quarantine(group: CommitGroup, source: str, topic: str, faults: Sequence[Fault], now_us: int) -> None:
    group.items += [
        QuarantineItem.from_payload(
            received_at_us=now_us,
            source=source,
            topic=topic,
            reason=fault.reason,
            detail=fault.detail,
            payload=fault.part,
        )
        for fault in faults
    ]
