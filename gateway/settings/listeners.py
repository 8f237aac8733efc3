"""`[ingress.listen]`, `[ingress.http]` and `[status]`: addresses, TLS, who may connect."""

from __future__ import annotations

import ipaddress
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from gateway.auth.tls import TlsFiles
from gateway.payloads.topics import TopicTemplate
from gateway.settings.schema import (
    Count,
    Port,
    Seconds,
    Table,
    is_loopback,
)


class DeviceListener(Table):
    """Where devices connect, and what is asked of them."""

    host: str = "127.0.0.1"
    """The address to listen on; "0.0.0.0" is every IPv4 address of this machine. An address that others can
    reach needs passwords or client certificates, or the word that everyone there may publish:
    allow_anonymous = true.
    """
    tls_cert_file: Path | None = Field(default=None, examples=["server.pem"])
    """PEM: the server's certificate with those that lead to its authority. Files that change are read again
    for new connections; those that are open go on.
    """
    tls_key_file: Path | None = Field(default=None, examples=["server.key"])
    """PEM: its key, without a password."""
    client_ca_file: Path | None = Field(default=None, examples=["devices-ca.pem"])
    """PEM: devices show certificates of these authorities."""
    client_crl_file: Path | None = Field(default=None, examples=["devices-crl.pem"])
    """PEM: a certificate that this list names as revoked is turned away."""
    client_certificate: Literal["required", "optional"] = "required"
    """ "required": no connection without a certificate; where there is a passwords_file, the password is
    asked for too. "optional": a certificate, or the password. Needs identity = "cn" or "san".
    """
    passwords_file: Path | None = Field(default=None, examples=["passwords"])
    """Names and hashed passwords. `tidegate device add NAME --config FILE` makes and changes it; a running
    gateway notices at once.
    """
    identity: Literal["username", "cn", "san"] | None = Field(default=None, examples=["username"])
    """Where a device's name comes from: "username", or its certificate's common name ("cn") or only DNS name
    ("san"). Without it: the user name where there is a passwords_file, the common name otherwise.
    """
    publish_as: Literal["self", "any"] | None = Field(default=None, examples=["self"])
    """ "self": a device publishes under its own name only, as sensor_id NAME or NAME:part. "any": under every
    name. Without it: "self" as soon as there are passwords or client certificates.
    """
    allow_plain_passwords: bool = False
    """Whether passwords may cross the network readable, without TLS, on an address that others can reach."""
    allow_anonymous: bool | None = Field(default=None, examples=[False])
    """Whether clients that show neither are admitted, to publish under any name that is not in
    passwords_file. Without it: only where nothing is asked of anyone, which host = "127.0.0.1" allows and
    others do not.
    """

    @model_validator(mode="after")
    def _validate_access(self) -> Self:
        """Refuse what contradicts itself, and a door that is open without anyone having said so."""
        faults = self._find_file_faults()
        if self.named_by == "username":
            if not self.has_client_secrets and (self.identity is not None or self.publish_as == "self"):
                faults.append(
                    "nothing tells who a client is: give passwords_file, or client_ca_file for certificates"
                )
            if self.client_ca_file is not None and self.client_certificate == "optional":
                faults.append(
                    'optional client certificates that give no name change nothing: set identity = "cn" or '
                    '"san", or client_certificate = "required"'
                )
        elif self.client_ca_file is None:
            faults.append(f"identity = {self.named_by!r} needs client_ca_file")
        faults += self._find_anonymity_faults()
        faults += self._find_plain_password_faults()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _find_file_faults(self) -> list[str]:
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together")
        if self.client_ca_file is not None and self.tls_cert_file is None:
            faults.append("client_ca_file needs TLS: give tls_cert_file and tls_key_file")
        if self.client_crl_file is not None and self.client_ca_file is None:
            faults.append("client_crl_file revokes certificates of client_ca_file; give that too")
        return faults

    def _find_plain_password_faults(self) -> list[str]:
        readable = self.has_client_secrets and self.tls_cert_file is None and not self.is_loopback
        if not readable or self.allow_plain_passwords:
            return []
        what = (
            f"passwords would cross the network readable on {self.host or 'every address'}: give "
            "tls_cert_file and tls_key_file; where the network itself is trusted, say so with "
            "allow_plain_passwords = true"
        )
        return [what]

    def _find_anonymity_faults(self) -> list[str]:
        if self.allow_anonymous is False and not self.authenticates:
            return ["nobody could connect: give passwords_file or client_ca_file, or allow_anonymous = true"]
        if self.allow_anonymous and self.client_ca_file is not None:
            if self.client_certificate == "required":
                return ['allow_anonymous and client_certificate = "required" contradict each other']
            if self.own_only:
                what = (
                    "clients without a certificate could publish as any device that has one: set "
                    'publish_as = "any" to accept that, or leave out allow_anonymous'
                )
                return [what]
        if not self.authenticates and not self.is_loopback and not self.allow_anonymous:
            what = (
                f"anyone who reaches {self.host or 'this machine'} could publish anything: give "
                "passwords_file (`tidegate device add` fills it) and TLS, or client_ca_file, or listen on "
                "127.0.0.1; where the network itself is trusted, say so with allow_anonymous = true"
            )
            return [what]
        return []

    @property
    def authenticates(self) -> bool:
        """Whether anything is asked of clients."""
        return self.has_client_secrets or self.client_ca_file is not None

    @property
    def has_client_secrets(self) -> bool:
        """Whether there are secrets that tell who a client is."""
        return self.passwords_file is not None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def allows_anonymous(self) -> bool:
        """Whether a client that shows nothing is admitted: as said, otherwise when none can show anything."""
        return not self.authenticates if self.allow_anonymous is None else self.allow_anonymous

    @property
    def named_by(self) -> Literal["username", "cn", "san"]:
        """Where the name of a device comes from."""
        if self.identity is not None:
            return self.identity
        return "cn" if self.client_ca_file is not None and self.passwords_file is None else "username"

    @property
    def own_only(self) -> bool:
        """Whether a device publishes under its own sensor_id only."""
        return self.authenticates if self.publish_as is None else self.publish_as == "self"

    @property
    def tls_files(self) -> TlsFiles | None:
        """What TLS is made from; None without TLS."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return TlsFiles(
            certificate=self.tls_cert_file,
            key=self.tls_key_file,
            client_ca=self.client_ca_file,
            client_crl=self.client_crl_file,
            client_required=self.client_certificate == "required",
        )


class Listen(DeviceListener):
    """The gateway's own MQTT server."""

    port: Port = 1883
    """The TCP port: 1883 by convention, 8883 with TLS."""
    topic: str = "sensors/{sensor_id}/{sensor_type}"
    """Which series a topic names. One level of the topic for each member in braces."""
    max_connections: Count = 10_500
    """Connections beyond it are closed at once, or take the place of one that has said nothing yet."""
    max_packet_bytes: Annotated[int, Field(ge=128, le=268_435_455)] = 1 << 20
    """The largest packet taken."""

    @field_validator("topic")
    @classmethod
    def _validate_topic(cls, topic: str) -> str:
        TopicTemplate(topic)
        return topic


