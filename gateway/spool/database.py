"""The spool's SQLite file: opened, verified, migrated; one writer thread, a separate reader connection.

Tools open it with `open_spool_read_only`, live or stopped, on a writable disk or a read-only one, and never
change it. Where the disk is writable SQLite may leave an empty `-wal` and a `-shm` beside a
stopped spool; the gateway takes them over. Long reads report to a `ProgressListener`.

Invariants:
- Every write is one function that runs on the writer's thread between BEGIN IMMEDIATE and COMMIT. No
  transaction contains an await, so a cancelled task cannot leave one half done.
- WAL with synchronous=FULL: when `write` returns, its transaction is fsynced (promise 1).
- One process writes: a lock file beside the spool is held from open to close.

`crash_point` marks places where a test may have the process killed: `TIDEGATE_CRASH_AT=name` or `name:n`
sends SIGKILL when the point is passed for the n-th time (default 1); `TIDEGATE_HANG_AT` takes the same and
blocks the thread there for ever. Without the variables a point does nothing.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sqlite3
import time
from contextlib import AsyncExitStack, ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import UUID, uuid4

import aiosqlite

from cloud_sync.runtime import statements
from gateway.spool import salvage
from gateway.spool.errors import SpoolAccessError, SpoolFullError, SpoolInUseError, SpoolTooNewError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

_hang_at = os.environ.pop("TIDEGATE_HANG_AT", "")
_crash_point_name, _, _crash_count_text = (os.environ.pop("TIDEGATE_CRASH_AT", "") or _hang_at).partition(":")
_passes_left = int(_crash_count_text or 1)


def crash_point(name: str) -> None:
    """Mark a place where a test may stop the process; see the module."""
    global _passes_left  # noqa: PLW0603 - one process, one crash
    if name != _crash_point_name:
        return
    _passes_left -= 1
    if _passes_left > 0:
        return
    while _hang_at:
        time.sleep(3600)
    os.kill(os.getpid(), signal.SIGKILL)


FORMAT_VERSION = 1
APPLICATION_ID = 0x54494445  # "TIDE", so that file(1) and a person can tell
SQL = statements.load_statements("gateway.spool", "sql", "statements.sql")

T = TypeVar("T")

_log = logging.getLogger(__name__)
_BUSY_TIMEOUT_S = 30.0
_LATEST_TABLES = {"processing_state", "loss", "outbox", "parked"}
_PRIMARY_CODE = 0xFF
_NO_SHARED_MEMORY = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR})


class _Connection(aiosqlite.Connection):
    """Runs a whole function on the connection's thread, in one hop."""

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        result: T = await self._execute(work, self._conn)  # type: ignore[no-untyped-call]  # aiosqlite's own
        return result

    @classmethod
    async def opened(cls, connector: Callable[[], sqlite3.Connection]) -> Self:
        """Connect with `connector`, on the connection's own thread."""
        connection = cls(connector, 64)
        await connection
        return connection


