"""`[status]`: the gateway's own HTTP endpoint, and who may look at it."""

from __future__ import annotations

import ipaddress
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Self

from pydantic import Field, model_validator

from gateway.ingress.tls import TlsFiles
from gateway.settings.tables import Port, Seconds, Table


class Status(Table):
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
    def _is_guarded(self) -> Self:
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
