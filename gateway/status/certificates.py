"""Validity of the certificate and revocation list files that the settings name; warnings before they expire.

Only as much DER is parsed as leads to the two dates (RFC 5280, sections 4.1 and 5.1); nothing is verified.
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

from cloud_sync.runtime.waits import sleep_or_stop
from gateway.settings.gateway_settings import list_files
from gateway.settings.schema import FileRole
from gateway.status.document import CertificateStatus

if TYPE_CHECKING:
    from collections.abc import Callable
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
    """The validity of every certificate and revocation list in a PEM file, in order. Raises ValueError."""
    found = []
    for label, body in _PEM_BLOCK.findall(pem):
        try:
            der = base64.b64decode(b"".join(body.split()), validate=True)
            times = _validity_times(der, is_crl=label == b"X509 CRL")
        except (binascii.Error, IndexError, UnicodeDecodeError) as fault:
            raise ValueError(f"contains a damaged {label.decode().lower()}") from fault
        found.append(Validity("revocation list" if label == b"X509 CRL" else "certificate", *times))
    return found


def _validity_times(der: bytes, *, is_crl: bool) -> tuple[float, float]:
    fields = _der_elements(_der_elements(_der_elements(der)[0][1])[0][1])
    if fields[0][0] == (_INTEGER if is_crl else _CONTEXT_0):  # the version, which may be left out
        fields = fields[1:]
    # of a list: signature, issuer, this update, perhaps the next; else: serial, signature, issuer, validity
    times = fields[2:4] if is_crl else _der_elements(fields[3][1])[:2]
    ends = times[1] if len(times) > 1 else (0, b"")
    never_ends = is_crl and ends[0] not in (_UTC_TIME, _GENERALIZED_TIME)
    return _parse_der_time(*times[0]), float("inf") if never_ends else _parse_der_time(*ends)


def _der_elements(data: bytes) -> list[tuple[int, bytes]]:
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
    """Every certificate file that the settings name. `now_s` is seconds since 1970."""
    files = list_files(settings, FileRole.CERTIFICATE)
    return [check_certificate_file(key, path, now_s) for key, path in files]


def check_certificate_file(key: str, path: Path, now_s: float) -> CertificateStatus:
    """The state of one file, by the entry that expires first."""
    try:
        found = parse_validities(path.read_bytes())
        fault = "" if found else "contains no PEM certificate"
    except (OSError, ValueError) as error:
        found, fault = [], f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
    if fault:
        return CertificateStatus(key, str(path), "certificate", None, fault)
    first = min(found, key=lambda validity: validity.not_after_s)
    latest = max(found, key=lambda validity: validity.not_before_s)
    days = round((first.not_after_s - now_s) / _DAY_S, 2)
    wait_days = (latest.not_before_s - now_s) / _DAY_S
    not_yet = f"the {latest.kind} is not valid for another {wait_days:.1f} days: is the clock right?"
    return CertificateStatus(key, str(path), first.kind, days, not_yet if wait_days > 0 else "")


class CertificateMonitor:
    """Logs, once a day for each file, what expires soon; `newest` is the result of the last check."""

    def __init__(
        self, settings: Callable[[], GatewaySettings], *, clock_s: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._clock_s = clock_s
        self._logged_s: dict[str, float] = {}
        self.newest: list[CertificateStatus] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Check until `stop` is set."""
        while not stop.is_set():
            await asyncio.to_thread(self.check_once)
            await sleep_or_stop(stop, _CHECK_INTERVAL_S)

    def check_once(self) -> list[CertificateStatus]:
        """Check every file; returns those that expire soon, whether they were logged now or before."""
        now_s = self._clock_s()
        self.newest = check_certificate_files(self._settings(), now_s)
        soon = [status for status in self.newest if status.soon]
        for status in soon:
            logged_s = self._logged_s.get(status.path)
            if logged_s is None or not 0 <= now_s - logged_s < _DAY_S:
                self._logged_s[status.path] = now_s
                _log.log(logging.ERROR if status.urgent else logging.WARNING, "%s; renew it", status)
        return soon
