"""`[alerts]`: the rules that raise alerts, and the channels that are notified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cloud_sync.destinations.http_client import HttpOptions, build_client_tls_context
from cloud_sync.model.records import Severity
from cloud_sync.runtime.secret_files import read_secret
from gateway.alerts.notifier import LogChannel, NotifierOptions
from gateway.alerts.rules import DEFAULT_ALERT_RULES, FLAG_PREFIX, QUANTITIES, SILENCE_QUANTITY, Rule
from gateway.processing.series_pattern import Pattern
from gateway.settings.schema import (
    CertificateFile,
    FileFault,
    HttpUrl,
    Limit,
    Name,
    NonNegative,
    Port,
    Seconds,
    SecretFile,
    SeriesPattern,
    Table,
    check_client_tls,
    find_duplicates,
    is_http_url,
    is_loopback,
    to_microseconds,
    unencrypted_secret_error,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.alerts.notifier import AlertChannel

LOG_CHANNEL = "log"
_SILENCE_MAX_S = 1e12


def _validate_quantity(text: str) -> str:
    if text not in QUANTITIES:
        raise ValueError(f"nothing that a rule can evaluate; allowed: {', '.join(QUANTITIES)}")
    return text


def _validate_mail_address(text: str) -> str:
    local, at, domain = text.rpartition("@")
    if not (local and at and domain) or any(c.isspace() or c in "<>," for c in text):
        raise ValueError("must be an e-mail address such as ops@plant.example")
    return text


MailAddress = Annotated[str, AfterValidator(_validate_mail_address)]


class AlertRule(Table):
    """A rule that raises alerts for some series."""

    name: Name = Field(examples=["hot"])
    """Its name in alerts; a rule with the name of a built-in one replaces it."""
    series: SeriesPattern = Field(default="*/*", examples=["*/temperature"])
    """The series: SENSOR_ID/SENSOR_TYPE with "*" for any text, "?" for one character."""
    without: list[SeriesPattern] = Field(default_factory=list, examples=[["spare-*/*"]])
    """Series among them that are excluded."""
    on: Annotated[str, AfterValidator(_validate_quantity)] = "value"
    """What it evaluates: "value", "quality", "battery_level", "signal_strength" of a reading, "rate_per_min"
    for the change of the value, "silence" for seconds without data, "flag.stuck" and so on for a flag of the
    checks, "rollup.mean" and so on for a rollup: mean, minimum, maximum, first, last, deviation, count,
    flagged, excluded.
    """
    above: Limit | None = Field(default=None, examples=[35])
    """An alert fires above it."""
    below: Limit | None = Field(default=None, examples=[-10])
    """An alert fires below it."""
    margin: NonNegative = 0
    """How far inside the limit the value has to return for the alert to resolve (hysteresis)."""
    window_s: Annotated[int, Field(gt=0)] = 60
    """For rollups: the length of the window."""
    for_s: NonNegative = 0
    """How long the condition has to hold without a break before the alert fires."""
    severity: Literal["info", "warning", "critical"] = "warning"
    """The severity of its alerts."""
    cooldown_s: NonNegative = 300
    """The shortest time between two alerts of the same rule and series."""
    repeat_s: NonNegative = 0
    """How often a firing alert is sent again; 0 for never."""
    recovery: bool = True
    """Whether the end of an alert is sent too."""
    channels: list[str] | None = Field(default=None, examples=[["log"]])
    """The channels that it is sent to. Default: every channel, and the log."""

    @model_validator(mode="after")
    def _validate_limits(self) -> Self:
        limits = [limit for limit in (self.above, self.below) if limit is not None]
        if self.on.startswith(FLAG_PREFIX):
            if limits:
                raise ValueError("a flag is set or not: above and below do not go with it")
        elif not limits:
            raise ValueError("needs above, below or both")
        if self.on == SILENCE_QUANTITY and (
            self.above is None or self.below is not None or not 0 < self.above < _SILENCE_MAX_S
        ):
            raise ValueError("silence needs above, in seconds, and no below")
        if len(limits) > 1 and limits[0] < limits[1]:
            raise ValueError("above is less than below: every value would raise an alert")
        return self

    def to_rule(self, channels: tuple[str, ...]) -> Rule:
        """The rule as the evaluator has it; `channels` are those of rules that name none."""
        return Rule(
            self.name,
            Pattern.parse(self.series),
            self.on,
            above=float("inf") if self.above is None else self.above,
            below=-float("inf") if self.below is None else self.below,
            margin=self.margin,
            window_s=self.window_s,
            for_us=to_microseconds(self.for_s),
            severity=Severity[self.severity.upper()],
            cooldown_us=to_microseconds(self.cooldown_s),
            repeat_us=to_microseconds(self.repeat_s),
            recovery=self.recovery,
            channels=channels if self.channels is None else tuple(self.channels),
            without=tuple(map(Pattern.parse, self.without)),
        )


class WebhookSettings(Table):
    """A webhook."""

    name: Name = Field(examples=["ops"])
    """Its name in rules."""
    kind: Literal["webhook"]
    """A POST of JSON to an address."""
    url: HttpUrl | None = Field(default=None, examples=["https://chat.example/hooks/plant"])
    """Its http:// or https:// address."""
    url_file: SecretFile | None = Field(default=None, examples=["ops.url"])
    """A file whose first line is the address, where that is a secret; it is used instead of url."""
    form: Literal["slack", "json"] = "slack"
    """What is posted: "slack" is {"text": ...}, which chat services accept; "json" is the whole message."""
    token_file: SecretFile | None = Field(default=None, examples=["ops.token"])
    """A file whose first line is sent as a bearer token."""
    allow_plain: bool = False
    """Whether to send a token or a secret address to another machine without TLS: only where something else
    encrypts.
    """
    ca_file: CertificateFile | None = Field(default=None, examples=["ops-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    timeout_s: Seconds = 10
    """How long to wait for an answer."""

    @model_validator(mode="after")
    def _validate_address(self) -> Self:
        if self.url is None and self.url_file is None:
            raise ValueError("needs url or url_file")
        if self.url is not None and self.url_file is None and (fault := self._unencrypted_secret(self.url)):
            raise ValueError(fault)
        return self

    def _unencrypted_secret(self, url: str) -> str:
        if self.allow_plain or (self.token_file is None and self.url_file is None):
            return ""
        return unencrypted_secret_error("the token or the address", url, "https://")

    def check_files(self) -> Iterator[FileFault]:
        """Whether the files can be used; an address in a file is checked like one in the table."""
        faults = [*super().check_files(), *check_client_tls(self.ca_file)]
        yield from faults
        if self.url_file is None or any(fault.key == "url_file" for fault in faults):
            return
        url = read_secret(self.url_file)
        if not is_http_url(url):
            allowed = "an http:// or https:// address with a host"
            yield FileFault("url_file", f"{self.url_file} holds no address", allowed)
        elif unencrypted := self._unencrypted_secret(url):
            yield FileFault("url_file", unencrypted)

    def build_channel(self) -> AlertChannel:
        """The channel; OSError if a file cannot be used."""
        from gateway.alerts.channels import WebhookChannel  # noqa: PLC0415 - brings httpx

        tls = None if self.ca_file is None else build_client_tls_context(self.ca_file)
        return WebhookChannel(
            self.name,
            read_secret(self.url_file) or self.url or "",
            form=self.form,
            token=read_secret(self.token_file),
            options=HttpOptions(tls, connections=1),
            timeout_s=self.timeout_s,
        )


class MailSettings(Table):
    """E-mail."""

    name: Name = Field(examples=["mail"])
    """Its name in rules."""
    kind: Literal["email"]
    """E-mail through a mail server."""
    host: str = Field(examples=["mail.example"], min_length=1)
    """The mail server."""
    port: Port = 587
    """Its TCP port."""
    tls: Literal["starttls", "tls", "none"] = "starttls"
    """"starttls" upgrades the connection before login, "tls" encrypts from the start (port 465), "none" does
    not encrypt.
    """
    username: str | None = Field(default=None, examples=["barn-1"])
    """The user name to log in with."""
    password_file: SecretFile | None = Field(default=None, examples=["mail.password"])
    """A file whose first line is the password."""
    sender: MailAddress = Field(examples=["barn-1@plant.example"])
    """The sender's address."""
    to: Annotated[list[MailAddress], Field(min_length=1)] = Field(examples=[["ops@plant.example"]])
    """The recipients' addresses."""
    ca_file: CertificateFile | None = Field(default=None, examples=["mail-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    timeout_s: Seconds = 30
    """How long sending may take altogether."""

    @model_validator(mode="after")
    def _validate_password(self) -> Self:
        if self.password_file is not None and self.tls == "none" and not is_loopback(self.host):
            raise ValueError('a password needs tls: "starttls" or "tls"')
        self.require_together("username", "password_file")
        return self

    def check_files(self) -> Iterator[FileFault]:
        """Whether the files can be used."""
        yield from super().check_files()
        yield from check_client_tls(self.ca_file)

    def build_channel(self) -> AlertChannel:
        """The channel; OSError if a file cannot be used."""
        from gateway.alerts.channels import MailChannel, MailServer  # noqa: PLC0415 - brings aiosmtplib

        server = MailServer(
            self.host,
            self.port,
            self.tls,
            self.username or "",
            read_secret(self.password_file),
            None if self.ca_file is None else build_client_tls_context(self.ca_file),
            self.timeout_s,
        )
        return MailChannel(self.name, server, self.sender, tuple(self.to))


AnyChannel = Annotated[WebhookSettings | MailSettings, Field(discriminator="kind")]


class AlertSettings(Table):
    """The rules that raise alerts, and the channels that are notified."""

    enabled: bool = True
    """Whether there are alerts at all."""
    builtin: bool = True
    """Whether the built-in rules apply: temperature, battery, quality, silence (docs/alerts.md)."""
    stale_s: Seconds = 3600
    """Readings that are older than this on arrival neither raise nor end alerts."""
    group_wait_s: NonNegative = 5
    """How long alerts of one rule are collected before a message is sent."""
    group_interval_s: NonNegative = 60
    """The shortest time between two messages of one rule on a channel; alerts in between share a message."""
    give_up_s: Seconds = 86_400
    """How long a message is retried on a failing channel; then it is dropped and counted."""
    rule: list[AlertRule] = Field(default_factory=list)
    """Rules, one table each."""
    channel: list[AnyChannel] = Field(default_factory=list)
    """Channels, one table each. There is always one called "log"."""

    @model_validator(mode="after")
    def _validate_names(self) -> Self:
        for what, names in (
            ("rules", [rule.name for rule in self.rule]),
            ("channels", [LOG_CHANNEL, *(channel.name for channel in self.channel)]),
        ):
            if twice := find_duplicates(names):
                raise ValueError(f"two {what} are called {twice}")
        known = self.channel_names
        for rule in self.rule:
            if unknown := [name for name in rule.channels or () if name not in known]:
                what = f"rule {rule.name}: there is no channel {', '.join(unknown)}"
                raise ValueError(f"{what}; allowed: {', '.join(known)}")
        return self

    @property
    def channel_names(self) -> tuple[str, ...]:
        """The names of all channels."""
        return (LOG_CHANNEL, *(channel.name for channel in self.channel))

    @property
    def rules(self) -> list[Rule]:
        """The active rules, the built-in ones first."""
        channels, own = self.channel_names, [rule.to_rule(self.channel_names) for rule in self.rule]
        names = {rule.name for rule in own}
        builtin = [
            r._replace(channels=channels) for r in DEFAULT_ALERT_RULES if self.builtin and r.name not in names
        ]
        return [*builtin, *own]

    def build_channels(self) -> list[AlertChannel]:
        """Every channel, none without alerts; OSError if a file that one names cannot be used."""
        return [LogChannel(), *(c.build_channel() for c in self.channel)] if self.enabled else []

    @property
    def notifier_options(self) -> NotifierOptions:
        """How messages are grouped and retried."""
        return NotifierOptions(self.group_wait_s, self.group_interval_s, self.give_up_s)
