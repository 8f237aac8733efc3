"""A spool opened read-only by a tool, live or stopped, on a disk that can be written or on one that cannot.

Nothing here changes the spool. On a disk that can be written SQLite may leave an empty `-wal` and a `-shm`
beside a stopped spool; the gateway takes them over. Long reads report to a `ProgressListener`.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Protocol

from gateway.spool.database import APPLICATION_ID, FORMAT_VERSION, open_read_only
from gateway.spool.errors import SpoolAccessError, SpoolTooNewError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class ProgressListener(Protocol):
    """Told what is being done, how much there is to do, and what of it is done."""

    def name(self, title: str) -> None:
        """What is being done from now on."""
        ...

    def total(self, total: int) -> None:
        """How much there is to do in all."""
        ...

    def advance(self, done: int = 1) -> None:
        """So much more is done."""
        ...


class NoProgress:
    """A watcher that does not look."""

    def name(self, title: str) -> None:
        """Nothing."""

    def total(self, total: int) -> None:
        """Nothing."""

    def advance(self, done: int = 1) -> None:
        """Nothing."""


_PRIMARY_CODE = 0xFF
_NO_SHARED_MEMORY = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR})


@contextmanager
def open_spool_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A read-only connection to the spool at `path`; SQLite's own errors inside become `SpoolFailed`.

    Raises:
        SpoolFailed: there is no spool, it is something else, or it cannot be read; says which.
        SpoolTooNew: a later release wrote it.
    """
    if path.is_dir():
        raise SpoolAccessError(f"{path}: is a folder; name the spool's file, such as {path / 'spool.db'}")
    try:
        connection = open_read_only(path)
    except SpoolAccessError as fault:
        connection = _open_immutable(path, fault)
    with closing(connection):
        try:
            _require_spool(path, connection)
            yield connection
        except sqlite3.Error as fault:
            raise SpoolAccessError(f"{path}: {fault}") from fault


def is_spool_live(path: Path) -> bool | None:
    """Whether a gateway holds this spool; None when its lock file may not be looked at.

    Tries the lock for an instant, shared with other tools.
    """
    try:
        fd = os.open(path.with_name(path.name + ".lock"), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def wal_size_bytes(path: Path) -> int:
    """Bytes of the write-ahead log, 0 when there is none."""
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except OSError:
        return 0


def _open_immutable(path: Path, fault: SpoolAccessError) -> sqlite3.Connection:
    """A spool on a medium that cannot be written, where SQLite cannot make its shared memory.

    Raises:
        SpoolFailed: the reason is another one, or the log holds commits that would not be seen.
    """
    code = getattr(fault.__cause__, "sqlite_errorcode", 0) & _PRIMARY_CODE
    if code not in _NO_SHARED_MEMORY or not path.is_file() or not os.access(path, os.R_OK):
        raise fault
    if wal_size_bytes(path):
        raise SpoolAccessError(
            f"{path}: its folder cannot be written, and {path.name}-wal holds commits that would "
            "not be seen. Copy the spool and its -wal to a folder that can be written, and name the copy"
        ) from fault
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None
    )
    try:
        connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error:
        connection.close()
        raise fault from None
    return connection


def _require_spool(path: Path, connection: sqlite3.Connection) -> None:
    (kind,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if kind != APPLICATION_ID:
        raise SpoolAccessError(
            f"{path}: is no spool (application id {kind:#x}; a spool has {APPLICATION_ID:#x})"
        )
    if version > FORMAT_VERSION:
        raise SpoolTooNewError(
            f"{path}: has format version {version}; this release reads up to {FORMAT_VERSION}. "
            "Install the release that wrote it, or a later one."
        )