_ByteLimit = Annotated[int, Field(ge=1024)]


class Http(DeviceListener):
    """The gateway's own HTTP server for readings: devices without MQTT, and other gateways."""

    enabled: bool = False
    """Whether to take readings over HTTP."""
    port: Port = 8422
    """The TCP port."""
    tokens_file: Path | None = Field(default=None, examples=["http-tokens"])
    """Names and hashed tokens. `tidegate device token NAME --config FILE` makes them: one of scope "batches"
    lets the gateway of that name deliver here, one of scope "readings" lets a client send readings under its
    name.
    """
    max_connections: Count = 1000
    """Requests on more are answered with 503."""
    max_requests: Count = 64
    """Requests with a body in progress; more are asked to come back (503)."""
    max_requests_each: Count = 8
    """The same of one client (429)."""
    max_body_bytes: _ByteLimit = 8 << 20
    """The largest body taken, as it is on the network."""
    max_plain_bytes: _ByteLimit = 32 << 20
    """The largest body of readings, decompressed."""
    max_plain_rows: Count = 100_000
    """Readings in one such body."""
    max_batch_rows: Count = 200_000
    """Records in one batch of another gateway."""
    process_batches: bool = False
    """Whether readings in batches of other gateways are rolled up and watched for alerts here as well. They
    do that themselves; it is for those that send readings only.
    """
    max_buffered_bytes: _ByteLimit = 64 << 20
    """What all bodies together may hold in memory; more are asked to come back (503)."""
    body_idle_s: Seconds = 30
    """The longest silence within a request."""
    answer_within_s: Seconds = 30
    """How long a request may wait for its commit; then it is asked to come back (503), and finds what it sent
    stored if it was.
    """
    retry_after_s: Count = 5
    """What a request for which there is no room is asked to wait."""

    @property
    def has_client_secrets(self) -> bool:
        """Whether there are secrets that tell who a client is."""
        return super().has_client_secrets or self.tokens_file is not None


class StatusSettings(Table):
    """The gateway's own HTTP endpoint for people and probes."""

    enabled: bool = True
    """Whether to serve it. `tidegate status` asks it."""
    host: str = "127.0.0.1"
    """The address to serve it on; 127.0.0.1 is this machine only. Others need tokens and TLS."""
    port: Port = 8421
    """Its TCP port."""
    tokens_file: Path | None = Field(default=None, examples=["status.tokens"])
    """Hashes of the tokens with which other machines may look. `tidegate token add NAME` makes and changes
    it; a running gateway notices at once.
    """
    tls_cert_file: Path | None = Field(default=None, examples=["server.pem"])
    """The endpoint's certificate with those that lead to its authority, PEM. Read again when it changes."""
    tls_key_file: Path | None = Field(default=None, examples=["server.key"])
    """The key of tls_cert_file, PEM, without a password."""
    allow_plain: bool = False
    """Whether tokens may travel without TLS: only where something else encrypts, as a proxy or a VPN."""
    silent_after_s: Seconds = 300
    """A device that has sent nothing for so long is shown as silent."""

    @model_validator(mode="after")
    def _validate_access(self) -> Self:
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together")
        if self.enabled and not self.is_loopback:
            if self.tokens_file is None:
                faults.append(
                    f"anyone who reaches {self.host or 'this machine'} could look in: give tokens_file "
                    "(`tidegate token add` fills it), or use host 127.0.0.1"
                )
            if self.tls_cert_file is None and not self.allow_plain:
                faults.append(
                    "tokens would travel unencrypted: give tls_cert_file and tls_key_file, or say "
                    "allow_plain = true where something else encrypts"
                )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def tls_files(self) -> TlsFiles | None:
        """What TLS is made from; None without TLS."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return TlsFiles(certificate=self.tls_cert_file, key=self.tls_key_file)
