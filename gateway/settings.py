"""Settings of the gateway: `config/gateway.toml` shows every key with its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloud_sync import settings_file
from cloud_sync.settings_file import Fault, SettingsFault
from gateway.ingress.topics import TopicTemplate

ENV_PREFIX = "TIDEGATE_"

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

    @field_validator("topic")
    @classmethod
    def _is_template(cls, topic: str) -> str:
        TopicTemplate(topic)
        return topic


class Host(_Table):
    """The gateway's own metrics as readings."""

    enabled: bool = True
    period_s: Annotated[float, Field(ge=0.1)] = 10


class Ingress(_Table):
    """How readings enter."""

    listen: Listen = Listen()
    host: Host = Host()


class _Destination(_Table):
    name: Name
    max_batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    flush_s: Annotated[float, Field(ge=0)] = 1
    timeout_s: Seconds = 30


class IngestDestination(_Destination):
    """A Tidegate ingest service."""

    kind: Literal["ingest"]
    url: HttpUrl
    token_file: Path


class InfluxDestination(_Destination):
    """An InfluxDB, or what speaks its write protocol."""

    kind: Literal["influxdb"]
    url: HttpUrl
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
        SettingsFault: with every fault, missing secret files included.
    """
    settings = settings_file.load(GatewaySettings, path, ENV_PREFIX)
    folder = path.absolute().parent
    settings.spool.path = folder / settings.spool.path
    faults = []
    for position, destination in enumerate(settings.destinations):
        for key in type(destination).model_fields:
            value: Any = getattr(destination, key)
            if not isinstance(value, Path):
                continue
            setattr(destination, key, folder / value)
            if key.endswith("_file"):
                faults += _secret_faults(path, f"destinations[{position}].{key}", folder / value)
    if faults:
        raise SettingsFault(faults)
    return settings


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
