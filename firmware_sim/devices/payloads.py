"""Readings encoded in each payload format, and Sparkplug B messages. Pure.

json     {"value": 21.5, "ts": 1767225600000000, "quality": 98, ...}; several as an array
fields   {"temperature": 21.5, "ts": ...}; several as an array
senml    RFC 8428 with base name and base time; no quality, battery, signal, seq or attributes but the unit
lines    InfluxDB line protocol, times in nanoseconds
csv      a line of ts, value, quality, battery_level, signal_strength, seq, location, manufacturer,
         firmware_version, unit for each
number   21.5: the newest alone, without a time, so that no record can tell it from another
sparkplug_b   Eclipse Sparkplug 3.0 section 6.4.1, protobuf written by hand: a device is an edge node of the
         group `sim`; each connection has a birth that gives its metrics aliases, data by alias with a
         sequence number and times in whole ms, and a death as its last will; nothing but values
"""

from __future__ import annotations

import csv
import io
import math
import re
import struct
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from firmware_sim.devices.sensors import WAVEFORMS
from firmware_sim.ground_truth import ATTRIBUTES, MEASURES, SEQ_ABSENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from firmware_sim.ground_truth import Reading, SeriesState

PayloadFormat = Literal["json", "fields", "senml", "lines", "csv", "number", "sparkplug_b"]
FORMATS_WITHOUT_MEASURES = frozenset({"senml", "sparkplug_b"})

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NUMERIC_TIMES_FROM_US = 10**14
_ESCAPED_CHARACTERS = re.compile(r"([,= ])")
_encoder = msgspec.json.Encoder()


