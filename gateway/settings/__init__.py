"""Settings of the gateway: `config/gateway.toml` shows every key with its default."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloud_sync import settings_file
from cloud_sync.destinations.http_client import tls_context
from cloud_sync.handed_over import handed_over
from cloud_sync.ingest.tokens import TokenFile, TokensFault
from cloud_sync.settings_file import Fault, SettingsFault
from gateway.ingress import credentials
from gateway.ingress.formats.rules import Rules
from gateway.ingress.tls import TlsFault, context_of
from gateway.ingress.topics import TopicTemplate
from gateway.settings.alerts import AlertSettings, AnyChannel, WebhookSettings
from gateway.settings.checks import CheckSettings
from gateway.settings.clock import ClockSettings
from gateway.settings.deadband import DeadbandRule  # noqa: TC001 - pydantic reads the annotations
from gateway.settings.destination import (
    AnyDestination,
    FileDestination,
    HttpDestination,
    InfluxDestination,
    IngestDestination,
)
from gateway.settings.http import Http
from gateway.settings.listen import Listen
from gateway.settings.rollups import Processing, RollupSettings
from gateway.settings.rule import IngressRule
from gateway.settings.status import Status
from gateway.settings.subscribe import Subscribe
from gateway.settings.tables import Count, Name, Seconds, Table, is_http_url

__all__ = [
    "AnyDestination",
    "FileDestination",
    "GatewaySettings",
    "Http",
    "HttpDestination",
    "InfluxDestination",
    "IngestDestination",
    "Ingress",
    "IngressRule",
    "Listen",
    "Subscribe",
    "load",
    "read",
    "secret_of",
]

if TYPE_CHECKING:
    from gateway.settings.door import Door

ENV_PREFIX = "TIDEGATE_GATEWAY_"


class Spool(Table):
    """The durable store."""

    path: Path = Field(examples=["/var/lib/tidegate/spool.db"])
    """The SQLite file, on a local disk (not NFS). Its folder is made if need be."""
    commit_interval_ms: Annotated[float, Field(ge=0, le=60_000)] = 5
    """At most one commit in so long. More saves flash, and delays acknowledgements by as much."""
    max_pending_bytes: Annotated[int, Field(ge=1 << 16)] = 32 << 20
    """What may wait in memory for its commit. Beyond it sockets are not read, so that TCP pushes back."""
    max_series: Count = 200_000
    """How many series, each counted once per state of its attributes, may be known. Readings of more are
    quarantined.
    """
    max_bytes: Annotated[int, Field(ge=1 << 20)] | None = Field(default=None, examples=[20_000_000_000])
    """The largest the spool may become on disk; without it only the disk is the limit."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 128 << 20
    """What of the disk stays free for others."""
    on_full: Literal["hold", "refuse"] = "hold"
    """When there is no room. "hold": withhold acknowledgements and stop reading, so that devices keep their
    data and send it when room returns. "refuse": tell them "quota exceeded", upon which they forget it.
    """
    give_up: bool = True
    """Whether the oldest readings that are not delivered make way for new ones when there is no room, their
    rollups being kept; what went is declared. Without it a spool without room takes nothing more.
    """
    max_age_d: Annotated[float, Field(gt=0)] | None = Field(default=None, examples=[60])
    """Readings older than that go, delivered or not, and are declared. Without it age does not matter."""
    keep_delivered_h: Annotated[float, Field(ge=0)] = 24
    """How long readings stay after every destination has given its receipt. What is not delivered is kept
    for as long as there is room (`give_up`, `max_age_d`).
    """
    flash_endurance_tb: Annotated[float, Field(gt=0)] | None = Field(default=None, examples=[100])
    """What may still be written to the disk the spool is on: its endurance as the maker states it (TBW), less
    what has been written. With it the status page says how many years that lasts.
    """


class Host(Table):
    """The gateway's own metrics as readings."""

    enabled: bool = True
    """Whether processor, memory, disk, temperatures and network become readings of a sensor called like the
    gateway.
    """
    period_s: Annotated[float, Field(ge=0.1)] = 10
    """How often they are read."""


