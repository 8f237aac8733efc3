"""Replays recordings: their rows as readings, sent as devices would send them now, one connection a file.

Files are sent together: paced, in the order of their times; as fast as possible, in turn. A loop begins again
where the recording ends, in time as well. Readings of one series keep their order. Each is in the ground
truth before it is sent. Memory is bounded: reading waits while `MAX_OUTSTANDING` publishes are
unacknowledged.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import heapq
import math
import random
import time
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TYPE_CHECKING, NamedTuple

from firmware_sim.devices.device import Device, DevicePool, RadioSettings
from firmware_sim.devices.payloads import encode_readings
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import SEQ_ABSENT, Publish, Reading, SeriesState
from firmware_sim.replay.column_map import find_header, sanitize_topic_level
from firmware_sim.replay.csv_values import CellError, is_missing, open_recording, parse_number, parse_time_us

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from firmware_sim.ground_truth import GroundTruthWriter
    from firmware_sim.replay.column_map import ColumnMap

MAX_REASONS = 100
MAX_OUTSTANDING = 2_000
_OFFER_BATCH = 64
_POLL_S = 0.02
_MIN_SLEEP_S = 0.05


class RecordedReading(NamedTuple):
    """One reading of a recording and the line it is on."""

    line: int
    state: SeriesState
    reading: Reading


@dataclass(slots=True)
class RecordingCounters:
    """What happened to the rows of recordings."""

    rows: int = 0
    readings: int = 0
    empty_cells: int = 0
    cut_times: int = 0
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)

    def skip(self, where: str, why: str) -> None:
        """Count something left out; the first hundred with where and why."""
        self.skipped += 1
        if len(self.reasons) < MAX_REASONS:
            self.reasons.append(f"{where}: {why}")


def read_recording(path: Path, mapping: ColumnMap, counters: RecordingCounters) -> Iterator[RecordedReading]:
    """The readings of a file in its order. What cannot be read is counted, with file and line."""
    options = mapping.options
    with open_recording(path, options.encoding) as lines:
        offset, header = find_header(path, lines, options)
        offset -= options.no_header
        first = [header] if options.no_header else []
        rows = csv.reader(chain(first, lines), delimiter=options.delimiter)
        width = len(mapping.columns)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as fault:
                counters.skip(f"{path}:{offset + rows.line_num}", str(fault))
                continue
            if not any(cell and not cell.isspace() for cell in row):
                continue
            counters.rows += 1
            line = offset + rows.line_num
            if len(row) > width and any(cell.strip() for cell in row[width:]):
                counters.skip(f"{path}:{line}", f"{len(row)} fields; the header has {width}")
                continue
            yield from _row_to_readings(
                row + [""] * (width - len(row)), mapping, counters, f"{path}:{line}", line
            )


def _row_to_readings(
    row: list[str], mapping: ColumnMap, counters: RecordingCounters, where: str, line: int
) -> Iterator[RecordedReading]:
    try:
        time_us, cut = parse_time_us(" ".join(row[at] for at in mapping.time), mapping.options.time_format)
        measures = {
            name: parse_number(row[at], mapping.options.decimal)
            for name, at in mapping.measures.items()
            if not is_missing(row[at])
        }
    except CellError as fault:
        counters.skip(where, str(fault))
        return
    counters.cut_times += cut
    seq = int(measures.pop("seq", SEQ_ABSENT))
    sensor_id = (
        mapping.sensor if isinstance(mapping.sensor, str) else sanitize_topic_level(row[mapping.sensor])
    )
    attributes = tuple((row[at].strip() or None) if at is not None else None for at in mapping.attributes)
    for at, kind in mapping.values:
        cell = row[at]
        if is_missing(cell):
            counters.empty_cells += 1
            continue
        try:
            value = parse_number(cell, mapping.options.decimal)
        except CellError as fault:
            counters.skip(where, f"column {mapping.columns[at]!r}: {fault}")
            continue
        counters.readings += 1
        sensor_type = kind if isinstance(kind, str) else sanitize_topic_level(row[kind])
        reading = Reading(time_us, value, **measures, seq=seq)
        yield RecordedReading(line, SeriesState(sensor_id, sensor_type, attributes), reading)


@dataclass(frozen=True, slots=True)
class ReplayPace:
    """How fast and how often recordings are sent: 0 loops are without end.

    `speed` is in seconds of the recording per second; `shift_us` is added to every time, `period_us` with
    each further loop.
    """

    speed: float
    shift_us: int = 0
    loops: int = 1
    period_us: int = 0


@dataclass(frozen=True, slots=True)
class TimeExtent:
    """Earliest and latest time of recordings, and how many readings they have."""

    first_us: int
    last_us: int
    readings: int

    @property
    def period_us(self) -> int:
        """How much later a further loop begins: one mean distance of readings after the last."""
        span_us = self.last_us - self.first_us
        return span_us + max(1, span_us // max(1, self.readings - 1))

    def shift_us(self, *, now_us: int, speed: float) -> int:
        """The shift with which a recording ends now, or at speed 1 begins now."""
        return now_us - (self.first_us if speed == 1 else self.last_us)


def find_time_extent(recordings: Sequence[tuple[Path, ColumnMap]]) -> TimeExtent:
    """Read the files once for their times."""
    first_us, last_us, count = math.inf, -math.inf, 0
    for path, mapping in recordings:
        for recorded in read_recording(path, mapping, RecordingCounters()):
            first_us = min(first_us, recorded.reading.time_us)
            last_us = max(last_us, recorded.reading.time_us)
            count += 1
    if not count:
        paths = ", ".join(str(path) for path, _ in recordings)
        raise SimError(f"{paths}: no reading found; --dry-run shows why")
    return TimeExtent(int(first_us), int(last_us), count)


def merge_recordings(
    parts: Sequence[Iterator[RecordedReading]], *, by_time: bool
) -> Iterator[tuple[int, RecordedReading]]:
    """Readings of several files with the number of their file: by time, or one of each in turn."""
    numbered = [zip(repeat(number), part) for number, part in enumerate(parts)]
    if by_time:
        yield from heapq.merge(*numbered, key=lambda pair: pair[1].reading.time_us)
        return
    while numbered:
        for each in list(numbered):
            try:
                yield next(each)
            except StopIteration:
                numbered.remove(each)


class ReplayPlayer:
    """One replay of some recordings. Further files have a number behind `device_id`."""

    def __init__(
        self,
        recordings: Sequence[tuple[Path, ColumnMap]],
        truth: GroundTruthWriter,
        radio: RadioSettings,
        *,
        device_id: str,
        pace: ReplayPace,
        readings_per_publish: int,
    ) -> None:
        self._recordings = recordings
        self._truth = truth
        self.radio = radio
        self._pace = pace
        self._readings_per_publish = readings_per_publish
        self.counters = RecordingCounters()
        self.loops_started = 0
        names = [f"{device_id}-{n}" if n else device_id for n in range(len(recordings))]
        self._devices = [Device(name, radio, truth.settle, random.Random(name)) for name in names]
        self._pool = DevicePool(self._devices, radio, truth)
        self._pending: dict[tuple[int, SeriesState], list[Reading]] = {}
        self._offers: list[tuple[int, Publish]] = []

    def progress(self) -> dict[str, object]:
        """The counters as `progress.json` and the display show them."""
        return {
            **self._pool.progress(),
            "rows": self.counters.rows,
            "skipped": self.counters.skipped,
            "loops": self.loops_started,
        }

    async def run(
        self,
        stop: asyncio.Event,
        *,
        connect_timeout_s: float,
        drain_timeout_s: float,
        on_progress: Callable[[dict[str, object]], None],
    ) -> None:
        """Send everything, or until `stop`; then wait for acknowledgements."""

        async def send_and_drain() -> None:
            await self._send(stop)
            await self._pool.drain(drain_timeout_s, stop)

        await self._pool.run(
            send_and_drain,
            stop,
            connect_timeout_s=connect_timeout_s,
            on_progress=lambda: on_progress(self.progress()),
        )

    async def _send(self, stop: asyncio.Event) -> None:
        begin_s, first_us = time.monotonic(), None
        for file, (_, state, reading) in self._readings():
            if stop.is_set():
                return
            if first_us is None:
                first_us = reading.time_us
            ahead_s = (reading.time_us - first_us) / 1e6 / self._pace.speed - (time.monotonic() - begin_s)
            if ahead_s > _MIN_SLEEP_S:
                await self._offer_all(stop)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), ahead_s)
            readings = self._pending.setdefault((file, state), [])
            readings.append(reading)
            if len(readings) >= self._readings_per_publish:
                self._encode(file, state, self._pending.pop((file, state)))
            if len(self._offers) >= _OFFER_BATCH:
                await self._offer(stop)
        if not stop.is_set():
            await self._offer_all(stop)

    def _readings(self) -> Iterator[tuple[int, RecordedReading]]:
        by_time = math.isfinite(self._pace.speed)
        while self._pace.loops == 0 or self.loops_started < self._pace.loops:
            later_us = self.loops_started * self._pace.period_us
            self.loops_started += 1
            parts = [read_recording(path, mapping, self.counters) for path, mapping in self._recordings]
            for file, recorded in merge_recordings(parts, by_time=by_time):
                reading = recorded.reading._replace(time_us=recorded.reading.time_us + later_us)
                yield file, recorded._replace(reading=reading)

    def _encode(self, file: int, state: SeriesState, readings: list[Reading]) -> None:
        shift_us = self._pace.shift_us
        shifted = [reading._replace(time_us=reading.time_us + shift_us) for reading in readings]
        number, first_row = self._truth.number_state(state), self._truth.rows
        for reading in shifted:
            self._truth.append(number, reading)
        self.radio.counters.produced += len(shifted)
        topic = f"sensors/{state.sensor_id}/{state.sensor_type}"
        publish = Publish(topic, encode_readings("json", state, shifted), first_row, len(shifted))
        self._offers.append((file, publish))

    async def _offer_all(self, stop: asyncio.Event) -> None:
        for (file, state), readings in self._pending.items():
            self._encode(file, state, readings)
        self._pending.clear()
        await self._offer(stop)

    async def _offer(self, stop: asyncio.Event) -> None:
        self._truth.flush()
        for file, publish in self._offers:
            self._devices[file].offer(publish)
        self._offers.clear()
        await asyncio.sleep(0)
        while self._pool.outstanding >= MAX_OUTSTANDING and not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _POLL_S)
