"""The status of a gateway that is not running, read from its spool without changing it."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from importlib.metadata import version
from typing import TYPE_CHECKING

from cloud_sync.records import RecordClass
from gateway.operate.losses_summary import losses_of
from gateway.operate.quarantine_summary import quarantine_of
from gateway.operate.remarks import remarks_of
from gateway.operate.series_chart import Chart, SeriesName, Steps, chart_of
from gateway.operate.spool_walk import kept_rows
from gateway.operate.status import DestinationStatus, IngressStatus, SpoolStatus, Status
from gateway.spool.database import SQL, file_size_bytes, open_read_only, require_all_tables, value_of
from gateway.spool.deliveries import backlog_of
from gateway.spool.segments import newest_of
from gateway.spool.series import all_series

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings

_DAY_US = 86_400_000_000
_STEPS = 288


def status_of_stopped(settings: GatewaySettings) -> Status:
    """The same document as a running gateway's; what only a running one knows is zero or None.

    Raises:
        SpoolError: there is no spool, or it cannot be read.
    """
    now_us = time.time_ns() // 1000
    path = settings.spool.path
    size_bytes = file_size_bytes(path)
    with closing(open_read_only(path)) as connection:
        require_all_tables(connection)
        kept = kept_rows(connection)
        damaged = connection.execute(SQL["damaged_totals"]).fetchone()[1]
        quarantine, losses = quarantine_of(connection), losses_of(connection)
        commit, rows_ever = newest_of(connection, RecordClass.READING)
        epoch = value_of(connection.execute(SQL["meta"], ("epoch",)).fetchone(), "")
        destinations = []
        for name, kind, _ in connection.execute(SQL["destinations"]).fetchall():
            backlog = backlog_of(connection, name, RecordClass.READING, commit)
            oldest_us = backlog.oldest_written_at_us
            destinations.append(
                DestinationStatus(
                    name=name,
                    kind=kind,
                    state="stopped",
                    last_error="",
                    delivered=rows_ever - backlog.readings,
                    delivered_per_s=0.0,
                    duplicates=0,
                    conflicts=0,
                    wire_bytes=0,
                    last_receipt_at_us=None,
                    backlog_readings=backlog.readings,
                    backlog_bytes=round(backlog.readings * size_bytes / kept) if kept else 0,
                    backlog_oldest_s=None if oldest_us is None else max(0.0, (now_us - oldest_us) / 1e6),
                    drain_s=0.0 if backlog.readings == 0 else None,
                )
            )
    document = Status(
        gateway_id=settings.gateway_id,
        version=version("tidegate"),
        running=False,
        at_us=now_us,
        uptime_s=0.0,
        ingress=IngressStatus(0, 0, 0, 0, 0.0, 0, 0, None, ""),
        spool=SpoolStatus(
            path=str(path),
            epoch=epoch,
            readings_ever=rows_ever,
            newest_commit=commit,
            size_bytes=size_bytes,
            free_bytes=shutil.disk_usage(path.parent).free,
            room_days=None,
            readings_kept=kept,
            damaged_readings=damaged,
        ),
        destinations=destinations,
        quarantine=quarantine,
        losses=losses,
    )
    document.remarks = remarks_of(document)
    return document


def chart_of_stopped(settings: GatewaySettings, series: str) -> Chart | None:
    """The last day of a series SENSOR/TYPE; None when the spool does not know it.

    Raises:
        SpoolError: there is no spool, or it cannot be read.
    """
    path = settings.spool.path
    sensor_id, _, sensor_type = series.partition("/")
    with closing(open_read_only(path)) as connection:
        require_all_tables(connection)
        states = [
            (n, s)
            for n, s in all_series(connection)
            if (s.sensor_id, s.sensor_type) == (sensor_id, sensor_type)
        ]
    if not states:
        return None
    name = SeriesName(sensor_id, sensor_type, dict(states[-1][1].attributes).get("unit", ""))
    until_us = time.time_ns() // 1000
    steps = Steps(until_us - _DAY_US, until_us, _STEPS)
    return chart_of(path, name, [number for number, _ in states], steps)
