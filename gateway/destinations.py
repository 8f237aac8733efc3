"""From a destination's settings to its code, which is loaded where there is one of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.shipper import Shipper, Spool
from gateway import settings as given

if TYPE_CHECKING:
    from pathlib import Path

    from cloud_sync.destinations import Destination


def destination_of(d: given.AnyDestination) -> Destination:
    """The destination that `d` describes; its secrets are read now."""
    match d:
        case given.IngestDestination():
            from cloud_sync.destinations.ingest_client import IngestClient  # noqa: PLC0415 - see the module

            return IngestClient(
                d.name, d.url, _secret(d.token_file), timeout_s=d.timeout_s, options=d.http_options()
            )
        case given.InfluxDestination():
            from cloud_sync.destinations.influxdb import InfluxDestination  # noqa: PLC0415 - see the module

            options = d.http_options()
            return InfluxDestination(
                d.name,
                d.url,
                api=d.api,
                org=d.org or "",
                bucket=d.bucket or "",
                token=_secret(d.token_file),
                database=d.database or "",
                retention_policy=d.retention_policy or "",
                username=d.username or "",
                password=_secret(d.password_file),
                timeout_s=d.timeout_s,
                tls=options.tls,
                proxy=options.proxy,
            )
        case given.FileDestination():
            from cloud_sync.destinations.files import FileDestination  # noqa: PLC0415 - see the module

            return FileDestination(
                d.name,
                d.directory,
                form=d.format,
                compress=d.compress,
                create=d.create,
                rotate_bytes=d.rotate_bytes,
                rotate_s=d.rotate_s,
                min_free_bytes=d.min_free_bytes,
            )


def shipper_of(d: given.AnyDestination, spool: Spool) -> Shipper:
    """The shipper that serves the destination that `d` describes."""
    is_file = isinstance(d, given.FileDestination)
    return Shipper(
        spool,
        destination_of(d),
        kind=d.kind,
        concurrency=1 if isinstance(d, given.FileDestination) else d.concurrency,
        in_order=is_file,
        keeps_ledger=d.kind == "ingest",
        max_batch_rows=d.max_batch_rows,
        max_batch_bytes=d.max_batch_bytes,
        target_s=d.target_s,
        flush_s=d.flush_s,
        max_bytes_per_s=d.max_bytes_per_s,
        schedule=d.schedule,
        schedule_for=d.windows_for,
        urgent=d.urgent,
    )


def _secret(path: Path | None) -> str:
    return "" if path is None else given.secret_of(path)
