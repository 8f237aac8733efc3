"""Replays recordings: their rows as readings, sent as if devices sent them now, one connection a file.

Files are sent together: paced, in the order of their times; as fast as possible, in turn. A loop begins again
where the recording ends, in time as well. Readings of one series keep their order. Each is in the ground
truth before it is sent. Memory is bounded: reading waits while `MAX_OUTSTANDING` publishes are
unacknowledged.
"""

from __future__ import annotations

import asyncio
import csv
import heapq
import math
import random
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import repeat
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec

from firmware_sim.devices.device import Device, RadioSettings
from firmware_sim.devices.firmware import Publish
from firmware_sim.errors import SimError
from firmware_sim.ground_truth import ATTRIBUTES, SEQ_ABSENT, SeriesState
from firmware_sim.replay.column_map import build_encoding_error, open_recording, sanitize_topic_level
from firmware_sim.replay.csv_values import CellError, is_missing, parse_number, parse_time_us

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from firmware_sim.ground_truth import GroundTruthWriter
    from firmware_sim.replay.column_map import ColumnMap

MAX_REASONS = 100


class RecordedReading(NamedTuple):
    """One reading of a recording. Absent numbers are NaN, an absent seq is -1."""

    line: int
    state: SeriesState
    time_us: int
    value: float
    quality: float
    battery_level: float
    signal_strength: float
    seq: int


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


def read_recording(path: Path, mapping: ColumnMap, tally: RecordingCounters) -> Iterator[RecordedReading]:
    """The readings of a file in its order. What cannot be read is counted in `tally`, with file and line.

    Raises:
        SimError: the file cannot be read, or is not text in the expected encoding.
    """
    with open_recording(path, mapping.options) as file:
        offset = _skip_to_data(file, mapping)
        rows = csv.reader(file, delimiter=mapping.delimiter)
        width = len(mapping.columns)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as fault:
                tally.skip(f"{path}:{offset + rows.line_num}", str(fault))
                continue
            except UnicodeDecodeError as fault:
                raise build_encoding_error(path, fault) from fault
            if not any(cell and not cell.isspace() for cell in row):
                continue
            tally.rows += 1
            line = offset + rows.line_num
            if len(row) > width and any(cell.strip() for cell in row[width:]):
                tally.skip(f"{path}:{line}", f"{len(row)} fields; the header has {width}")
                continue
            yield from _row_to_readings(
                row + [""] * (width - len(row)), mapping, tally, f"{path}:{line}", line
            )


def _row_to_readings(
    row: list[str], mapping: ColumnMap, tally: RecordingCounters, where: str, line: int
) -> Iterator[RecordedReading]:
    try:
        time_us, cut = parse_time_us(" ".join(row[at] for at in mapping.time), mapping.time_format)
        measures = {
            name: parse_number(row[at], mapping.decimal)
            for name, at in mapping.measures.items()
            if not is_missing(row[at])
        }
    except CellError as fault:
        tally.skip(where, str(fault))
        return
    tally.cut_times += cut
    sensor_id = (
        mapping.sensor if isinstance(mapping.sensor, str) else sanitize_topic_level(row[mapping.sensor])
    )
    attributes = tuple((row[at].strip() or None) if at is not None else None for at in mapping.attributes)
    for at, kind in mapping.values:
        cell = row[at]
        if is_missing(cell):
            tally.empty_cells += 1
            continue
        try:
            value = parse_number(cell, mapping.decimal)
        except CellError as fault:
            tally.skip(where, f"column {mapping.columns[at]!r}: {fault}")
            continue
        tally.readings += 1
        yield RecordedReading(
            line,
            SeriesState(
                sensor_id, kind if isinstance(kind, str) else sanitize_topic_level(row[kind]), attributes
            ),
            time_us,
            value,
            measures.get("quality", math.nan),
            measures.get("battery_level", math.nan),
            measures.get("signal_strength", math.nan),
            int(measures.get("seq", SEQ_ABSENT)),
        )


def _skip_to_data(file: IO[str], mapping: ColumnMap) -> int:
    """Pass over everything before the first row of data; how many lines that was."""
    number = 0
    for number, line in enumerate(file, 1):
        if number > mapping.options.skip_lines and line.strip() and not line.startswith("#"):
            break
    if mapping.options.header:
        return number
    file.seek(0)
    for _ in range(number - 1):
        file.readline()
    return number - 1


MAX_OUTSTANDING = 2_000
_NUMERIC_TIMES_FROM_US = 10**14
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OFFER_BATCH = 64
_POLL_S = 0.02
_ACK_POLL_S = 0.5
_STOPPED_DRAIN_S = 2.0
_MIN_SLEEP_S = 0.05
_SHOW_EVERY_S = 1.0
_encoder = msgspec.json.Encoder()


def format_payload_time(time_us: int) -> int | str:
    """A time as a payload carries it: microseconds, or RFC 3339 text before March 1973.

    A gateway tells the unit of a number by its size and would take smaller numbers for milliseconds.
    """
    if abs(time_us) >= _NUMERIC_TIMES_FROM_US:
        return time_us
    return (EPOCH + timedelta(microseconds=time_us)).isoformat()


