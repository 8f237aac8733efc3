"""Who is at the door: passwords and client certificates turned into identities.

A password costs its hash only the first time: a keyed digest of what was found right is kept in memory, one
for each device, so that ten thousand devices that come back at once do not cost ten thousand hashes. Hashes
are made in threads of their own, few of them, while ingress goes on.

Guessing is slowed down by two token buckets. A wrong password takes one from the bucket of its address and
user name (`_PER_NAME`), and one from that of its address (`_PER_ADDRESS`); where a bucket is empty nothing
is checked any more and the answer is "connection rate exceeded", or "server unavailable" in 3.1.1. A device
found right before is let in all the same: one that has a wrong password does not lock out its neighbours.
An unknown name costs the same hash as a known one.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from gateway.ingress.admission import Identity, Refusal, not_owned_by, own_topics, owned_by, owned_by_none_of
from gateway.ingress.buckets import Buckets
from gateway.ingress.changing_file import ChangingFile
from gateway.ingress.credentials import (
    COST_GENERATED,
    CredentialsFault,
    PasswordHash,
    fault_in_name,
    hash_of,
    matches,
    read,
)
from gateway.ingress.packets import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from gateway.ingress.admission import Certificate
    from gateway.ingress.topics import Naming

_log = logging.getLogger(__name__)
_PER_NAME: Final = (5, 0.1)
_PER_ADDRESS: Final = (100, 1.0)
_LOGGED: Final = (3, 1 / 60)

IdentitySource = Literal["username", "cn", "san"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is asked of whoever connects.

    Attributes:
        identity: where the name comes from: the user name, or the certificate's common name or only DNS name.
        allow_anonymous: whether clients that show nothing are admitted, as nobody in particular.
        publish_as_self: whether a device publishes under its own sensor_id only.
        both: whether a certificate is not enough, and the password of the same name is asked for as well.
    """

    identity: IdentitySource
    allow_anonymous: bool
    publish_as_self: bool
    both: bool = False


