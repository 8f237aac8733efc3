"""`[[ingress.subscribe]]`: an existing broker."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from gateway.ingress.subscription import address_of, check_filter
from gateway.settings.tables import Name, Table, plain_secret_fault


class Subscribe(Table):
    """An existing broker that the gateway reads."""

    url: str = Field(examples=["mqtts://broker.example:8883"])
    """mqtt://HOST[:PORT] or mqtts://HOST[:PORT]"""
    filters: Annotated[list[str], Field(min_length=1)] = Field(
        examples=[["sensors/#", "$share/gateways/plant/#"]]
    )
    """Topic filters to subscribe to. With $share/GROUP/ in front several gateways share the load."""
    unsubscribe: list[str] = Field(default_factory=list)
    """Filters of earlier times that the broker's session still has, to be taken off."""
    name: Name | None = Field(default=None, examples=["broker.example"])
    """What it is called in the status and in logs; its host without it."""
    client_id: str | None = Field(default=None, examples=["tidegate-barn-1"])
    """The session's name at the broker, its own for every table; tidegate-GATEWAY without it."""
    qos: Annotated[int, Field(ge=0, le=2)] = 1
    """The quality of service to subscribe with. With 0 the broker keeps nothing while this gateway is away.
    """
    retained: bool = False
    """Whether messages that the broker retains are taken at the first subscription."""
    username: str | None = Field(default=None, examples=["barn-1"])
    """The user name to show."""
    password_file: Path | None = Field(default=None, examples=["broker.password"])
    """A file whose first line is the password."""
    allow_plain: bool = False
    """Whether the password may go to another machine without TLS: only where something else encrypts."""
    ca_file: Path | None = Field(default=None, examples=["broker-ca.pem"])
    """PEM: trust these authorities instead of the system's."""
    cert_file: Path | None = Field(default=None, examples=["gateway.pem"])
    """PEM: this gateway's certificate."""
    key_file: Path | None = Field(default=None, examples=["gateway.key"])
    """PEM: the key of cert_file, without a password."""
    server_name: str | None = Field(default=None, examples=["broker.example"])
    """The name the broker's certificate is for, where it is not the address's."""
    receive_maximum: Annotated[int, Field(ge=1, le=65_535)] = 5_000
    """Messages that may be on their way without an acknowledgement."""
    session_expiry_s: Annotated[int, Field(ge=0, le=4_294_967_295)] = 2_592_000
    """How long the broker keeps the session, and what comes for it, while this gateway is away."""
    keep_alive_s: Annotated[int, Field(ge=0, le=65_535)] = 60
    """The longest silence before the connection is tried; 0 for never."""
    max_packet_bytes: Annotated[int, Field(ge=256, le=268_435_455)] = 8 << 20
    """The largest packet taken."""
    broker_reviewed: bool = False
    """Whether the broker's own limits were looked at; then the warning at the start is left out."""

    @field_validator("url")
    @classmethod
    def _is_address(cls, url: str) -> str:
        address_of(url)
        return url

    @field_validator("filters", "unsubscribe")
    @classmethod
    def _are_filters(cls, filters: list[str]) -> list[str]:
        for topic_filter in filters:
            check_filter(topic_filter)
        return filters

    @model_validator(mode="after")
    def _in_pairs(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if self.password_file is not None and not self.allow_plain:
            fault = plain_secret_fault("the password", self.url, "mqtts://")
            if fault:
                raise ValueError(fault)
        return self
