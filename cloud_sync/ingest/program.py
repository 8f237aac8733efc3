"""The ingest service as a program: the only place that knows every part of it. Build, run, maintain, stop."""

from __future__ import annotations

import asyncio
import logging
import random
import signal
import ssl
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import uvicorn

from cloud_sync.codec.wire import WireLimits
from cloud_sync.http.auth import ClientCertificateProtocol, RequestAuthenticator
from cloud_sync.http.requests import RequestAdmission, RequestLimits
from cloud_sync.http.tokens import TokenFile
from cloud_sync.http.uvicorn_server import CannotStartError, UvicornServer, bind_http_sockets
from cloud_sync.ingest import settings as settings_of_ingest
from cloud_sync.ingest.app import IngestApp, IngestMetrics, build_app
from cloud_sync.ingest.apply_queue import ApplyQueue
from cloud_sync.model.errors import DeliveryError
from cloud_sync.runtime import logs
from cloud_sync.runtime.watchdog import Watchdog, watchdog_period_s
from cloud_sync.runtime.watched_file import CertReloader
from cloud_sync.timescale.ledger import delete_old_answers
from cloud_sync.timescale.row_store import delete_old_rollups
from cloud_sync.timescale.schema import SchemaTooNewError, TimescalePolicies
from cloud_sync.timescale.sink import TimescaleSink

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from cloud_sync.ingest.settings import Database, IngestSettings, Limits, Tls

_log = logging.getLogger(__name__)
_MAINTENANCE_PERIOD_S = 3600.0