def encode_readings(
    payload_format: PayloadFormat, state: SeriesState, readings: Sequence[Reading], boot_id: str = ""
) -> bytes:
    """The payload of readings of one series; the boot id is carried by JSON objects only."""
    match payload_format:
        case "lines":
            payload = "\n".join(_encode_line(state, reading) for reading in readings).encode()
        case "senml":
            payload = _encoder.encode(_build_senml(state, readings))
        case "csv":
            payload = _encode_csv(state, readings)
        case "number":
            payload = repr(readings[-1].value).encode()
        case "sparkplug_b":
            metrics = (
                _metric_head(state.sensor_type, reading.time_us // 1000)
                + _varint(13 << 3 | _FIXED64)
                + struct.pack("<d", reading.value)
                for reading in readings
            )
            payload = _varint_field(1, readings[-1].time_us // 1000)
            payload += b"".join(_bytes_field(2, metric) for metric in metrics)
        case _:
            objects = [_build_object(payload_format, state, reading, boot_id) for reading in readings]
            payload = _encoder.encode(objects[0] if len(objects) == 1 else objects)
    return payload


def _present_measures(reading: Reading) -> dict[str, float]:
    numbers = zip(MEASURES, reading[2:], strict=True)
    return {name: n for name, n in numbers if not math.isnan(n) and (name != "seq" or n != SEQ_ABSENT)}


def _build_object(
    payload_format: PayloadFormat, state: SeriesState, reading: Reading, boot_id: str
) -> dict[str, object]:
    value_key = state.sensor_type if payload_format == "fields" else "value"
    stamp: int | str = reading.time_us
    if (
        abs(reading.time_us) < _NUMERIC_TIMES_FROM_US
    ):  # a gateway would read so small a number as milliseconds
        stamp = (_EPOCH + timedelta(microseconds=reading.time_us)).isoformat()
    members: dict[str, object] = {value_key: reading.value, "ts": stamp}
    members |= _present_measures(reading)
    if boot_id:
        members["boot_id"] = boot_id
    attributes = {n: text for n, text in zip(ATTRIBUTES, state.attributes, strict=True) if text is not None}
    if payload_format == "fields":
        attributes.pop("unit", None)
    return members | attributes


def _encode_csv(state: SeriesState, readings: Sequence[Reading]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    unit, *attributes = state.attributes
    for reading in readings:
        measures = _present_measures(reading)
        cells = [measures.get(name) for name in MEASURES]
        writer.writerow((reading.time_us, reading.value, *cells, *attributes, unit))
    return out.getvalue().encode()


def _build_senml(state: SeriesState, readings: Sequence[Reading]) -> list[dict[str, object]]:
    base_s = readings[0].time_us // 1_000_000
    records: list[dict[str, object]] = [
        {"n": state.sensor_type, "t": round(reading.time_us / 1e6 - base_s, 6), "v": reading.value}
        for reading in readings
    ]
    records[0] = {"bn": f"{state.sensor_id}:", "bt": base_s, "bu": state.attributes[0], **records[0]}
    return records


def _encode_line(state: SeriesState, reading: Reading) -> str:
    tags = [("sensor_id", state.sensor_id), *zip(ATTRIBUTES, state.attributes, strict=True)]
    key = ",".join([_escape(state.sensor_type)] + [f"{name}={_escape(text)}" for name, text in tags if text])
    fields = [f"value={reading.value!r}"]
    fields += [f"{n}={v!r}{'i' if n == 'seq' else ''}" for n, v in _present_measures(reading).items()]
    return f"{key} {','.join(fields)} {reading.time_us}000"


def _escape(text: str) -> str:
    return _ESCAPED_CHARACTERS.sub(r"\\\1", text)


_SPARKPLUG_GROUP = "sim"
_ALIASES = {name: number for number, name in enumerate(WAVEFORMS, start=1)}
_INT64, _DOUBLE, _BOOLEAN, _STRING = 4, 10, 11, 12
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_SEQ_END = 256


class MqttMessage(NamedTuple):
    """A topic and a payload."""

    topic: str
    payload: bytes


def sparkplug_topic(kind: str, device_id: str) -> str:
    """The topic of a message: NBIRTH, NDATA, NDEATH."""
    return f"spBv1.0/{_SPARKPLUG_GROUP}/{kind}/{device_id}"


class SparkplugSession:
    """Birth, death and sequence numbers of one device; `metrics` are (sensor_type, unit)."""

    def __init__(self, device_id: str, metrics: Iterable[tuple[str, str]]) -> None:
        self._device_id = device_id
        self._metrics = tuple(metrics)
        self._birth_count = -1
        self._seq = 0

    def begin(self) -> MqttMessage:
        """The last will of the next connection: its number is in the birth as well."""
        self._birth_count = (self._birth_count + 1) % _SEQ_END
        return MqttMessage(sparkplug_topic("NDEATH", self._device_id), self._birth_number())

    def birth(self, now_ms: int) -> MqttMessage:
        """The first message of a connection. Its metrics have no value yet."""
        self._seq = 0
        rebirth = _string_field(1, "Node Control/Rebirth") + _varint_field(4, _BOOLEAN) + _varint_field(14, 0)
        metrics = b"".join(
            _bytes_field(
                2,
                _string_field(1, name)
                + _metric_head(name, now_ms)
                + _varint_field(7, 1)
                + _bytes_field(
                    9,
                    _string_field(1, "engUnit")
                    + _bytes_field(2, _varint_field(1, _STRING) + _string_field(8, unit)),
                ),
            )
            for name, unit in self._metrics
        )
        payload = _varint_field(1, now_ms) + self._birth_number() + _bytes_field(2, rebirth) + metrics
        return MqttMessage(sparkplug_topic("NBIRTH", self._device_id), payload + _varint_field(3, 0))

    def add_sequence_number(self, payload: bytes) -> bytes:
        """Data with the next sequence number of this connection."""
        self._seq = (self._seq + 1) % _SEQ_END
        return payload + _varint_field(3, self._seq)

    def _birth_number(self) -> bytes:
        return _bytes_field(
            2, _string_field(1, "bdSeq") + _varint_field(4, _INT64) + _varint_field(11, self._birth_count)
        )


def _metric_head(sensor_type: str, time_ms: int) -> bytes:
    return _varint_field(2, _ALIASES[sensor_type]) + _varint_field(3, time_ms) + _varint_field(4, _DOUBLE)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number >= 1 << 7:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _varint_field(field: int, number: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(number)


def _bytes_field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _string_field(field: int, text: str) -> bytes:
    return _bytes_field(field, text.encode())
