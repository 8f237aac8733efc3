"""Samples as payloads, one shape each. Pure.

json     {"value": 21.5, "ts": 1767225600000000, "quality": 98, ...}; several as an array
fields   {"temperature": 21.5, "ts": ...}; several as an array
senml    RFC 8428 with base name and base time; no quality, battery, signal, seq or attributes but the unit
lines    InfluxDB line protocol, times in nanoseconds
csv      a line of ts, value, quality, battery_level, signal_strength, seq, location, manufacturer,
         firmware_version, unit for each
number   21.5: the newest alone, without a time, so that no record can tell it from another
sparkplug_b   data of a Sparkplug B node by alias, times in milliseconds; nothing but values (`sparkplug`)
"""

from __future__ import annotations

import csv
import io
import math
import re
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from firmware_sim import sparkplug
from firmware_sim.truth import ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from firmware_sim.truth import State

Shape = Literal["json", "fields", "senml", "lines", "csv", "number", "sparkplug_b"]
SHAPES: tuple[str, ...] = get_args(Shape)

_encoder = msgspec.json.Encoder()
_SPECIAL = re.compile(r"([,= ])")


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


def encode_payload(samples: Sequence[Sample]) -> bytes:
    """One reading as an object, several as an array. Floats are their shortest exact decimal form."""
    return _encoder.encode(samples[0] if len(samples) == 1 else samples)


def encode(shape: Shape, state: State, samples: Sequence[Sample]) -> bytes:  # noqa: PLR0911 - one a shape
    """Samples of one series in a shape."""
    if shape == "json":
        return encode_payload(samples)
    if shape == "lines":
        return "\n".join(_line(state, sample) for sample in samples).encode()
    if shape == "senml":
        return _encoder.encode(_senml(state, samples))
    if shape == "csv":
        return _csv(samples)
    if shape == "number":
        return repr(samples[-1].value).encode()
    if shape == "sparkplug_b":
        return sparkplug.data(state.sensor_type, samples)
    objects = []
    for sample in samples:
        members: dict[str, Any] = msgspec.to_builtins(sample)
        value = members.pop("value")
        members.pop("unit", None)
        objects.append({state.sensor_type: value, **members})
    return _encoder.encode(objects[0] if len(objects) == 1 else objects)


def says_measures(shape: Shape) -> bool:
    """Whether the shape carries quality, battery level, signal strength and sequence number."""
    return shape not in {"senml", "sparkplug_b"}


def says_times(shape: Shape) -> bool:
    """Whether the shape carries times; without them it cannot be told which reading was stored."""
    return shape != "number"


def step_us(shape: Shape) -> int:
    """What times in the shape are multiples of, microseconds."""
    return 1000 if shape == "sparkplug_b" else 1


def _csv(samples: Sequence[Sample]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for s in samples:
        texts = (s.location, s.manufacturer, s.firmware_version, s.unit)
        writer.writerow((s.ts, s.value, s.quality, s.battery_level, s.signal_strength, s.seq, *texts))
    return out.getvalue().encode()


def _senml(state: State, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    base_s = samples[0].ts // 1_000_000
    records: list[dict[str, Any]] = [
        {"n": state.sensor_type, "t": round(sample.ts / 1e6 - base_s, 6), "v": sample.value}
        for sample in samples
    ]
    records[0] = {"bn": f"{state.sensor_id}:", "bt": base_s, "bu": samples[0].unit, **records[0]}
    return records


def _line(state: State, sample: Sample) -> str:
    tags = [("sensor_id", state.sensor_id), *zip(ATTRIBUTES, state.attributes, strict=True)]
    key = ",".join(
        [_escaped(state.sensor_type)] + [f"{name}={_escaped(text)}" for name, text in tags if text]
    )
    numbers = [("value", sample.value), ("quality", sample.quality), ("battery_level", sample.battery_level)]
    numbers.append(("signal_strength", sample.signal_strength))
    fields = [
        f"{name}={number!r}" for name, number in numbers if number is not None and math.isfinite(number)
    ]
    if sample.seq is not None:
        fields.append(f"seq={sample.seq}i")
    return f"{key} {','.join(fields)} {sample.ts}000"


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", text)
