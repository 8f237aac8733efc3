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

import tenacity
import uvicorn

from cloud_sync.codec.wire import WireLimits
from cloud_sync.http.auth import RequestAuthenticator
from cloud_sync.http.requests import RequestAdmission, RequestLimits
from cloud_sync.http.tokens import TokenFile
from cloud_sync.http.uvicorn_server import (
    CannotStartError,
    HeadTimeoutProtocol,
    UvicornServer,
    bind_http_sockets,
)
from cloud_sync.ingest.app import IngestApp
from cloud_sync.ingest.apply_queue import ApplyQueue
from cloud_sync.ingest.settings import load_settings, read_dsn
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

    from cloud_sync.ingest.settings import Database, IngestSettings, Tls

_log = logging.getLogger(__name__)
_MAINTENANCE_PERIOD_S = 3600.0
_KEEP_ALIVE_S = 75


async def run_maintenance(sink: TimescaleSink, database: Database) -> None:
    """Tidy about every hour, each replica at times of its own; after an error, an hour later."""
    while True:
        await asyncio.sleep(_MAINTENANCE_PERIOD_S * random.uniform(0.5, 1.5))  # noqa: S311 - spreads replicas, keeps no secret
        try:
            await maintain_once(sink, database)
        except DeliveryError as fault:
            _log.warning("maintenance of the database failed, next in about an hour: %s", fault)


async def maintain_once(sink: TimescaleSink, database: Database) -> None:
    """Merge the ledger's old entries, delete old answers and rollups."""
    if database.merge_ledger_after_days is not None:
        await sink.merge_ledger(timedelta(days=database.merge_ledger_after_days))
    await sink.transact(delete_old_answers)
    for window_s, days in database.rollup_retention_days.items():
        await sink.transact(partial(delete_old_rollups, window_s=window_s, older_than=timedelta(days=days)))


def build_sink(database: Database, dsn: str) -> TimescaleSink:
    """The sink of a configuration."""
    compress, drop = database.compress_after_days, database.retention_days
    policies = TimescalePolicies(
        timedelta(hours=database.chunk_hours),
        None if compress is None else timedelta(days=compress),
        None if drop is None else timedelta(days=drop),
    )
    return TimescaleSink(
        dsn,
        name="region",
        pool_size=database.pool_size,
        statement_timeout_s=database.statement_timeout_s,
        policies=policies,
    )


async def run_service(path: Path) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests accepted.

    InvalidSettingsError, TokenFileError and CannotStartError have one message each, for a person.
    """
    settings = load_settings(path)
    logs.configure_logging(settings.log_level, settings.log_format)
    tokens = TokenFile(settings.tokens_file)
    if not len(tokens):
        _log.warning("%s has no token: every batch will be refused", settings.tokens_file)
    sink = build_sink(settings.database, read_dsn(settings, path))
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
    """Serve on bound sockets until `stop` is set. The line it prints when ready names the address."""
    queue = ApplyQueue(settings.database.pool_size)
    app = IngestApp(
        sink,
        RequestAuthenticator(tokens),
        RequestAdmission(RequestLimits(**settings.limits.model_dump(exclude={"max_rows"}))),
        queue,
        WireLimits(max_rows=settings.limits.max_rows),
    )
    context = None if settings.tls is None else build_cert_reloader(settings.tls).context
    config = uvicorn.Config(
        app.build(),
        http=HeadTimeoutProtocol,
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
        lambda: [queue.stage],
        lambda: f"listening; {queue.waiting} batches wait",
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
                tasks.create_task(run_maintenance(sink, settings.database), name="maintenance"),
            ]
            await serving
            for task in helping:
                task.cancel()
    except* SchemaTooNewError as faults:
        too_new = faults
    if too_new is not None:
        raise CannotStartError(str(too_new.exceptions[0])) from too_new


def _log_retry(attempt: tenacity.RetryCallState) -> None:
    fault = attempt.outcome.exception() if attempt.outcome else None
    _log.warning("the database is not ready, next try in %.1f s: %s", attempt.upcoming_sleep, fault)


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(DeliveryError),
    wait=tenacity.wait_exponential(multiplier=0.5, max=15.0),
    before_sleep=_log_retry,
)
async def prepare_until_ready(sink: TimescaleSink) -> None:
    """Prepare the database, however long it takes to appear: a box may boot before its database does."""
    await sink.prepare()


async def _announce_then_stop(
    server: uvicorn.Server, stop: asyncio.Event, bound: list[socket.socket], watchdog: Watchdog
) -> None:
    """Announce that the service is ready, then pass a stop on to it."""
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


def build_cert_reloader(tls: Tls) -> CertReloader:
    """The TLS of a configuration: 1.2 or later; with a CA, clients may show a certificate, or must.

    CannotStartError when a file cannot be read, or does not hold what it should.
    """
    paths = [path for path in (tls.cert_file, tls.key_file, tls.client_ca_file) if path is not None]

    def build() -> ssl.SSLContext:
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
            names = ", ".join(map(str, paths))
            raise CannotStartError(f"cannot use the files of [tls] ({names}): {fault}") from fault
        return context

    return CertReloader(build, paths, CannotStartError)
