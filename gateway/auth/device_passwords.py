"""The password file of devices: its format, its hashes, and changes to it.

One line per device, `name:scrypt$ln=10,r=8,p=1$SALT$KEY`; empty lines and lines that begin with `#` are
kept. `ln` is the base-2 logarithm of scrypt's cost; SALT and KEY are base64 without padding. A generated
password has 160 random bits and needs little cost (`COST_GENERATED`); one chosen by a person gets
`COST_CHOSEN`. The file is replaced as a whole.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from cloud_sync.runtime.files import replace_file
from gateway.payloads.topics import NAME_MAX_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COST_GENERATED: Final = 10
COST_CHOSEN: Final = 14
CHOSEN_MIN_CHARACTERS: Final = 12

_SCRYPT_MEMORY_MAX_BYTES = 1 << 26
_HASH_PATTERN = re.compile(
    r"scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]{11,})\$([A-Za-z0-9+/]{22,})"
)
_INVALID_NAME_CHARACTERS = re.compile(r"[:/+#\s\x00-\x1f\x7f-\x9f]")


class PasswordFileError(Exception):
    """The password file cannot be read or written, or a line of it is invalid."""


class PasswordHash(NamedTuple):
    """A stored password: scrypt's cost (n = 2**ln, r, p), the salt, and the derived key."""

    ln: int
    r: int
    p: int
    salt: bytes
    key: bytes

    def __str__(self) -> str:
        salt, key = _encode_base64(self.salt), _encode_base64(self.key)
        return f"scrypt$ln={self.ln},r={self.r},p={self.p}${salt}${key}"


def hash_password(password: bytes, *, ln: int, salt: bytes | None = None) -> PasswordHash:
    """Hash a password at a cost of 2**ln KiB of memory, with a new salt unless one is given."""
    blank = PasswordHash(ln, 8, 1, salt or secrets.token_bytes(16), b"\0" * 32)
    return blank._replace(key=_derive_key(blank, password))


def verify_password(stored: PasswordHash, password: bytes) -> bool:
    """Whether a password is the one stored. Takes as long either way, without the interpreter lock."""
    return hmac.compare_digest(stored.key, _derive_key(stored, password))


def find_device_name_fault(name: str) -> str | None:
    """Why a device cannot have this name, or None. A name is also a sensor_id, hence a level of a topic."""
    if not 0 < len(name) <= NAME_MAX_CHARACTERS:
        return f"a device's name has 1 to {NAME_MAX_CHARACTERS} characters"
    if _INVALID_NAME_CHARACTERS.search(name):
        return "a device's name is without space, control character, and any of : / + #"
    return None


def parse_password_file(text: str, source: str) -> dict[str, PasswordHash]:
    """The devices of a file's text; PasswordFileError names `source` and the line."""
    devices: dict[str, PasswordHash] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if _is_comment(line):
            continue
        name, _, stored = line.strip().partition(":")
        fault = find_device_name_fault(name)
        if fault is None and name in devices:
            fault = f"{name} has a line already"
        if fault is not None:
            raise PasswordFileError(f"{source}: line {number}: {fault}")
        try:
            devices[name] = _parse_hash(stored)
        except ValueError as invalid:
            raise PasswordFileError(
                f"{source}: line {number}: expected {name}:scrypt$ln=N,r=8,p=1$SALT$KEY, "
                f"as `tidegate device add` writes it ({invalid})"
            ) from invalid
    return devices


def read_password_file(path: Path) -> dict[str, PasswordHash]:
    """The devices of a file; PasswordFileError when it is missing, unreadable or invalid."""
    return parse_password_file(_read_text(path), str(path))


def add_device(path: Path, name: str, password: str | None = None, *, replace: bool = False) -> str:
    """Give a device a password, generated unless given, and return it: it cannot be read again."""
    fault = find_device_name_fault(name)
    if fault is not None:
        raise PasswordFileError(f"{name!r}: {fault}")
    if password is not None and len(password) < CHOSEN_MIN_CHARACTERS:
        raise PasswordFileError(
            f"a password has at least {CHOSEN_MIN_CHARACTERS} characters; leave it to be generated"
        )
    ln = COST_GENERATED if password is None else COST_CHOSEN
    password = password or secrets.token_urlsafe(20)
    line = f"{name}:{hash_password(password.encode(), ln=ln)}"
    with _locked_for_change(path):
        lines = _read_text(path, missing="").splitlines()
        there = name in parse_password_file("\n".join(lines), str(path))
        if there and not replace:
            raise PasswordFileError(f"{name} is there already; --replace gives it a new password")
        changed = [line if _is_line_of(old, name) else old for old in lines]
        _write_lines(path, changed if there else [*lines, line])
    return password


def remove_device(path: Path, name: str) -> bool:
    """Remove a device from the file; whether it was there."""
    with _locked_for_change(path):
        lines = _read_text(path).splitlines()
        there = name in parse_password_file("\n".join(lines), str(path))
        if there:
            _write_lines(path, [line for line in lines if not _is_line_of(line, name)])
    return there


def _derive_key(stored: PasswordHash, password: bytes) -> bytes:
    return hashlib.scrypt(
        password,
        salt=stored.salt,
        n=1 << stored.ln,
        r=stored.r,
        p=stored.p,
        maxmem=2 * _SCRYPT_MEMORY_MAX_BYTES,
        dklen=len(stored.key),
    )


def _parse_hash(text: str) -> PasswordHash:
    """ValueError for an invalid hash, or one that costs more than a gateway should spend on a CONNECT."""
    found = _HASH_PATTERN.fullmatch(text)
    if found is None:
        raise ValueError("not of this form")
    ln, r, p = (int(digits) for digits in found.groups()[:3])
    if not (ln and r and p):
        raise ValueError("a cost of 0")
    if 128 * r * p << ln > _SCRYPT_MEMORY_MAX_BYTES:
        raise ValueError(f"128 * r * p * 2**ln is over {_SCRYPT_MEMORY_MAX_BYTES}")
    try:
        return PasswordHash(ln, r, p, _decode_base64(found[4]), _decode_base64(found[5]))
    except binascii.Error as invalid:
        raise ValueError("salt or key are not base64") from invalid


def _encode_base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


def _decode_base64(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _is_comment(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _is_line_of(line: str, name: str) -> bool:
    return not _is_comment(line) and line.strip().partition(":")[0] == name


def _read_text(path: Path, missing: str | None = None) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as fault:
        if missing is not None:
            return missing
        hint = f"`tidegate device add NAME --passwords-file {path}` makes it"
        raise PasswordFileError(f"{path}: there is no such file; {hint}") from fault
    except (OSError, UnicodeDecodeError) as fault:
        raise PasswordFileError(
            f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}"
        ) from fault


@contextlib.contextmanager
def _locked_for_change(path: Path) -> Iterator[None]:
    """Hold a lock against other changes, on the folder, so that no lock file stays behind."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as fault:
        raise PasswordFileError(f"{path}: its folder cannot be opened: {fault.strerror}") from fault
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write_lines(path: Path, lines: list[str]) -> None:
    """Replace the file: a new one is readable by its owner only, an existing one keeps owner and group."""
    try:
        owner, mode = path.parent.stat(), 0o600
        if path.exists():
            owner = path.stat()
            mode |= owner.st_mode & 0o040
        replace_file(path, "".join(f"{line}\n" for line in lines).encode(), mode, owner=owner)
    except OSError as error:
        raise PasswordFileError(f"{path}: cannot be written: {error.strerror}") from error
