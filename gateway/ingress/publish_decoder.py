"""Publishes decoded into a commit group: readings into rows, everything else into quarantine items.

How to decode is resolved once per topic and cached. Never raises for what a payload holds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from cloud_sync.model.reading_builder import (
    MAX_TIME_US,
    MICROSECONDS_FROM,
    MICROSECONDS_TO,
    MIN_TIME_US,
    TimestampError,
    parse_timestamp,
)
from cloud_sync.model.records import Flag
from gateway.payloads.decoder_registry import SingleSeriesDecoder, build_failing_decoder
from gateway.payloads.measurement import Fault, PayloadDecodeError, limit_faults
from gateway.spool.quarantine_items import QuarantineItem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.ingress.commit_group import CommitGroup
    from gateway.ingress.series_resolver import SeriesEntry, SeriesResolver
    from gateway.payloads.decoder_registry import RuleSet
    from gateway.payloads.formats.json_reading import JsonReading
    from gateway.payloads.measurement import Decoder, Measurement
    from gateway.payloads.rule import PayloadRule

_BULK_READINGS_MIN = 8  # readings in one payload that are worth packing together
_CACHED_TOPICS_MAX = 200_000
_TIME_ASSIGNED_FLAG = int(Flag.TIME_ASSIGNED)


class PublishSource(Protocol):
    """Where a publish came from, as far as decoding goes; see `Acknowledger`."""

    @property
    def name(self) -> str:
        """What quarantine rows call it."""
        ...

    @property
    def may_publish_sensor(self) -> Callable[[str], bool] | None:
        """Which sensor_ids payloads may name; None: all."""
        ...


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
            if len(readings) < _BULK_READINGS_MIN or not _add_bulk(group, series, readings):
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
                number = self.resolver.find_number(series, reading)
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
        number = self.resolver.find_number(series, measurement)
        time_us, flags = measurement.time_us, measurement.flags
        if time_us is None:
            time_us, flags = series.assign_time_us(now_us), flags | _TIME_ASSIGNED_FLAG
        elif not MIN_TIME_US <= time_us <= MAX_TIME_US:
            raise PayloadDecodeError("bad_time", "the time lies outside 1677..2262")
        if not math.isfinite(measurement.value):
            raise PayloadDecodeError("bad_value", f"{measurement.value!r} is not a finite number")
        group.add(number, measurement, time_us, flags)


def _add_bulk(group: CommitGroup, series: SeriesEntry, readings: Sequence[JsonReading]) -> bool:
    """Add a long array at once; False when its readings have to be added one by one."""
    find = series.numbers.get
    numbers = [find((r.location, r.manufacturer, r.firmware_version, r.unit)) for r in readings]
    return None not in numbers and group.extend(cast("list[int]", numbers), readings)


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