async def run_maintenance(sink: TimescaleSink, database: Database) -> None:
    """Tidy every hour, at a moment of each replica's own; a fault waits for the next time."""
    while True:
        await asyncio.sleep(_MAINTENANCE_PERIOD_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads replicas, keeps no secret
        try:
            await maintain_once(sink, database)
        except DeliveryError as fault:
            _log.warning("tidying is put off: %s", fault)


async def maintain_once(sink: TimescaleSink, database: Database) -> None:
    """Merge the ledger's old entries, drop old answers and rollups."""
    if database.merge_ledger_after_days is not None:
        await sink.merge_ledger(timedelta(days=database.merge_ledger_after_days))
    await sink.transact(delete_old_answers)
    for window_s, days in database.rollup_retention_days.items():
        await sink.transact(partial(delete_old_rollups, window_s=window_s, older_than=timedelta(days=days)))


_MIN_PREPARE_WAIT_S = 0.5
_MAX_PREPARE_WAIT_S = 15.0
_KEEP_ALIVE_S = 75


def build_sink(database: Database, dsn: str) -> TimescaleSink:
    """The sink of a configuration."""
    days = (
        None if d is None else timedelta(days=d)
        for d in (database.compress_after_days, database.retention_days)
    )
    return TimescaleSink(
        dsn,
        name="region",
        pool_size=database.pool_size,
        statement_timeout_s=database.statement_timeout_s,
        policies=TimescalePolicies(timedelta(hours=database.chunk_hours), *days),
    )


async def run_service(path: Path) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests accepted.

    Raises:
        SettingsFault, TokensFault, CannotStartError: one message each, for a person.
    """
    settings = settings_of_ingest.load_settings(path)
    logs.configure_logging(settings.log_level, settings.log_format)
    tokens = TokenFile(settings.tokens_file)
    if not len(tokens):
        _log.warning("%s has no token: every batch will be refused", settings.tokens_file)
    sink = build_sink(settings.database, settings_of_ingest.read_dsn(settings, path))
    bound = bind_http_sockets(settings.listen.host, settings.listen.port)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    try:
        await serve(settings, sink, tokens, bound, stop)
    finally:
        await sink.aclose()


async def serve(
    settings: IngestSettings,
    sink: TimescaleSink,
    tokens: TokenFile,
    bound: list[socket.socket],
    stop: asyncio.Event,
) -> None:
    """Serve on a bound socket until `stop` is set. The line it prints when ready names the address."""
    intake = RequestAdmission(_build_request_limits(settings.limits))
    turns = ApplyQueue(settings.database.pool_size)
    parts = IngestApp(
        sink=sink,
        callers=RequestAuthenticator(tokens),
        intake=intake,
        turns=turns,
        limits=WireLimits(max_rows=settings.limits.max_rows),
        metrics=IngestMetrics(intake, turns),
    )
    context = None if settings.tls is None else _build_cert_reloader(settings.tls).context
    config = uvicorn.Config(
        build_app(parts),
        http=ClientCertificateProtocol,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(settings.stop_within_s)),
    )
    server = UvicornServer(config)
    watchdog = Watchdog(
        lambda: [turns.stage],
        lambda: f"listening; {turns.waiting} batches wait",
        period_s=watchdog_period_s(),
    )
    too_new: ExceptionGroup[SchemaTooNewError] | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(sockets=bound), name="http")
            helping = [
                tasks.create_task(prepare_until_ready(sink), name="prepare-database"),
                tasks.create_task(_announce_then_stop(server, stop, bound, watchdog), name="stop"),
                tasks.create_task(watchdog.run(), name="watchdog"),
                tasks.create_task(run_maintenance(sink, settings.database), name="upkeep"),
            ]
            await serving
            for task in helping:
                task.cancel()
    except* SchemaTooNewError as faults:
        too_new = faults
    if too_new is not None:
        raise CannotStartError(str(too_new.exceptions[0])) from too_new


async def prepare_until_ready(sink: TimescaleSink) -> None:
    """Prepare the database, however long it takes to appear: a box may boot before its database does."""
    pause_s = _MIN_PREPARE_WAIT_S
    while True:
        try:
            await sink.prepare()
        except DeliveryError as fault:
            _log.warning("the database is not ready, next try in %.1f s: %s", pause_s, fault)
        else:
            return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_PREPARE_WAIT_S)


async def _announce_then_stop(
    server: uvicorn.Server, stop: asyncio.Event, bound: list[socket.socket], watchdog: Watchdog
) -> None:
    """Say that the service is ready, then pass a stop on to it."""
    while not server.started:  # noqa: ASYNC110 - uvicorn tells it by an attribute only
        await asyncio.sleep(0.01)
    host, port = bound[0].getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if server.config.is_ssl else "http"
    print(f"tidegate ingest: listening on {scheme}://{shown}:{port}", flush=True)  # noqa: T201 - promised to scripts
    watchdog.ready()
    await stop.wait()
    watchdog.stopping()
    server.should_exit = True


def _build_cert_reloader(tls: Tls) -> CertReloader:
    """The TLS of a configuration, made anew when its files change.

    Raises:
        CannotStartError: as for `tls_context`.
    """
    files = [path for path in (tls.cert_file, tls.key_file, tls.client_ca_file) if path is not None]
    return CertReloader(lambda: build_tls_context(tls), files, CannotStartError)


def build_tls_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or later; with a CA, clients may show a certificate, or must.

    Raises:
        CannotStartError: a file cannot be read, or does not hold what it should.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_NONE
    try:
        context.load_cert_chain(tls.cert_file, tls.key_file)
        if tls.client_ca_file is not None:
            context.load_verify_locations(tls.client_ca_file)
            required = tls.client_certificates == "required"
            context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    except OSError as fault:  # ssl.SSLError is one of them
        files = ", ".join(map(str, filter(None, (tls.cert_file, tls.key_file, tls.client_ca_file))))
        raise CannotStartError(f"cannot use the files of [tls] ({files}): {fault}") from fault
    return context


def _build_request_limits(limits: Limits) -> RequestLimits:
    return RequestLimits(
        body_bytes=limits.max_body_bytes,
        plain_bytes=limits.max_plain_bytes,
        plain_rows=limits.max_plain_rows,
        requests=limits.max_requests,
        requests_each=limits.max_requests_each,
        buffered_bytes=limits.max_buffered_bytes,
        idle_s=limits.body_idle_s,
        retry_after_s=limits.retry_after_s,
    )
