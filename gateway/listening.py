"""The `listen` ingress as its settings want it: TLS, who may connect, how many."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gateway.ingress.admission import Anonymous
from gateway.ingress.descriptors import connections_affordable
from gateway.ingress.doorkeeper import Doorkeeper, Policy
from gateway.ingress.formats.rules import Rules
from gateway.ingress.listener import Listener, ListenSettings
from gateway.ingress.served import Served
from gateway.ingress.tls import Certificates
from gateway.ingress.topics import TopicTemplate

if TYPE_CHECKING:
    from gateway.ingress.admission import Authenticator
    from gateway.ingress.intake import Intake
    from gateway.ingress.topics import Naming
    from gateway.settings import Listen
    from gateway.settings.door import Door

_log = logging.getLogger(__name__)


def listener_of(listen: Listen, intake: Intake, naming: Naming | None = None) -> Listener:
    """Make the listener; nothing is bound yet. Raises the soft limit of open files to what it needs.

    Raises:
        TlsFault: a certificate or key cannot be used.
        CredentialsFault: the password file cannot be used.
    """
    files = listen.tls_files
    if listen.passwords_file is not None and files is None and not listen.is_loopback:
        _log.warning(
            "passwords cross the network readable: %s:%d has no TLS (tls_cert_file, tls_key_file)",
            listen.host,
            listen.port,
        )
    return Listener(
        ListenSettings(
            host=listen.host,
            port=listen.port,
            max_connections=connections_affordable(listen.max_connections),
            max_packet_bytes=listen.max_packet_bytes,
            ssl=None if files is None else Certificates(files).context,
        ),
        intake,
        authenticator_of(listen, naming or TopicTemplate(listen.topic)),
        Served(naming) if isinstance(naming, Rules) else None,
    )


def authenticator_of(door: Door, naming: Naming) -> Authenticator:
    """Who decides on everyone that comes to a door; `naming` knows whose readings topics carry.

    Raises:
        CredentialsFault: the password file cannot be used.
    """
    if not door.authenticates:
        return Anonymous()
    policy = Policy(
        identity=door.named_by,
        allow_anonymous=door.admits_anonymous,
        publish_as_self=door.own_only,
        both=door.passwords_file is not None and door.client_certificate == "required",
    )
    return Doorkeeper(policy, naming, door.passwords_file)
