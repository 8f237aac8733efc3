"""`[[ingress.rule]]`: which topics carry which payload shape. docs/payloads.md explains every key."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, PrivateAttr, model_validator

from gateway.ingress.formats import rule as formats
from gateway.ingress.formats.presets import Preset, rules_of
from gateway.ingress.formats.rule import Format  # noqa: TC001 - pydantic reads the annotations
from gateway.settings.tables import Table

if TYPE_CHECKING:
    from collections.abc import Sequence


class Member(Table):
    """`[ingress.rule.members."PATH"]`: what one member of a payload becomes."""

    name: str | None = Field(default=None, examples=["temperature"])
    """What it is called in place of its path."""
    unit: str | None = Field(default=None, examples=["degC"])
    """Its unit (of a rule: of every member that has none of its own)."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What the number is multiplied by."""
    offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """What is added after that."""
    values: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """What texts stand for, such as {ON = 1, OFF = 0}; "true" and "false" are booleans."""


class IngressRule(Table):
    """One rule for a set of topics. The first whose topic fits counts."""

    preset: Preset | None = None
    """Rules for a kind of device, in place of topic and format; docs/presets.md has them."""
    base: str | None = None
    """Of a preset: what its topics begin with, where it is not as usual."""
    topic: str | None = Field(None, examples=["zigbee2mqtt/{sensor_id}"])
    """A topic filter (with + and #) whose levels may have names: {sensor_id}; {rest#} is all that follow."""
    format: Format | None = Field(None, examples=["fields"])
    """The payload's shape: reading, ndjson, fields, number, csv, senml, line_protocol, sparkplug_b. Or
    ignore: it acknowledges and takes nothing.
    """
    sensor_id: str | None = Field(default=None, examples=["{sensor_id}"])
    """How the sensor is called: text with names in braces, of topic levels or members of the payload."""
    sensor_type: str | None = Field(default=None, examples=["{member}"])
    """How what it measures is called, in the same way; {member} is the member's path."""
    include: list[str] = Field(default_factory=list)
    """Members to take, by dotted path; * stands for any text. Without any: every member that is a number."""
    exclude: list[str] = Field(default_factory=list)
    """Members to leave out, in the same way."""
    members: dict[str, Member] = Field(default_factory=dict)
    """What single members become, by path: name, unit, scale, offset, values."""
    companions: dict[str, str] = Field(default_factory=dict)
    """Where the payload has quality, battery_level, signal_strength, seq, location, manufacturer or
    firmware_version.
    """
    unit: str | None = Field(default=None, examples=["degC"])
    """Its unit (of a rule: of every member that has none of its own)."""
    scale: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """What the number is multiplied by."""
    offset: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """What is added after that."""
    values: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """What texts stand for, such as {ON = 1, OFF = 0}; "true" and "false" are booleans."""
    time: str | None = Field(default=None, examples=["timestamp"])
    """The member with the time. Without it readings get the time they came in, and say so."""
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    """What a time that is a number counts; "auto" goes by its size (line protocol: ns)."""
    time_zone: str | None = Field(default=None, examples=["Europe/Berlin"])
    """Where the clock is that writes times as text without an offset, such as "Europe/Berlin" or "UTC"."""
    root: str | None = None
    """Of fields: the path of the member that holds the measurements; their paths begin there."""
    may_be_empty: bool = False
    """Of fields and number: whether a payload without any reading is as it should be."""
    columns: list[str] = Field(default_factory=list)
    """Of csv: what each column is called; "" leaves one out."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Of csv: what stands between columns."""
    max_payload_bytes: Annotated[int, Field(ge=1, le=1 << 28)] = formats.MAX_PAYLOAD_BYTES
    """The most that a payload compressed by gzip or zstd may become."""
    _rules: Sequence[formats.Rule] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.format == "sparkplug_b" and find_spec("google.protobuf") is None:
            raise ValueError(
                'format "sparkplug_b" needs protobuf, which is not installed: tidegate[sparkplug]'
            )
        if self.preset is not None:
            others = sorted(self.model_fields_set - {"preset", "base", "time_zone"})
            if others:
                raise ValueError(f"preset goes with base and time_zone alone, not with {', '.join(others)}")
            self._rules = rules_of(self.preset, self.base, self._zone())
        elif self.topic is None or self.format is None:
            raise ValueError("a rule needs topic and format, or preset")
        elif self.base is not None:
            raise ValueError("base goes with preset")
        else:
            self._rules = (self._made(self.topic, self.format),)
        return self

    @property
    def rules(self) -> Sequence[formats.Rule]:
        """The rules that it stands for, in order."""
        return self._rules

    def _made(self, topic: str, format_: Format) -> formats.Rule:
        return formats.rule_of(
            topic,
            format_,
            sensor_id=self.sensor_id,
            sensor_type=self.sensor_type,
            unit=self.unit,
            scale=self.scale,
            offset=self.offset,
            values=self.values,
            members={path: formats.Member(**member.model_dump()) for path, member in self.members.items()},
            include=tuple(self.include),
            exclude=tuple(self.exclude),
            companions=self.companions,
            time=self.time,
            time_unit=self.time_unit,
            time_zone=self._zone(),
            root=self.root,
            may_be_empty=self.may_be_empty,
            columns=tuple(self.columns),
            separator=self.separator,
            max_payload_bytes=self.max_payload_bytes,
        )

    def _zone(self) -> ZoneInfo | None:
        try:
            return None if self.time_zone is None else ZoneInfo(self.time_zone)
        except (KeyError, ValueError, OSError):
            raise ValueError(
                f"time_zone = {self.time_zone!r} is not known; allowed: names such as Europe/Berlin or UTC"
            ) from None


def _has_protobuf() -> bool:
    try:
        return find_spec("google.protobuf") is not None
    except ModuleNotFoundError:
        return False
