"""Validity of the certificate and revocation list files that the settings name, and warnings before they
expire.

Only as much DER is read as leads to the two dates (RFC 5280, sections 4.1 and 5.1); nothing is verified.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.settings.destinations import HttpDestination
from gateway.status.document import CertificateStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gateway.settings.gateway_settings import GatewaySettings

_PEM_BLOCK = re.compile(
    rb"-----BEGIN (CERTIFICATE|X509 CRL|TRUSTED CERTIFICATE)-----(.+?)-----END \1-----", re.DOTALL
)
_INTEGER, _SEQUENCE, _CONTEXT_0 = 0x02, 0x30, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_LONG_FORM: Final = 0x80
_UTC_TIME_PIVOT_YEAR: Final = 50  # two-digit years below it are of this century (RFC 5280, 4.1.2.5.1)


class Validity(NamedTuple):
    """One certificate or revocation list of a file: `kind` in words, times in seconds since 1970."""

    kind: str
    not_before_s: float
    not_after_s: float


def parse_validities(pem: bytes) -> list[Validity]:
    """Those of every certificate and revocation list in a PEM file, in its order.

    Raises:
        ValueError: one of them cannot be read.
    """
    found = []
    for label, body in _PEM_BLOCK.findall(pem):
        try:
            der = base64.b64decode(b"".join(body.split()), validate=True)
            times = _crl_times(der) if label == b"X509 CRL" else _certificate_times(der)
        except (binascii.Error, IndexError, UnicodeDecodeError) as fault:
            raise ValueError(f"holds a damaged {label.decode().lower()}") from fault
        found.append(Validity("revocation list" if label == b"X509 CRL" else "certificate", *times))
    return found


def _certificate_times(der: bytes) -> tuple[float, float]:
    fields = _der_elements(_der_elements(_der_elements(der)[0][1])[0][1])
    if fields[0][0] == _CONTEXT_0:
        fields = fields[1:]
    before, after = _der_elements(fields[3][1])[:2]  # serial, signature, issuer, validity
    return _parse_der_time(*before), _parse_der_time(*after)


def _crl_times(der: bytes) -> tuple[float, float]:
    fields = _der_elements(_der_elements(_der_elements(der)[0][1])[0][1])
    if fields[0][0] == _INTEGER:
        fields = fields[1:]
    this_update, following = fields[2], fields[3] if len(fields) > 3 else (0, b"")  # noqa: PLR2004 - signature, issuer, this, next
    begins = _parse_der_time(*this_update)
    ends = _parse_der_time(*following) if following[0] in (_UTC_TIME, _GENERALIZED_TIME) else float("inf")
    return begins, ends


def _der_elements(data: bytes) -> list[tuple[int, bytes]]:
    """Tag and content of each element that stands in `data`, one after the other."""
    found, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & _LONG_FORM:
            size = length & ~_LONG_FORM
            length, at = int.from_bytes(data[at : at + size]), at + size
        if at + length > len(data):
            raise IndexError(at)
        found.append((tag, data[at : at + length]))
        at += length
    return found


def _parse_der_time(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == _UTC_TIME:
        text = ("20" if int(text[:2]) < _UTC_TIME_PIVOT_YEAR else "19") + text
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


_DAY_S: Final = 86_400
_CHECK_INTERVAL_S: Final = 6 * 3600.0

_log = logging.getLogger(__name__)


def check_certificate_files(settings: GatewaySettings, now_s: float) -> list[CertificateStatus]:
    """Every certificate file that settings name. `now_s` is seconds since 1970."""
    return [check_certificate_file(key, path, now_s) for key, path in list_certificate_files(settings)]


def list_certificate_files(settings: GatewaySettings) -> Iterator[tuple[str, Path]]:
    """The keys that name certificate files, with the files."""
    named: list[tuple[str, Path | None]] = []
    for place, door in settings.ingress.device_listeners.items():
        named += [
            (f"{place}.tls_cert_file", door.tls_cert_file),
            (f"{place}.client_ca_file", door.client_ca_file),
            (f"{place}.client_crl_file", door.client_crl_file),
        ]
    if settings.status.enabled:
        named.append(("status.tls_cert_file", settings.status.tls_cert_file))
    named += [(f"alerts.channel[{c.name}].ca_file", c.ca_file) for c in settings.alerts.channel]
    for subscribe in settings.ingress.subscribe:
        place = f"ingress.subscribe[{subscribe.name or subscribe.url}]"
        named += [(f"{place}.cert_file", subscribe.cert_file), (f"{place}.ca_file", subscribe.ca_file)]
    for destination in settings.destinations:
        if isinstance(destination, HttpDestination):
            place = f"destinations[{destination.name}]"
            named += [
                (f"{place}.cert_file", destination.cert_file),
                (f"{place}.ca_file", destination.ca_file),
            ]
    return ((key, path) for key, path in named if path is not None)


def check_certificate_file(key: str, path: Path, now_s: float) -> CertificateStatus:
    """What a file holds, by the part of it that ends first."""
    try:
        found = parse_validities(path.read_bytes())
    except OSError as fault:
        return CertificateStatus(key, str(path), "certificate", None, f"cannot be read: {fault.strerror}")
    except ValueError as fault:
        return CertificateStatus(key, str(path), "certificate", None, str(fault))
    if not found:
        return CertificateStatus(key, str(path), "certificate", None, "holds no PEM certificate")
    first = min(found, key=lambda validity: validity.not_after_s)
    early = max(found, key=lambda validity: validity.not_before_s)
    days = round((first.not_after_s - now_s) / _DAY_S, 2)
    wait_days = (early.not_before_s - now_s) / _DAY_S
    unusable = (
        f"the {early.kind} is valid only in {wait_days:.1f} days: is the clock right?"
        if wait_days > 0
        else ""
    )
    return CertificateStatus(key, str(path), first.kind, days, unusable)


class CertificateMonitor:
    """Says in the log, once a day for each file, what ends within `SOON_DAYS`.

    Attributes:
        newest: every certificate file as it was when it was looked at last, for the status.
    """

    def __init__(
        self, settings: Callable[[], GatewaySettings], *, clock_s: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._clock_s = clock_s
        self._logged_s: dict[str, float] = {}
        self.newest: list[CertificateStatus] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop` is set."""
        while not stop.is_set():
            await asyncio.to_thread(self.look_once)
            try:
                async with asyncio.timeout(_CHECK_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                continue

    def look_once(self) -> list[CertificateStatus]:
        """Look at every file; those that end soon, whether they were logged now or before."""
        now_s = self._clock_s()
        self.newest = check_certificate_files(self._settings(), now_s)
        soon = [status for status in self.newest if status.soon]
        for status in soon:
            said_s = self._logged_s.get(status.path)
            if said_s is None or not 0 <= now_s - said_s < _DAY_S:
                self._logged_s[status.path] = now_s
                _log.log(logging.ERROR if status.urgent else logging.WARNING, "%s; renew it", status)
        return soon