class Ingress(Table):
    """How readings enter."""

    listen: Listen = Listen()
    """The gateway's own MQTT server."""
    host: Host = Host()
    """The gateway's own metrics."""
    http: Http = Http()
    """The gateway's own HTTP server for readings."""
    subscribe: list[Subscribe] = Field(default_factory=list)
    """Existing MQTT 5 brokers to read, one table each."""
    rule: list[IngressRule] = Field(default_factory=list)
    """Payload shapes by topic; the first that fits counts. Where none does: JSON readings on listen.topic."""

    @property
    def doors(self) -> dict[str, Door]:
        """Where devices connect, by the path of the table; those that are closed are left out."""
        doors: dict[str, Door] = {"ingress.listen": self.listen}
        return {**doors, "ingress.http": self.http} if self.http.enabled else doors

    @property
    def rules(self) -> Rules:
        """Every rule, with the listener's topic for what fits none."""
        return Rules(TopicTemplate(self.listen.topic), [rule for table in self.rule for rule in table.rules])

    @field_validator("subscribe")
    @classmethod
    def _sessions_apart(cls, tables: list[Subscribe]) -> list[Subscribe]:
        sessions = [(table.url, table.client_id) for table in tables]
        if len(set(sessions)) < len(sessions):
            raise ValueError(
                "two tables with the same url need a client_id each, or they take turns at one session"
            )
        return tables


