"""`[ingress]`: the sources of readings, and `[[ingress.rule]]`, payload formats by topic.

`IngressSettings` is the registry of sources: one field, one source. docs/payloads.md explains every key of a
rule.
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from cloud_sync.delivery.lanes import find_time_zone
from gateway.ingress.host_metrics import HostMetricsSource
from gateway.mqtt.broker_session import SubscriberOptions, check_topic_filter, parse_broker_url
from gateway.mqtt.subscriber import Subscriber
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.presets import Preset, build_preset_rules
from gateway.payloads.rule import MAX_PAYLOAD_BYTES, FieldConversion, PayloadFormat, PayloadRule
from gateway.payloads.topics import TopicTemplate
from gateway.settings.listeners import Http, Listen
from gateway.settings.schema import (
    CertificateFile,
    Finite,
    KeyFile,
    Name,
    Reloadable,
    Restart,
    SecretFile,
    SourceTable,
    Table,
    TimeZone,
    parseable_by,
    unencrypted_secret_error,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import tzinfo

    from gateway.ingress.source import Source
    from gateway.settings.listeners import DeviceListener
    from gateway.settings.schema import SourceContext


class Subscribe(SourceTable):
    """An existing broker that the gateway reads."""

    url: Annotated[str, parseable_by(parse_broker_url)] = Field(examples=["mqtts://broker.example:8883"])
    """mqtt://HOST[:PORT] or mqtts://HOST[:PORT]"""
    filters: Annotated[list[str], Field(min_length=1)] = Field(
        examples=[["sensors/#", "$share/gateways/plant/#"]]
    )
    """Topic filters to subscribe to. With $share/GROUP/ in front several gateways share the load."""
    unsubscribe: list[str] = Field(default_factory=list)
    """Filters that the session at the broker still has from earlier, to be removed."""
    name: Name | None = Field(default=None, examples=["broker.example"])
    """Its name in the status and in logs. Default: its host."""
    client_id: str | None = Field(default=None, examples=["tidegate-barn-1"])
    """The name of the session at the broker, unique for every table. Default: tidegate-GATEWAY."""
    qos: Annotated[int, Field(ge=0, le=2)] = 1
    """The quality of service to subscribe with. With 0 a broker queues nothing for an offline gateway."""
    retained: bool = False
    """Whether to store the broker's retained messages at the first subscription."""
    username: str | None = Field(default=None, examples=["barn-1"])
    """The user name to log in with."""
    password_file: SecretFile | None = Field(default=None, examples=["broker.password"])
    """A file whose first line is the password."""
    allow_plain: bool = False
    """Whether to send the password to another machine without TLS: only where something else encrypts."""
    ca_file: CertificateFile | None = Field(default=None, examples=["broker-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    cert_file: CertificateFile | None = Field(default=None, examples=["gateway.pem"])
    """PEM: this gateway's certificate."""
    key_file: KeyFile | None = Field(default=None, examples=["gateway.key"])
    """PEM: the key of cert_file, without a password."""
    server_name: str | None = Field(default=None, examples=["broker.example"])
    """The name in the broker's certificate, if it differs from the address."""
    receive_maximum: Annotated[int, Field(ge=1, le=65_535)] = 5_000
    """Messages in flight without an acknowledgement."""
    session_expiry_s: Annotated[int, Field(ge=0, le=4_294_967_295)] = 2_592_000
    """How long the broker keeps the session and its messages while this gateway is offline."""
    keep_alive_s: Annotated[int, Field(ge=0, le=65_535)] = 60
    """The longest silence before the connection is checked; 0 for never."""
    max_packet_bytes: Annotated[int, Field(ge=256, le=268_435_455)] = 8 << 20
    """The largest packet accepted."""
    broker_reviewed: bool = False
    """Whether the broker's own limits have been reviewed; then the warning at the start is omitted."""

    @field_validator("filters", "unsubscribe")
    @classmethod
    def _validate_filters(cls, filters: list[str]) -> list[str]:
        for topic_filter in filters:
            check_topic_filter(topic_filter)
        return filters

    @model_validator(mode="after")
    def _validate_pairs(self) -> Self:
        self.require_together("cert_file", "key_file")
        if self.password_file is not None and not self.allow_plain:
            fault = unencrypted_secret_error("the password", self.url, "mqtts://")
            if fault:
                raise ValueError(fault)
        return self

    def build_options(self, gateway_id: str) -> SubscriberOptions:
        """The subscriber's options."""
        options = self.model_dump(exclude={"name", "client_id", "allow_plain"})
        options["filters"], options["unsubscribe"] = tuple(self.filters), tuple(self.unsubscribe)
        return SubscriberOptions(
            name=self.name or parse_broker_url(self.url).host,
            client_id=self.client_id or f"tidegate-{gateway_id}",
            **options,
        )

    def build_source(self, context: SourceContext) -> Subscriber:
        """The subscriber of this broker."""
        return Subscriber(self.build_options(context.gateway_id), context.committer)


class HostMetricsSettings(SourceTable):
    """The gateway's own metrics as readings."""

    enabled: Annotated[bool, Restart("the source starts and stops with the gateway")] = True
    """Whether processor, memory, disk, temperatures and network become readings of a sensor named after the
    gateway.
    """
    period_s: Reloadable[Annotated[float, Field(ge=0.1)]] = 10
    """How often they are read."""

    def build_source(self, context: SourceContext) -> HostMetricsSource:
        """The source; its readings have no time of their own while the clock is in doubt."""
        clock = context.clock
        return HostMetricsSource(
            context.committer,
            context.gateway_id,
            context.spool.database.path.parent,
            period_s=self.period_s,
            clock_us=lambda: clock.now_us() if clock.trusted else None,
        )


class MemberSettings(Table):
    """`[ingress.rule.members."PATH"]`: what one member of a payload becomes."""

    name: str | None = Field(default=None, examples=["temperature"])
    """Its name in place of its path."""
    unit: str | None = Field(default=None, examples=["degC"])
    """The unit. Of a rule: of every member without its own."""
    scale: Finite = 1.0
    """The number is multiplied by it."""
    offset: Finite = 0.0
    """Added after that."""
    values: dict[str, Finite] = Field(default_factory=dict)
    """Numbers for texts, such as {ON = 1, OFF = 0}; "true" and "false" are booleans."""


class IngressRule(Table):
    """One rule for a set of topics. The first whose topic matches applies."""

    preset: Preset | None = None
    """Rules for a kind of device, in place of topic and format; docs/presets.md has them."""
    base: str | None = None
    """Of a preset: what its topics begin with, if not as usual."""
    topic: str | None = Field(None, examples=["zigbee2mqtt/{sensor_id}"])
    """A topic filter (with + and #) whose levels may have names: {sensor_id}; {rest#} is all that follow."""
    format: PayloadFormat | None = Field(None, examples=["fields"])
    """The payload's format: reading, ndjson, fields, number, csv, senml, line_protocol, sparkplug_b; or
    ignore, which acknowledges and stores nothing.
    """
    sensor_id: str | None = Field(default=None, examples=["{sensor_id}"])
    """The sensor's name: text with names in braces, of topic levels or members of the payload."""
    sensor_type: str | None = Field(default=None, examples=["{member}"])
    """The name of what it measures, in the same way; {member} is the member's path."""
    include: list[str] = Field(default_factory=list)
    """Members to store, by dotted path; * stands for any text. Default: every member that is a number."""
    exclude: list[str] = Field(default_factory=list)
    """Members to leave out, in the same way."""
    members: dict[str, MemberSettings] = Field(default_factory=dict)
    """What single members become, by path: name, unit, scale, offset, values."""
    companions: dict[str, str] = Field(default_factory=dict)
    """Where the payload has quality, battery_level, signal_strength, seq, location, manufacturer or
    firmware_version.
    """
    unit: str | None = Field(default=None, examples=["degC"])
    """The unit. Of a rule: of every member without its own."""
    scale: Finite = 1.0
    """The number is multiplied by it."""
    offset: Finite = 0.0
    """Added after that."""
    values: dict[str, Finite] = Field(default_factory=dict)
    """Numbers for texts, such as {ON = 1, OFF = 0}; "true" and "false" are booleans."""
    time: str | None = Field(default=None, examples=["timestamp"])
    """The member with the time. Without it readings get the time of receipt, and are marked so."""
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    """The unit of a numeric time; "auto" judges by its size (line protocol: ns)."""
    time_zone: TimeZone | None = Field(default=None, examples=["Europe/Berlin"])
    """The zone of times that are text without an offset, such as "Europe/Berlin" or "UTC"."""
    root: str | None = None
    """Of fields: the path of the member that holds the measurements; their paths begin there."""
    may_be_empty: bool = False
    """Of fields and number: whether a payload without readings is valid."""
    columns: list[str] = Field(default_factory=list)
    """Of csv: the name of each column; "" skips one."""
    separator: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """Of csv: the character between columns."""
    max_payload_bytes: Annotated[int, Field(ge=1, le=1 << 28)] = MAX_PAYLOAD_BYTES
    """The limit of a payload decompressed from gzip or zstd."""
    _rules: Sequence[PayloadRule] = PrivateAttr(default=())

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
    def rules(self) -> Sequence[PayloadRule]:
        """The payload rules, in order."""
        return self._rules

    def _build_rule(self, topic: str, format_: PayloadFormat) -> PayloadRule:
        others = {"preset", "base", "topic", "format", "members", "time_zone"}
        members = {path: FieldConversion(**member.model_dump()) for path, member in self.members.items()}
        return PayloadRule(
            topic, format_, members=members, time_zone=self._zone(), **self.model_dump(exclude=others)
        )

    def _zone(self) -> tzinfo | None:
        return None if self.time_zone is None else find_time_zone(self.time_zone)


class IngressSettings(Table):
    """How readings enter: the registry of sources, one field each."""

    listen: Annotated[Listen, Restart("devices are connected under its settings")] = Listen()
    """The gateway's own MQTT server."""
    host: HostMetricsSettings = HostMetricsSettings()
    """The gateway's own metrics."""
    http: Annotated[Http, Restart("the port is bound, and clients are connected under its settings")] = Http()
    """The gateway's own HTTP server for readings."""
    subscribe: Annotated[list[Subscribe], Restart("the session with the broker is open")] = Field(
        default_factory=list
    )
    """Existing MQTT 5 brokers to read, one table each."""
    rule: Reloadable[list[IngressRule]] = Field(default_factory=list)
    """Payload formats by topic; the first that matches applies. Default: JSON readings on listen.topic."""

    def build_sources(self, context: SourceContext) -> list[Source]:
        """Every source that is enabled, not started yet."""
        entries = chain.from_iterable(value if isinstance(value, list) else [value] for _, value in self)
        return [
            entry.build_source(context)
            for entry in entries
            if isinstance(entry, SourceTable) and getattr(entry, "enabled", True)
        ]

    @property
    def device_listeners(self) -> dict[str, DeviceListener]:
        """The servers that devices connect to, by the path of the table; those not enabled are left out."""
        device_listeners: dict[str, DeviceListener] = {"ingress.listen": self.listen}
        return {**device_listeners, "ingress.http": self.http} if self.http.enabled else device_listeners

    @property
    def rules(self) -> RuleSet:
        """Every rule, with the listener's topic for topics that none matches."""
        return RuleSet(
            TopicTemplate(self.listen.topic), [rule for table in self.rule for rule in table.rules]
        )

    @field_validator("subscribe")
    @classmethod
    def _require_distinct_sessions(cls, tables: list[Subscribe]) -> list[Subscribe]:
        sessions = [(table.url, table.client_id) for table in tables]
        if len(set(sessions)) < len(sessions):
            raise ValueError(
                "two tables with the same url need a client_id each, or each disconnects the other"
            )
        return tables
