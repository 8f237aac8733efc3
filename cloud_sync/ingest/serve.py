"""The ingest service as a program: the only place that knows every part of it. Build, run, stop."""

from __future__ import annotations

import asyncio
import logging
import signal
from datetime import timedelta
from typing import TYPE_CHECKING

import uvicorn

from cloud_sync import logs
from cloud_sync.database.schema import Policies, SchemaTooNewError
from cloud_sync.destinations.timescaledb import TimescaleSink
from cloud_sync.errors import DeliveryError
from cloud_sync.ingest import settings as settings_of_ingest
from cloud_sync.ingest import upkeep
from cloud_sync.ingest.app import IngestApp, create_app
from cloud_sync.ingest.callers import Callers
from cloud_sync.ingest.certificates import CertificateProtocol, server_context
from cloud_sync.ingest.intake import Intake, IntakeLimits
from cloud_sync.ingest.metrics import IngestMetrics
from cloud_sync.ingest.renewal import Renewal
from cloud_sync.ingest.server import CannotStartError, Server, bind
from cloud_sync.ingest.tokens import TokenFile
from cloud_sync.ingest.turns import Turns
from cloud_sync.watchdog import Watchdog, period_of
from cloud_sync.wire import WireLimits

if TYPE_CHECKING:
    import socket
    import ssl
    from pathlib import Path

    from cloud_sync.ingest.settings import Database, IngestSettings, Limits, Tls

_log = logging.getLogger(__name__)
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
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
        policies=Policies(timedelta(hours=database.chunk_hours), *days),
    )


async def run(path: Path) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests accepted.

    Raises:
        SettingsFault, TokensFault, CannotStartError: one message each, for a person.
    """
    settings = settings_of_ingest.load(path)
    logs.set_up(settings.log_level, settings.log_format)
    tokens = TokenFile(settings.tokens_file)
    if tokens.refresh() == 0:
        _log.warning("%s has no token: every batch will be refused", settings.tokens_file)
    sink = build_sink(settings.database, settings_of_ingest.dsn_of(settings, path))
    bound = bind(settings.listen.host, settings.listen.port)
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
    bound: socket.socket,
    stop: asyncio.Event,
) -> None:
    """Serve on a bound socket until `stop` is set. The line it prints when ready names the address."""
    intake = Intake(_intake_limits(settings.limits))
    turns = Turns(settings.database.pool_size)
    parts = IngestApp(
        sink=sink,
        callers=Callers(tokens),
        intake=intake,
        turns=turns,
        limits=WireLimits(max_rows=settings.limits.max_rows),
        metrics=IngestMetrics(intake, turns),
    )
    context = None if settings.tls is None else _renewed(settings.tls).context
    config = uvicorn.Config(
        create_app(parts),
        http=CertificateProtocol,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, int(settings.stop_within_s)),
    )
    server = Server(config)
    watchdog = Watchdog(
        lambda: [turns.stage], lambda: f"listening; {turns.waiting} batches wait", period_s=period_of()
    )
    too_new: ExceptionGroup[SchemaTooNewError] | None = None
    try:
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(sockets=[bound]), name="http")
            helping = [
                tasks.create_task(keep_preparing(sink), name="prepare-database"),
                tasks.create_task(_stop(server, stop, bound, watchdog), name="stop"),
                tasks.create_task(watchdog.run(), name="watchdog"),
                tasks.create_task(upkeep.keep_up(sink, settings.database), name="upkeep"),
            ]
            await serving
            for task in helping:
                task.cancel()
    except* SchemaTooNewError as faults:
        too_new = faults
    if too_new is not None:
        raise CannotStartError(str(too_new.exceptions[0])) from too_new


async def keep_preparing(sink: TimescaleSink) -> None:
    """Prepare the database, however long it takes to appear: a box may boot before its database does."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            await sink.prepare()
        except DeliveryError as fault:
            _log.warning("the database is not ready, next try in %.1f s: %s", pause_s, fault)
        else:
            return
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _stop(
    server: uvicorn.Server, stop: asyncio.Event, bound: socket.socket, watchdog: Watchdog
) -> None:
    """Say that the service is ready, then pass a stop on to it."""
    while not server.started:  # noqa: ASYNC110 - uvicorn tells it by an attribute only
        await asyncio.sleep(0.01)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    scheme = "https" if server.config.is_ssl else "http"
    print(f"tidegate ingest: listening on {scheme}://{shown}:{port}", flush=True)  # noqa: T201 - promised to scripts
    watchdog.ready()
    await stop.wait()
    watchdog.stopping()
    server.should_exit = True


def _renewed(tls: Tls) -> Renewal:
    """The TLS of a configuration, made anew when its files change.

    Raises:
        CannotStartError: as for `tls_context`.
    """
    files = [path for path in (tls.cert_file, tls.key_file, tls.client_ca_file) if path is not None]
    return Renewal(lambda: tls_context(tls), files, CannotStartError)


def tls_context(tls: Tls) -> ssl.SSLContext:
    """The TLS of a configuration.

    Raises:
        CannotStartError: a file cannot be read, or does not hold what it should.
    """
    try:
        return server_context(
            tls.cert_file, tls.key_file, tls.client_ca_file, required=tls.client_certificates == "required"
        )
    except OSError as fault:  # ssl.SSLError is one of them
        files = ", ".join(map(str, filter(None, (tls.cert_file, tls.key_file, tls.client_ca_file))))
        raise CannotStartError(f"cannot use the files of [tls] ({files}): {fault}") from fault


def _intake_limits(limits: Limits) -> IntakeLimits:
    return IntakeLimits(
        body_bytes=limits.max_body_bytes,
        plain_bytes=limits.max_plain_bytes,
        plain_rows=limits.max_plain_rows,
        requests=limits.max_requests,
        requests_each=limits.max_requests_each,
        buffered_bytes=limits.max_buffered_bytes,
        idle_s=limits.body_idle_s,
        retry_after_s=limits.retry_after_s,
    )
