"""The default shape where the payload names its series: JSON readings with sensor_id and sensor_type. Pure.

One object, an array, or (ndjson) one object a line; members as in `json_reading`, times too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cloud_sync.instants import BadInstant, instant_us
from gateway.ingress.formats.json_reading import JsonReading
from gateway.ingress.formats.measurement import MEMBERS_MAX, Fault, Measurement, NotDecodable
from gateway.ingress.formats.plans import scaled
from gateway.ingress.topics import SeriesName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.rule import Rule


class NamedReading(JsonReading, gc=False):
    """One reading that says whose it is."""

    sensor_id: str = ""
    sensor_type: str = ""


_one = msgspec.json.Decoder(NamedReading)
_parts = msgspec.json.Decoder(list[msgspec.Raw])
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decoder(rule: Rule, levels: Mapping[str, str]) -> Callable[[bytes, int], Decoded]:
    """What decodes the payloads of one topic, whose named levels are given."""
    reader = _Reader(rule, levels)
    split = _lines if rule.format == "ndjson" else _members

    def decode(payload: bytes, now_us: int) -> Decoded:  # noqa: ARG001 - of every decoder
        out: list[Measurement] = []
        faults: list[Fault] = []
        try:
            parts = split(payload)
        except _UNREADABLE as fault:
            return (), [Fault("not_json", str(fault) or type(fault).__name__, payload)]
        if len(parts) > MEMBERS_MAX:
            what = f"{len(parts)} members; at most {MEMBERS_MAX} are taken"
            return (), [Fault("too_many_members", what, payload)]
        for position, part in enumerate(parts):
            try:
                out.append(reader.read(part))
            except NotDecodable as fault:
                where = f"member {position}: " if len(parts) > 1 else ""
                faults.append(Fault(fault.reason, f"{where}{fault}", bytes(part)))
        return out, faults

    return decode


class _Reader:
    """Reads single readings on one topic."""

    def __init__(self, rule: Rule, levels: Mapping[str, str]) -> None:
        self._otherwise = rule.otherwise
        self._sensor_id = rule.sensor_id.filled(levels)
        self._sensor_type = rule.sensor_type.filled(levels)

    def read(self, part: bytes | msgspec.Raw) -> Measurement:
        """The measurement of one reading.

        Raises:
            NotDecodable: it is none.
        """
        try:
            told = _one.decode(part)
        except msgspec.ValidationError as fault:
            raise NotDecodable("bad_reading", str(fault)) from None
        except _UNREADABLE as fault:
            raise NotDecodable("not_json", str(fault) or type(fault).__name__) from None
        known = {"sensor_id": told.sensor_id, "sensor_type": told.sensor_type}
        for needed in (*self._sensor_id.names, *self._sensor_type.names):
            if not known[needed]:
                raise NotDecodable(f"no_{needed}", f"{needed}: expected text that names the series")
        name = SeriesName(
            self._sensor_id.render(known.__getitem__), self._sensor_type.render(known.__getitem__)
        )
        try:
            time_us = None if told.ts is None else instant_us(told.ts)
        except BadInstant as fault:
            raise NotDecodable("bad_time", f"ts: {fault}") from None
        return Measurement(
            name,
            scaled(self._otherwise, "value", float(told.value)),
            time_us,
            told.quality,
            told.battery_level,
            told.signal_strength,
            told.seq,
            told.location,
            told.manufacturer,
            told.firmware_version,
            told.unit or self._otherwise.unit,
        )


def _lines(payload: bytes) -> Sequence[bytes]:
    return [line for line in payload.split(b"\n") if line.strip()]


def _members(payload: bytes) -> Sequence[bytes | msgspec.Raw]:
    return _parts.decode(payload) if payload.lstrip()[:1] == b"[" else (payload,)
