"""What tables of the configuration are made of: the base class, the types of keys, and their markers.

A key says everything about itself where it is declared: its type, default and example, its description (the
docstring under it), what kind of file it names (`FileRole`), and what changing it takes (`Reloadable`,
`Restart`; the innermost marker counts, and a key without any takes a restart).
"""

from __future__ import annotations

import ipaddress
import math
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NamedTuple, TypeVar, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr

from cloud_sync.delivery.lanes import find_time_zone
from cloud_sync.destinations.http_client import build_client_tls_context
from cloud_sync.runtime.secret_files import read_secret
from gateway.auth.tls import TlsFileError, TlsFiles, build_server_context
from gateway.processing.series_pattern import Pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from gateway.ingress.committer import Committer
    from gateway.ingress.source import Source
    from gateway.payloads.decoder_registry import RuleSet
    from gateway.processing.clock import GatewayClock
    from gateway.spool.spool import Spool

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Restart:
    """Marks a key or table that takes a restart to change, with the reason."""

    reason: str


DEFAULT_RESTART_REASON: Final = "it is read once, at the start"
PORT_BOUND: Final = Restart("the port is bound")
Reloadable = Annotated[T, Restart("")]
"""A key or table that a running gateway can reload."""


class FileRole(Enum):
    """What a file is for, and so how it is checked and who may read it."""

    DATA = auto()
    SECRET = auto()
    HASHES = auto()
    CERTIFICATE = auto()
    KEY = auto()


DataPath = Annotated[Path, FileRole.DATA]
SecretFile = Annotated[Path, FileRole.SECRET]
HashesFile = Annotated[Path, FileRole.HASHES]
CertificateFile = Annotated[Path, FileRole.CERTIFICATE]
KeyFile = Annotated[Path, FileRole.KEY]


def parse_timestamp(text: str) -> datetime:
    """A time with its offset; ValueError for anything else."""
    with suppress(ValueError):
        at = datetime.fromisoformat(text)
        if at.tzinfo is not None:
            return at
    raise ValueError("must be a time with its offset, such as 2026-05-01T12:00:00Z")


def to_microseconds(seconds: float) -> int:
    """Whole microseconds, limited to what 64 bits hold in sums."""
    return min(round(seconds * 1e6), 1 << 60)


def is_http_url(url: str) -> bool:
    """Whether it is an http:// or https:// address with a host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unencrypted_secret_error(what: str, url: str, secure: str) -> str:
    """Why `what`, a secret, may not be sent to `url`, which does not begin with `secure`; "" where it may."""
    if url.startswith(secure) or is_loopback(urlsplit(url).hostname or ""):
        return ""
    return (
        f"{what} would cross the network readable: use {secure}, or set allow_plain = true where something "
        "else encrypts, such as a VPN"
    )


def find_duplicates(names: list[str]) -> str:
    """Names that occur more than once, as text; "" when there are none."""
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def _validate_http_url(url: str) -> str:
    if not is_http_url(url):
        raise ValueError("must be an http:// or https:// address with a host")
    return url.rstrip("/")


def parseable_by(parse: Callable[[str], object]) -> AfterValidator:
    """Accept a text that `parse` accepts; its ValueError is the fault."""

    def validate(text: str) -> str:
        parse(text)
        return text

    return AfterValidator(validate)


def _reject_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("must be a number, inf or -inf")
    return value


Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(gt=0)]
CountOrZero = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Limit = Annotated[float, AfterValidator(_reject_nan)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
HttpUrl = Annotated[str, AfterValidator(_validate_http_url)]
Timestamp = Annotated[str, parseable_by(parse_timestamp)]
TimeZone = Annotated[str, parseable_by(find_time_zone)]
SeriesPattern = Annotated[str, parseable_by(Pattern.parse)]


class FileFault(NamedTuple):
    """Why a file that `key` names cannot be used; `allowed` is what would be right, "" if `what` says it."""

    key: str
    what: str
    allowed: str = ""


class Table(BaseModel):
    """A table of the file. Unknown keys are faults; the docstring under a key is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    _configured: dict[str, Path] = PrivateAttr(default_factory=dict)

    def replace_path(self, key: str, path: Path) -> None:
        """Use `path`, a copy that systemd provides, for what `key` names."""
        self._configured[key] = getattr(self, key)
        setattr(self, key, path)

    def configured_value(self, key: str) -> object:
        """What the configuration says of `key`, even if systemd provides a copy of the file."""
        return self._configured.get(key, getattr(self, key))

    def list_files(self, *roles: FileRole) -> Iterator[tuple[str, FileRole, Path]]:
        """Key, role and path of every file that this table names; of these roles only, if any are given."""
        for key, field in type(self).model_fields.items():
            value = getattr(self, key)
            if isinstance(value, Path):
                role = _find_role(field.annotation, field.metadata)
                if not roles or role in roles:
                    yield key, role, value

    def check_files(self) -> Iterator[FileFault]:
        """Whether the files can be used: by default that those with a secret hold one."""
        for key, _, path in self.list_files(FileRole.SECRET):
            yield from check_secret_file(key, path)

    def require_together(self, *keys: str) -> None:
        """Raise ValueError if only some of these keys are given."""
        if len({getattr(self, key) is None for key in keys}) > 1:
            raise ValueError(f"{' and '.join(keys)} go together")


