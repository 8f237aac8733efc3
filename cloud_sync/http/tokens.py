"""Tokens: a text file of `name sha256-of-token [scope]` lines; `#` starts a comment.

Scope `batches`, the default, is a gateway's: it may send its own wire batches and see its own progress. Scope
`readings` is a client's that is no gateway: it may send plain readings. Scope `view` may see every gateway.
A name may have several tokens, so that a new one can be in use before the old one is revoked. Only hashes are
stored: a token is 32 random bytes, so a plain SHA-256 cannot be searched. A running service notices a changed
file at its next request.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from pathlib import Path

_NAME = re.compile(r"[^\s#/\x00-\x1f]{1,128}")
_HASH = re.compile(r"[0-9a-f]{64}")
_TOKEN_BYTES = 32
_MAX_WORDS = 3
_HEADING = "# name sha256-of-token [scope]; written by `tidegate ingest token`\n"

Scope = Literal["batches", "readings", "view"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


class TokenFileError(Exception):
    """The file of tokens cannot be read or written, or a line of it makes no sense."""


class TokenEntry(NamedTuple):
    """One line: a gateway or client, the hash of one of its tokens, and what it may do with that."""

    name: str
    token_hash: str
    scope: Scope = "batches"


def parse_tokens(text: str, source: str) -> list[TokenEntry]:
    """The entries of a file's text.

    Raises:
        TokensFault: naming `source` and the line.
    """
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
    """The entries of a file; none when there is no such file.

    Raises:
        TokensFault: it cannot be read, or a line makes no sense.
    """
    try:
        return parse_tokens(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as fault:
        raise TokenFileError(f"{path}: cannot be read: {getattr(fault, 'strerror', fault)}") from fault


def add_token(path: Path, name: str, scope: Scope = "batches") -> str:
    """Give a gateway or client one more token and return it: nobody can read it again.

    Raises:
        TokensFault: the name is not usable, or the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise TokenFileError(
            f"{name!r} is no gateway_id: expected up to 128 characters without space, # or /"
        )
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    _write_tokens(path, [*read_tokens(path), TokenEntry(name, _hash_token(token), scope)])
    return token


def revoke_tokens(path: Path, name: str) -> int:
    """Take away every token of a gateway or client; returns how many there were.

    Raises:
        TokensFault: the file cannot be read or written.
    """
    entries = read_tokens(path)
    kept = [entry for entry in entries if entry.name != name]
    if len(kept) < len(entries):
        _write_tokens(path, kept)
    return len(entries) - len(kept)


class TokenFile:
    """The tokens of a running service, read again when the file changes; `made_by` is the command to name."""

    def __init__(self, path: Path, made_by: str = "tidegate ingest token add GATEWAY") -> None:
        self._path = path
        self._made_by = made_by
        self._stamp: tuple[int, int, int] | None = None
        self._entries: list[TokenEntry] = []

    def refresh(self) -> int:
        """Read the file if it changed; returns the number of entries.

        Raises:
            TokensFault: it cannot be used; the entries read before stay in force.
        """
        try:
            status = self._path.stat()
        except OSError as fault:
            hint = f"; `{self._made_by}` makes it"
            raise TokenFileError(f"{self._path}: cannot be read: {fault.strerror}{hint}") from fault
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if stamp != self._stamp:
            self._entries = read_tokens(self._path)
            self._stamp = stamp
        return len(self._entries)

    def entry_of(self, token: str) -> TokenEntry | None:
        """Whose token it is. Every entry is compared, in time that says nothing of the token."""
        presented = _hash_token(token)
        found = None
        for entry in self._entries:
            if hmac.compare_digest(entry.token_hash, presented):
                found = entry
        return found


def _hash_token(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _format_entry(entry: TokenEntry) -> str:
    scope = "" if entry.scope == "batches" else f" {entry.scope}"
    return f"{entry.name} {entry.token_hash}{scope}\n"


def _write_tokens(path: Path, entries: list[TokenEntry]) -> None:
    """Replace the file as a whole, for the owner it had or its folder has.

    A folder that passes its group on has the group read it. Comments of a person are not kept.
    """
    text = _HEADING + "".join(map(_format_entry, entries))
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        like = (path if path.exists() else path.parent).stat()
        shared = like.st_mode & (stat.S_ISGID if stat.S_ISDIR(like.st_mode) else stat.S_IRGRP)
        opened = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(opened, "w", encoding="utf-8") as file:
            with contextlib.suppress(PermissionError):  # only root gives files away, and only it needs to
                os.fchown(opened, like.st_uid, like.st_gid)
            os.fchmod(opened, 0o640 if shared else 0o600)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as fault:
        raise TokenFileError(f"{path}: cannot be written: {fault.strerror}") from fault
