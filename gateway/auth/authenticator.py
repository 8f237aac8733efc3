"""Who may connect and what they may publish: identities, permissions, passwords, client certificates.

A password costs its scrypt hash only the first time; a keyed digest of each verified one is kept in
memory. Hashes run in a few threads of their own. Failed attempts are limited by token buckets per address
and user name and per address; a device verified before is always admitted. An unknown user name costs the
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
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

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

    from gateway.mqtt.codec.packets import Publish
    from gateway.payloads.topics import TopicResolver

_CACHED_TOPICS_MAX: Final = 1000

PeerCertificate = Mapping[str, Any]
"""A verified client certificate as `ssl.SSLSocket.getpeercert` describes it."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Someone who may connect.

    Attributes:
        name: who it is.
        may_publish: asked once per connection and topic (bytes, a valid topic name); None allows every topic.
        owns: asked about each sensor_id that a payload names by itself; None allows every one.
        scope: whose client identifiers are meant: the same one in another scope is another client, so that
            nobody takes over the session of somebody else.
        stands: asked about once a second; False (the device was removed, say) ends the connection.
    """

    name: str
    may_publish: Callable[[bytes], bool] | None = None
    scope: str = ""
    still_valid: Callable[[], bool] | None = None
    may_publish_sensor: Callable[[str], bool] | None = None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Someone who may not connect, with the CONNACK reason code of MQTT 5 that says why."""

    reason_code: int = ReasonCode.NOT_AUTHORIZED


class Authenticator(Protocol):
    """Decides on every CONNECT."""

    def authenticate(
        self,
        client_id: str,
        username: str | None,
        password: bytes | None,
        certificate: PeerCertificate | None,
        address: str,
    ) -> Identity | Refusal | Awaitable[Identity | Refusal]:
        """Decide at once, or return an awaitable when it takes long (a slow hash, in a thread).

        `client_id` is the one in effect, assigned when the client sent none; `address` is the peer's, without
        the port. Whatever the connection has sent after CONNECT waits for the answer.
        """
        ...


class AnonymousAuthenticator:
    """Admits everyone, as nobody in particular. For a listener on loopback or a network that is trusted."""

    def authenticate(
        self,
        client_id: str,
        username: str | None,  # noqa: ARG002 - the seam's signature
        password: bytes | None,  # noqa: ARG002 - the seam's signature
        certificate: PeerCertificate | None,  # noqa: ARG002 - the seam's signature
        address: str,  # noqa: ARG002 - the seam's signature
    ) -> Identity:
        """Everyone is welcome under the name they give."""
        return Identity(client_id)


def owning_device(sensor_id: str) -> str:
    """The device a sensor_id belongs to: `pump-1` owns `pump-1` and `pump-1:flow`.

    No device's name holds a colon, so that no device owns what is another's.
    """
    return sensor_id.partition(":")[0]


def allow_own_sensors(name: str) -> Callable[[str], bool]:
    """The rule "only as itself", for sensor_ids."""
    return lambda sensor_id: owning_device(sensor_id) == name


def allow_unregistered_sensors(devices: Callable[[], Container[str]]) -> Callable[[str], bool]:
    """The rule "as nobody in particular", for sensor_ids: all but those of the devices known at the time."""
    return lambda sensor_id: owning_device(sensor_id) not in devices()


def allow_own_topics(name: str, naming: TopicResolver) -> Callable[[bytes], bool]:
    """The rule "only as itself": topics whose sensor_id belongs to the device `name`.

    Topics whose payloads name their sensors are open to everyone: there each reading is asked about.
    """

    def rule(topic: bytes) -> bool:
        text = topic.decode("utf-8", "replace")
        sensor_id = naming.sensor_id_from_topic(text)
        if naming.has_sensor_id_in_payload(text):
            return True
        return sensor_id is not None and owning_device(sensor_id) == name

    return rule


def allow_unregistered_topics(
    devices: Callable[[], Container[str]], naming: TopicResolver
) -> Callable[[bytes], bool]:
    """The rule "as nobody in particular": every topic but those of the devices known at the time."""

    def rule(topic: bytes) -> bool:
        sensor_id = naming.sensor_id_from_topic(topic.decode("utf-8", "replace"))
        return sensor_id is None or owning_device(sensor_id) not in devices()

    return rule


class PublishPermissions:
    """What one connection may publish: its identity's rule, asked once per topic (of a bounded number)."""

    __slots__ = ("_answers", "_rule")

    def __init__(self, rule: Callable[[bytes], bool]) -> None:
        self._rule = rule
        self._answers: dict[bytes, bool] = {}

    def allows(self, topic: bytes) -> bool:
        """Whether `topic` may be published to."""
        answer = self._answers.get(topic)
        if answer is None:
            if len(self._answers) >= _CACHED_TOPICS_MAX:
                self._answers.clear()
            answer = self._answers[topic] = self._rule(topic)
        return answer

    def forget(self) -> None:
        """What topics carry has changed: ask about each again."""
        self._answers.clear()

    def split(self, run: list[Publish]) -> tuple[list[Publish], list[Publish]]:
        """The publishes that are granted, and those that are denied, each in order."""
        granted: list[Publish] = []
        denied: list[Publish] = []
        for publish in run:
            (granted if self.allows(publish.topic) else denied).append(publish)
        return granted, denied


_log = logging.getLogger(__name__)
_FAILURES_PER_NAME: Final = (5, 0.1)
_FAILURES_PER_ADDRESS: Final = (100, 1.0)
_REFUSAL_LOG_RATE: Final = (3, 1 / 60)

