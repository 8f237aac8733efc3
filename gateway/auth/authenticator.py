"""Who may connect and what they may publish: identities, permissions, passwords, client certificates.

A password costs its scrypt hash only the first time; a keyed digest of each verified one is kept in
memory. Hashes run in a few threads of their own. Failed attempts are limited by token buckets per address
and user name and per address; a device verified before is always accepted. An unknown user name costs the
same hash as a known one.
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
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from cloud_sync.runtime.rates import TokenBuckets
from cloud_sync.runtime.watched_file import WatchedFile
from gateway.auth.device_passwords import (
    COST_GENERATED,
    PasswordFileError,
    PasswordHash,
    find_device_name_fault,
    hash_password,
    read_password_file,
    verify_password,
)
from gateway.mqtt.codec.packets import ReasonCode

if TYPE_CHECKING:
    from collections.abc import Container
    from pathlib import Path

    from gateway.payloads.topics import TopicResolver

PeerCertificate = Mapping[str, Any]
"""A verified client certificate as `ssl.SSLSocket.getpeercert` describes it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Someone who may connect.

    `may_publish` is asked once per connection and topic, `may_publish_sensor` about each sensor_id that a
    payload names; None allows all. Equal client identifiers in two scopes are two clients. `still_valid` is
    asked about once a second; False ends the connection.
    """

    name: str
    may_publish: Callable[[bytes], bool] | None = None
    client_id_scope: str = ""
    still_valid: Callable[[], bool] = lambda: True
    may_publish_sensor: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Someone who may not connect, with the CONNACK reason code of MQTT 5 that says why."""

    reason_code: int = ReasonCode.NOT_AUTHORIZED


class Credentials(NamedTuple):
    """What a client shows. `client_id` is the one in effect; `address` is the peer's, without the port."""

    client_id: str
    username: str | None = None
    password: bytes | None = None
    certificate: PeerCertificate | None = None
    address: str = ""


class Authenticator(Protocol):
    """Decides on every CONNECT and every HTTP request."""

    def authenticate(self, credentials: Credentials) -> Identity | Refusal | Awaitable[Identity | Refusal]:
        """Decide at once, or return an awaitable when it takes long (a slow hash, in a thread)."""


class AnonymousAuthenticator:
    """Accepts everyone, under their client identifier. For a listener on loopback or a trusted network."""

    def authenticate(self, credentials: Credentials) -> Identity:
        """Accept."""
        return Identity(credentials.client_id)


def owning_device(sensor_id: str) -> str:
    """The device a sensor_id belongs to: `pump-1` owns `pump-1` and `pump-1:flow`; no name has a colon."""
    return sensor_id.partition(":")[0]


def allow_own_sensors(name: str) -> Callable[[str], bool]:
    """Sensor_ids of the device `name`."""
    return lambda sensor_id: owning_device(sensor_id) == name


def allow_own_topics(name: str, topics: TopicResolver) -> Callable[[bytes], bool]:
    """Topics whose sensor_id belongs to the device `name`.

    Topics whose payloads name their sensors are open to everyone: there each reading is checked.
    """

    def rule(topic: bytes) -> bool:
        text = topic.decode("utf-8", "replace")
        sensor_id = topics.sensor_id_from_topic(text)
        if topics.has_sensor_id_in_payload(text):
            return True
        return sensor_id is not None and owning_device(sensor_id) == name

    return rule


def allow_unregistered_topics(
    devices: Callable[[], Container[str]], topics: TopicResolver
) -> Callable[[bytes], bool]:
    """Topics whose sensor_id belongs to none of the devices known at the time."""

    def rule(topic: bytes) -> bool:
        sensor_id = topics.sensor_id_from_topic(topic.decode("utf-8", "replace"))
        return sensor_id is None or owning_device(sensor_id) not in devices()

    return rule


_log = logging.getLogger(__name__)
_FAILURES_PER_NAME: Final = (5, 0.1)
_FAILURES_PER_ADDRESS: Final = (100, 1.0)
_REFUSAL_LOG_RATE: Final = (3, 1 / 60)

