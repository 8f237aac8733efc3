"""Samples encoded in each payload format, and Sparkplug B messages. Pure.

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
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import msgspec

from firmware_sim.devices.sensors import WAVEFORMS
from firmware_sim.ground_truth import ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from firmware_sim.ground_truth import SeriesState

SPARKPLUG_GROUP = "sim"
_ALIASES = {name: number for number, name in enumerate(WAVEFORMS, start=1)}
_INT64, _DOUBLE, _BOOLEAN, _STRING = 4, 10, 11, 12
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_SEQ_END = 256


def sparkplug_topic(kind: str, device_id: str) -> str:
    """The topic of a message: NBIRTH, NDATA, NDEATH."""
    return f"spBv1.0/{SPARKPLUG_GROUP}/{kind}/{device_id}"


def encode_sparkplug_data(sensor_type: str, samples: Iterable[Sample]) -> bytes:
    """Samples of one metric, without the sequence number: it depends on the connection, see `Session`."""
    samples = list(samples)
    return _varint_field(1, samples[-1].ts // 1000) + b"".join(
        _bytes_field(
            2,
            _varint_field(2, _ALIASES[sensor_type])
            + _varint_field(3, sample.ts // 1000)
            + _varint_field(4, _DOUBLE)
            + _double_field(13, sample.value),
        )
        for sample in samples
    )


class SparkplugSession:
    """What one device says on each of its connections beside its data.

    Args:
        device_id: the node.
        metrics: (sensor_type, unit) of everything it measures.
    """

    def __init__(self, device_id: str, metrics: Iterable[tuple[str, str]]) -> None:
        self._device_id = device_id
        self._metrics = tuple(metrics)
        self._number = -1
        self._seq = 0

    def begin(self) -> MqttMessage:
        """The last will of the connection that is to be made: its number is in the birth as well."""
        self._number = (self._number + 1) % _SEQ_END
        return MqttMessage(sparkplug_topic("NDEATH", self._device_id), self._birth_number())

    def birth(self, now_ms: int) -> MqttMessage:
        """The first message of a connection. Metrics are there without a value."""
        self._seq = 0
        rebirth = _string_field(1, "Node Control/Rebirth") + _varint_field(4, _BOOLEAN) + _varint_field(14, 0)
        named = b"".join(
            _bytes_field(
                2,
                _string_field(1, name)
                + _varint_field(2, _ALIASES[name])
                + _varint_field(3, now_ms)
                + _varint_field(4, _DOUBLE)
                + _varint_field(7, 1)
                + _bytes_field(
                    9,
                    _string_field(1, "engUnit")
                    + _bytes_field(2, _varint_field(1, _STRING) + _string_field(8, unit)),
                ),
            )
            for name, unit in self._metrics
        )
        payload = _varint_field(1, now_ms) + self._birth_number() + _bytes_field(2, rebirth) + named
        return MqttMessage(sparkplug_topic("NBIRTH", self._device_id), payload + _varint_field(3, 0))

    def numbered(self, payload: bytes) -> bytes:
        """Data with the next sequence number of this connection."""
        self._seq = (self._seq + 1) % _SEQ_END
        return payload + _varint_field(3, self._seq)

    def _birth_number(self) -> bytes:
        return _bytes_field(
            2, _string_field(1, "bdSeq") + _varint_field(4, _INT64) + _varint_field(11, self._number)
        )


class MqttMessage(NamedTuple):
    """A topic and a payload."""

    topic: str
    payload: bytes


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _varint_field(field: int, number: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(number)


def _double_field(field: int, number: float) -> bytes:
    return _varint(field << 3 | _FIXED64) + struct.pack("<d", number)


def _bytes_field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _string_field(field: int, text: str) -> bytes:
    return _bytes_field(field, text.encode())


PayloadFormat = Literal["json", "fields", "senml", "lines", "csv", "number", "sparkplug_b"]
PAYLOAD_FORMATS: tuple[str, ...] = get_args(PayloadFormat)

_encoder = msgspec.json.Encoder()
_ESCAPED_CHARACTERS = re.compile(r"([,= ])")


class Sample(msgspec.Struct, omit_defaults=True):
    """One reading as JSON: the gateway's own field names."""

    value: float
    ts: int
    quality: float | None = None
    battery_level: float | None = None
    signal_strength: float | None = None
    seq: int | None = None
    boot_id: str | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


def encode_json(samples: Sequence[Sample]) -> bytes:
    """One reading as an object, several as an array. Floats are their shortest exact decimal form."""
    return _encoder.encode(samples[0] if len(samples) == 1 else samples)


def encode_samples(shape: PayloadFormat, state: SeriesState, samples: Sequence[Sample]) -> bytes:  # noqa: PLR0911 - one a shape
    """Samples of one series in a shape."""
    if shape == "json":
        return encode_json(samples)
    if shape == "lines":
        return "\n".join(_encode_line(state, sample) for sample in samples).encode()
    if shape == "senml":
        return _encoder.encode(_build_senml(state, samples))
    if shape == "csv":
        return _encode_csv(samples)
    if shape == "number":
        return repr(samples[-1].value).encode()
    if shape == "sparkplug_b":
        return encode_sparkplug_data(state.sensor_type, samples)
    objects = []
    for sample in samples:
        members: dict[str, Any] = msgspec.to_builtins(sample)
        value = members.pop("value")
        members.pop("unit", None)
        objects.append({state.sensor_type: value, **members})
    return _encoder.encode(objects[0] if len(objects) == 1 else objects)


def carries_measures(shape: PayloadFormat) -> bool:
    """Whether the shape carries quality, battery level, signal strength and sequence number."""
    return shape not in {"senml", "sparkplug_b"}


def carries_times(shape: PayloadFormat) -> bool:
    """Whether the shape carries times; without them it cannot be told which reading was stored."""
    return shape != "number"


def time_resolution_us(shape: PayloadFormat) -> int:
    """What times in the shape are multiples of, microseconds."""
    return 1000 if shape == "sparkplug_b" else 1


def _encode_csv(samples: Sequence[Sample]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for s in samples:
        texts = (s.location, s.manufacturer, s.firmware_version, s.unit)
        writer.writerow((s.ts, s.value, s.quality, s.battery_level, s.signal_strength, s.seq, *texts))
    return out.getvalue().encode()


def _build_senml(state: SeriesState, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    base_s = samples[0].ts // 1_000_000
    records: list[dict[str, Any]] = [
        {"n": state.sensor_type, "t": round(sample.ts / 1e6 - base_s, 6), "v": sample.value}
        for sample in samples
    ]
    records[0] = {"bn": f"{state.sensor_id}:", "bt": base_s, "bu": samples[0].unit, **records[0]}
    return records


def _encode_line(state: SeriesState, sample: Sample) -> str:
    tags = [("sensor_id", state.sensor_id), *zip(ATTRIBUTES, state.attributes, strict=True)]
    key = ",".join([_escape(state.sensor_type)] + [f"{name}={_escape(text)}" for name, text in tags if text])
    numbers = [("value", sample.value), ("quality", sample.quality), ("battery_level", sample.battery_level)]
    numbers.append(("signal_strength", sample.signal_strength))
    fields = [
        f"{name}={number!r}" for name, number in numbers if number is not None and math.isfinite(number)
    ]
    if sample.seq is not None:
        fields.append(f"seq={sample.seq}i")
    return f"{key} {','.join(fields)} {sample.ts}000"


def _escape(text: str) -> str:
    return _ESCAPED_CHARACTERS.sub(r"\\\1", text)
