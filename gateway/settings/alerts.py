"""`[alerts]`: the rules that raise alerts, and the channels that are notified."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cloud_sync.model.records import Severity
from gateway.alerts.notifier import NotifierOptions
from gateway.alerts.rules import DEFAULT_ALERT_RULES, FLAG_PREFIX, QUANTITIES, SILENCE_QUANTITY, Rule
from gateway.processing.series_pattern import Pattern
from gateway.settings.processing import Limit, NonNegative, SeriesPattern  # noqa: TC001 - pydantic reads the annotations
from gateway.settings.schema import HttpUrl, Name, Port, Seconds, Table, is_loopback, unencrypted_secret_error

LOG_CHANNEL = "log"
_US_MAX = 1 << 60
_SILENCE_MAX_S = 1e12


def _validate_quantity(text: str) -> str:
    if text not in QUANTITIES:
        raise ValueError(f"nothing that a rule can look at; allowed: {', '.join(QUANTITIES)}")
    return text


def _validate_mail_address(text: str) -> str:
    local, at, domain = text.rpartition("@")
    if not (local and at and domain) or any(c.isspace() or c in "<>," for c in text):
        raise ValueError("must be an e-mail address such as ops@plant.example")
    return text


MailAddress = Annotated[str, AfterValidator(_validate_mail_address)]


class AlertRule(Table):
    """When alerts of some series begin and end."""

    name: Name = Field(examples=["hot"])
    """What it is called in alerts; a rule called like a built-in one takes its place."""
    series: SeriesPattern = Field(default="*/*", examples=["*/temperature"])
    """Which: SENSOR_ID/SENSOR_TYPE with "*" for anything, "?" for one character."""
    without: list[SeriesPattern] = Field(default_factory=list, examples=[["spare-*/*"]])
    """Series among them that it is not for."""
    on: Annotated[str, AfterValidator(_validate_quantity)] = "value"
    """What it looks at: "value", "quality", "battery_level" or "signal_strength" of a reading, "rate_per_min"
    for the change of the value, "silence" for seconds without data, "flag.stuck" and so on for a flag of the
    checks, "rollup.mean" and so on for a rollup: mean, minimum, maximum, first, last, deviation, count,
    flagged, excluded.
    """
    above: Limit | None = Field(default=None, examples=[35])
    """An alert begins above it."""
    below: Limit | None = Field(default=None, examples=[-10])
    """An alert begins below it."""
    margin: NonNegative = 0
    """How far back inside the limit the value has to be for the alert to end."""
    window_s: Annotated[int, Field(gt=0)] = 60
    """Of a rollup: the length of its window."""
    for_s: NonNegative = 0
    """How long it has to be so, without a break, before the alert begins."""
    severity: Literal["info", "warning", "critical"] = "warning"
    """How bad it is."""
    cooldown_s: NonNegative = 300
    """How long after an alert of a series the next one of the same rule and series may begin."""
    repeat_s: NonNegative = 0
    """How often an alert that goes on is told again; 0 for never."""
    recovery: bool = True
    """Whether the end is told too."""
    channels: list[str] | None = Field(default=None, examples=[["log"]])
    """Who is told; without it every channel, and the log."""

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
        """The rule as processing takes it; `channels` are those told without any named here."""
        return Rule(
            self.name,
            Pattern.of(self.series),
            self.on,
            above=float("inf") if self.above is None else self.above,
            below=-float("inf") if self.below is None else self.below,
            margin=self.margin,
            window_s=self.window_s,
            for_us=_to_microseconds(self.for_s),
            severity=Severity[self.severity.upper()],
            cooldown_us=_to_microseconds(self.cooldown_s),
            repeat_us=_to_microseconds(self.repeat_s),
            recovery=self.recovery,
            channels=channels if self.channels is None else tuple(self.channels),
            without=tuple(map(Pattern.of, self.without)),
        )


class WebhookSettings(Table):
    """A webhook."""

    name: Name = Field(examples=["ops"])
    """What rules call it."""
    kind: Literal["webhook"]
    """A POST of JSON to an address."""
    url: HttpUrl | None = Field(default=None, examples=["https://chat.example/hooks/plant"])
    """Its http:// or https:// address."""
    url_file: Path | None = Field(default=None, examples=["ops.url"])
    """A file whose first line is the address, where that is a secret; it counts before url."""
    form: Literal["slack", "json"] = "slack"
    """What is posted: "slack" is {"text": ...}, which chat services take; "json" is the whole message."""
    token_file: Path | None = Field(default=None, examples=["ops.token"])
    """A file whose first line is sent as a bearer token."""
    allow_plain: bool = False
    """Whether a token or a secret address may go to another machine without TLS: only where something else
    encrypts.
    """
    ca_file: Path | None = Field(default=None, examples=["ops-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    timeout_s: Seconds = 10
    """How long an answer may take."""

    @model_validator(mode="after")
    def _validate_address(self) -> Self:
        if self.url is None and self.url_file is None:
            raise ValueError("needs url or url_file")
        if (
            self.url is not None
            and self.url_file is None
            and (fault := self.find_unencrypted_secret(self.url))
        ):
            raise ValueError(fault)
        return self

    def find_unencrypted_secret(self, url: str) -> str:
        """Why what is secret of this channel may not go to `url`, "" where it may."""
        if self.allow_plain or (self.token_file is None and self.url_file is None):
            return ""
        return unencrypted_secret_error("the token or the address", url, "https://")


class MailSettings(Table):
    """E-mail."""

    name: Name = Field(examples=["mail"])
    """What rules call it."""
    kind: Literal["email"]
    """E-mail through a mail server."""
    host: str = Field(examples=["mail.example"], min_length=1)
    """The mail server."""
    port: Port = 587
    """Its TCP port."""
    tls: Literal["starttls", "tls", "none"] = "starttls"
    """"starttls" encrypts before anything is said, "tls" from the start (port 465), "none" never."""
    username: str | None = Field(default=None, examples=["barn-1"])
    """The user name to show."""
    password_file: Path | None = Field(default=None, examples=["mail.password"])
    """A file whose first line is the password."""
    sender: MailAddress = Field(examples=["barn-1@plant.example"])
    """Who it is from."""
    to: Annotated[list[MailAddress], Field(min_length=1)] = Field(examples=[["ops@plant.example"]])
    """Who gets it."""
    ca_file: Path | None = Field(default=None, examples=["mail-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    timeout_s: Seconds = 30
    """How long the whole may take."""

    @model_validator(mode="after")
    def _secret(self) -> Self:
        if self.password_file is not None and self.tls == "none" and not is_loopback(self.host):
            raise ValueError('a password needs tls: "starttls" or "tls"')
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file go together")
        return self


AnyChannel = Annotated[WebhookSettings | MailSettings, Field(discriminator="kind")]


class AlertSettings(Table):
    """What raises an alert, and who is told."""

    enabled: bool = True
    """Whether there are alerts at all."""
    builtin: bool = True
    """Whether the built-in rules are in force: temperature, battery, quality, silence (docs/alerts.md)."""
    stale_s: Seconds = 3600
    """Readings that are older than this as they come raise and end no alerts."""
    group_wait_s: NonNegative = 5
    """How long what one rule has to say is gathered before it is told."""
    group_interval_s: NonNegative = 60
    """One rule is heard on a channel at most so often; what comes meanwhile is one message."""
    give_up_s: Seconds = 86_400
    """How long a channel that fails is tried; then the message is dropped and counted."""
    rule: list[AlertRule] = Field(default_factory=list)
    """What raises an alert, one table each."""
    channel: list[AnyChannel] = Field(default_factory=list)
    """Who is told, one table each. There is always one called "log"."""

    @model_validator(mode="after")
    def _validate_names(self) -> Self:
        for what, names in (
            ("rules", [rule.name for rule in self.rule]),
            ("channels", [LOG_CHANNEL, *(channel.name for channel in self.channel)]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"two {what} are called {', '.join(twice)}")
        known = self.channel_names
        for rule in self.rule:
            if strangers := [name for name in rule.channels or () if name not in known]:
                what = f"rule {rule.name}: there is no channel {', '.join(strangers)}"
                raise ValueError(f"{what}; allowed: {', '.join(known)}")
        return self

    @property
    def channel_names(self) -> tuple[str, ...]:
        """Every channel there is."""
        return (LOG_CHANNEL, *(channel.name for channel in self.channel))

    @property
    def rules(self) -> list[Rule]:
        """Those in force, the built-in ones first."""
        channels, own = self.channel_names, [rule.to_rule(self.channel_names) for rule in self.rule]
        names = {rule.name for rule in own}
        given = [
            r._replace(channels=channels) for r in DEFAULT_ALERT_RULES if self.builtin and r.name not in names
        ]
        return [*given, *own]

    @property
    def terms(self) -> NotifierOptions:
        """How messages are gathered and tried."""
        return NotifierOptions(self.group_wait_s, self.group_interval_s, self.give_up_s)


def _to_microseconds(seconds: float) -> int:
    return min(round(seconds * 1e6), _US_MAX)