IdentitySource = Literal["username", "cn", "san"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthenticationPolicy:
    """What clients must show, and what they may then publish.

    The name comes from `identity`: the user name, or the certificate's common name or only DNS name. With
    `publish_as_self` a device publishes under its own sensor_id only. With `require_password` a certificate
    is not enough.
    """

    identity: IdentitySource
    allow_anonymous: bool
    publish_as_self: bool
    require_password: bool = False


class CredentialsAuthenticator:
    """Implements `Authenticator`. The constructor raises PasswordFileError like `read_password_file`."""

    def __init__(
        self,
        policy: AuthenticationPolicy,
        topics: TopicResolver,
        passwords_file: Path | None = None,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._topics = topics
        self._clock_s = clock_s
        self._passwords = (
            None
            if passwords_file is None
            else WatchedFile([passwords_file], partial(read_password_file, passwords_file), PasswordFileError)
        )
        threads = max(1, (os.cpu_count() or 1) // 2)
        self._hash_threads = ThreadPoolExecutor(threads, "password")
        self._hash_slots = asyncio.Semaphore(threads)
        self._process_key = secrets.token_bytes(32)
        self._verified_digests: dict[str, bytes] = {}
        self._dummy_hash = hash_password(b"", ln=COST_GENERATED)
        self._failures_by_name: TokenBuckets[bytes] = TokenBuckets(*_FAILURES_PER_NAME)
        self._failures_by_address: TokenBuckets[str] = TokenBuckets(*_FAILURES_PER_ADDRESS)
        self._refusal_log_rate: TokenBuckets[str] = TokenBuckets(*_REFUSAL_LOG_RATE)
        self.hashes_total = 0

    def authenticate(self, credentials: Credentials) -> Identity | Refusal | Awaitable[Identity | Refusal]:
        """Decide at once where no hash is needed, in a thread where one is."""
        client_id, username, password, certificate, address = credentials
        policy = self._policy
        if certificate is not None and policy.identity != "username":
            name = device_name_from_certificate(certificate, policy.identity)
            if name is None:
                self._log_refusal(address, f"a certificate without a usable name ({policy.identity})")
                return Refusal()
            if not policy.require_password:
                return self._identity(name)
            if username != name:
                self._log_refusal(address, f"user name {username!r:.80} with the certificate of {name!r}")
                return Refusal(ReasonCode.BAD_USER_NAME_OR_PASSWORD)
        if username is None or self._passwords is None:
            return self._anonymous(client_id, address)
        if self._is_verified(username, password or b""):
            return self._identity(username)
        return self._check_password(username, password or b"", address)

    def _anonymous(self, client_id: str, address: str) -> Identity | Refusal:
        if not self._policy.allow_anonymous:
            self._log_refusal(address, "a client without credentials")
            return Refusal()
        if self._passwords is None:
            return Identity(client_id)
        return Identity(
            client_id,
            allow_unregistered_topics(self._devices, self._topics),
            may_publish_sensor=lambda sensor_id: owning_device(sensor_id) not in self._devices(),
        )

    def _identity(self, name: str) -> Identity:
        stored, as_self = self._devices().get(name), self._policy.publish_as_self
        return Identity(
            name,
            allow_own_topics(name, self._topics) if as_self else None,
            client_id_scope=name,
            still_valid=lambda: stored is None or self._devices().get(name) == stored,
            may_publish_sensor=allow_own_sensors(name) if as_self else None,
        )

    def _devices(self) -> Mapping[str, PasswordHash]:
        return {} if self._passwords is None else self._passwords.current(self._clock_s())

    async def _check_password(self, username: str, password: bytes, address: str) -> Identity | Refusal:
        """Compare a password with the one stored, once a thread is free."""
        network = _network_of_address(address)
        client = hashlib.blake2b(f"{network}\n{username}".encode(), digest_size=16).digest()
        async with self._hash_slots:
            if self._is_verified(username, password):  # by another connection of the device, meanwhile
                return self._identity(username)
            now_s = self._clock_s()
            if not (
                self._failures_by_name.has_token(client, now_s=now_s)
                and self._failures_by_address.has_token(network, now_s=now_s)
            ):
                self._log_refusal(address, f"too many wrong passwords, last for {username!r:.80}")
                return Refusal(ReasonCode.CONNECTION_RATE_EXCEEDED)
            stored = self._devices().get(username)
            self.hashes_total += 1
            matches = await asyncio.get_running_loop().run_in_executor(
                self._hash_threads, verify_password, stored or self._dummy_hash_for(username), password
            )
            if matches and stored is not None and self._devices().get(username) == stored:
                self._verified_digests[username] = self._digest(username, stored, password)
                return self._identity(username)
        now_s = self._clock_s()
        self._failures_by_name.try_spend(client, now_s=now_s)
        self._failures_by_address.try_spend(network, now_s=now_s)
        self._log_refusal(address, f"a wrong user name or password, for {username!r:.80}")
        return Refusal(ReasonCode.BAD_USER_NAME_OR_PASSWORD)

    def _is_verified(self, username: str, password: bytes) -> bool:
        verified = self._verified_digests.get(username)
        if verified is None:
            return False
        stored = self._devices().get(username)
        if stored is None:
            del self._verified_digests[username]
            return False
        return hmac.compare_digest(verified, self._digest(username, stored, password))

    def _digest(self, username: str, stored: PasswordHash, password: bytes) -> bytes:
        """Bound to the device and to the line of the file that the password matched."""
        text = username.encode() + b"\0" + stored.salt + stored.key + password
        return hashlib.blake2b(text, key=self._process_key, digest_size=32).digest()

    def _dummy_hash_for(self, username: str) -> PasswordHash:
        """The hash that an unknown name is compared with: some device's, always the same for a name."""
        devices = self._devices()
        if not devices:
            return self._dummy_hash
        digest = hashlib.blake2b(username.encode(), key=self._process_key, digest_size=8).digest()
        return list(devices.values())[int.from_bytes(digest) % len(devices)]

    def _log_refusal(self, address: str, reason: str) -> None:
        if self._refusal_log_rate.try_spend(_network_of_address(address), now_s=self._clock_s()):
            _log.warning("refused at %s: %s", address, reason)


def device_name_from_certificate(certificate: PeerCertificate, source: IdentitySource) -> str | None:
    """The only common name or DNS name; None if there is not exactly one, or one that no device can have."""
    if source == "san":
        names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    else:
        parts = (pair for part in certificate.get("subject", ()) for pair in part)
        names = [value for kind, value in parts if kind == "commonName"]
    if len(names) != 1 or find_device_name_fault(names[0]) is not None:
        return None
    return str(names[0])


def _network_of_address(address: str) -> str:
    """An IPv4 address itself; the /64 of an IPv6 address, as one host may use all its addresses."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((parsed, 64), strict=False))
