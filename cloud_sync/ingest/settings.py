"""Settings of the ingest service: `config/ingest.toml` shows every key with its default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from cloud_sync.runtime import settings_file
from cloud_sync.runtime.secret_files import find_credential, read_secret
from cloud_sync.runtime.settings_file import Fault, InvalidSettingsError

ENV_PREFIX = "TIDEGATE_INGEST_"

Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class _Table(BaseModel):
    """A table of the file. Unknown keys are faults."""

    model_config = ConfigDict(extra="forbid")


class Listen(_Table):
    """The address to listen on."""

    host: str = "127.0.0.1"
    port: Port = 8420


class Tls(_Table):
    """TLS of the service itself; without it a proxy in front should do TLS."""

    cert_file: Path = Field(description="the service's certificate, PEM, with its chain")
    key_file: Path = Field(description="the certificate's key, PEM")
    client_ca_file: Path | None = None
    client_certificates: Literal["optional", "required"] = "optional"

    @model_validator(mode="after")
    def _ca_for_clients(self) -> Self:
        if self.client_certificates == "required" and self.client_ca_file is None:
            raise ValueError('client_certificates = "required" needs client_ca_file')
        return self


class Database(_Table):
    """The PostgreSQL or TimescaleDB that batches are applied to."""

    dsn: SecretStr | None = Field(
        None, description="a PostgreSQL URL, e.g. postgresql://tidegate@db/tidegate"
    )
    dsn_file: Path | None = Field(None, description="a file whose first line is the URL")
    pool_size: Annotated[int, Field(ge=1, le=64)] = 4
    statement_timeout_s: Seconds = 60
    chunk_hours: Positive = 24
    compress_after_days: Positive | None = 7
    retention_days: Positive | None = None
    rollup_retention_days: dict[Annotated[int, Field(ge=1)], Positive] = Field(
        {}, description="days to keep rollups of a window, by its length in seconds; others are kept"
    )
    merge_ledger_after_days: Positive | None = 7

    @model_validator(mode="after")
    def _one_dsn(self) -> Self:
        if (self.dsn is None) == (self.dsn_file is None):
            raise ValueError("exactly one of dsn and dsn_file is needed")
        return self


class Limits(_Table):
    """`max_rows` of a wire batch; the others are those of `RequestLimits`."""

    max_body_bytes: Positive = 32 << 20
    max_plain_bytes: Positive = 32 << 20
    max_plain_rows: Positive = 100_000
    max_rows: Positive = 1_000_000
    max_requests: Positive = 64
    max_requests_each: Positive = 8
    max_buffered_bytes: Positive = 256 << 20
    body_idle_s: Seconds = 30
    retry_after_s: Positive = 5


class IngestSettings(BaseSettings):
    """The whole file."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix=ENV_PREFIX)

    tokens_file: Path = Field(description="the file that `tidegate ingest token add` writes")
    listen: Listen = Listen()
    tls: Tls | None = None
    database: Database = Field(description="a [database] table with dsn or dsn_file")
    limits: Limits = Limits()
    stop_within_s: Seconds = 25
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "text", "json"] = "auto"


def load_settings(path: Path) -> IngestSettings:
    """Settings from a file and the environment; paths in it are relative to the file's own folder."""
    settings = settings_file.load_settings(IngestSettings, path, ENV_PREFIX)
    settings.tokens_file = path.parent / settings.tokens_file
    if settings.database.dsn_file is not None:
        settings.database.dsn_file = find_credential(path.parent / settings.database.dsn_file)
    if settings.tls is not None:
        for key, file in settings.tls:
            if isinstance(file, Path):
                setattr(settings.tls, key, path.parent / file)
    return settings


def read_dsn(settings: IngestSettings, path: Path) -> str:
    """The database URL, read from its file where one is named."""
    database = settings.database
    key = "database.dsn" if database.dsn is not None else "database.dsn_file"
    if database.dsn_file is None:
        dsn = "" if database.dsn is None else database.dsn.get_secret_value()
    else:
        try:
            dsn = read_secret(database.dsn_file)
        except (OSError, UnicodeDecodeError) as fault:
            reason = f"{database.dsn_file} cannot be read: {getattr(fault, 'strerror', fault)}"
            raise InvalidSettingsError([Fault(str(path), key, reason, "")]) from fault
    if not dsn.startswith(("postgresql://", "postgres://")):
        raise InvalidSettingsError(
            [Fault(str(path), key, "is no PostgreSQL URL", "postgresql://USER@HOST/DATABASE")]
        )
    return dsn
