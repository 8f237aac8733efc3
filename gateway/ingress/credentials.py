"""The password file of devices: its form, its hashes, and changes to it.

One line a device, `name:scrypt$ln=10,r=8,p=1$SALT$KEY`; empty lines and those that begin with `#` are kept
as they are. `ln` is the base-2 logarithm of scrypt's cost; SALT and KEY are base64 without padding. Each line
has its own cost, because passwords differ: a generated one has 160 random bits, which no search finds however
cheap the hash, while one that a person chose is worth `COST_CHOSEN`. scrypt is OpenSSL's (`hashlib.scrypt`).

A file is replaced as a whole. A new one is readable by its owner only; an old one keeps its owner and group.
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

from gateway.ingress.topics import NAME_MAX_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COST_GENERATED: Final = 10
COST_CHOSEN: Final = 14
CHOSEN_MIN_CHARACTERS: Final = 12

_SALT_BYTES = 16
_KEY_BYTES = 32
_GENERATED_BYTES = 20
_MEMORY_MAX_BYTES = 1 << 26
_ENTRY = re.compile(
    r"scrypt\$ln=(\d{1,2}),r=(\d{1,2}),p=(\d{1,2})\$([A-Za-z0-9+/]{11,})\$([A-Za-z0-9+/]{22,})"
)
_NOT_IN_A_NAME = re.compile(r"[:/+#\s\x00-\x1f\x7f-\x9f]")


class CredentialsFault(Exception):  # noqa: N818 - a fault of a file, like SettingsFault
    """The password file cannot be read or written, or a line of it makes no sense."""


class PasswordHash(NamedTuple):
    """A password as it is stored: scrypt's cost (n = 2**ln, r, p), the salt, and the key derived."""

    ln: int
    r: int
    p: int
    salt: bytes
    key: bytes

    def __str__(self) -> str:
        return f"scrypt$ln={self.ln},r={self.r},p={self.p}${_encoded(self.salt)}${_encoded(self.key)}"


def hash_of(password: bytes, *, ln: int, salt: bytes | None = None) -> PasswordHash:
    """Hash a password at a cost of 2**ln KiB of memory, with a new salt unless one is given."""
    blank = PasswordHash(ln, 8, 1, salt or secrets.token_bytes(_SALT_BYTES), b"\0" * _KEY_BYTES)
    return blank._replace(key=_derived(blank, password))


def matches(stored: PasswordHash, password: bytes) -> bool:
    """Whether a password is the one stored. Takes as long either way, without the interpreter lock."""
    return hmac.compare_digest(stored.key, _derived(stored, password))


def generated_password() -> str:
    """A password of 160 random bits, in characters that any device can be given."""
    return secrets.token_urlsafe(_GENERATED_BYTES)


def fault_in_name(name: str) -> str | None:
    """Why a device cannot have this name, or None. A name is also a sensor_id, hence a level of a topic."""
    if not 0 < len(name) <= NAME_MAX_CHARACTERS:
        return f"a device's name has 1 to {NAME_MAX_CHARACTERS} characters"
    if _NOT_IN_A_NAME.search(name):
        return "a device's name is without space, control character, and any of : / + #"
    return None


def parse(text: str, source: str) -> dict[str, PasswordHash]:
    """The devices of a file's text.

    Raises:
        CredentialsFault: naming `source` and the line.
    """
    devices: dict[str, PasswordHash] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if _is_comment(line):
            continue
        name, _, stored = line.strip().partition(":")
        fault = fault_in_name(name)
        if fault is None and name in devices:
            fault = f"{name} has a line already"
        if fault is not None:
            raise CredentialsFault(f"{source}: line {number}: {fault}")
        try:
            devices[name] = _parsed(stored)
        except ValueError as invalid:
            raise CredentialsFault(
                f"{source}: line {number}: expected {name}:scrypt$ln=N,r=8,p=1$SALT$KEY, "
                f"as `tidegate device add` writes it ({invalid})"
            ) from invalid
    return devices


def read(path: Path) -> dict[str, PasswordHash]:
    """The devices of a file.

    Raises:
        CredentialsFault: it is not there, cannot be read, or a line makes no sense.
    """
    return parse(_text_of(path), str(path))