class Doorkeeper:
    """Implements `Authenticator`.

    Raises:
        CredentialsFault: the password file cannot be used.
    """

    def __init__(
        self,
        policy: Policy,
        naming: Naming,
        passwords_file: Path | None = None,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._naming = naming
        self._clock_s = clock_s
        self._passwords: ChangingFile[dict[str, PasswordHash]] | None = None
        if passwords_file is not None:
            self._passwords = ChangingFile([passwords_file], partial(read, passwords_file), CredentialsFault)
        threads = max(1, (os.cpu_count() or 1) // 2)
        self._threads = ThreadPoolExecutor(threads, "password")
        self._free = asyncio.Semaphore(threads)
        self._process_key = secrets.token_bytes(32)
        self._found_right: dict[str, bytes] = {}
        self._decoy = hash_of(b"", ln=COST_GENERATED)
        self._by_name: Buckets[bytes] = Buckets(*_PER_NAME)
        self._by_address: Buckets[str] = Buckets(*_PER_ADDRESS)
        self._logged: Buckets[str] = Buckets(*_LOGGED)
        self.hashes_total = 0

    def admit(
        self,
        client_id: str,
        username: str | None,
        password: bytes | None,
        certificate: Certificate | None,
        address: str,
    ) -> Identity | Refusal | Awaitable[Identity | Refusal]:
        """Decide at once where no hash is needed, in a thread where one is."""
        policy = self._policy
        if certificate is not None and policy.identity != "username":
            name = name_in(certificate, policy.identity)
            if name is None:
                self._warn(address, f"a certificate that gives no usable name ({policy.identity})")
                return Refusal()
            if not policy.both:
                return self._identity(name)
            if username != name:
                self._warn(address, f"user name {username!r:.80} with the certificate of {name!r}")
                return Refusal(ReasonCode.BAD_USER_NAME_OR_PASSWORD)
        if username is None or self._passwords is None:
            return self._anonymous(client_id, address)
        if self._is_known(username, password or b""):
            return self._identity(username)
        return self._check(username, password or b"", address)

    def _anonymous(self, client_id: str, address: str) -> Identity | Refusal:
        if not self._policy.allow_anonymous:
            self._warn(address, "a client that shows no credentials")
            return Refusal()
        if self._passwords is None:
            return Identity(client_id)
        rule = not_owned_by(self._devices, self._naming)
        return Identity(client_id, rule, owns=owned_by_none_of(self._devices))

    def _identity(self, name: str) -> Identity:
        rule = own_topics(name, self._naming) if self._policy.publish_as_self else None
        stored = self._devices().get(name)
        stands = None if stored is None else (lambda: self._devices().get(name) == stored)
        owns = owned_by(name) if self._policy.publish_as_self else None
        return Identity(name, rule, scope=name, stands=stands, owns=owns)

    def _devices(self) -> Mapping[str, PasswordHash]:
        return {} if self._passwords is None else self._passwords.current(self._clock_s())

    async def _check(self, username: str, password: bytes, address: str) -> Identity | Refusal:
        """Compare a password with the one stored, when it is its turn."""
        network = _network(address)
        who = hashlib.blake2b(f"{network}\n{username}".encode(), digest_size=16).digest()
        async with self._free:
            if self._is_known(username, password):  # by another connection of the device, meanwhile
                return self._identity(username)
            now_s = self._clock_s()
            if not (self._by_name.holds(who, now_s=now_s) and self._by_address.holds(network, now_s=now_s)):
                self._warn(address, f"wrong passwords too often, last for {username!r:.80}")
                return Refusal(ReasonCode.CONNECTION_RATE_EXCEEDED)
            stored = self._devices().get(username)
            self.hashes_total += 1
            right = await asyncio.get_running_loop().run_in_executor(
                self._threads, matches, stored or self._decoy_for(username), password
            )
            if right and stored is not None and self._devices().get(username) == stored:
                self._found_right[username] = self._digest(username, stored, password)
                return self._identity(username)
        now_s = self._clock_s()
        self._by_name.take(who, now_s=now_s)
        self._by_address.take(network, now_s=now_s)
        self._warn(address, f"a wrong user name or password, for {username!r:.80}")
        return Refusal(ReasonCode.BAD_USER_NAME_OR_PASSWORD)

    def _is_known(self, username: str, password: bytes) -> bool:
        found = self._found_right.get(username)
        if found is None:
            return False
        stored = self._devices().get(username)
        if stored is None:
            del self._found_right[username]
            return False
        return hmac.compare_digest(found, self._digest(username, stored, password))

    def _digest(self, username: str, stored: PasswordHash, password: bytes) -> bytes:
        """Ties a password to its device and to the line of the file it was right for."""
        text = username.encode() + b"\0" + stored.salt + stored.key + password
        return hashlib.blake2b(text, key=self._process_key, digest_size=32).digest()

    def _decoy_for(self, username: str) -> PasswordHash:
        """What an unknown name is compared with: the cost of some device, always the same for a name."""
        devices = self._devices()
        if not devices:
            return self._decoy
        chosen = int.from_bytes(
            hashlib.blake2b(username.encode(), key=self._process_key, digest_size=8).digest()
        )
        costs = list(devices.values())
        return costs[chosen % len(costs)]

    def _warn(self, address: str, what: str) -> None:
        if self._logged.take(_network(address), now_s=self._clock_s()):
            _log.warning("refused at %s: %s", address, what)


def name_in(certificate: Certificate, source: IdentitySource) -> str | None:
    """The name a certificate gives its owner: its only common name, or its only DNS name; None if it has not
    exactly one, or one that no device can have.
    """
    if source == "san":
        names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    else:
        parts = (pair for part in certificate.get("subject", ()) for pair in part)
        names = [value for kind, value in parts if kind == "commonName"]
    if len(names) != 1 or fault_in_name(names[0]) is not None:
        return None
    return str(names[0])


def _network(address: str) -> str:
    """Whom an address stands for: itself in IPv4, its /64 in IPv6, of which anyone may use every address."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))
