"""Recorded readings sent as if devices sent them now: a connection a file, paced or as fast as it goes.

Files are sent together: paced, in the order of their times; as fast as it goes, in turn. A loop begins again
where the recording ends, in time as well. Readings of one series keep their order. Each is in the truth
record before it is sent. Memory is bounded: reading the files waits while `MAX_OUTSTANDING` publishes are
unacknowledged.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import repeat
from typing import TYPE_CHECKING

import msgspec

from firmware_sim.device import Device, Radio
from firmware_sim.errors import SimError
from firmware_sim.firmware import Publish
from firmware_sim.recordings import Recorded, Tally, read_recording
from firmware_sim.truth import ATTRIBUTES, SEQ_ABSENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from firmware_sim.mapping import Mapping
    from firmware_sim.truth import State, TruthWriter

MAX_OUTSTANDING = 2_000
MICROSECONDS_FROM = 10**14
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_OFFER_AT_ONCE = 64
_POLL_S = 0.02
_LOOK_AROUND_S = 0.5
_HURRY_S = 2.0
_WORTH_WAITING_S = 0.05
_SHOW_EVERY_S = 1.0
_encoder = msgspec.json.Encoder()


def instant(time_us: int) -> int | str:
    """A time as a payload carries it: microseconds, or RFC 3339 text before March 1973.

    A gateway tells the unit of a number by its size and would take smaller numbers for milliseconds.
    """
    if abs(time_us) >= MICROSECONDS_FROM:
        return time_us
    return (EPOCH + timedelta(microseconds=time_us)).isoformat()


@dataclass(frozen=True, slots=True)
class Pace:
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


def encode_recorded(readings: Sequence[Recorded], shift_us: int) -> bytes:
    """The payload of readings of one series: an object for one, an array for several."""
    objects = []
    for reading in readings:
        sample: dict[str, object] = {"value": reading.value, "ts": instant(reading.time_us + shift_us)}
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
class Extent:
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


def find_extent(recordings: Sequence[tuple[Path, Mapping]]) -> Extent:
    """Read the files once for their times.

    Raises:
        SimError: nothing in them can be read.
    """
    lowest, highest, count = None, None, 0
    for path, mapping in recordings:
        for reading in read_recording(path, mapping, Tally()):
            lowest = reading.time_us if lowest is None else min(lowest, reading.time_us)
            highest = reading.time_us if highest is None else max(highest, reading.time_us)
            count += 1
    if lowest is None or highest is None:
        raise SimError(
            f"{', '.join(str(path) for path, _ in recordings)}: no reading in there; try --dry-run"
        )
    return Extent(lowest, highest, count)


def together(parts: Sequence[Iterator[Recorded]], *, by_time: bool) -> Iterator[tuple[int, Recorded]]:
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
class Replay:
    """One replay of some recordings.

    Attributes:
        recordings: files and what their columns mean.
        truth: where everything is recorded.
        radio: how it talks; its counters are the replay's.
        device_id: MQTT client identifier; further files have a number behind it.
    """

    recordings: Sequence[tuple[Path, Mapping]]
    truth: TruthWriter
    radio: Radio
    device_id: str
    pace: Pace
    readings_per_publish: int
    tally: Tally = field(default_factory=Tally)
    loops_begun: int = 0
    _devices: list[Device] = field(init=False)
    _gathering: dict[tuple[int, State], list[Recorded]] = field(default_factory=dict)
    _offers: list[tuple[int, Publish]] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
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
            "loops": self.loops_begun,
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
            shower = group.create_task(self._show(show), name="progress")
            reached = await self._reached(connect_timeout_s, stop)
            if reached:
                await self._send(stop)
                await self._drain(stop, drain_timeout_s)
            for task in (*radios, shower):
                task.cancel()
        self.truth.flush()
        self.truth.progress(self.progress())
        if not reached and not stop.is_set():
            why = self.radio.counters.last_fault or "no answer"
            raise SimError(f"{self.radio.broker}: not reachable within {connect_timeout_s:g} s: {why}")

    async def _reached(self, timeout_s: float, stop: asyncio.Event) -> bool:
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
            if ahead_s > _WORTH_WAITING_S:
                self._publish_gathered()
                await self._offer(stop)
                await _sleep_or_stop(ahead_s, stop)
            self._gather(number, reading)
            if len(self._offers) >= _OFFER_AT_ONCE:
                await self._offer(stop)
        if not stop.is_set():
            self._publish_gathered()
            await self._offer(stop)

    def _readings(self) -> Iterator[tuple[int, Recorded]]:
        by_time = math.isfinite(self.pace.speed)
        while self.pace.loops == 0 or self.loops_begun < self.pace.loops:
            later_us = self.loops_begun * self.pace.period_us
            self.loops_begun += 1
            parts = [read_recording(path, mapping, self.tally) for path, mapping in self.recordings]
            for number, reading in together(parts, by_time=by_time):
                yield number, reading._replace(time_us=reading.time_us + later_us) if later_us else reading

    def _gather(self, number: int, reading: Recorded) -> None:
        gathered = self._gathering.setdefault((number, reading.state), [])
        gathered.append(reading)
        if len(gathered) >= self.readings_per_publish:
            self._publish(number, self._gathering.pop((number, reading.state)))

    def _publish_gathered(self) -> None:
        for (number, _), gathered in self._gathering.items():
            self._publish(number, gathered)
        self._gathering.clear()

    def _publish(self, number: int, readings: list[Recorded]) -> None:
        sensor_id, sensor_type, _ = readings[0].state
        state = self.truth.state(readings[0].state)
        shift_us = self.pace.shift_us
        first_row = self.truth.rows
        for r in readings:
            self.truth.produce(
                state, r.time_us + shift_us, r.value, r.quality, r.battery_level, r.signal_strength, r.seq
            )
        self.radio.counters.produced += len(readings)
        payload = encode_recorded(readings, shift_us)
        publish = Publish(f"sensors/{sensor_id}/{sensor_type}", payload, first_row, len(readings))
        self._offers.append((number, publish))

    async def _offer(self, stop: asyncio.Event) -> None:
        self.truth.flush()
        for number, publish in self._offers:
            self._devices[number].offer(publish)
        self._offers.clear()
        await asyncio.sleep(0)
        while self.outstanding >= MAX_OUTSTANDING and not stop.is_set():
            await self._news_within(_LOOK_AROUND_S)

    async def _drain(self, stop: asyncio.Event, timeout_s: float) -> None:
        """Wait until nothing is outstanding; give up after `timeout_s` without an acknowledgement."""
        since_s = time.monotonic()
        while self.outstanding and time.monotonic() - since_s < timeout_s:
            if await self._news_within(_LOOK_AROUND_S):
                since_s = time.monotonic()
            if stop.is_set():
                timeout_s = min(timeout_s, _HURRY_S)

    async def _news_within(self, seconds: float) -> bool:
        """Wait for the next acknowledgement; whether one came in time."""
        self._news.clear()
        try:
            await asyncio.wait_for(self._news.wait(), seconds)
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
        self._news.set()


async def _sleep_or_stop(seconds: float, stop: asyncio.Event) -> None:
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting}, timeout=seconds)
    waiting.cancel()
