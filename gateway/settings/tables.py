"""What every table of the configuration is made of."""

from __future__ import annotations

import ipaddress
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def is_http_url(url: str) -> bool:
    """Whether it is an http:// or https:// address with a host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _http_url(url: str) -> str:
    if not is_http_url(url):
        raise ValueError("must be an http:// or https:// address with a host")
    return url.rstrip("/")


HttpUrl = Annotated[str, AfterValidator(_http_url)]


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and reached by nobody else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def plain_secret_fault(what: str, url: str, secure: str) -> str:
    """Why a secret may not go to an address: it would cross the network readable. "" where it may.

    Args:
        what: the secret, in words.
        url: where it goes.
        secure: how an address begins that encrypts, such as "https://".
    """
    if url.startswith(secure) or is_loopback(urlsplit(url).hostname or ""):
        return ""
    return (
        f"{what} would cross the network readable: use {secure}, or say allow_plain = true where something "
        "else encrypts, as a VPN"
    )


class Table(BaseModel):
    """A table of the file. Unknown keys are faults; the docstring under a key is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    _configured: dict[str, Path] = PrivateAttr(default_factory=dict)

    def hand_over(self, key: str, given: Path) -> None:
        """Have `key` lead to `given`, where systemd put a copy, and remember what the configuration says."""
        self._configured[key] = getattr(self, key)
        setattr(self, key, given)

    def configured(self, key: str) -> Any:
        """What the configuration says of `key`, wherever that was handed over."""
        return self._configured.get(key, getattr(self, key))
