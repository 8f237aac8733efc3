"""`[[destinations]]`: one table for each upstream, by kind."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cloud_sync.destinations.http_client import HttpOptions, tls_context
from cloud_sync.schedule import Schedule, window_of, zone_of
from gateway.settings.tables import Count, HttpUrl, Name, Seconds, Table
from gateway.spool.deliveries import FROM_NOW


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


class Destination(Table):
    """What every kind of destination has."""

    name: Name
    start: Annotated[str, AfterValidator(_start)] = "oldest"
    max_batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    max_batch_bytes: Annotated[int, Field(ge=4096)] = 4 << 20
    target_s: Seconds = 1
    flush_s: Annotated[float, Field(ge=0)] = 0.8
    timeout_s: Seconds = 30
    max_bytes_per_s: Count | None = None
    windows: list[Annotated[str, AfterValidator(_window)]] = []  # noqa: RUF012 - pydantic copies defaults
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


class HttpDestination(Destination):
    """What those over HTTP have besides."""

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


class IngestDestination(HttpDestination):
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


class InfluxDestination(HttpDestination):
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


class FileDestination(Destination):
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
