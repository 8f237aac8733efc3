"""Settings of the gateway: `config/gateway.toml` shows every key with its default."""

from __future__ import annotations

import ipaddress
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloud_sync import settings_file
from cloud_sync.destinations.http_client import HttpOptions, tls_context
from cloud_sync.schedule import Schedule, window_of, zone_of
from cloud_sync.settings_file import Fault, SettingsFault
from gateway.ingress import credentials
from gateway.ingress.subscription import address_of, check_filter
from gateway.ingress.tls import TlsFault, TlsFiles, context_of
from gateway.ingress.topics import TopicTemplate
from gateway.spool.deliveries import FROM_NOW

ENV_PREFIX = "TIDEGATE_GATEWAY_"

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def _http_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// address with a host")
    return url.rstrip("/")


HttpUrl = Annotated[str, AfterValidator(_http_url)]


class _Table(BaseModel):
    """A table of the file. Unknown keys are faults."""

    model_config = ConfigDict(extra="forbid")


class Spool(_Table):
    """The durable store."""

    path: Path = Field(description="the SQLite file, e.g. /var/lib/tidegate/spool.db")
    commit_interval_ms: Annotated[float, Field(ge=0, le=60_000)] = 5
    max_pending_bytes: Annotated[int, Field(ge=1 << 16)] = 32 << 20
    max_series: Count = 200_000
    max_bytes: Annotated[int, Field(ge=1 << 20)] | None = None
    min_free_bytes: Annotated[int, Field(ge=0)] = 128 << 20
    on_full: Literal["hold", "refuse"] = "hold"
    keep_delivered_h: Annotated[float, Field(ge=0)] = 24


class Listen(_Table):
    """The gateway's own MQTT server."""

    host: str = "127.0.0.1"
    port: Port = 1883
    topic: str = "sensors/{sensor_id}/{sensor_type}"
    max_connections: Count = 10_500
    max_packet_bytes: Annotated[int, Field(ge=128, le=268_435_455)] = 1 << 20
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    client_ca_file: Path | None = None
    client_crl_file: Path | None = None
    client_certificate: Literal["required", "optional"] = "required"
    passwords_file: Path | None = None
    identity: Literal["username", "cn", "san"] | None = None
    publish_as: Literal["self", "any"] | None = None
    allow_anonymous: bool | None = None

    @field_validator("topic")
    @classmethod
    def _is_template(cls, topic: str) -> str:
        TopicTemplate(topic)
        return topic

    @model_validator(mode="after")
    def _is_guarded(self) -> Self:
        """Refuse what contradicts itself, and a door that is open without anyone having said so."""
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together")
        if self.client_ca_file is not None and self.tls_cert_file is None:
            faults.append("client_ca_file needs TLS: give tls_cert_file and tls_key_file")
        if self.client_crl_file is not None and self.client_ca_file is None:
            faults.append("client_crl_file revokes certificates of client_ca_file; give that too")
        if self.named_by == "username":
            if self.passwords_file is None and (self.identity is not None or self.publish_as == "self"):
                faults.append(
                    "nothing tells who a client is: give passwords_file, or client_ca_file for certificates"
                )
            if self.client_ca_file is not None and self.client_certificate == "optional":
                faults.append(
                    'optional client certificates that give no name change nothing: set identity = "cn" or '
                    '"san", or client_certificate = "required"'
                )
        elif self.client_ca_file is None:
            faults.append(f"identity = {self.named_by!r} needs client_ca_file")
        faults += self._faults_of_anonymity()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults_of_anonymity(self) -> list[str]:
        if self.allow_anonymous is False and not self.authenticates:
            return ["nobody could connect: give passwords_file or client_ca_file, or allow_anonymous = true"]
        if self.allow_anonymous and self.client_ca_file is not None:
            if self.client_certificate == "required":
                return ['allow_anonymous and client_certificate = "required" contradict each other']
            if self.own_only:
                what = (
                    "clients without a certificate could publish as any device that has one: set "
                    'publish_as = "any" to accept that, or leave out allow_anonymous'
                )
                return [what]
        if not self.authenticates and not self.is_loopback and not self.allow_anonymous:
            what = (
                f"anyone who reaches {self.host or 'this machine'} could publish anything: give "
                "passwords_file (`tidegate device add` fills it) and TLS, or client_ca_file, or listen on "
                "127.0.0.1; where the network itself is trusted, say so with allow_anonymous = true"
            )
            return [what]
        return []

    @property
    def authenticates(self) -> bool:
        """Whether anything is asked of clients."""
        return self.passwords_file is not None or self.client_ca_file is not None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def admits_anonymous(self) -> bool:
        """Whether a client that shows nothing is admitted: as said, otherwise when none can show anything."""
        return not self.authenticates if self.allow_anonymous is None else self.allow_anonymous

    @property
    def named_by(self) -> Literal["username", "cn", "san"]:
        """Where the name of a device comes from."""
        if self.identity is not None:
            return self.identity
        return "cn" if self.client_ca_file is not None and self.passwords_file is None else "username"

    @property
    def own_only(self) -> bool:
        """Whether a device publishes under its own sensor_id only."""
        return self.authenticates if self.publish_as is None else self.publish_as == "self"

    @property
    def tls_files(self) -> TlsFiles | None:
        """What TLS is made from; None without TLS."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return TlsFiles(
            certificate=self.tls_cert_file,
            key=self.tls_key_file,
            client_ca=self.client_ca_file,
            client_crl=self.client_crl_file,
            client_required=self.client_certificate == "required",
        )


class Host(_Table):
    """The gateway's own metrics as readings."""

    enabled: bool = True
    period_s: Annotated[float, Field(ge=0.1)] = 10