class GatewaySettings(BaseSettings):
    """Everything the gateway can be told."""

    model_config = SettingsConfigDict(extra="forbid", use_attribute_docstrings=True)

    gateway_id: Name = Field(examples=["barn-1"])
    """This gateway's name upstream, unique among all that deliver to the same place. Letters, digits, . _ -
    It stays: what was delivered is remembered under this name.
    """
    spool: Spool
    """A [spool] table: where readings are made durable before they are acknowledged."""
    ingress: Ingress = Ingress()
    """How readings enter."""
    clock: ClockSettings = ClockSettings()
    """When the gateway's own clock is relied on."""
    checks: CheckSettings = CheckSettings()
    """What is flagged as suspicious."""
    report_by_exception: list[DeadbandRule] = Field(default_factory=list)
    """Series of which only what changes is delivered, one table each; of several the one whose pattern says
    most is in force.
    """
    processing: Processing = Processing()
    """How processing follows the commits."""
    rollups: RollupSettings = RollupSettings()
    """How readings are summarised."""
    alerts: AlertSettings = AlertSettings()
    """What raises an alert, and who is told."""
    destinations: list[AnyDestination] = Field(default_factory=list)
    """Where readings go, one table each. Each has a progress of its own, kept under its name."""
    status: Status = Status()
    """The gateway's own HTTP endpoint."""
    stop_within_s: Seconds = 20
    """How long an orderly stop may take. Keep it below TimeoutStopSec of the systemd unit."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """How it is logged: text, JSON, or text that fits systemd's journal where it leads there."""

    @model_validator(mode="after")
    def _rules_see_windows(self) -> Self:
        windows_s = self.rollups.windows_s if self.rollups.enabled else []
        for rule in self.alerts.rule:
            if rule.on.startswith("rollup.") and rule.window_s not in windows_s:
                raise ValueError(
                    f"alerts.rule {rule.name}: there are no rollups of {rule.window_s} s; "
                    f"allowed for window_s: {', '.join(map(str, windows_s)) or 'none, rollups are off'}"
                )
        return self

    @field_validator("destinations")
    @classmethod
    def _named_apart(cls, destinations: list[AnyDestination]) -> list[AnyDestination]:
        names = [d.name for d in destinations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two destinations are called {', '.join(twice)}; each needs a name of its own")
        return destinations


def load(path: Path) -> GatewaySettings:
    """Settings from a file and the environment; paths in it are relative to the file's own folder.

    Raises:
        SettingsFault: with every fault, files that are missing or of no use included.
    """
    settings = read(path)
    faults = _door_faults(path, "ingress.listen", settings.ingress.listen)
    faults += _door_faults(path, "ingress.http", settings.ingress.http)
    faults += _status_faults(path, settings.status)
    for position, subscribe in enumerate(settings.ingress.subscribe):
        if subscribe.password_file is not None:
            key = f"ingress.subscribe[{position}].password_file"
            faults += _secret_faults(path, key, subscribe.password_file)
    for position, channel in enumerate(settings.alerts.channel):
        faults += _channel_faults(path, f"alerts.channel[{position}]", channel)
    for position, destination in enumerate(settings.destinations):
        for key, value in _paths_of(destination):
            if key in ("token_file", "password_file"):
                faults += _secret_faults(path, f"destinations[{position}].{key}", value)
        if isinstance(destination, HttpDestination):
            faults += _tls_faults(path, f"destinations[{position}]", destination)
    if faults:
        raise SettingsFault(faults)
    return settings


def read(path: Path) -> GatewaySettings:
    """The same without a look at the files that the settings name, for commands that make them.

    Raises:
        SettingsFault: with every fault of the settings themselves.
    """
    settings = settings_file.load(GatewaySettings, path, ENV_PREFIX)
    folder = path.absolute().parent
    for table in (
        settings.spool,
        settings.status,
        settings.ingress.listen,
        settings.ingress.http,
        *settings.ingress.subscribe,
        *settings.destinations,
        *settings.alerts.channel,
    ):
        for key, value in _paths_of(table):
            is_secret = key in ("token_file", "password_file")
            setattr(table, key, folder / value)
            if is_secret and (given := handed_over(folder / value)) != folder / value:
                table.hand_over(key, given)
    return settings


def _paths_of(table: BaseModel) -> list[tuple[str, Path]]:
    values: list[tuple[str, Any]] = [(key, getattr(table, key)) for key in type(table).model_fields]
    return [(key, value) for key, value in values if isinstance(value, Path)]


def _door_faults(source: Path, table: str, door: Door) -> list[Fault]:
    faults = []
    if door.tls_files is not None:
        try:
            context_of(door.tls_files)
        except TlsFault as fault:
            key = next((name for name, path in _paths_of(door) if path == fault.path), "tls_cert_file")
            faults.append(Fault(str(source), f"{table}.{key}", str(fault), ""))
    if door.passwords_file is not None:
        try:
            credentials.read(door.passwords_file)
        except credentials.CredentialsFault as fault:
            faults.append(Fault(str(source), f"{table}.passwords_file", str(fault), ""))
    if isinstance(door, Http) and door.tokens_file is not None:
        try:
            TokenFile(door.tokens_file, f"tidegate device token NAME --config {source}").refresh()
        except TokensFault as fault:
            faults.append(Fault(str(source), f"{table}.tokens_file", str(fault), ""))
    return faults


def _status_faults(source: Path, status: Status) -> list[Fault]:
    faults = []
    if status.tls_files is not None:
        try:
            context_of(status.tls_files)
        except TlsFault as fault:
            key = next((name for name, path in _paths_of(status) if path == fault.path), "tls_cert_file")
            faults.append(Fault(str(source), f"status.{key}", str(fault), ""))
    if status.tokens_file is not None:
        try:
            TokenFile(status.tokens_file, f"tidegate token add NAME --config {source}").refresh()
        except TokensFault as fault:
            faults.append(Fault(str(source), "status.tokens_file", str(fault), ""))
    return faults


def _channel_faults(source: Path, place: str, channel: AnyChannel) -> list[Fault]:
    """Whether the files of a channel can be used; an address in a file is checked like one in the table."""
    faults = []
    for key, value in _paths_of(channel):
        if key == "ca_file":
            try:
                tls_context(value)
            except OSError as fault:
                what = f"{value} cannot be used: {fault.strerror or fault}"
                faults.append(Fault(str(source), f"{place}.{key}", what, "PEM"))
            continue
        found = _secret_faults(source, f"{place}.{key}", value)
        if key == "url_file" and not found and not is_http_url(secret_of(value)):
            allowed = "an http:// or https:// address with a host"
            found = [Fault(str(source), f"{place}.{key}", f"{value} holds no address", allowed)]
        elif key == "url_file" and not found and isinstance(channel, WebhookSettings):
            plain = channel.plain_fault(secret_of(value))
            found = [Fault(str(source), f"{place}.{key}", plain, "")] if plain else []
        faults += found
    return faults


def _tls_faults(source: Path, place: str, destination: HttpDestination) -> list[Fault]:
    """Whether each file can be used for what it is there for."""
    faults = []
    for key, given in (
        ("ca_file", (destination.ca_file, None, None)),
        ("cert_file", (None, destination.cert_file, destination.key_file)),
    ):
        if any(given):
            try:
                tls_context(*given)
            except OSError as fault:
                what = f"{next(filter(None, given))} cannot be used: {fault.strerror or fault}"
                faults.append(Fault(str(source), f"{place}.{key}", what, "PEM, a key without a password"))
    return faults


def secret_of(path: Path) -> str:
    """The secret a file holds: its first line. `load` has seen that it is there."""
    return path.read_text(encoding="utf-8").partition("\n")[0].strip()


def _secret_faults(source: Path, key: str, path: Path) -> list[Fault]:
    try:
        if secret_of(path):
            return []
        what = f"{path} is empty"
    except (OSError, UnicodeDecodeError) as fault:
        what = f"{path} cannot be read: {getattr(fault, 'strerror', None) or fault}"
    return [Fault(str(source), key, what, "a file whose first line is the secret")]