@dataclass(slots=True)
class Database:
    """The open spool file. Made by `open`, released by `close`."""

    path: Path
    epoch: UUID
    _writer: _Connection
    _reader: _Connection
    _lock_fd: int = field(default=-1)

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Open or create the spool at `path`; a damaged one is salvaged. Raises SpoolError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock_fd = _acquire_lock(path)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640))
        except OSError as fault:
            raise SpoolAccessError(f"{path}: {fault.strerror or fault}") from fault
        async with AsyncExitStack() as undo:
            undo.callback(os.close, lock_fd)
            with _spool_errors(path):
                writer = await _open_checked_writer(path)
                undo.push_async_callback(writer.close)
                epoch = await writer.run(lambda c: _verify_and_migrate(c, path))
                reader = await _Connection.opened(lambda: _connect_and_read_header(path, "mode=ro"))
            undo.pop_all()
        return cls(path, epoch, writer, reader, lock_fd)

    async def close(self) -> None:
        """Close both connections and release the lock; SQLite checkpoints the log."""
        await self._reader.close()
        await self._writer.close()
        os.close(self._lock_fd)

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` as one transaction: fsynced on return, rolled back on an error. Raises SpoolError."""

        def run(connection: sqlite3.Connection) -> T:
            with transaction(connection):
                return work(connection)

        with _spool_errors(self.path):
            return await self._writer.run(run)

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run `work` on the reader connection, apart from the writer."""
        with _spool_errors(self.path):
            return await self._reader.run(work)

    async def renew_epoch(self) -> None:
        """Give the spool a new epoch (promise 2), under which undelivered commits are delivered."""
        epoch = uuid4()
        await self.write(lambda c: write_meta(c, "epoch", str(epoch)))
        self.epoch = epoch

    async def reclaim(self, pages: int) -> None:
        """Return at most `pages` free pages to the file system."""
        with _spool_errors(self.path):
            await self._writer.run(lambda c: c.executescript(f"PRAGMA incremental_vacuum({pages});"))

    async def limit_wal(self, max_bytes: int) -> None:
        """Keep the write-ahead log near `max_bytes`, for a spool with a small cap."""
        pages = max(1, max_bytes // 2 // 4096)

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(f"PRAGMA journal_size_limit = {max_bytes}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {pages}")

        await self._writer.run(work)

    async def used_and_spare_bytes(self) -> tuple[int, int]:
        """Bytes in use, write-ahead log included, and free bytes inside the file."""

        def look(connection: sqlite3.Connection) -> tuple[int, int]:
            page, pages, free = (
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("page_size", "page_count", "freelist_count")
            )
            return (pages - free) * page, free * page

        used, spare = await self.read(look)
        return used + wal_size_bytes(self.path), spare


async def _open_checked_writer(path: Path) -> _Connection:
    """The writer's connection to a sound spool; a damaged one is salvaged first."""
    writer = await _Connection.opened(lambda: connect(path))
    try:
        damage = await writer.run(lambda c: _find_damage(c, path))
        if damage is None:
            salvage.suspect_marker_path(path).unlink(missing_ok=True)
        else:
            await writer.close()
            aside = salvage.move_aside(path, damage)
            writer = await _Connection.opened(lambda: connect(path))
            await writer.run(lambda c: _verify_and_migrate(c, path))
            await writer.run(lambda c: salvage.copy_readable_rows(c, aside))
    except BaseException:
        await writer.close()
        raise
    return writer


def _find_damage(connection: sqlite3.Connection, path: Path) -> str | None:
    """What is wrong with the file, or None. Errors other than damage are raised."""
    try:
        _verify_and_migrate(connection, path)
    except sqlite3.Error as fault:
        # SQLite also refuses to write to a header it half understands, though the file is writable.
        read_only = getattr(fault, "sqlite_errorcode", 0) & _PRIMARY_CODE == sqlite3.SQLITE_READONLY
        if read_only or salvage.is_damage_error(fault):
            return str(fault)
        raise
    except (TypeError, ValueError, UnicodeDecodeError) as fault:
        return f"its own description cannot be read: {fault}"
    return salvage.find_corruption(connection, path)


def wal_size_bytes(path: Path) -> int:
    """Bytes of a spool's write-ahead log, 0 when there is none."""
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except OSError:
        return 0


def file_size_bytes(path: Path) -> int:
    """Bytes on disk of a spool: the file and its write-ahead log."""
    return (path.stat().st_size if path.exists() else 0) + wal_size_bytes(path)


class ProgressListener:
    """Receives the progress of a long read. This one ignores it."""

    def name(self, title: str) -> None:
        """Start a phase."""

    def total(self, total: int) -> None:
        """Set the total."""

    def advance(self, done: int = 1) -> None:
        """Add to what is done."""


NO_PROGRESS = ProgressListener()


def open_read_only(path: Path) -> sqlite3.Connection:
    """A connection that reads a live or stopped spool and never changes it. Raises SpoolError."""
    if not path.exists():
        raise SpoolAccessError(f"{path}: there is no spool here")
    if path.is_dir():
        raise SpoolAccessError(f"{path}: is a folder; name the spool's file, such as {path / 'spool.db'}")
    with _spool_errors(path):
        connection = _connect_read_only(path)
        with ExitStack() as undo:
            undo.callback(connection.close)
            (kind,) = connection.execute("PRAGMA application_id").fetchone()
            if kind != APPLICATION_ID:
                raise SpoolAccessError(
                    f"{path}: is no spool (application id {kind:#x}; a spool has {APPLICATION_ID:#x})"
                )
            _check_version(connection, path)
            undo.pop_all()
    return connection


@contextmanager
def open_spool_read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """The same for the length of a block; SQLite's own errors inside become `SpoolAccessError`."""
    with closing(open_read_only(path)) as connection:
        try:
            yield connection
        except sqlite3.Error as fault:
            raise SpoolAccessError(f"{path}: {fault}") from fault


def _connect_read_only(path: Path) -> sqlite3.Connection:
    """On a medium where SQLite cannot make its shared memory the file is opened as immutable.

    Commits in its write-ahead log would not be seen then: with any it is an error.
    """
    try:
        return _connect_and_read_header(path, "mode=ro")
    except sqlite3.Error as fault:
        code = fault.sqlite_errorcode & _PRIMARY_CODE
        if code not in _NO_SHARED_MEMORY or not path.is_file() or not os.access(path, os.R_OK):
            raise
        if wal_size_bytes(path):
            raise SpoolAccessError(
                f"{path}: its folder cannot be written, and {path.name}-wal holds commits that would "
                "not be seen. Copy the spool and its -wal to a folder that can be written, and name the copy"
            ) from fault
        with suppress(sqlite3.Error):
            return _connect_and_read_header(path, "mode=ro&immutable=1")
        raise


def _connect_and_read_header(path: Path, mode: str) -> sqlite3.Connection:
    connection = connect(path, mode)
    try:
        connection.execute("PRAGMA query_only = 1")
        connection.execute("PRAGMA user_version").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def is_spool_live(path: Path) -> bool | None:
    """Whether a gateway holds this spool (tries the lock); None when the lock file cannot be opened."""
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


def _acquire_lock(path: Path) -> int:
    fd = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise SpoolInUseError(f"{path}: another gateway is using this spool") from None
    return fd


def connect(path: Path, mode: str = "mode=rwc") -> sqlite3.Connection:
    """A connection without implicit transactions, which any thread may use."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{mode}",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_TIMEOUT_S,
        check_same_thread=False,
    )


def _verify_and_migrate(connection: sqlite3.Connection, path: Path) -> UUID:
    """Returns the epoch."""
    version = _check_version(connection, path)
    if version == FORMAT_VERSION:
        reject_development_version(connection, path)
    if version == 0:
        if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise SpoolAccessError(f"{path}: this is not a Tidegate spool but a database of something else")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_size_limit = 16777216")
    for number in range(version + 1, FORMAT_VERSION + 1):
        _migrate(connection, number)
    connection.execute(SQL["write_nothing"])  # fails where SQLite would not write
    return UUID(str(read_meta(connection, "epoch")))


def reject_development_version(connection: sqlite3.Connection, path: Path) -> None:
    """Raise SpoolAccessError for a spool that was written before format 1 was fixed."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if "meta" in tables and not tables & _LATEST_TABLES:
        raise SpoolAccessError(
            f"{path}: a development version wrote this spool, before format 1 was fixed. "
            "Deliver what it holds with that version, or move it away: the gateway makes a new one"
        )


def _check_version(connection: sqlite3.Connection, path: Path) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > FORMAT_VERSION:
        raise SpoolTooNewError(
            f"{path}: the spool has format version {version}; this release reads up to {FORMAT_VERSION}. "
            "Install the release that wrote it, or a later one."
        )
    return version


def _migrate(connection: sqlite3.Connection, number: int) -> None:
    folder = files("gateway.spool").joinpath("sql")
    script = next(p for p in folder.iterdir() if p.name.startswith(f"{number:03}_"))
    lines = (line.split("--")[0].rstrip() for line in script.read_text(encoding="utf-8").splitlines())
    with transaction(connection):
        for statement in "\n".join(lines).split(";"):
            connection.execute(statement.strip())
        crash_point("in_migration")
        if number == 1:
            write_meta(connection, "epoch", str(uuid4()))
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {number}")
    _log.info("spool format is now version %d", number)


@contextmanager
def _spool_errors(path: Path) -> Iterator[None]:
    """Raise SQLite's errors as the spool's; after damage the next start checks the whole file."""
    try:
        yield
    except sqlite3.Error as fault:
        if salvage.is_damage_error(fault):
            with suppress(OSError):
                salvage.suspect_marker_path(path).touch()
        if getattr(fault, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            raise SpoolFullError(f"{path}: no room on the disk ({fault})") from fault
        raise SpoolAccessError(f"{path}: {fault}") from fault


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what the block writes; roll it back on an exception."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def read_view(connection: sqlite3.Connection) -> Iterator[None]:
    """One view of the file for the whole block: compaction may move segments meanwhile."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("COMMIT")


def read_meta(connection: sqlite3.Connection, key: str, default: int | str = 0) -> int | str:
    """The value of a key in `meta`, or `default`."""
    row = connection.execute(SQL["meta"], (key,)).fetchone()
    value: int | str = default if row is None else row[0]
    return value


def write_meta(connection: sqlite3.Connection, key: str, value: int | str) -> None:
    """Set a key in `meta`; inside a transaction."""
    connection.execute(SQL["set_meta"], (key, value))


def fetch_scalar(connection: sqlite3.Connection, statement: str, parameters: Sequence[Any] = ()) -> Any:
    """The first column of the first row that a named statement finds, None when it finds none."""
    row = connection.execute(SQL[statement], parameters).fetchone()
    return None if row is None else row[0]
