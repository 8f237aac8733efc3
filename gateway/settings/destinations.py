"""`[[destinations]]`: one table for each upstream, by kind."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cloud_sync.delivery.lanes import Schedule, find_time_zone, parse_window
from cloud_sync.destinations.file import parquet
from cloud_sync.destinations.http_client import HttpOptions, build_client_tls_context
from cloud_sync.model.records import RecordClass
from gateway.settings.schema import Count, HttpUrl, Name, Seconds, Table, unencrypted_secret_error
from gateway.spool.deliveries import FROM_NOW_ON

RecordClassName = Literal["alerts", "rollups", "readings"]
_RECORD_CLASSES = {
    "alerts": RecordClass.ALERT,
    "rollups": RecordClass.ROLLUP,
    "readings": RecordClass.READING,
}


def _validate_start(text: str) -> str:
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


def _validate_window(text: str) -> str:
    parse_window(text)
    return text


def _validate_time_zone(name: str) -> str:
    find_time_zone(name)
    return name


def _validate_record_classes(names: list[RecordClassName]) -> list[RecordClassName]:
    if not names:
        raise ValueError('must name at least one of "alerts", "rollups", "readings"')
    return names


RecordClassNames = Annotated[list[RecordClassName], AfterValidator(_validate_record_classes)]


class Destination(Table):
    """What every kind of destination has."""

    name: Name = Field(examples=["regional"])
    """What it is called here. Its progress is kept under this name."""
    start: Annotated[str, AfterValidator(_validate_start)] = "oldest"
    """What a destination gets that is new here: "oldest" for everything in the spool, "now" for nothing of
    it, or a time with its offset, such as "2026-05-01T12:00:00Z".
    """
    max_batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    """Readings sent at once, at most."""
    max_batch_bytes: Annotated[int, Field(ge=4096)] = 4 << 20
    """Bytes of one batch on the link, at most."""
    target_s: Seconds = 0.5
    """How long one request of backlog should take: batches are sized by it."""
    flush_s: Annotated[float, Field(ge=0)] = 0.8
    """How long readings may wait for company."""
    timeout_s: Seconds = 30
    """How long one answer may take."""
    max_bytes_per_s: Count | None = Field(default=None, examples=[100_000])
    """Budget of the link, all requests together; live readings go first. Without it there is no limit."""
    windows: list[Annotated[str, AfterValidator(_validate_window)]] = []  # noqa: RUF012 - pydantic copies defaults
    """When to send, in local time of time_zone: "Mon-Fri 22:00-06:00", "Sat,Sun 00:00-24:00", "12:30-13:30".
    Without any: always.
    """
    windows_for: Literal["backfill", "everything"] = "backfill"
    """What waits for a window: "backfill", that is everything but the newest, or "everything"."""
    time_zone: Annotated[str, AfterValidator(_validate_time_zone)] = "UTC"
    """The IANA name of the zone that windows are in."""
    urgent: bool = True
    """Whether an alert is sent at once, without waiting for a window or the budget of the link."""
    send: RecordClassNames = ["alerts", "rollups", "readings"]  # noqa: RUF012 - pydantic copies defaults
    """What it is sent; what was given up is declared to every destination."""

    @property
    def since_us(self) -> int | None:
        """From when on a destination that is new gets what was committed; None for everything."""
        if self.start in ("oldest", "now"):
            return None if self.start == "oldest" else FROM_NOW_ON
        return round(datetime.fromisoformat(self.start).timestamp() * 1_000_000)

    @property
    def classes(self) -> frozenset[RecordClass]:
        """What it is sent; what was given up is declared to all."""
        return frozenset({RecordClass.DECLARATION, *(_RECORD_CLASSES[name] for name in self.send)})

    @property
    def schedule(self) -> Schedule:
        """When it may be sent to."""
        return Schedule.parse(self.windows, self.time_zone)


class HttpDestination(Destination):
    """What those over HTTP have besides."""

    url: HttpUrl = Field(examples=["https://region.example:8420"])
    """Its http:// or https:// address."""
    concurrency: Annotated[int, Field(ge=1, le=16)] = 2
    """Requests at a time: one for what is newest, the others for the backlog."""
    ca_file: Path | None = Field(default=None, examples=["region-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    cert_file: Path | None = Field(default=None, examples=["gateway.pem"])
    """PEM: this gateway's certificate, which tells the destination who it is."""
    key_file: Path | None = Field(default=None, examples=["gateway.key"])
    """PEM: the key of cert_file, without a password."""
    proxy: HttpUrl | None = Field(default=None, examples=["http://proxy.example:3128"])
    """An http:// or https:// proxy. Variables of the environment are not asked."""
    allow_plain: bool = False
    """Whether a token or password may go to another machine without TLS: only where something else
    encrypts.
    """

    @model_validator(mode="after")
    def _identified(self) -> Self:
        if self.key_file is not None and self.cert_file is None:
            raise ValueError("key_file needs cert_file")
        if not self.url.startswith("https:") and (self.ca_file or self.cert_file):
            raise ValueError("ca_file and cert_file need an https:// address")
        if self.secret_file is not None and not self.allow_plain:
            fault = unencrypted_secret_error(f"the secret in {self.secret_file.name}", self.url, "https://")
            if fault:
                raise ValueError(fault)
        return self

    @property
    def secret_file(self) -> Path | None:
        """The token or password that it is shown; None for none."""
        return None

    def http_options(self) -> HttpOptions:
        """How to reach it; the files are read now.

        Raises:
            OSError: one of them cannot be used.
        """
        tls = None
        if self.ca_file is not None or self.cert_file is not None:
            tls = build_client_tls_context(self.ca_file, self.cert_file, self.key_file)
        return HttpOptions(tls, self.proxy or "", connections=self.concurrency + 1)


class IngestDestination(HttpDestination):
    """A Tidegate ingest service."""

    kind: Literal["ingest"]
    """A Tidegate ingest service, in front of TimescaleDB or PostgreSQL."""
    token_file: Path | None = Field(default=None, examples=["regional.token"])
    """A file whose first line is the token that `tidegate ingest token add` printed. A service that takes
    client certificates needs none.
    """

    @model_validator(mode="after")
    def _require_credentials(self) -> Self:
        if self.token_file is None and self.cert_file is None:
            raise ValueError(
                "token_file is missing: the service gives a token, or takes a client certificate"
            )
        return self

    @property
    def secret_file(self) -> Path | None:
        """The token."""
        return self.token_file


class InfluxDestination(HttpDestination):
    """An InfluxDB, or what speaks its write protocol."""

    kind: Literal["influxdb"]
    """An InfluxDB, or what speaks its write protocol."""
    api: Literal["v1", "v2"] = "v2"
    """ "v2" for InfluxDB 2 and 3, "v1" for InfluxDB 1."""
    org: str | None = Field(default=None, examples=["farm"])
    """The organisation (v2)."""
    bucket: str | None = Field(default=None, examples=["sensors"])
    """The bucket (v2)."""
    token_file: Path | None = Field(default=None, examples=["cloud.token"])
    """A file whose first line is the token (v2)."""
    database: str | None = Field(default=None, examples=["sensors"])
    """The database (v1)."""
    retention_policy: str | None = Field(default=None, examples=["autogen"])
    """The retention policy (v1); the database's default without it."""
    username: str | None = Field(default=None, examples=["tidegate"])
    """The user's name (v1), where it asks for one."""
    password_file: Path | None = Field(default=None, examples=["cloud.password"])
    """A file whose first line is the user's password (v1)."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needed = {"v2": ("bucket",), "v1": ("database",)}[self.api]
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f'api = "{self.api}" needs {" and ".join(missing)}')
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file go together")
        return self

    @property
    def secret_file(self) -> Path | None:
        """The token, or the password."""
        return self.token_file or self.password_file


class FileDestination(Destination):
    """Files of line protocol in a folder."""

    kind: Literal["file"]
    """Files of line protocol or Parquet in a folder, for data that leaves on a stick."""
    directory: Path = Field(examples=["/media/stick/readings"])
    """The folder to write to."""
    create: bool = True
    """Whether to make the folder. With false a stick that is not mounted is waited for."""
    rotate_bytes: Count = 64 << 20
    """A file gets its final name at this size."""
    rotate_s: Seconds = 3600
    """A file gets its final name when its first reading is so old."""
    format: Literal["line_protocol", "parquet"] = "line_protocol"
    """What the files hold: "line_protocol", or "parquet", which needs tidegate[parquet]."""
    compress: bool = True
    """Whether to write gzip; Parquet is always compressed."""
    min_free_bytes: Annotated[int, Field(ge=0)] = 64 << 20
    """What of the disk stays free for others."""
    send: RecordClassNames = ["readings"]  # noqa: RUF012 - as above
    """What it is sent: files hold readings."""

    @model_validator(mode="after")
    def _holds(self) -> Self:
        if self.format == "parquet" and not parquet.is_available():
            raise ValueError('format = "parquet" needs pyarrow: install tidegate[parquet]')
        if self.send != ["readings"]:
            raise ValueError('send: files hold readings; only ["readings"] is possible')
        return self

    @property
    def classes(self) -> frozenset[RecordClass]:
        """Files hold readings."""
        return frozenset({RecordClass.READING})


AnyDestination = Annotated[
    IngestDestination | InfluxDestination | FileDestination, Field(discriminator="kind")
]
