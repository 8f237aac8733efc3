"""Samples as payloads, one shape each. Pure.

json     {"value": 21.5, "ts": 1767225600000000, "quality": 98, ...}; several as an array
fields   {"temperature": 21.5, "ts": ...}; several as an array
senml    RFC 8428 with base name and base time; no quality, battery, signal, seq or attributes but the unit
lines    InfluxDB line protocol, times in nanoseconds
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from firmware_sim.truth import ATTRIBUTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from firmware_sim.truth import State

Shape = Literal["json", "fields", "senml", "lines"]
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


def encode(shape: Shape, state: State, samples: Sequence[Sample]) -> bytes:
    """Samples of one series in a shape."""
    if shape == "json":
        return encode_payload(samples)
    if shape == "lines":
        return "\n".join(_line(state, sample) for sample in samples).encode()
    if shape == "senml":
        return _encoder.encode(_senml(state, samples))
    objects = []
    for sample in samples:
        members: dict[str, Any] = msgspec.to_builtins(sample)
        value = members.pop("value")
        members.pop("unit", None)
        objects.append({state.sensor_type: value, **members})
    return _encoder.encode(objects[0] if len(objects) == 1 else objects)


def says_measures(shape: Shape) -> bool:
    """Whether the shape carries quality, battery level, signal strength and sequence number."""
    return shape != "senml"


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
