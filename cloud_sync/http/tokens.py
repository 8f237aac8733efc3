"""Bearer tokens with scopes: a file of lines `name sha256-of-token [scope]`; `#` starts a comment.

Comments are not kept when the file is written. Scope `batches`, the default: a gateway sends its own wire
batches and sees its own progress. `readings`: a client sends plain readings. `view`: sees every gateway. A
name may have several tokens, so that a new one can be in use before the old one is revoked. A token is 32
random bytes, so a plain SHA-256 of it cannot be searched.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import stat
import time
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from cloud_sync.runtime.files import replace_file
from cloud_sync.runtime.watched_file import WatchedFile

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[^\s#/\x00-\x1f]{1,128}")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_WORDS = 3
_HEADING = "# name sha256-of-token [scope]; written by `tidegate ingest token`\n"

Scope = Literal["batches", "readings", "view"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class TokenFileError(Exception):
    """The file of tokens cannot be read or written, or a line of it is invalid."""


class TokenEntry(NamedTuple):
    """One line of the file."""

    name: str
    token_hash: str
    scope: Scope = "batches"


def parse_tokens(text: str, source: str) -> list[TokenEntry]:
    """The entries of a file's text."""
    entries = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        name, token_hash, scope = (words + ["", "batches"][len(words) - 1 :])[:_MAX_WORDS]
        known = next((s for s in SCOPES if s == scope), None)
        if len(words) > _MAX_WORDS or known is None or not _HASH.fullmatch(token_hash):
            raise TokenFileError(
                f"{source}: line {number}: expected a name, 64 hexadecimal digits, "
                f"and perhaps a scope ({', '.join(SCOPES)})"
            )
        entries.append(TokenEntry(name, token_hash, known))
    return entries


def read_tokens(path: Path) -> list[TokenEntry]:
    """The entries of a file, none when there is no such file; TokenFileError when it cannot be used."""
    try:
        return parse_tokens(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as fault:
        raise TokenFileError(f"{path}: cannot be read: {getattr(fault, 'strerror', fault)}") from fault


def add_token(path: Path, name: str, scope: Scope = "batches") -> str:
    """Add a token for a gateway or client and return it; it cannot be read again."""
    if not _NAME.fullmatch(name):
        raise TokenFileError(
            f"{name!r} is no gateway_id: expected up to 128 characters without space, # or /"
        )
    token = secrets.token_urlsafe(32)
    _write_tokens(path, [*read_tokens(path), TokenEntry(name, _hash_token(token), scope)])
    return token


def revoke_tokens(path: Path, name: str) -> int:
    """Remove every token of a gateway or client; returns how many there were."""
    entries = read_tokens(path)
    remaining = [entry for entry in entries if entry.name != name]
    if len(remaining) < len(entries):
        _write_tokens(path, remaining)
    return len(entries) - len(remaining)


class TokenFile:
    """The tokens of a running service; a changed file counts from the next request on.

    `command` is named in the TokenFileError when there is no such file.
    """

    def __init__(self, path: Path, command: str = "tidegate ingest token add GATEWAY") -> None:
        self._path = path
        self._command = command
        self._entries = WatchedFile([path], self._read, TokenFileError, check_interval_s=0.0)

    def __len__(self) -> int:
        return len(self._entries.current(time.monotonic()))

    def find_entry(self, token: str) -> TokenEntry | None:
        """Whose token it is. Every entry is compared, so the time taken says nothing about the token."""
        presented = _hash_token(token)
        found = None
        for entry in self._entries.current(time.monotonic()):
            if hmac.compare_digest(entry.token_hash, presented):
                found = entry
        return found

    def _read(self) -> list[TokenEntry]:
        if not self._path.exists():
            raise TokenFileError(f"{self._path}: there is no such file; create it with `{self._command}`")
        return read_tokens(self._path)


def _hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _write_tokens(path: Path, entries: list[TokenEntry]) -> None:
    """Replace the file, keeping its owner; in a folder with the setgid bit the group may read a new one."""
    lines = [f"{e.name} {e.token_hash} {e.scope}".removesuffix(" batches") + "\n" for e in entries]
    text = _HEADING + "".join(lines)
    try:
        like = (path if path.exists() else path.parent).stat()
        shared = like.st_mode & (stat.S_ISGID if stat.S_ISDIR(like.st_mode) else stat.S_IRGRP)
        replace_file(path, text.encode(), 0o640 if shared else 0o600, owner=like)
    except OSError as fault:
        raise TokenFileError(f"{path}: cannot be written: {fault.strerror}") from fault