def add(path: Path, name: str, password: str | None = None, *, replace: bool = False) -> str:
    """Give a device a password, generated unless given, and return it: nobody can read it again.

    Raises:
        CredentialsFault: the name or the password is not usable, the device is there already and is not to be
            replaced, or the file cannot be read or written.
    """
    fault = fault_in_name(name)
    if fault is not None:
        raise CredentialsFault(f"{name!r}: {fault}")
    if password is not None and len(password) < CHOSEN_MIN_CHARACTERS:
        raise CredentialsFault(
            f"a password has at least {CHOSEN_MIN_CHARACTERS} characters; leave it to be generated"
        )
    ln = COST_GENERATED if password is None else COST_CHOSEN
    password = password or generated_password()
    line = f"{name}:{hash_of(password.encode(), ln=ln)}"
    with _changing(path):
        lines = _text_of(path, missing="").splitlines()
        there = name in parse("\n".join(lines), str(path))
        if there and not replace:
            raise CredentialsFault(f"{name} is there already; --replace gives it a new password")
        _write(path, [line if _names(old, name) else old for old in lines] if there else [*lines, line])
    return password


def remove(path: Path, name: str) -> bool:
    """Take a device out of the file; whether it was there.

    Raises:
        CredentialsFault: the file cannot be read or written.
    """
    with _changing(path):
        lines = _text_of(path).splitlines()
        there = name in parse("\n".join(lines), str(path))
        if there:
            _write(path, [line for line in lines if not _names(line, name)])
    return there


def _derived(stored: PasswordHash, password: bytes) -> bytes:
    return hashlib.scrypt(
        password,
        salt=stored.salt,
        n=1 << stored.ln,
        r=stored.r,
        p=stored.p,
        maxmem=2 * _MEMORY_MAX_BYTES,
        dklen=len(stored.key),
    )


def _parsed(text: str) -> PasswordHash:
    """The hash a text stands for.

    Raises:
        ValueError: it is none, or one that would cost more than a gateway should spend on a CONNECT.
    """
    found = _ENTRY.fullmatch(text)
    if found is None:
        raise ValueError("not of this form")
    ln, r, p = (int(digits) for digits in found.groups()[:3])
    if not (ln and r and p):
        raise ValueError("a cost of 0")
    if 128 * r * p << ln > _MEMORY_MAX_BYTES:
        raise ValueError(f"128 * r * p * 2**ln is over {_MEMORY_MAX_BYTES}")
    try:
        return PasswordHash(ln, r, p, _decoded(found[4]), _decoded(found[5]))
    except binascii.Error as invalid:
        raise ValueError("salt or key are not base64") from invalid


def _encoded(raw: bytes) -> str:
    return base64.b64encode(raw).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _is_comment(line: str) -> bool:
    return not line.strip() or line.lstrip().startswith("#")


def _names(line: str, name: str) -> bool:
    return not _is_comment(line) and line.strip().partition(":")[0] == name


def _text_of(path: Path, missing: str | None = None) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as fault:
        if missing is not None:
            return missing
        hint = f"`tidegate device add NAME --passwords-file {path}` makes it"
        raise CredentialsFault(f"{path}: there is no such file; {hint}") from fault
    except (OSError, UnicodeDecodeError) as fault:
        raise CredentialsFault(
            f"{path}: cannot be read: {getattr(fault, 'strerror', None) or fault}"
        ) from fault


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[None]:
    """Keep others from changing the file meanwhile: a lock on its folder, which leaves nothing behind."""
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as fault:
        raise CredentialsFault(f"{path}: its folder cannot be opened: {fault.strerror}") from fault
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(path: Path, lines: list[str]) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    like = path if path.exists() else path.parent
    try:
        status = like.stat()
        mode = 0o600 | (status.st_mode & 0o040 if like is path else 0)
        opened = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(opened, "w", encoding="utf-8") as file:
            with contextlib.suppress(PermissionError):  # only root gives files away, and only it needs to
                os.fchown(opened, status.st_uid, status.st_gid)
            os.fchmod(opened, mode)
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(opened)
        draft.replace(path)
    except OSError as fault:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise CredentialsFault(f"{path}: cannot be written: {fault.strerror}") from fault
