"""Plain readings, as clients that are no gateways send them: JSON, NDJSON or line protocol. Pure.

A JSON reading is an object with `sensor_id`, `sensor_type` and `value` (a finite number, or true/false as
1/0), and perhaps `ts`, `quality`, `battery_level`, `signal_strength`, `seq`, `location`, `manufacturer`,
`firmware_version`, `unit`; other members are skipped. `ts` is RFC 3339 text, or a number whose unit follows
from its size: below 1e11 seconds, below 1e14 milliseconds, below 1e17 microseconds, else nanoseconds.
A bad reading costs that reading, not its neighbours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from cloud_sync.gathered import BadReading, Gathering, Reading, check_series
from cloud_sync.instants import BadInstant, InstantOutOfRange, instant_us
from cloud_sync.line_protocol_reader import LineReader
from cloud_sync.records import ATTRIBUTE_NAMES, Flag, Readings, Series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

JSON, NDJSON, LINES = "application/json", "application/x-ndjson", "text/plain"
MEDIA_TYPES = (JSON, NDJSON, "application/ndjson", LINES)

_STAMPED_MAX = 200_000
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class NotPlain(Exception):  # noqa: N818 - said of the input, not of the program
    """A body that holds no readings at all, or too many; `reason` is not_json or too_many_rows."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Bad:
    """One that is no reading.

    Attributes:
        index: its position in the body (or its line), from 0; None where `detail` tells it.
        reason: machine-readable.
        part: its bytes.
        detail: more in words, "" for nothing more.
    """

    index: int | None
    reason: str
    part: bytes | msgspec.Raw
    detail: str = ""


class Stamps:
    """Times for readings that come without one: that of receipt, and rising within each series."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], int] = {}

    def stamp(self, series: Series, now_us: int) -> int:
        """A time for one reading, microseconds since 1970 UTC."""
        if len(self._last) > _STAMPED_MAX:
            self._last.clear()
        name = series[:2]
        at_us = self._last[name] = max(now_us, self._last.get(name, now_us - 1) + 1)
        return at_us


@dataclass(frozen=True, slots=True)
class Plain:
    """The readings of a body, in canonical order, and what was not taken."""

    series: Sequence[Series]
    readings: Readings
    rejected: list[Bad] = field(default_factory=list)


class _PlainReading(msgspec.Struct, gc=False):
    value: float | bool
    sensor_id: str = ""
    sensor_type: str = ""
    ts: int | float | str | None = None
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


_one = msgspec.json.Decoder(_PlainReading)
_parts = msgspec.json.Decoder(list[msgspec.Raw])


def parse(
    body: bytes,
    media_type: str,
    *,
    now_us: int,
    max_rows: int,
    precision: str = "ns",
    stamps: Stamps | None = None,
    fault_of: Callable[[Series], str | None] = lambda _: None,
) -> Plain:
    """The readings of a body.

    Args:
        body: as it is after any content encoding.
        media_type: one of `MEDIA_TYPES`.
        now_us: for readings without a time, which get `Flag.TIME_ASSIGNED`.
        max_rows: of the body, bad ones counted too.
        precision: of line protocol's timestamps.
        stamps: who remembers the times given to readings without one; nobody beyond this body by default.
        fault_of: why readings of a series are not taken here, machine-readable; None takes them.

    Raises:
        NotPlain: nothing of it can be taken.
    """
    gathering, rejected, stamps = Gathering(), [], stamps or Stamps()
    faults: dict[Series, str | None] = {}
    for index, (part, read) in enumerate(_each(body, media_type, LineReader(precision))):
        if index >= max_rows:
            raise NotPlain("too_many_rows", f"a request may have {max_rows} readings")
        if isinstance(read, Reading):
            try:
                if read.series not in faults:
                    check_series(read.series)
                    faults[read.series] = fault_of(read.series)
                _require_none(faults[read.series])
                gathering.add(read if read.time_us is not None else _timed(read, stamps, now_us))
            except BadReading as bad:
                read = bad  # noqa: PLW2901 - it turned out to be none
        if isinstance(read, BadReading):
            rejected.append(Bad(index, str(read), part))
    return Plain(*gathering.take(), rejected)


def _require_none(fault: str | None) -> None:
    if fault is not None:
        raise BadReading(fault)


def _timed(reading: Reading, stamps: Stamps, now_us: int) -> Reading:
    at_us = stamps.stamp(reading.series, now_us)
    return reading._replace(time_us=at_us, flags=reading.flags | Flag.TIME_ASSIGNED)


def _each(
    body: bytes, media_type: str, lines: LineReader
) -> Iterator[tuple[bytes | msgspec.Raw, Reading | BadReading | None]]:
    """Each reading with its bytes, or why it is none; None for a line that holds nothing."""
    if media_type == JSON:
        yield from ((part, _from_json(part)) for part in _members(body))
        return
    for line in body.split(b"\n"):
        if media_type == LINES:
            yield line, _from_line(line, lines)
        else:
            yield line, _from_json(line) if line.strip() else None


def _members(body: bytes) -> Sequence[bytes | msgspec.Raw]:
    try:
        if body.lstrip()[:1] == b"[":
            return _parts.decode(body)
        msgspec.json.decode(body, type=msgspec.Raw)
    except _UNREADABLE as fault:
        raise NotPlain("not_json", f"the body is no JSON: {fault}") from fault
    return (body,)


def _from_json(part: bytes | msgspec.Raw) -> Reading | BadReading:
    try:
        told = _one.decode(part)
    except msgspec.ValidationError as fault:
        return BadReading("no_value" if "field `value`" in str(fault) else "bad_reading")
    except _UNREADABLE:
        return BadReading("not_json")
    attributes = tuple((name, text) for name in sorted(ATTRIBUTE_NAMES) if (text := getattr(told, name)))
    quality, battery_level, signal_strength = (
        math.nan if number is None else number
        for number in (told.quality, told.battery_level, told.signal_strength)
    )
    try:
        return Reading(
            Series(told.sensor_id, told.sensor_type, attributes),
            None if told.ts is None else _instant_us(told.ts),
            float(told.value),
            quality,
            battery_level,
            signal_strength,
            told.seq,
        )
    except BadReading as fault:
        return fault


def _from_line(line: bytes, lines: LineReader) -> Reading | BadReading | None:
    try:
        return lines.read(line.decode())
    except UnicodeDecodeError:
        return BadReading("not_utf8")
    except BadReading as fault:
        return fault


def _instant_us(ts: float | str) -> int:
    try:
        return instant_us(ts)
    except InstantOutOfRange:
        raise BadReading("time_out_of_range") from None
    except BadInstant:
        raise BadReading("bad_time") from None
