"""Settings of the gateway, loaded and checked: `config/gateway.toml` shows every key with its default."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloud_sync.destinations.http_client import build_client_tls_context
from cloud_sync.http.tokens import TokenFile, TokenFileError
from cloud_sync.runtime import settings_file
from cloud_sync.runtime.secret_files import find_credential, read_secret
from cloud_sync.runtime.settings_file import Fault, InvalidSettingsError
from gateway.auth import device_passwords
from gateway.auth.tls import TlsFileError, build_server_context
from gateway.payloads.decoder_registry import RuleSet
from gateway.payloads.topics import TopicTemplate
from gateway.settings.alerts import AlertSettings, AnyChannel, WebhookSettings
from gateway.settings.destinations import (
    AnyDestination,
    HttpDestination,
)
from gateway.settings.listeners import Http, Listen, StatusSettings
from gateway.settings.processing import (
    CheckSettings,
    ClockSettings,
    DeadbandRule,
    ProcessingSettings,
    RollupSettings,
)
from gateway.settings.schema import Count, Name, Seconds, Table, is_http_url
from gateway.settings.sources import IngressRule, Subscribe  # noqa: TC001 - pydantic reads the annotations

if TYPE_CHECKING:
    from gateway.settings.listeners import DeviceListener

ENV_PREFIX = "TIDEGATE_GATEWAY_"


class SpoolSettings(Table):
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


class HostMetricsSettings(Table):
    """The gateway's own metrics as readings."""

    enabled: bool = True
    """Whether processor, memory, disk, temperatures and network become readings of a sensor called like the
    gateway.
    """
    period_s: Annotated[float, Field(ge=0.1)] = 10
    """How often they are read."""


class IngressSettings(Table):
    """How readings enter."""

    listen: Listen = Listen()
    """The gateway's own MQTT server."""
    host: HostMetricsSettings = HostMetricsSettings()
    """The gateway's own metrics."""
    http: Http = Http()
    """The gateway's own HTTP server for readings."""
    subscribe: list[Subscribe] = Field(default_factory=list)
    """Existing MQTT 5 brokers to read, one table each."""
    rule: list[IngressRule] = Field(default_factory=list)
    """Payload shapes by topic; the first that fits counts. Where none does: JSON readings on listen.topic."""

    @property
    def device_listeners(self) -> dict[str, DeviceListener]:
        """Where devices connect, by the path of the table; those that are closed are left out."""
        device_listeners: dict[str, DeviceListener] = {"ingress.listen": self.listen}
        return {**device_listeners, "ingress.http": self.http} if self.http.enabled else device_listeners

    @property
    def rules(self) -> RuleSet:
        """Every rule, with the listener's topic for what fits none."""
        return RuleSet(
            TopicTemplate(self.listen.topic), [rule for table in self.rule for rule in table.rules]
        )

    @field_validator("subscribe")
    @classmethod
    def _require_distinct_sessions(cls, tables: list[Subscribe]) -> list[Subscribe]:
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
    spool: SpoolSettings
    """A [spool] table: where readings are made durable before they are acknowledged."""
    ingress: IngressSettings = IngressSettings()
    """How readings enter."""
    clock: ClockSettings = ClockSettings()
    """When the gateway's own clock is relied on."""
    checks: CheckSettings = CheckSettings()
    """What is flagged as suspicious."""
    report_by_exception: list[DeadbandRule] = Field(default_factory=list)
    """Series of which only what changes is delivered, one table each; of several the one whose pattern says
    most is in force.
    """
    processing: ProcessingSettings = ProcessingSettings()
    """How processing follows the commits."""
    rollups: RollupSettings = RollupSettings()
    """How readings are summarised."""
    alerts: AlertSettings = AlertSettings()
    """What raises an alert, and who is told."""
    destinations: list[AnyDestination] = Field(default_factory=list)
    """Where readings go, one table each. Each has a progress of its own, kept under its name."""
    status: StatusSettings = StatusSettings()
    """The gateway's own HTTP endpoint."""
    stop_within_s: Seconds = 20
    """How long an orderly stop may take. Keep it below TimeoutStopSec of the systemd unit."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """How it is logged: text, JSON, or text that fits systemd's journal where it leads there."""

    @model_validator(mode="after")
    def _validate_rollup_rules(self) -> Self:
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
    def _require_distinct_names(cls, destinations: list[AnyDestination]) -> list[AnyDestination]:
        names = [d.name for d in destinations]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two destinations are called {', '.join(twice)}; each needs a name of its own")
        return destinations


