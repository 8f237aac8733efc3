"""Influx line protocol: `MEASUREMENT[,TAG=TEXT] FIELD=VALUE[,...] [TIME]`, a reading a field. Pure.

What is measured is the measurement and the field (`weather.temperature`), the measurement alone where the
field is `value`. Such a line may have quality, battery_level, signal_strength, seq and flags beside it, as
this gateway writes them. Tags that are attributes of a series are taken over. A bad field costs itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cloud_sync.gathered import BadReading
from cloud_sync.line_protocol_reader import (
    PRECISIONS,
    fields_of,
    key_of,
    number_of,
    parts_of,
    whole_of,
)
from cloud_sync.records import Flag
from gateway.ingress.formats import plans as planned
from gateway.ingress.formats.measurement import MEMBERS_MAX, Fault, Measurement, NotDecodable
from gateway.ingress.formats.plans import PlanBook, Plans

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.rule import Rule

_WHOLE = re.compile(r"[+-]?\d{1,30}", re.ASCII)
_KEYS_MAX: Final = 10_000
_FIELDS_MAX: Final = 1_000
_BESIDE: Final = ("quality", "battery_level", "signal_strength")
_SINGLE_MAX: Final = 3.4e38
_SEQ_MAX: Final = (1 << 63) - 1
_FLAGS: Final = int(sum(Flag) & ~(Flag.SUPPRESSED | Flag.PROCESSED))  # which are the gateway's own to set
_ABSENT: Final = (None, None, None, None, 0)
_Beside = tuple[float | None, float | None, float | None, int | None, int]


class _Key(NamedTuple):
    """What the part of a line before the first space says."""

    measurement: str
    plans: Plans
    location: str | None
    manufacturer: str | None
    firmware_version: str | None
    unit: str | None


def decoder(rule: Rule, levels: Mapping[str, str]) -> Callable[[bytes, int], Decoded]:
    """What decodes the payloads of one topic, whose named levels are given."""
    reader = _Lines(rule, levels)

    def decode(payload: bytes, now_us: int) -> Decoded:  # noqa: ARG001 - of every decoder
        lines = payload.split(b"\n")
        if len(lines) > MEMBERS_MAX:
            what = f"{len(lines)} lines; at most {MEMBERS_MAX} are taken"
            return (), [Fault("too_many_members", what, payload)]
        out: list[Measurement] = []
        faults: list[Fault] = []
        for number, line in enumerate(lines, start=1):
            try:
                reader.read(line, out, faults)
            except (BadReading, UnicodeDecodeError, NotDecodable) as fault:
                faults.append(_fault_of(fault, number, line))
        return out, faults

    return decode


class _Lines:
    """Reads lines under one rule; remembers the keys it has seen."""

    def __init__(self, rule: Rule, levels: Mapping[str, str]) -> None:
        self._book = PlanBook(rule, levels)
        self._times, self._divided = PRECISIONS["ns" if rule.time_unit == "auto" else rule.time_unit]
        self._keys: dict[str, _Key] = {}

    def read(self, raw: bytes, out: list[Measurement], faults: list[Fault]) -> None:
        """The readings of one line."""
        line = raw.decode().strip(" \r")
        if not line or line.startswith("#"):
            return
        key_text, fields_text, time_text = parts_of(line)
        key = self._keys.get(key_text) or self._learn(key_text)
        fields = fields_of(fields_text)
        if len(fields) > _FIELDS_MAX:
            raise NotDecodable("too_many_members", f"{len(fields)} fields; at most {_FIELDS_MAX} are taken")
        time_us = None if time_text is None else self._time(time_text)
        before = len(out) + len(faults)
        beside = _beside(fields) if len(fields) > 1 and "value" in fields else _ABSENT
        for name, text in fields.items():
            if "value" in fields and (name in _BESIDE or name in ("seq", "flags")):
                continue
            path = key.measurement if name == "value" else f"{key.measurement}.{name}"
            try:
                measured = _measured(key, path, text, time_us, beside)
            except NotDecodable as fault:
                part = f"{key_text} {name}={text}" + ("" if time_text is None else f" {time_text}")
                faults.append(fault.fault(part.encode()))
                continue
            if measured is not None:
                out.append(measured)
        if len(out) + len(faults) == before:
            raise NotDecodable(
                "no_measurement", f"no field makes a reading under this rule: {fields_text:.64}"
            )

    def _learn(self, text: str) -> _Key:
        measurement, tags = key_of(text)
        names = []
        for name in self._book.names:
            if not tags.get(name):
                raise NotDecodable("no_sensor_id", f"{name}: there is no such tag")
            names.append(tags[name])
        if len(self._keys) >= _KEYS_MAX:
            self._keys.clear()
        plans = self._book.only or self._book.of(tuple(names))
        attributes = (
            tags.get(name) or None for name in ("location", "manufacturer", "firmware_version", "unit")
        )
        key = self._keys[text] = _Key(measurement, plans, *attributes)
        return key

    def _time(self, text: str) -> int:
        if _WHOLE.fullmatch(text) is None:
            raise NotDecodable("bad_time", f"expected a whole number at the end, found {text[:64]!r}")
        return int(text) * self._times // self._divided


def _measured(key: _Key, path: str, text: str, time_us: int | None, beside: _Beside) -> Measurement | None:
    plan = key.plans.known(path) or key.plans.of(path)
    if plan is None:
        return None
    value: Any
    if text.startswith('"'):
        value = text[1:-1].replace('\\"', '"').replace("\\\\", "\\")
    else:
        try:
            value = number_of(text, "bad_member")
        except BadReading:
            raise NotDecodable("bad_member", f"{path}: expected a number, found {text[:64]!r}") from None
    number = planned.number_of(plan, path, value)
    if number is None:
        return None
    quality, battery_level, signal_strength, seq, flags = beside
    return Measurement(
        plan.name,
        number,
        time_us,
        quality,
        battery_level,
        signal_strength,
        seq,
        key.location,
        key.manufacturer,
        key.firmware_version,
        plan.unit or key.unit,
        flags,
    )


def _beside(fields: dict[str, str]) -> _Beside:
    numbers = [number_of(fields[name], f"bad_{name}") if name in fields else None for name in _BESIDE]
    for name, number in zip(_BESIDE, numbers, strict=True):
        if number is not None and abs(number) > _SINGLE_MAX:
            raise BadReading(f"bad_{name}")
    seq = whole_of(fields["seq"], "bad_seq") if "seq" in fields else None
    flags = whole_of(fields["flags"], "bad_flags") if "flags" in fields else 0
    if seq is not None and not 0 <= seq <= _SEQ_MAX:
        raise BadReading("bad_seq")
    return numbers[0], numbers[1], numbers[2], seq, flags & _FLAGS


def _fault_of(fault: BadReading | UnicodeDecodeError | NotDecodable, number: int, line: bytes) -> Fault:
    where = f"line {number}: "
    if isinstance(fault, NotDecodable):
        return Fault(fault.reason, where + str(fault), line)
    if isinstance(fault, UnicodeDecodeError):
        return Fault("not_utf8", where + str(fault), line)
    reason = str(fault)
    if reason == "not_line_protocol":
        what = "expected MEASUREMENT[,TAG=TEXT] FIELD=VALUE[,FIELD=VALUE] [TIME]"
        return Fault(reason, where + what, line)
    return Fault("bad_reading", f"{where}{reason.removeprefix('bad_')}: expected a number", line)