def _find_role(annotation: object, metadata: Iterable[object] = ()) -> FileRole:
    """The role in an annotation such as `SecretFile | None`."""
    inner = chain.from_iterable(get_args(argument) for argument in get_args(annotation))
    return next((entry for entry in chain(metadata, inner) if isinstance(entry, FileRole)), FileRole.DATA)


def check_secret_file(key: str, path: Path) -> Iterator[FileFault]:
    """Whether the first line of a file can be read and is not empty."""
    allowed = "a file whose first line is the secret"
    try:
        if not read_secret(path):
            yield FileFault(key, f"{path} is empty", allowed)
    except (OSError, UnicodeDecodeError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        yield FileFault(key, f"{path} cannot be read: {reason}", allowed)


def check_client_tls(
    ca_file: Path | None, cert_file: Path | None = None, key_file: Path | None = None
) -> Iterator[FileFault]:
    """Whether each file can be used for a TLS client."""
    for key, path, files in (
        ("ca_file", ca_file, (ca_file, None, None)),
        ("cert_file", cert_file, (None, cert_file, key_file)),
    ):
        try:
            if path is not None:
                build_client_tls_context(*files)
        except OSError as fault:
            what = f"{path} cannot be used: {fault.strerror or fault}"
            yield FileFault(key, what, "PEM, a key without a password")


class ServerTable(Table):
    """An address that the gateway serves, with or without TLS."""

    if TYPE_CHECKING:  # each server declares these keys in its own order
        host: str
        tls_cert_file: Path | None
        tls_key_file: Path | None

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def tls_files(self) -> TlsFiles | None:
        """The files that the TLS context is made from; None without TLS."""
        if self.tls_cert_file is None or self.tls_key_file is None:
            return None
        return TlsFiles(certificate=self.tls_cert_file, key=self.tls_key_file)

    def check_files(self) -> Iterator[FileFault]:
        """Whether the TLS files can be used."""
        try:
            if self.tls_files is not None:
                build_server_context(self.tls_files)
        except TlsFileError as fault:
            key = next((key for key, _, path in self.list_files() if path == fault.path), "tls_cert_file")
            yield FileFault(key, str(fault))


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source of readings may be built from; each uses what it needs."""

    gateway_id: str
    committer: Committer
    rules: RuleSet
    spool: Spool
    clock: GatewayClock
    stop_within_s: float


class SourceTable(Table):
    """A table under `[ingress]` that stands for a source of readings."""

    def build_source(self, context: SourceContext) -> Source:
        """The source, not started yet; OSError if a file cannot be used."""
        raise NotImplementedError