IdentitySource = Literal["username", "cn", "san"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthenticationPolicy:
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


class CredentialsAuthenticator:
    """Implements `Authenticator`.

    Raises:
        CredentialsFault: the password file cannot be used.
    """

    def __init__(
        self,
        policy: AuthenticationPolicy,
        naming: TopicResolver,
        passwords_file: Path | None = None,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._naming = naming
        self._clock_s = clock_s
        self._passwords: WatchedFile[dict[str, PasswordHash]] | None = None
        if passwords_file is not None:
            self._passwords = WatchedFile(
                [passwords_file], partial(read_password_file, passwords_file), PasswordFileError
            )
        threads = max(1, (os.cpu_count() or 1) // 2)
        self._hash_threads = ThreadPoolExecutor(threads, "password")
        self._free = asyncio.Semaphore(threads)
        self._process_key = secrets.token_bytes(32)
        self._verified_digests: dict[str, bytes] = {}
        self._dummy_hash = hash_password(b"", ln=COST_GENERATED)
        self._failures_by_name: TokenBuckets[bytes] = TokenBuckets(*_FAILURES_PER_NAME)
        self._failures_by_address: TokenBuckets[str] = TokenBuckets(*_FAILURES_PER_ADDRESS)
        self._refusal_log_rate: TokenBuckets[str] = TokenBuckets(*_REFUSAL_LOG_RATE)
        self.hashes_total = 0

    def authenticate(
        self,
        client_id: str,
        username: str | None,
        password: bytes | None,
        certificate: PeerCertificate | None,
        address: str,
    ) -> Identity | Refusal | Awaitable[Identity | Refusal]:
        """Decide at once where no hash is needed, in a thread where one is."""
        policy = self._policy
        if certificate is not None and policy.identity != "username":
            name = device_name_from_certificate(certificate, policy.identity)
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
        rule = allow_unregistered_topics(self._devices, self._naming)
        return Identity(client_id, rule, may_publish_sensor=allow_unregistered_sensors(self._devices))

    def _identity(self, name: str) -> Identity:
        rule = allow_own_topics(name, self._naming) if self._policy.publish_as_self else None
        stored = self._devices().get(name)
        still_valid = None if stored is None else (lambda: self._devices().get(name) == stored)
        may_publish_sensor = allow_own_sensors(name) if self._policy.publish_as_self else None
        return Identity(
            name, rule, scope=name, still_valid=still_valid, may_publish_sensor=may_publish_sensor
        )

    def _devices(self) -> Mapping[str, PasswordHash]:
        return {} if self._passwords is None else self._passwords.current(self._clock_s())

    async def _check(self, username: str, password: bytes, address: str) -> Identity | Refusal:
        """Compare a password with the one stored, when it is its turn."""
        network = _network_of_address(address)
        who = hashlib.blake2b(f"{network}\n{username}".encode(), digest_size=16).digest()
        async with self._free:
            if self._is_known(username, password):  # by another connection of the device, meanwhile
                return self._identity(username)
            now_s = self._clock_s()
            if not (
                self._failures_by_name.has_token(who, now_s=now_s)
                and self._failures_by_address.has_token(network, now_s=now_s)
            ):
                self._warn(address, f"wrong passwords too often, last for {username!r:.80}")
                return Refusal(ReasonCode.CONNECTION_RATE_EXCEEDED)
            stored = self._devices().get(username)
            self.hashes_total += 1
            right = await asyncio.get_running_loop().run_in_executor(
                self._hash_threads, verify_password, stored or self._dummy_hash_for(username), password
            )
            if right and stored is not None and self._devices().get(username) == stored:
                self._verified_digests[username] = self._digest(username, stored, password)
                return self._identity(username)
        now_s = self._clock_s()
        self._failures_by_name.try_spend(who, now_s=now_s)
        self._failures_by_address.try_spend(network, now_s=now_s)
        self._warn(address, f"a wrong user name or password, for {username!r:.80}")
        return Refusal(ReasonCode.BAD_USER_NAME_OR_PASSWORD)

    def _is_known(self, username: str, password: bytes) -> bool:
        found = self._verified_digests.get(username)
        if found is None:
            return False
        stored = self._devices().get(username)
        if stored is None:
            del self._verified_digests[username]
            return False
        return hmac.compare_digest(found, self._digest(username, stored, password))

    def _digest(self, username: str, stored: PasswordHash, password: bytes) -> bytes:
        """Ties a password to its device and to the line of the file it was right for."""
        text = username.encode() + b"\0" + stored.salt + stored.key + password
        return hashlib.blake2b(text, key=self._process_key, digest_size=32).digest()

    def _dummy_hash_for(self, username: str) -> PasswordHash:
        """What an unknown name is compared with: the cost of some device, always the same for a name."""
        devices = self._devices()
        if not devices:
            return self._dummy_hash
        chosen = int.from_bytes(
            hashlib.blake2b(username.encode(), key=self._process_key, digest_size=8).digest()
        )
        costs = list(devices.values())
        return costs[chosen % len(costs)]

    def _warn(self, address: str, what: str) -> None:
        if self._refusal_log_rate.try_spend(_network_of_address(address), now_s=self._clock_s()):
            _log.warning("refused at %s: %s", address, what)


def device_name_from_certificate(certificate: PeerCertificate, source: IdentitySource) -> str | None:
    """The name a certificate gives its owner: its only common name, or its only DNS name; None if it has not
    exactly one, or one that no device can have.
    """
    if source == "san":
        names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    else:
        parts = (pair for part in certificate.get("subject", ()) for pair in part)
        names = [value for kind, value in parts if kind == "commonName"]
    if len(names) != 1 or find_device_name_fault(names[0]) is not None:
        return None
    return str(names[0])


def _network_of_address(address: str) -> str:
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
