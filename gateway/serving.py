"""The `http` ingress as its settings want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.ingest.intake import Intake, IntakeLimits
from cloud_sync.ingest.tokens import TokenFile
from cloud_sync.wire import WireLimits
from gateway.ingress.http.app import HttpApp
from gateway.ingress.http.batches import BatchIntake
from gateway.ingress.http.callers import Callers
from gateway.ingress.http.readings import ReadingIntake
from gateway.ingress.http.server import HttpIngress, HttpSettings
from gateway.ingress.tls import Certificates
from gateway.ingress.topics import TopicTemplate
from gateway.listening import authenticator_of
from gateway.spool.answered import Answers
from gateway.spool.received import ReceivedRanges

if TYPE_CHECKING:
    from gateway.ingress.committer import Committer
    from gateway.settings import GatewaySettings
    from gateway.settings.http import Http
    from gateway.spool.appender import Appender
    from gateway.spool.database import Database
    from gateway.spool.series import SeriesBook


def http_of(
    settings: GatewaySettings, database: Database, committer: Committer, appender: Appender, book: SeriesBook
) -> HttpIngress | None:
    """Make the ingress; nothing is bound yet. None where it is not enabled.

    Raises:
        TlsFault, CredentialsFault: a file cannot be used.
    """
    http = settings.ingress.http
    if not http.enabled:
        return None
    app = HttpApp(
        settings.gateway_id,
        callers=Callers(
            authenticator_of(http, TopicTemplate(settings.ingress.listen.topic)),
            None if http.tokens_file is None else TokenFile(http.tokens_file, "tidegate device token NAME"),
            own_only=http.own_only,
        ),
        intake=Intake(_limits(http)),
        committer=committer,
        batches=BatchIntake(
            committer, appender, book, ReceivedRanges(database), process=http.process_batches
        ),
        readings=ReadingIntake(committer, book, Answers(database), max_rows=http.max_plain_rows),
        limits=WireLimits(max_rows=http.max_batch_rows),
        answer_within_s=http.answer_within_s,
    )
    files = http.tls_files
    given = HttpSettings(
        http.host, http.port, http.max_connections, None if files is None else Certificates(files)
    )
    return HttpIngress(given, app, stop_within_s=settings.stop_within_s)


def _limits(http: Http) -> IntakeLimits:
    return IntakeLimits(
        body_bytes=http.max_body_bytes,
        plain_bytes=http.max_plain_bytes,
        plain_rows=http.max_plain_rows,
        requests=http.max_requests,
        requests_each=http.max_requests_each,
        buffered_bytes=http.max_buffered_bytes,
        idle_s=http.body_idle_s,
        retry_after_s=http.retry_after_s,
    )
