"""Whom a client certificate names. uvicorn keeps certificates to itself; this protocol hands the names on.

A gateway is named by the common name of its certificate's subject, or by a DNS or URI alternative name.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

from cloud_sync.ingest.heads import TimedHeads

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Mapping
    from pathlib import Path

NAMES = "certificate_names"
"""The key under which a request's state has the names; absent when there was no certificate."""

_ALTERNATIVES = ("DNS", "URI")


class CertificateProtocol(TimedHeads):
    """HTTP/1.1 whose requests know the names of the client's certificate."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Read the certificate once for all requests of the connection."""
        super().connection_made(transport)
        names = names_of(transport.get_extra_info("peercert") or {})
        if names:
            self.app_state = {**self.app_state, NAMES: names}


def names_of(certificate: Mapping[str, Any]) -> frozenset[str]:
    """The names in a certificate, as `SSLSocket.getpeercert` tells it. Verified by TLS before."""
    parts = (pair for part in certificate.get("subject", ()) for pair in part)
    subject = {value for key, value in parts if key == "commonName"}
    others = {value for kind, value in certificate.get("subjectAltName", ()) if kind in _ALTERNATIVES}
    return frozenset(subject | others)


def server_context(
    cert_file: Path, key_file: Path, client_ca_file: Path | None, *, required: bool
) -> ssl.SSLContext:
    """TLS 1.2 or later for the service; with a CA, clients may show a certificate, or must.

    Raises:
        OSError, ssl.SSLError: a file cannot be read, or does not hold what it should.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert_file, key_file)
    context.verify_mode = ssl.CERT_NONE
    if client_ca_file is not None:
        context.load_verify_locations(client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    return context