def load_settings(path: Path) -> GatewaySettings:
    """Settings from a file and the environment; paths in it are relative to the file's own folder.

    Raises:
        SettingsFault: with every fault, files that are missing or of no use included.
    """
    settings = parse_settings_file(path)
    faults = _check_listener_files(path, "ingress.listen", settings.ingress.listen)
    faults += _check_listener_files(path, "ingress.http", settings.ingress.http)
    faults += _check_status_files(path, settings.status)
    for position, subscribe in enumerate(settings.ingress.subscribe):
        if subscribe.password_file is not None:
            key = f"ingress.subscribe[{position}].password_file"
            faults += _check_secret_file(path, key, subscribe.password_file)
    for position, channel in enumerate(settings.alerts.channel):
        faults += _check_channel_files(path, f"alerts.channel[{position}]", channel)
    for position, destination in enumerate(settings.destinations):
        for key, value in _path_fields(destination):
            if key in ("token_file", "password_file"):
                faults += _check_secret_file(path, f"destinations[{position}].{key}", value)
        if isinstance(destination, HttpDestination):
            faults += _check_destination_tls(path, f"destinations[{position}]", destination)
    if faults:
        raise InvalidSettingsError(faults)
    return settings


def parse_settings_file(path: Path) -> GatewaySettings:
    """The same without a look at the files that the settings name, for commands that make them.

    Raises:
        SettingsFault: with every fault of the settings themselves.
    """
    settings = settings_file.load_settings(GatewaySettings, path, ENV_PREFIX)
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
        for key, value in _path_fields(table):
            is_secret = key in ("token_file", "password_file")
            setattr(table, key, folder / value)
            if is_secret and (given := find_credential(folder / value)) != folder / value:
                table.hand_over(key, given)
    return settings


def _path_fields(table: BaseModel) -> list[tuple[str, Path]]:
    values: list[tuple[str, Any]] = [(key, getattr(table, key)) for key in type(table).model_fields]
    return [(key, value) for key, value in values if isinstance(value, Path)]


def _check_listener_files(source: Path, table: str, door: DeviceListener) -> list[Fault]:
    faults = []
    if door.tls_files is not None:
        try:
            build_server_context(door.tls_files)
        except TlsFileError as fault:
            key = next((name for name, path in _path_fields(door) if path == fault.path), "tls_cert_file")
            faults.append(Fault(str(source), f"{table}.{key}", str(fault), ""))
    if door.passwords_file is not None:
        try:
            device_passwords.read_password_file(door.passwords_file)
        except device_passwords.PasswordFileError as fault:
            faults.append(Fault(str(source), f"{table}.passwords_file", str(fault), ""))
    if isinstance(door, Http) and door.tokens_file is not None:
        try:
            TokenFile(door.tokens_file, f"tidegate device token NAME --config {source}")
        except TokenFileError as fault:
            faults.append(Fault(str(source), f"{table}.tokens_file", str(fault), ""))
    return faults


def _check_status_files(source: Path, status: StatusSettings) -> list[Fault]:
    faults = []
    if status.tls_files is not None:
        try:
            build_server_context(status.tls_files)
        except TlsFileError as fault:
            key = next((name for name, path in _path_fields(status) if path == fault.path), "tls_cert_file")
            faults.append(Fault(str(source), f"status.{key}", str(fault), ""))
    if status.tokens_file is not None:
        try:
            TokenFile(status.tokens_file, f"tidegate token add NAME --config {source}")
        except TokenFileError as fault:
            faults.append(Fault(str(source), "status.tokens_file", str(fault), ""))
    return faults


def _check_channel_files(source: Path, place: str, channel: AnyChannel) -> list[Fault]:
    """Whether the files of a channel can be used; an address in a file is checked like one in the table."""
    faults = []
    for key, value in _path_fields(channel):
        if key == "ca_file":
            try:
                build_client_tls_context(value)
            except OSError as fault:
                what = f"{value} cannot be used: {fault.strerror or fault}"
                faults.append(Fault(str(source), f"{place}.{key}", what, "PEM"))
            continue
        found = _check_secret_file(source, f"{place}.{key}", value)
        if key == "url_file" and not found and not is_http_url(read_secret(value)):
            allowed = "an http:// or https:// address with a host"
            found = [Fault(str(source), f"{place}.{key}", f"{value} holds no address", allowed)]
        elif key == "url_file" and not found and isinstance(channel, WebhookSettings):
            plain = channel.find_unencrypted_secret(read_secret(value))
            found = [Fault(str(source), f"{place}.{key}", plain, "")] if plain else []
        faults += found
    return faults


def _check_destination_tls(source: Path, place: str, destination: HttpDestination) -> list[Fault]:
    """Whether each file can be used for what it is there for."""
    faults = []
    for key, given in (
        ("ca_file", (destination.ca_file, None, None)),
        ("cert_file", (None, destination.cert_file, destination.key_file)),
    ):
        if any(given):
            try:
                build_client_tls_context(*given)
            except OSError as fault:
                what = f"{next(filter(None, given))} cannot be used: {fault.strerror or fault}"
                faults.append(Fault(str(source), f"{place}.{key}", what, "PEM, a key without a password"))
    return faults


def _check_secret_file(source: Path, key: str, path: Path) -> list[Fault]:
    try:
        if read_secret(path):
            return []
        what = f"{path} is empty"
    except (OSError, UnicodeDecodeError) as fault:
        what = f"{path} cannot be read: {getattr(fault, 'strerror', None) or fault}"
    return [Fault(str(source), key, what, "a file whose first line is the secret")]
