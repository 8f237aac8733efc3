"""SenML packs over HTTP (RFC 8428): a body as plain readings. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cloud_sync.gathered import BadReading, Gathering, Reading
from cloud_sync.ingest.plain import Bad, NotPlain, Plain, Stamps
from cloud_sync.records import ATTRIBUTE_NAMES, Flag, Series
from gateway.ingress.formats.rule import rule_of
from gateway.ingress.formats.shapes import decode

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.ingress.formats.measurement import Measurement

MEDIA_TYPES = ("application/senml+json", "application/senml+cbor")
_TOPIC = "http"
_RULE = rule_of(_TOPIC, "senml")


def parse(
    body: bytes,
    *,
    now_us: int,
    max_rows: int,
    stamps: Stamps,
    fault_of: Callable[[Series], str | None],
) -> Plain:
    """The readings of a pack, as `cloud_sync.ingest.plain.parse` gives those of other bodies.

    Raises:
        NotPlain: nothing of it can be taken.
    """
    measurements, faults = decode(body, _TOPIC, _RULE, now_us=now_us)
    if len(measurements) > max_rows:
        raise NotPlain("too_many_rows", f"a request may have {max_rows} readings")
    rejected = [Bad(None, fault.reason, fault.part, fault.detail) for fault in faults]
    if not measurements and len(faults) == 1 and faults[0].reason == "not_senml":
        raise NotPlain("not_senml", faults[0].detail)
    gathering = Gathering()
    for one in measurements:
        series = Series(*one.name, _attributes(one))
        flags, time_us = one.flags, one.time_us
        fault = fault_of(series)
        if fault is None:
            if time_us is None:
                time_us, flags = stamps.stamp(series, now_us), flags | Flag.TIME_ASSIGNED
            try:
                gathering.add(Reading(series, time_us, one.value, *_companions(one), one.seq, flags))
            except BadReading as bad:
                fault = str(bad)
        if fault is not None:
            rejected.append(Bad(None, fault, b"", f"{series.sensor_id}/{series.sensor_type}"))
    return Plain(*gathering.take(), rejected)


def _attributes(one: Measurement) -> tuple[tuple[str, str], ...]:
    return tuple((name, text) for name in sorted(ATTRIBUTE_NAMES) if (text := getattr(one, name)))


def _companions(one: Measurement) -> tuple[float, float, float]:
    quality, battery_level, signal_strength = (
        math.nan if number is None else number
        for number in (one.quality, one.battery_level, one.signal_strength)
    )
    return quality, battery_level, signal_strength
