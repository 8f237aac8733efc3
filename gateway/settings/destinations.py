"""`[[destinations]]`: one table for each upstream, by kind. `AnyDestination` is the registry of kinds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from cloud_sync.delivery.batch_sender import DeliveryOptions, DeliveryState
from cloud_sync.delivery.lanes import Schedule, parse_window
from cloud_sync.delivery.shipper import Shipper
from cloud_sync.destinations import parquet
from cloud_sync.destinations.file import FileDestination as FileWriter
from cloud_sync.destinations.file import FileOptions
from cloud_sync.destinations.http_client import HttpOptions, build_client_tls_context
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.secret_files import read_secret
from gateway.settings.schema import (
    CertificateFile,
    Count,
    CountOrZero,
    DataPath,
    FileFault,
    HttpUrl,
    KeyFile,
    Name,
    Seconds,
    SecretFile,
    Table,
    TimeZone,
    check_client_tls,
    find_duplicates,
    parse_timestamp,
    parseable_by,
    unencrypted_secret_error,
)
from gateway.spool.deliveries import FROM_NOW_ON

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cloud_sync.delivery.batch_sender import Spool
    from cloud_sync.destinations import Destination as DestinationPort

_RECORD_CLASSES = {
    "alerts": RecordClass.ALERT,
    "rollups": RecordClass.ROLLUP,
    "readings": RecordClass.READING,
}


def _validate_start(text: str) -> str:
    if text not in ("oldest", "now"):
        try:
            parse_timestamp(text)
        except ValueError as fault:
            raise ValueError(str(fault).replace("must be", 'must be "oldest", "now", or')) from None
    return text


RecordClassNames = Annotated[list[Literal["alerts", "rollups", "readings"]], Field(min_length=1)]


class Destination(Table):
    """What every kind of destination has."""

    if TYPE_CHECKING:
        kind: str

    name: Name = Field(examples=["regional"])
    """Its name here. Its progress is kept under this name."""
    start: Annotated[str, AfterValidator(_validate_start)] = "oldest"
    """Where a new destination starts: "oldest" sends everything in the spool, "now" nothing of it, a time
    with its offset, such as "2026-05-01T12:00:00Z", what was stored from then on.
    """
    max_batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 50_000
    """The largest batch, in readings."""
    max_batch_bytes: Annotated[int, Field(ge=4096)] = 4 << 20
    """The largest batch, in bytes on the network."""
    target_s: Seconds = 0.5
    """How long one request of backlog should take; batches are sized by it."""
    flush_s: Annotated[float, Field(ge=0)] = 0.8
    """How long to wait to fill a batch."""
    timeout_s: Seconds = 30
    """How long to wait for one answer."""
    max_bytes_per_s: Count | None = Field(default=None, examples=[100_000])
    """The limit of all requests together; live readings go first. Default: no limit."""
    windows: list[Annotated[str, parseable_by(parse_window)]] = Field(default=[])
    """When to send, in local time of time_zone: "Mon-Fri 22:00-06:00", "Sat,Sun 00:00-24:00", "12:30-13:30".
    Default: always.
    """
    windows_for: Literal["backfill", "everything"] = "backfill"
    """What waits for a window: "backfill", that is everything but the newest, or "everything"."""
    time_zone: TimeZone = "UTC"
    """The IANA name of the time zone of windows."""
    urgent: bool = True
    """Whether alerts are sent at once, regardless of windows and max_bytes_per_s."""
    send: RecordClassNames = Field(default=["alerts", "rollups", "readings"])
    """What is sent. Losses are declared to every destination."""

    @property
    def since_us(self) -> int | None:
        """From when on a new destination gets what was stored; None for everything."""
        if self.start in ("oldest", "now"):
            return None if self.start == "oldest" else FROM_NOW_ON
        return round(parse_timestamp(self.start).timestamp() * 1e6)

    @property
    def classes(self) -> frozenset[RecordClass]:
        """The classes of records that are sent."""
        return frozenset({RecordClass.DECLARATION, *(_RECORD_CLASSES[name] for name in self.send)})

    def delivery_options(self) -> DeliveryOptions:
        """How the destination is served."""
        return DeliveryOptions(
            kind=self.kind,
            max_batch_rows=self.max_batch_rows,
            max_batch_bytes=self.max_batch_bytes,
            target_s=self.target_s,
            flush_s=self.flush_s,
            max_bytes_per_s=self.max_bytes_per_s,
            schedule=Schedule.parse(self.windows, self.time_zone),
            schedule_for=self.windows_for,
            urgent=self.urgent,
        )

    def build_destination(self) -> DestinationPort:
        """The destination; its files are read now, OSError if one cannot be used."""
        raise NotImplementedError

    def build_shipper(self, spool: Spool) -> Shipper:
        """The shipper that serves the destination; as `build_destination`."""
        return Shipper(DeliveryState(spool, self.build_destination(), self.delivery_options()))


class HttpDestination(Destination):
    """What destinations over HTTP have besides."""

    url: HttpUrl = Field(examples=["https://region.example:8420"])
    """Its http:// or https:// address."""
    concurrency: Annotated[int, Field(ge=1, le=16)] = 2
    """Parallel requests: one for live readings, the others for the backlog."""
    ca_file: CertificateFile | None = Field(default=None, examples=["region-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    cert_file: CertificateFile | None = Field(default=None, examples=["gateway.pem"])
    """PEM: this gateway's certificate, which identifies it."""
    key_file: KeyFile | None = Field(default=None, examples=["gateway.key"])
    """PEM: the key of cert_file, without a password."""
    proxy: HttpUrl | None = Field(default=None, examples=["http://proxy.example:3128"])
    """An http:// or https:// proxy. Environment variables for proxies are ignored."""
    allow_plain: bool = False
    """Whether to send a token or password to another machine without TLS: only where something else encrypts.
    """

    @model_validator(mode="after")
    def _validate_tls(self) -> Self:
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
        """The file of the token or password; None for none."""
        return None

    def check_files(self) -> Iterator[FileFault]:
        """Whether secrets and TLS files can be used."""
        yield from super().check_files()
        yield from check_client_tls(self.ca_file, self.cert_file, self.key_file)

    def delivery_options(self) -> DeliveryOptions:
        """How the destination is served."""
        return replace(super().delivery_options(), concurrency=self.concurrency)

    def http_options(self) -> HttpOptions:
        """How to connect; the files are read now, OSError if one cannot be used."""
        tls = None
        if self.ca_file is not None or self.cert_file is not None:
            tls = build_client_tls_context(self.ca_file, self.cert_file, self.key_file)
        return HttpOptions(tls, self.proxy or "", connections=self.concurrency + 1)


class IngestDestination(HttpDestination):
    """A Tidegate ingest service."""

    kind: Literal["ingest"]
    """A Tidegate ingest service, in front of TimescaleDB or PostgreSQL."""
    token_file: SecretFile | None = Field(default=None, examples=["regional.token"])
    """A file whose first line is the token that `tidegate ingest token add` printed. Not needed with a client
    certificate.
    """

    @model_validator(mode="after")
    def _require_credentials(self) -> Self:
        if self.token_file is None and self.cert_file is None:
            raise ValueError("token_file is missing: the service needs a token or a client certificate")
        return self

    @property
    def secret_file(self) -> Path | None:
        """The token."""
        return self.token_file

    def delivery_options(self) -> DeliveryOptions:
        """How the destination is served."""
        return replace(super().delivery_options(), keeps_ledger=True)

    def build_destination(self) -> DestinationPort:
        """The client of the service."""
        from cloud_sync.destinations.ingest_client import IngestClient  # noqa: PLC0415 - brings httpx

        token = read_secret(self.token_file)
        return IngestClient(self.name, self.url, token, timeout_s=self.timeout_s, options=self.http_options())


class InfluxDestination(HttpDestination):
    """An InfluxDB, or a server that speaks its write protocol."""

    kind: Literal["influxdb"]
    """An InfluxDB, or a server that speaks its write protocol."""
    api: Literal["v1", "v2"] = "v2"
    """"v2" for InfluxDB 2 and 3, "v1" for InfluxDB 1."""
    org: str | None = Field(default=None, examples=["farm"])
    """The organisation (v2)."""
    bucket: str | None = Field(default=None, examples=["sensors"])
    """The bucket (v2)."""
    token_file: SecretFile | None = Field(default=None, examples=["cloud.token"])
    """A file whose first line is the token (v2)."""
    database: str | None = Field(default=None, examples=["sensors"])
    """The database (v1)."""
    retention_policy: str | None = Field(default=None, examples=["autogen"])
    """The retention policy (v1). Default: the database's own."""
    username: str | None = Field(default=None, examples=["tidegate"])
    """The user's name (v1), if the server needs one."""
    password_file: SecretFile | None = Field(default=None, examples=["cloud.password"])
    """A file whose first line is the user's password (v1)."""

    @model_validator(mode="after")
    def _validate_api(self) -> Self:
        needed = {"v2": "bucket", "v1": "database"}[self.api]
        if getattr(self, needed) is None:
            raise ValueError(f'api = "{self.api}" needs {needed}')
        self.require_together("username", "password_file")
        return self

    @property
    def secret_file(self) -> Path | None:
        """The token, or the password."""
        return self.token_file or self.password_file

    def build_destination(self) -> DestinationPort:
        """The client of the server."""
        from cloud_sync.destinations import influxdb  # noqa: PLC0415 - brings httpx

        options = influxdb.InfluxOptions(
            self.url,
            api=self.api,
            org=self.org or "",
            bucket=self.bucket or "",
            token=read_secret(self.token_file),
            database=self.database or "",
            retention_policy=self.retention_policy or "",
            username=self.username or "",
            password=read_secret(self.password_file),
            timeout_s=self.timeout_s,
            http=self.http_options(),
        )
        return influxdb.InfluxDestination(self.name, options)


class FileDestination(Destination):
    """Files in a folder."""

    kind: Literal["file"]
    """Files of line protocol or Parquet in a folder, such as on a USB stick."""
    directory: DataPath = Field(examples=["/media/stick/readings"])
    """The folder to write to."""
    create: bool = True
    """Whether to make the folder. With false, delivery waits until a stick is mounted."""
    rotate_bytes: Count = 64 << 20
    """A file gets its final name at this size."""
    rotate_s: Seconds = 3600
    """A file gets its final name when its first reading is so old."""
    format: Literal["line_protocol", "parquet"] = "line_protocol"
    """The format of the files: "line_protocol", or "parquet", which needs tidegate[parquet]."""
    compress: bool = True
    """Whether to write gzip; Parquet is always compressed."""
    min_free_bytes: CountOrZero = 64 << 20
    """Space on the disk that stays free for others."""
    send: RecordClassNames = Field(default=["readings"])
    """What is sent: files hold readings only."""

    @model_validator(mode="after")
    def _validate_contents(self) -> Self:
        if self.format == "parquet" and not parquet.is_available():
            raise ValueError('format = "parquet" needs pyarrow: install tidegate[parquet]')
        if self.send != ["readings"]:
            raise ValueError('send: files hold readings; only ["readings"] is possible')
        return self

    @property
    def classes(self) -> frozenset[RecordClass]:
        """Files hold readings."""
        return frozenset({RecordClass.READING})

    def delivery_options(self) -> DeliveryOptions:
        """How the destination is served."""
        return replace(super().delivery_options(), concurrency=1, in_order=True)

    def build_destination(self) -> DestinationPort:
        """The writer of the files."""
        options = FileOptions(
            form=self.format,
            compress=self.compress,
            create=self.create,
            rotate_bytes=self.rotate_bytes,
            rotate_s=self.rotate_s,
            min_free_bytes=self.min_free_bytes,
        )
        return FileWriter(self.name, self.directory, options)


AnyDestination = Annotated[
    IngestDestination | InfluxDestination | FileDestination, Field(discriminator="kind")
]


def require_distinct_names(destinations: list[AnyDestination]) -> list[AnyDestination]:
    """The destinations; ValueError if two have the same name."""
    if twice := find_duplicates([d.name for d in destinations]):
        raise ValueError(f"two destinations are called {twice}; each needs a name of its own")
    return destinations
