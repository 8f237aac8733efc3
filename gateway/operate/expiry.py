"""Which certificates the gateway uses, how long they last, and a word about those that end soon."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

import msgspec

from gateway.operate.validity import validities
from gateway.settings import HttpDestination

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from gateway.settings import GatewaySettings

DAY_S: Final = 86_400
SOON_DAYS: Final = 30
URGENT_DAYS: Final = 7
_EVERY_S: Final = 6 * 3600.0

_log = logging.getLogger(__name__)


class CertificateStatus(msgspec.Struct):
    """One file of certificates or revocation lists.

    Attributes:
        key: the setting that names it.
        path: the file.
        kind: certificate or revocation list: the one of the file that ends first.
        days_left: until it ends; negative when it has ended; None when it cannot be read.
        fault: why it cannot be read, or that it is not valid yet; "" otherwise.
    """

    key: str
    path: str
    kind: str
    days_left: float | None
    fault: str = ""

    @property
    def urgent(self) -> bool:
        """Whether it has ended, ends within a week, or is of no use."""
        return bool(self.fault) or (self.days_left is not None and self.days_left < URGENT_DAYS)

    @property
    def soon(self) -> bool:
        """Whether somebody should renew it now."""
        return self.urgent or (self.days_left is not None and self.days_left < SOON_DAYS)

    def __str__(self) -> str:
        if self.fault:
            return f"{self.key}: {self.path}: {self.fault}"
        days = self.days_left or 0.0
        when = f"ends in {days:.0f} days" if days >= 0 else f"ended {-days:.0f} days ago"
        return f"{self.key}: {self.path}: the {self.kind} {when}"


def certificates(settings: GatewaySettings, now_s: float) -> list[CertificateStatus]:
    """Every certificate file that settings name. `now_s` is seconds since 1970."""
    return [certificate_status(key, path, now_s) for key, path in certificate_files(settings)]


def certificate_files(settings: GatewaySettings) -> Iterator[tuple[str, Path]]:
    """The keys that name certificate files, with the files."""
    named: list[tuple[str, Path | None]] = []
    for place, door in settings.ingress.doors.items():
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


def certificate_status(key: str, path: Path, now_s: float) -> CertificateStatus:
    """What a file holds, by the part of it that ends first."""
    try:
        found = validities(path.read_bytes())
    except OSError as fault:
        return CertificateStatus(key, str(path), "certificate", None, f"cannot be read: {fault.strerror}")
    except ValueError as fault:
        return CertificateStatus(key, str(path), "certificate", None, str(fault))
    if not found:
        return CertificateStatus(key, str(path), "certificate", None, "holds no PEM certificate")
    first = min(found, key=lambda validity: validity.not_after_s)
    early = max(found, key=lambda validity: validity.not_before_s)
    days = round((first.not_after_s - now_s) / DAY_S, 2)
    wait_days = (early.not_before_s - now_s) / DAY_S
    unusable = (
        f"the {early.kind} is valid only in {wait_days:.1f} days: is the clock right?"
        if wait_days > 0
        else ""
    )
    return CertificateStatus(key, str(path), first.kind, days, unusable)


class ExpiryWatch:
    """Says in the log, once a day for each file, what ends within `SOON_DAYS`.

    Attributes:
        newest: every certificate file as it was when it was looked at last, for the status.
    """

    def __init__(
        self, settings: Callable[[], GatewaySettings], *, clock_s: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._clock_s = clock_s
        self._said_s: dict[str, float] = {}
        self.newest: list[CertificateStatus] = []

    async def run(self, stop: asyncio.Event) -> None:
        """Look until `stop` is set."""
        while not stop.is_set():
            await asyncio.to_thread(self.look_once)
            try:
                async with asyncio.timeout(_EVERY_S):
                    await stop.wait()
            except TimeoutError:
                continue

    def look_once(self) -> list[CertificateStatus]:
        """Look at every file; those that end soon, whether they were logged now or before."""
        now_s = self._clock_s()
        self.newest = certificates(self._settings(), now_s)
        soon = [status for status in self.newest if status.soon]
        for status in soon:
            said_s = self._said_s.get(status.path)
            if said_s is None or not 0 <= now_s - said_s < DAY_S:
                self._said_s[status.path] = now_s
                _log.log(logging.ERROR if status.urgent else logging.WARNING, "%s; renew it", status)
        return soon
