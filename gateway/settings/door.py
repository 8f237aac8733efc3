"""A door that devices come through: its address, TLS, who may enter and as whom. One table each."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Literal, Self

from pydantic import Field, model_validator

from gateway.ingress.tls import TlsFiles
from gateway.settings.tables import Table, is_loopback


class Door(Table):
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
    def _is_guarded(self) -> Self:
        """Refuse what contradicts itself, and a door that is open without anyone having said so."""
        faults = self._faults_of_files()
        if self.named_by == "username":
            if not self.knows_clients and (self.identity is not None or self.publish_as == "self"):
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
        faults += self._faults_of_plain_passwords()
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults_of_files(self) -> list[str]:
        faults = []
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            faults.append("tls_cert_file and tls_key_file go together")
        if self.client_ca_file is not None and self.tls_cert_file is None:
            faults.append("client_ca_file needs TLS: give tls_cert_file and tls_key_file")
        if self.client_crl_file is not None and self.client_ca_file is None:
            faults.append("client_crl_file revokes certificates of client_ca_file; give that too")
        return faults

    def _faults_of_plain_passwords(self) -> list[str]:
        readable = self.knows_clients and self.tls_cert_file is None and not self.is_loopback
        if not readable or self.allow_plain_passwords:
            return []
        what = (
            f"passwords would cross the network readable on {self.host or 'every address'}: give "
            "tls_cert_file and tls_key_file; where the network itself is trusted, say so with "
            "allow_plain_passwords = true"
        )
        return [what]

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
        return self.knows_clients or self.client_ca_file is not None

    @property
    def knows_clients(self) -> bool:
        """Whether there are secrets that tell who a client is."""
        return self.passwords_file is not None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

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
