"""`[[ingress.subscribe]]`: an existing broker."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator

from gateway.ingress.subscription import address_of, check_filter
from gateway.settings.tables import Name, Table


class Subscribe(Table):
    """An existing broker that the gateway reads."""

    url: str = Field(description="mqtt://HOST[:PORT] or mqtts://HOST[:PORT]")
    filters: Annotated[list[str], Field(min_length=1)]
    unsubscribe: list[str] = Field(default_factory=list)
    name: Name | None = None
    client_id: str | None = None
    qos: Annotated[int, Field(ge=0, le=2)] = 1
    retained: bool = False
    username: str | None = None
    password_file: Path | None = None
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None
    receive_maximum: Annotated[int, Field(ge=1, le=65_535)] = 5_000
    session_expiry_s: Annotated[int, Field(ge=0, le=4_294_967_295)] = 2_592_000
    keep_alive_s: Annotated[int, Field(ge=0, le=65_535)] = 60
    max_packet_bytes: Annotated[int, Field(ge=256, le=268_435_455)] = 8 << 20
    broker_reviewed: bool = False

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
        return self
