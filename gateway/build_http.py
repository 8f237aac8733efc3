"""Builds the HTTP ingress. Imports a web server: loaded only when the ingress is enabled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.codec.wire import WireLimits
from cloud_sync.http.requests import RequestAdmission, RequestLimits
from cloud_sync.http.tokens import TokenFile
from gateway.auth.tls import ReloadingServerContext
from gateway.build import build_authenticator
from gateway.ingress.http.batches import BatchReceiver
from gateway.ingress.http.readings import ReadingReceiver
from gateway.ingress.http.request_auth import RequestAuthenticator
from gateway.ingress.http.server import HttpApp, HttpServerOptions, HttpSource
from gateway.payloads.topics import TopicTemplate
from gateway.spool.received_ledger import IdempotencyKeys, ReceivedLedger

if TYPE_CHECKING:
    from gateway.ingress.committer import Committer
    from gateway.settings.gateway_settings import GatewaySettings
    from gateway.settings.listeners import Http
    from gateway.spool.appender import Appender
    from gateway.spool.database import Database
    from gateway.spool.series_catalog import SeriesCatalog


def build_http_ingress(
    settings: GatewaySettings,
    database: Database,
    committer: Committer,
    appender: Appender,
    catalog: SeriesCatalog,
) -> HttpSource | None:
    """Make the ingress; nothing is bound yet. None where it is not enabled.

    Raises:
        TlsFault, CredentialsFault: a file cannot be used.
    """
    http = settings.ingress.http
    if not http.enabled:
        return None
    app = HttpApp(
        settings.gateway_id,
        callers=RequestAuthenticator(
            build_authenticator(http, TopicTemplate(settings.ingress.listen.topic)),
            None if http.tokens_file is None else TokenFile(http.tokens_file, "tidegate device token NAME"),
            own_only=http.own_only,
        ),
        intake=RequestAdmission(_build_request_limits(http)),
        committer=committer,
        batches=BatchReceiver(
            committer, appender, catalog, ReceivedLedger(database), process=http.process_batches
        ),
        readings=ReadingReceiver(committer, catalog, IdempotencyKeys(database), max_rows=http.max_plain_rows),
        limits=WireLimits(max_rows=http.max_batch_rows),
        answer_within_s=http.answer_within_s,
    )
    files = http.tls_files
    given = HttpServerOptions(
        http.host, http.port, http.max_connections, None if files is None else ReloadingServerContext(files)
    )
    return HttpSource(given, app, stop_within_s=settings.stop_within_s)


def _build_request_limits(http: Http) -> RequestLimits:
    return RequestLimits(
        body_bytes=http.max_body_bytes,
        plain_bytes=http.max_plain_bytes,
        plain_rows=http.max_plain_rows,
        requests=http.max_requests,
        requests_each=http.max_requests_each,
        buffered_bytes=http.max_buffered_bytes,
        idle_s=http.body_idle_s,
        retry_after_s=http.retry_after_s,
    )