class Subscribe(_Table):
    """An existing broker that the gateway reads."""

    url: str = Field(description="mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    filters: Annotated[list[str], Field(min_length=1)]
    unsubscribe: list[str] = Field(default_factory=list)
    name: Name | None = None
    client_id: str | None = None
    qos: Annotated[int, Field(ge=0, le=2)] = 1
    retained: bool = False
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None
    receive_maximum: Annotated[int, Field(ge=1, le=65_535)] = 5_000
    session_expiry_s: Annotated[int, Field(ge=0, le=4_294_967_295)] = 2_592_000
    keep_alive_s: Annotated[int, Field(ge=0, le=65_535)] = 60
    max_packet_bytes: Annotated[int, Field(ge=256, le=268_435_455)] = 8 << 20
    broker_reviewed: bool = False

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        address_of(url)
        return url

    @field_validator("filters", "unsubscribe")
    @classmethod
    def _are_filters(cls, filters: list[str]) -> list[str]:
        for topic_filter in filters:
            check_filter(topic_filter)
        return filters

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        return self


class Ingress(_Table):
    """How readings enter."""

    listen: Listen = Listen()
    host: Host = Host()
    subscribe: list[Subscribe] = Field(default_factory=list)

    @field_validator("subscribe")
    @classmethod
    def _sessions_apart(cls, tables: list[Subscribe]) -> list[Subscribe]:
        sessions = [(table.url, table.client_id) for table in tables]
        if len(set(sessions)) < len(sessions):
            raise ValueError(
                "two tables with the same url need a client_id each, or they take turns at one session"
            )
        return tables


def _start(text: str) -> str:
    if text not in ("oldest", "now"):
        try:
            zone = datetime.fromisoformat(text).tzinfo
        except ValueError:
            zone = None
        if zone is None:
            raise ValueError(
                'must be "oldest", "now", or a time with its offset, such as 2026-05-01T12:00:00Z'
            )
    return text


def _window(text: str) -> str:
    window_of(text)
    return text


def _zone(name: str) -> str:
    zone_of(name)
    return name


class _Destination(_Table):
    name: Name
    start: Annotated[str, AfterValidator(_start)] = "oldest"
    max_batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    max_batch_bytes: Annotated[int, Field(ge=4096)] = 4 << 20
    target_s: Seconds = 1
    flush_s: Annotated[float, Field(ge=0)] = 0.8
    timeout_s: Seconds = 30
    max_bytes_per_s: Count | None = None
    windows: list[Annotated[str, AfterValidator(_window)]] = []
    windows_for: Literal["backfill", "everything"] = "backfill"
    time_zone: Annotated[str, AfterValidator(_zone)] = "UTC"

    @property
    def since_us(self) -> int | None:
        """From when on a destination that is new gets what was committed; None for everything."""
        if self.start in ("oldest", "now"):
            return None if self.start == "oldest" else FROM_NOW
        return round(datetime.fromisoformat(self.start).timestamp() * 1_000_000)

    @property
    def schedule(self) -> Schedule:
        """When it may be sent to."""
        return Schedule.of(self.windows, self.time_zone)


class _HttpDestination(_Destination):
    url: HttpUrl
    concurrency: Annotated[int, Field(ge=1, le=16)] = 2
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    proxy: HttpUrl | None = None

    @model_validator(mode="after")
    def _identified(self) -> Self:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs cert_file")
        if not self.url.startswith("https:") and (self.ca_file or self.cert_file):
            raise ValueError("ca_file and cert_file need an https:// address")
        return self

    def http_options(self) -> HttpOptions:
        """How to reach it; the files are read now.

        Raises:
            OSError: one of them cannot be used.
        """
        tls = None
        if self.ca_file is not None or self.cert_file is not None:
            tls = tls_context(self.ca_file, self.cert_file, self.key_file)
        return HttpOptions(tls, self.proxy or "", connections=self.concurrency + 1)


class IngestDestination(_HttpDestination):
    """A Tidegate ingest service."""

    kind: Literal["ingest"]
    token_file: Path | None = None

    @model_validator(mode="after")
    def _known_by(self) -> Self:
        if self.token_file is None and self.cert_file is None:
            raise ValueError(
                "token_file is missing: the service gives a token, or takes a client certificate"
            )
        return self


class InfluxDestination(_HttpDestination):
    """An InfluxDB, or what speaks its write protocol."""

    kind: Literal["influxdb"]
    api: Literal["v1", "v2"] = "v2"
    org: str | None = None
    bucket: str | None = None
    token_file: Path | None = None
    database: str | None = None
    retention_policy: str | None = None
    username: str | None = None
    password_file: Path | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {"v2": ("bucket",), "v1": ("database",)}[self.api]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f'api = "{self.api}" needs {" and ".join(missing)}')
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file go together")
        return self


