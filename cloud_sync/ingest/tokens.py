"""Tokens of gateways: a text file of `gateway_id sha256-of-token` lines; `#` starts a comment.

A gateway may have several tokens, so that a new one can be in use before the old one is revoked. Only hashes
are stored: a token is 32 random bytes, so a plain SHA-256 cannot be searched. A running service notices a
changed file at its next request.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

_GATEWAY_ID = re.compile(r"[^\s#/\x00-\x1f]{1,128}")
_HASH = re.compile(r"[0-9a-f]{64}")
_TOKEN_BYTES = 32
_HEADING = "# gateway_id sha256-of-token; written by `tidegate ingest token`\n"


class TokensFault(Exception):  # noqa: N818 - a fault of a file, like SettingsFault
    """The file of tokens cannot be read or written, or a line of it makes no sense."""


class Entry(NamedTuple):
    """One line: a gateway and the hash of one of its tokens."""

    gateway_id: str
    token_hash: str


def parse(text: str, source: str) -> list[Entry]:
    """The entries of a file's text.

    Raises:
        TokensFault: naming `source` and the line.
    """
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not _HASH.fullmatch(words[1]):  # noqa: PLR2004 - the two words of an entry
            raise TokensFault(f"{source}: line {number}: expected a gateway_id and 64 hexadecimal digits")
        entries.append(Entry(*words))
    return entries


def read(path: Path) -> list[Entry]:
    """The entries of a file; none when there is no such file.

    Raises:
        TokensFault: it cannot be read, or a line makes no sense.
    """
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as fault:
        raise TokensFault(f"{path}: cannot be read: {getattr(fault, 'strerror', fault)}") from fault


def add(path: Path, gateway_id: str) -> str:
    """Give a gateway one more token and return it: nobody can read it again.

    Raises:
        TokensFault: the gateway_id is not usable, or the file cannot be read or written.
    """
    if not _GATEWAY_ID.fullmatch(gateway_id):
        raise TokensFault(
            f"{gateway_id!r} is no gateway_id: expected up to 128 characters without space, # or /"
        )
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    _write(path, [*read(path), Entry(gateway_id, _hash_of(token))])
    return token


def revoke(path: Path, gateway_id: str) -> int:
    """Take away every token of a gateway; returns how many there were.

    Raises:
        TokensFault: the file cannot be read or written.
    """
    entries = read(path)
    kept = [entry for entry in entries if entry.gateway_id != gateway_id]
    if len(kept) < len(entries):
        _write(path, kept)
    return len(entries) - len(kept)


class TokenFile:
    """The tokens of a running service, read again when the file changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._entries: list[Entry] = []

    def refresh(self) -> int:
        """Read the file if it changed; returns the number of entries.

        Raises:
            TokensFault: it cannot be used; the entries read before stay in force.
        """
        try:
            status = self._path.stat()
        except OSError as fault:
            hint = "; `tidegate ingest token add GATEWAY` makes it"
            raise TokensFault(f"{self._path}: cannot be read: {fault.strerror}{hint}") from fault
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._entries = read(self._path)
            self._stamp = stamp
        return len(self._entries)

    def gateway_of(self, token: str) -> str | None:
        """The gateway a token belongs to. Every entry is compared, in time that says nothing of the token."""
        presented = _hash_of(token)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.token_hash, presented):
                found = entry.gateway_id
        return found


def _hash_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _write(path: Path, entries: list[Entry]) -> None:
    """Replace the file as a whole, readable by its owner only. Comments of a person are not kept."""
    text = _HEADING + "".join(f"{entry.gateway_id} {entry.token_hash}\n" for entry in entries)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with os.fdopen(
            os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
        ) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as fault:
        raise TokensFault(f"{path}: cannot be written: {fault.strerror}") from fault
