"""`[ingress.listen]`: the gateway's own MQTT server, and who may connect to it."""

from __future__ import annotations

import ipaddress
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from gateway.ingress.tls import TlsFiles
from gateway.ingress.topics import TopicTemplate
from gateway.settings.tables import Count, Port, Table


class Listen(Table):
    """The gateway's own MQTT server."""

    host: str = "127.0.0.1"
    port: Port = 1883
    topic: str = "sensors/{sensor_id}/{sensor_type}"
    max_connections: Count = 10_500
    max_packet_bytes: Annotated[int, Field(ge=128, le=268_435_455)] = 1 << 20
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    client_ca_file: Path | None = None
    client_crl_file: Path | None = None
    client_certificate: Literal["required", "optional"] = "required"
    passwords_file: Path | None = None
    identity: Literal["username", "cn", "san"] | None = None
    publish_as: Literal["self", "any"] | None = None
    allow_anonymous: bool | None = None

    @field_validator("topic")
    @classmethod
    def _is_template(cls, topic: str) -> str:
        TopicTemplate(topic)
        return topic

    @model_validator(mode="after")
    def _is_guarded(self) -> Self:
        """Refuse what contradicts itself, and a door that is open without anyone having said so."""
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together")
        if self.client_ca_file is not None and self.tls_cert_file is None:
            faults.append("client_ca_file needs TLS: give tls_cert_file and tls_key_file")
        if self.client_crl_file is not None and self.client_ca_file is None:
            faults.append("client_crl_file revokes certificates of client_ca_file; give that too")
        if self.named_by == "username":
            if self.passwords_file is None and (self.identity is not None or self.publish_as == "self"):
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
        faults += self._faults_of_anonymity()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults_of_anonymity(self) -> list[str]:
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
        return self.passwords_file is not None or self.client_ca_file is not None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def admits_anonymous(self) -> bool:
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