class FileDestination(_Destination):
    """Files of line protocol in a folder."""

    kind: Literal["file"]
    directory: Path
    create: bool = True
    rotate_bytes: Count = 64 << 20
    rotate_s: Seconds = 3600
    compress: bool = True
    min_free_bytes: Annotated[int, Field(ge=0)] = 64 << 20


AnyDestination = Annotated[
    IngestDestination | InfluxDestination | FileDestination, Field(discriminator="kind")
]


class Status(_Table):
    """The gateway's own HTTP endpoint for people and probes."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: Port = 8421


class GatewaySettings(BaseSettings):
    """Everything the gateway can be told."""

    model_config = SettingsConfigDict(extra="forbid")

    gateway_id: Name = Field(description="this gateway's name upstream, unique among gateways, e.g. barn-1")
    spool: Spool = Field(description="a [spool] table with path")
    ingress: Ingress = Ingress()
    destinations: list[AnyDestination] = Field(default_factory=list)
    status: Status = Status()
    stop_within_s: Seconds = 20
    log_level: Literal["debug", "info", "warning", "error"] = "info"

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
    faults = _listen_faults(path, settings.ingress.listen)
    for position, subscribe in enumerate(settings.ingress.subscribe):
        if subscribe.password_file is not None:
            key = f"ingress.subscribe[{position}].password_file"
            faults += _secret_faults(path, key, subscribe.password_file)
    for position, destination in enumerate(settings.destinations):
        for key, value in _paths_of(destination):
            if key in ("token_file", "password_file"):
                faults += _secret_faults(path, f"destinations[{position}].{key}", value)
        if isinstance(destination, _HttpDestination):
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
        settings.ingress.listen,
        *settings.ingress.subscribe,
        *settings.destinations,
    ):
        for key, value in _paths_of(table):
            setattr(table, key, folder / value)
    return settings


def _paths_of(table: BaseModel) -> list[tuple[str, Path]]:
    values: list[tuple[str, Any]] = [(key, getattr(table, key)) for key in type(table).model_fields]
    return [(key, value) for key, value in values if isinstance(value, Path)]


def _listen_faults(source: Path, listen: Listen) -> list[Fault]:
    faults = []
    if listen.tls_files is not None:
        try:
            context_of(listen.tls_files)
        except TlsFault as fault:
            key = next((name for name, path in _paths_of(listen) if path == fault.path), "tls_cert_file")
            faults.append(Fault(str(source), f"ingress.listen.{key}", str(fault), ""))
    if listen.passwords_file is not None:
        try:
            credentials.read(listen.passwords_file)
        except credentials.CredentialsFault as fault:
            faults.append(Fault(str(source), "ingress.listen.passwords_file", str(fault), ""))
    return faults


def _tls_faults(source: Path, place: str, destination: _HttpDestination) -> list[Fault]:
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
