"""TLS contexts of devices' servers and of broker clients. TLS 1.2 and 1.3.

A server's context is rebuilt when its files change: new connections use the new one, open ones keep theirs.
A context is complete before it is used: a certificate without its key is never served.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cloud_sync.destinations.http_client import build_client_tls_context
from cloud_sync.runtime.watched_file import CertReloader

if TYPE_CHECKING:
    from pathlib import Path


class TlsFileError(Exception):
    """A certificate or key file cannot be used. `path` is the file to look at."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        super().__init__(f"{path}: {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """The PEM files of a server: its chain and key, and the authorities of clients with what they revoked.

    Without `client_ca` no certificate is asked for; with `client_required` a client must have one.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    client_crl: Path | None = None
    client_required: bool = True

    @property
    def paths(self) -> list[Path]:
        """The files in use."""
        return [p for p in (self.certificate, self.key, self.client_ca, self.client_crl) if p is not None]


def build_server_context(files: TlsFiles) -> ssl.SSLContext:
    """A server's context; TlsFileError names the file that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_CIPHER_SERVER_PREFERENCE | ssl.OP_NO_COMPRESSION
    for path in files.paths:
        _check_readable(path)

    def refuse_password() -> bytes:  # without it OpenSSL would ask on the terminal, and wait
        raise TlsFileError(files.key, "is encrypted; the gateway needs it without a password")

    try:
        context.load_cert_chain(files.certificate, files.key, refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsFileError(files.key, f"is not the key of {files.certificate}") from error
        raise TlsFileError(
            files.certificate, f"is no PEM certificate, or {files.key} no PEM key ({_openssl_reason(error)})"
        ) from error
    if files.client_ca is not None:
        _load_authorities(context, files.client_ca, "certificate of an authority")
        context.verify_mode = ssl.CERT_REQUIRED if files.client_required else ssl.CERT_OPTIONAL
    if files.client_crl is not None:
        _load_authorities(context, files.client_crl, "revocation list")
        if not context.cert_store_stats()["crl"]:
            raise TlsFileError(files.client_crl, "holds no PEM revocation list")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def build_cert_reloader(files: TlsFiles) -> CertReloader:
    """Build a server's context, and again when a file changes; TlsFileError as `build_server_context`."""
    return CertReloader(partial(build_server_context, files), files.paths, TlsFileError)


def build_client_context(ca: Path | None, certificate: Path | None, key: Path | None) -> ssl.SSLContext:
    """A client's context; TlsFileError names a file to look at. See `build_client_tls_context`."""
    files = [path for path in (certificate, key, ca) if path is not None]
    for path in files:
        _check_readable(path)
    try:
        return build_client_tls_context(ca, certificate, key)
    except ssl.SSLError as error:
        reason = f"or the files with it cannot be used for TLS ({_openssl_reason(error)})"
        raise TlsFileError(files[0], reason) from error


def _load_authorities(context: ssl.SSLContext, path: Path, kind: str) -> None:
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as fault:
        raise TlsFileError(path, f"holds no PEM {kind} ({_openssl_reason(fault)})") from fault


def _check_readable(path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as fault:
        raise TlsFileError(path, f"cannot be read: {fault.strerror}") from fault


def _openssl_reason(fault: ssl.SSLError) -> str:
    return (fault.reason or str(fault)).lower().replace("_", " ")
