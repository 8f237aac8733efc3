"""Builds the status document: of a running gateway from its components, of a stopped one from its spool.

Rates and flash wear need samples over time, which `StatusCollector` takes while the gateway runs. It only
reads.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from contextlib import closing
from importlib.metadata import version
from typing import TYPE_CHECKING

from cloud_sync.model.records import RecordClass
from gateway.humanize import format_count
from gateway.query.series_chart import Chart, ChartSeries, ChartSteps, read_chart
from gateway.spool.database import SQL, file_size_bytes, open_read_only, require_all_tables, scalar_from_row
from gateway.spool.deliveries import read_backlog
from gateway.spool.errors import SpoolError
from gateway.spool.segment_reader import count_kept_rows
from gateway.spool.segments import read_commit_counter
from gateway.spool.series_catalog import read_all_series
from gateway.status.advice import build_advice
from gateway.status.document import (
    DestinationStatus,
    IngressStatus,
    LossesStatus,
    QuarantineStatus,
    SpoolStatus,
    Status,
    build_devices_status,
    build_running_status,
    read_losses_status,
    read_quarantine_status,
)
from gateway.status.samplers import FlashWear, RateHistory

if TYPE_CHECKING:
    from gateway.runtime import Runtime
    from gateway.settings.gateway_settings import GatewaySettings

_log = logging.getLogger(__name__)
_SAMPLE_INTERVAL_S = 5.0
_CACHE_S = 0.5
_RECORDS_CACHE_S = 5.0
_MIN_AVERAGE_SAMPLES = 15


class StatusCollector:
    """Of one gateway's parts. Many may ask for the document at once: it is made twice a second at most."""

    def __init__(self, parts: Runtime) -> None:
        self._parts = parts
        settings = parts.settings
        self._wear = FlashWear(settings.spool.path.parent, settings.spool.flash_endurance_tb)
        self._recent = RateHistory()
        self._turn = asyncio.Lock()
        self._document: Status | None = None
        self._document_built_s = float("-inf")
        self._quarantine = QuarantineStatus(0, 0, [])
        self._losses = LossesStatus(0, 0, [])
        self._records_read_s = float("-inf")

    async def run(self, stop: asyncio.Event) -> None:
        """Observe until `stop` is set."""
        while not stop.is_set():
            try:
                await self.sample_once(time.monotonic())
            except SpoolError as fault:
                _log.warning("the spool cannot be looked at: %s", fault)
            try:
                async with asyncio.timeout(_SAMPLE_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                continue

    async def sample_once(self, now_s: float) -> None:
        """Take the samples that are due; `now_s` is monotonic seconds."""
        self._wear.note(self._wear.look(self._parts.segments.appended_bytes, now_s))
        if self._recent.is_due(now_s):
            document = await build_running_status(self._parts)
            self._recent.note(
                document.ingress.readings_per_s,
                {d.name: d.backlog_readings for d in document.destinations},
                now_us=document.at_us,
                now_s=now_s,
            )

    async def status(self) -> Status:
        """The whole document.

        Raises:
            SpoolError: the spool cannot be read.
        """
        async with self._turn:
            now_s = time.monotonic()
            if self._document is None or now_s - self._document_built_s >= _CACHE_S:
                self._document = await self._made(now_s)
                self._document_built_s = now_s
            return self._document

    async def _made(self, now_s: float) -> Status:
        parts = self._parts
        recent = self._recent.status()
        rates = recent.readings_per_s
        document = await build_running_status(
            parts, average_per_s=sum(rates) / len(rates) if len(rates) >= _MIN_AVERAGE_SAMPLES else None
        )
        if now_s - self._records_read_s >= _RECORDS_CACHE_S:
            self._quarantine = await parts.database.read(read_quarantine_status)
            self._losses = await parts.database.read(read_losses_status)
            self._records_read_s = now_s
        document.recent = recent
        document.quarantine = self._quarantine
        document.losses = self._losses
        document.devices = build_devices_status(
            parts.appender.device_activity.last_received(parts.duplicates, document.at_us),
            document.at_us,
            parts.settings.status.silent_after_s,
        )
        document.wear = self._wear.status(self._wear.look(parts.segments.appended_bytes, now_s))
        document.remarks = build_advice(document)
        return document


_DAY_US = 86_400_000_000
_CHART_STEPS = 288


def build_stopped_status(settings: GatewaySettings) -> Status:
    """The same document as a running gateway's; what only a running one knows is zero or None.

    Raises:
        SpoolError: there is no spool, or it cannot be read.
    """
    now_us = time.time_ns() // 1000
    path = settings.spool.path
    size_bytes = file_size_bytes(path)
    with closing(open_read_only(path)) as connection:
        require_all_tables(connection)
        kept = count_kept_rows(connection)
        damaged = connection.execute(SQL["damaged_totals"]).fetchone()[1]
        quarantine, losses = read_quarantine_status(connection), read_losses_status(connection)
        commit, rows_ever = read_commit_counter(connection, RecordClass.READING)
        epoch = scalar_from_row(connection.execute(SQL["meta"], ("epoch",)).fetchone(), "")
        destinations = []
        for name, kind, _ in connection.execute(SQL["destinations"]).fetchall():
            backlog = read_backlog(connection, name, RecordClass.READING, commit)
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
    document.remarks = build_advice(document)
    return document


def read_stopped_chart(settings: GatewaySettings, series: str) -> Chart | None:
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
            for n, s in read_all_series(connection)
            if (s.sensor_id, s.sensor_type) == (sensor_id, sensor_type)
        ]
    if not states:
        return None
    name = ChartSeries(sensor_id, sensor_type, dict(states[-1][1].attributes).get("unit", ""))
    until_us = time.time_ns() // 1000
    steps = ChartSteps(until_us - _DAY_US, until_us, _CHART_STEPS)
    return read_chart(path, name, [number for number, _ in states], steps)


_ERROR_MAX_CHARS = 80


def format_service_status(parts: Runtime) -> str:
    """Where it listens, what comes in, whether it holds, and how each destination is doing."""
    listen, counters = parts.settings.ingress.listen, parts.committer.counters
    readings_per_s = format_count(counters.rate.per_s(time.monotonic()))
    said = [
        f"listening on {listen.host}:{parts.listener.port}",
        f"{readings_per_s} readings/s from {parts.listener.counters.connections_open} connections",
    ]
    if counters.holding_reason:
        said.insert(0, f"HOLDING: {counters.holding_reason}")
    for shipper in parts.shippers:
        error = shipper.counters.last_error[:_ERROR_MAX_CHARS]
        said.append(f"{shipper.name} {shipper.counters.state}" + (f" ({error})" if error else ""))
    return "; ".join(said)