@dataclass(frozen=True, slots=True)
class ReplayPace:
    """How fast, and when.

    Attributes:
        speed: seconds of the recording per second; infinity is as fast as it goes.
        shift_us: added to every time.
        loops: how many times the whole is sent; 0 is for ever.
        period_us: added to every time with each further loop.
    """

    speed: float
    shift_us: int = 0
    loops: int = 1
    period_us: int = 0


def encode_recorded_readings(readings: Sequence[RecordedReading], shift_us: int) -> bytes:
    """The payload of readings of one series: an object for one, an array for several."""
    objects = []
    for reading in readings:
        sample: dict[str, object] = {
            "value": reading.value,
            "ts": format_payload_time(reading.time_us + shift_us),
        }
        for name in ("quality", "battery_level", "signal_strength"):
            number = getattr(reading, name)
            if not math.isnan(number):
                sample[name] = number
        if reading.seq != SEQ_ABSENT:
            sample["seq"] = reading.seq
        sample.update(
            (name, text)
            for name, text in zip(ATTRIBUTES, reading.state.attributes, strict=True)
            if text is not None
        )
        objects.append(sample)
    return _encoder.encode(objects[0] if len(objects) == 1 else objects)


@dataclass(frozen=True, slots=True)
class TimeExtent:
    """From when to when recordings go, and how many readings that is."""

    first_us: int
    last_us: int
    readings: int

    @property
    def period_us(self) -> int:
        """How much later a further loop begins, so that it follows on as readings follow each other."""
        span_us = self.last_us - self.first_us
        return span_us + max(1, span_us // max(1, self.readings - 1))

    def shift_us(self, *, now_us: int, speed: float) -> int:
        """What to add so that a recording ends now, or at speed 1 begins now."""
        return now_us - (self.first_us if speed == 1 else self.last_us)


def find_time_extent(recordings: Sequence[tuple[Path, ColumnMap]]) -> TimeExtent:
    """Read the files once for their times.

    Raises:
        SimError: nothing in them can be read.
    """
    lowest, highest, count = None, None, 0
    for path, mapping in recordings:
        for reading in read_recording(path, mapping, RecordingCounters()):
            lowest = reading.time_us if lowest is None else min(lowest, reading.time_us)
            highest = reading.time_us if highest is None else max(highest, reading.time_us)
            count += 1
    if lowest is None or highest is None:
        raise SimError(
            f"{', '.join(str(path) for path, _ in recordings)}: no reading in there; try --dry-run"
        )
    return TimeExtent(lowest, highest, count)


def merge_recordings(
    parts: Sequence[Iterator[RecordedReading]], *, by_time: bool
) -> Iterator[tuple[int, RecordedReading]]:
    """Readings of several files with the number of their file: by time, or one of each in turn."""
    numbered = [zip(repeat(number), part) for number, part in enumerate(parts)]
    if by_time:
        yield from heapq.merge(*numbered, key=lambda pair: pair[1].time_us)
        return
    while numbered:
        for each in list(numbered):
            try:
                yield next(each)
            except StopIteration:
                numbered.remove(each)


@dataclass(slots=True)
class ReplayPlayer:
    """One replay of some recordings.

    Attributes:
        recordings: files and what their columns mean.
        truth: where everything is recorded.
        radio: how it talks; its counters are the replay's.
        device_id: MQTT client identifier; further files have a number behind it.
    """

    recordings: Sequence[tuple[Path, ColumnMap]]
    truth: GroundTruthWriter
    radio: RadioSettings
    device_id: str
    pace: ReplayPace
    readings_per_publish: int
    tally: RecordingCounters = field(default_factory=RecordingCounters)
    loops_started: int = 0
    _devices: list[Device] = field(init=False)
    _pending_readings: dict[tuple[int, SeriesState], list[RecordedReading]] = field(default_factory=dict)
    _offers: list[tuple[int, Publish]] = field(default_factory=list)
    _acknowledgement_arrived: asyncio.Event = field(default_factory=asyncio.Event)
    _started_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        names = [f"{self.device_id}-{n}" if n else self.device_id for n in range(len(self.recordings))]
        self._devices = [Device(name, self.radio, self._settled, random.Random(name)) for name in names]

    @property
    def outstanding(self) -> int:
        """Publishes not yet acknowledged."""
        return sum(device.outstanding for device in self._devices)

    def progress(self) -> dict[str, object]:
        """Counters as the display shows them."""
        return {
            **asdict(self.radio.counters),
            "rows": self.tally.rows,
            "skipped": self.tally.skipped,
            "devices": len(self._devices),
            "loops": self.loops_started,
            "outstanding_publishes": self.outstanding,
            "elapsed_s": round(time.monotonic() - self._started_s, 1),
        }

    async def run(
        self,
        stop: asyncio.Event,
        *,
        connect_timeout_s: float,
        drain_timeout_s: float,
        show: Callable[[dict[str, object]], None],
    ) -> None:
        """Send everything, or until `stop`; then wait for acknowledgements.

        Raises:
            SimError: nothing was reachable within `connect_timeout_s`.
        """
        async with asyncio.TaskGroup() as group:
            radios = [
                group.create_task(device.run(), name=f"replay {device.device_id}") for device in self._devices
            ]
            display_task = group.create_task(self._show(show), name="progress")
            reached = await self._wait_until_connected(connect_timeout_s, stop)
            if reached:
                await self._send(stop)
                await self._drain(stop, drain_timeout_s)
            for task in (*radios, display_task):
                task.cancel()
        self.truth.flush()
        self.truth.progress(self.progress())
        if not reached and not stop.is_set():
            why = self.radio.counters.last_fault or "no answer"
            raise SimError(f"{self.radio.broker}: not reachable within {connect_timeout_s:g} s: {why}")

    async def _wait_until_connected(self, timeout_s: float, stop: asyncio.Event) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not self.radio.counters.devices_connected:
            if stop.is_set() or time.monotonic() >= deadline_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _send(self, stop: asyncio.Event) -> None:
        begin_s, first_us = time.monotonic(), None
        for number, reading in self._readings():
            if stop.is_set():
                break
            if first_us is None:
                first_us = reading.time_us
            ahead_s = (reading.time_us - first_us) / 1e6 / self.pace.speed - (time.monotonic() - begin_s)
            if ahead_s > _MIN_SLEEP_S:
                self._publish_pending()
                await self._offer(stop)
                await _sleep_or_stop(ahead_s, stop)
            self._queue_reading(number, reading)
            if len(self._offers) >= _OFFER_BATCH:
                await self._offer(stop)
        if not stop.is_set():
            self._publish_pending()
            await self._offer(stop)

    def _readings(self) -> Iterator[tuple[int, RecordedReading]]:
        by_time = math.isfinite(self.pace.speed)
        while self.pace.loops == 0 or self.loops_started < self.pace.loops:
            later_us = self.loops_started * self.pace.period_us
            self.loops_started += 1
            parts = [read_recording(path, mapping, self.tally) for path, mapping in self.recordings]
            for number, reading in merge_recordings(parts, by_time=by_time):
                yield number, reading._replace(time_us=reading.time_us + later_us) if later_us else reading

    def _queue_reading(self, number: int, reading: RecordedReading) -> None:
        gathered = self._pending_readings.setdefault((number, reading.state), [])
        gathered.append(reading)
        if len(gathered) >= self.readings_per_publish:
            self._publish(number, self._pending_readings.pop((number, reading.state)))

    def _publish_pending(self) -> None:
        for (number, _), gathered in self._pending_readings.items():
            self._publish(number, gathered)
        self._pending_readings.clear()

    def _publish(self, number: int, readings: list[RecordedReading]) -> None:
        sensor_id, sensor_type, _ = readings[0].state
        state = self.truth.state(readings[0].state)
        shift_us = self.pace.shift_us
        first_row = self.truth.rows
        for r in readings:
            self.truth.produce(
                state, r.time_us + shift_us, r.value, r.quality, r.battery_level, r.signal_strength, r.seq
            )
        self.radio.counters.produced += len(readings)
        payload = encode_recorded_readings(readings, shift_us)
        publish = Publish(f"sensors/{sensor_id}/{sensor_type}", payload, first_row, len(readings))
        self._offers.append((number, publish))

    async def _offer(self, stop: asyncio.Event) -> None:
        self.truth.flush()
        for number, publish in self._offers:
            self._devices[number].offer(publish)
        self._offers.clear()
        await asyncio.sleep(0)
        while self.outstanding >= MAX_OUTSTANDING and not stop.is_set():
            await self._wait_for_acknowledgement(_ACK_POLL_S)

    async def _drain(self, stop: asyncio.Event, timeout_s: float) -> None:
        """Wait until nothing is outstanding; give up after `timeout_s` without an acknowledgement."""
        since_s = time.monotonic()
        while self.outstanding and time.monotonic() - since_s < timeout_s:
            if await self._wait_for_acknowledgement(_ACK_POLL_S):
                since_s = time.monotonic()
            if stop.is_set():
                timeout_s = min(timeout_s, _STOPPED_DRAIN_S)

    async def _wait_for_acknowledgement(self, seconds: float) -> bool:
        """Wait for the next acknowledgement; whether one came in time."""
        self._acknowledgement_arrived.clear()
        try:
            await asyncio.wait_for(self._acknowledgement_arrived.wait(), seconds)
        except TimeoutError:
            return False
        return True

    async def _show(self, show: Callable[[dict[str, object]], None]) -> None:
        while True:
            self.truth.progress(self.progress())
            show(self.progress())
            await asyncio.sleep(_SHOW_EVERY_S)

    def _settled(self, publish: Publish, reason_code: int) -> None:
        self.truth.settle(publish.first_row, publish.rows, reason_code, time.time_ns() // 1000)
        self._acknowledgement_arrived.set()


async def _sleep_or_stop(seconds: float, stop: asyncio.Event) -> None:
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting}, timeout=seconds)
    waiting.cancel()
