"""The default payload shape: a JSON object with a value, or an array of such objects. Pure.

Members: value (required: a finite number, or true/false as 1/0), ts, quality, battery_level,
signal_strength, seq, location, manufacturer, firmware_version, unit. Others are skipped.
A bad member of an array costs that member, not its neighbours. A payload may be compressed by gzip or zstd.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import msgspec

from gateway.ingress.formats import compressed
from gateway.ingress.formats.measurement import Fault

if TYPE_CHECKING:
    from collections.abc import Sequence


Single = Annotated[float, msgspec.Meta(ge=-3.4e38, le=3.4e38)]
"""A number that fits single precision."""
EXPANDED_MAX_BYTES: Final = 8 << 20
Seq = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class JsonReading(msgspec.Struct, gc=False):
    """One reading as a device writes it; `value` is finite, as JSON numbers are."""

    value: float | bool
    ts: int | float | str | None = None
    quality: Single | None = None
    battery_level: Single | None = None
    signal_strength: Single | None = None
    seq: Seq | None = None
    location: str | None = None
    manufacturer: str | None = None
    firmware_version: str | None = None
    unit: str | None = None


_one = msgspec.json.Decoder(JsonReading)
_many = msgspec.json.Decoder(list[JsonReading])
_parts = msgspec.json.Decoder(list[msgspec.Raw])


def decode(payload: bytes) -> tuple[Sequence[JsonReading], list[Fault]]:
    """Readings and faults of one payload; times and ranges are not looked at here."""
    try:
        if payload[:1] == b"{":
            return (_one.decode(payload),), []
        return (_many.decode(payload) if payload.lstrip()[:1] == b"[" else (_one.decode(payload),)), []
    except msgspec.ValidationError as fault:
        if payload.lstrip()[:1] == b"[":
            return _each(payload)
        return (), [Fault("bad_reading", str(fault), payload)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        if payload[:2] in compressed.BEGINNINGS:
            return _expanded(payload)
        return (), [Fault("not_json", str(fault) or type(fault).__name__, payload)]


def _expanded(payload: bytes) -> tuple[Sequence[JsonReading], list[Fault]]:
    try:
        expanded = compressed.expanded(payload, EXPANDED_MAX_BYTES)
    except compressed.CannotExpand as fault:
        return (), [Fault(fault.reason, str(fault), payload)]
    if expanded[:2] in compressed.BEGINNINGS:
        return (), [Fault("bad_compression", "compressed twice, or not what its first bytes say", payload)]
    return decode(expanded)


def _each(payload: bytes) -> tuple[list[JsonReading], list[Fault]]:
    """The members of an array that has at least one bad one."""
    readings, faults = [], []
    try:
        parts = _parts.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        return [], [Fault("not_json", str(fault) or type(fault).__name__, payload)]
    for position, part in enumerate(parts):
        try:
            readings.append(_one.decode(part))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
            faults.append(Fault("bad_reading", f"member {position}: {fault}", bytes(part)))
    return readings, faults
