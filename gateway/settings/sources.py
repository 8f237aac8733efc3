"""`[[ingress.subscribe]]`, existing brokers to read, and `[[ingress.rule]]`, payload formats by topic.

docs/payloads.md explains every key of a rule.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, Annotated, Literal, Self
from zoneinfo import ZoneInfo

from pydantic import Field, PrivateAttr, field_validator, model_validator

from gateway.mqtt.broker_session import check_topic_filter, parse_broker_url
from gateway.payloads import rule as formats
from gateway.payloads.presets import Preset, build_preset_rules
from gateway.payloads.rule import PayloadFormat  # noqa: TC001 - pydantic reads the annotations
from gateway.settings.schema import Name, Table, unencrypted_secret_error

if TYPE_CHECKING:
    from collections.abc import Sequence


class Subscribe(Table):
    """An existing broker that the gateway reads."""

    url: str = Field(examples=["mqtts://broker.example:8883"])
    """mqtt://HOST[:PORT] or mqtts://HOST[:PORT]"""
    filters: Annotated[list[str], Field(min_length=1)] = Field(
        examples=[["sensors/#", "$share/gateways/plant/#"]]
    )
    """Topic filters to subscribe to. With $share/GROUP/ in front several gateways share the load."""
    unsubscribe: list[str] = Field(default_factory=list)
    """Filters of earlier times that the broker's session still has, to be taken off."""
    name: Name | None = Field(default=None, examples=["broker.example"])
    """What it is called in the status and in logs; its host without it."""
    client_id: str | None = Field(default=None, examples=["tidegate-barn-1"])
    """The session's name at the broker, its own for every table; tidegate-GATEWAY without it."""
    qos: Annotated[int, Field(ge=0, le=2)] = 1
    """The quality of service to subscribe with. With 0 the broker keeps nothing while this gateway is away.
    """
    retained: bool = False
    """Whether messages that the broker retains are taken at the first subscription."""
    username: str | None = Field(default=None, examples=["barn-1"])
    """The user name to show."""
    password_file: Path | None = Field(default=None, examples=["broker.password"])
    """A file whose first line is the password."""
    allow_plain: bool = False
    """Whether the password may go to another machine without TLS: only where something else encrypts."""
    ca_file: Path | None = Field(default=None, examples=["broker-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    cert_file: Path | None = Field(default=None, examples=["gateway.pem"])
    """PEM: this gateway's certificate."""
    key_file: Path | None = Field(default=None, examples=["gateway.key"])
    """PEM: the key of cert_file, without a password."""
    server_name: str | None = Field(default=None, examples=["broker.example"])
    """The name the broker's certificate is for, where it is not the address's."""
    receive_maximum: Annotated[int, Field(ge=1, le=65_535)] = 5_000
    """Messages that may be on their way without an acknowledgement."""
    session_expiry_s: Annotated[int, Field(ge=0, le=4_294_967_295)] = 2_592_000
    """How long the broker keeps the session, and what comes for it, while this gateway is away."""
    keep_alive_s: Annotated[int, Field(ge=0, le=65_535)] = 60
    """The longest silence before the connection is tried; 0 for never."""
    max_packet_bytes: Annotated[int, Field(ge=256, le=268_435_455)] = 8 << 20
    """The largest packet taken."""
    broker_reviewed: bool = False
    """Whether the broker's own limits were looked at; then the warning at the start is left out."""

    @field_validator("url")
    @classmethod
    def _validate_url(cls, url: str) -> str:
        parse_broker_url(url)
        return url

    @field_validator("filters", "unsubscribe")
    @classmethod
    def _validate_filters(cls, filters: list[str]) -> list[str]:
        for topic_filter in filters:
            check_topic_filter(topic_filter)
        return filters

    @model_validator(mode="after")
    def _validate_pairs(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if self.password_file is not None and not self.allow_plain:
            fault = unencrypted_secret_error("the password", self.url, "mqtts://")
            if fault:
                raise ValueError(fault)
        return self


class MemberSettings(Table):
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
    format: PayloadFormat | None = Field(None, examples=["fields"])
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
    members: dict[str, MemberSettings] = Field(default_factory=dict)
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
    _rules: Sequence[formats.PayloadRule] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _validate_rule(self) -> Self:
        if self.format == "sparkplug_b" and find_spec("google.protobuf") is None:
            raise ValueError(
                'format "sparkplug_b" needs protobuf, which is not installed: tidegate[sparkplug]'
            )
        if self.preset is not None:
            others = sorted(self.model_fields_set - {"preset", "base", "time_zone"})
            if others:
                raise ValueError(f"preset goes with base and time_zone alone, not with {', '.join(others)}")
            self._rules = build_preset_rules(self.preset, self.base, self._zone())
        elif self.topic is None or self.format is None:
            raise ValueError("a rule needs topic and format, or preset")
        elif self.base is not None:
            raise ValueError("base goes with preset")
        else:
            self._rules = (self._build_rule(self.topic, self.format),)
        return self

    @property
    def rules(self) -> Sequence[formats.PayloadRule]:
        """The rules that it stands for, in order."""
        return self._rules

    def _build_rule(self, topic: str, format_: PayloadFormat) -> formats.PayloadRule:
        others = {"preset", "base", "topic", "format", "members", "time_zone"}
        members = {
            path: formats.FieldConversion(**member.model_dump()) for path, member in self.members.items()
        }
        return formats.PayloadRule(
            topic, format_, members=members, time_zone=self._zone(), **self.model_dump(exclude=others)
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
