"""A spool that SQLite finds damaged: put aside under its date, and what can be read goes into a new one.

The new spool has an epoch of its own, because the newest commit numbers of the old one may be among what
was lost (promise 2); whatever was delivered twice by that, the region stores once. Nothing is deleted: the
damaged file stays beside the spool until a person removes it.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.codec import columns
from cloud_sync.model.errors import FormatError
from cloud_sync.model.records import RecordClass
from cloud_sync.runtime.files import fsync_folder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_log = logging.getLogger(__name__)
_SIDE_FILES = ("", "-wal", "-shm")
_DAMAGE_CODES = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT})
_DAMAGE_MESSAGES = (
    "unsupported file format",
    "malformed",
    "no such table",
    "no such column",
    "no such index",
)
_ALWAYS_CHECKED_BELOW_BYTES = 256 << 20


class SpoolTable(NamedTuple):
    """Columns at the front of a table that are its key (0: its rowid); whether it is copied as it is."""

    key_columns: int = 0
    copied: bool = True


SPOOL_TABLES = {
    "series": SpoolTable(),
    "series_mark": SpoolTable(),
    "destination": SpoolTable(1),
    "delivered": SpoolTable(3),
    "batch": SpoolTable(3),
    "part": SpoolTable(5, copied=False),  # batches travel whole in a new epoch
    "received": SpoolTable(6),
    "answered": SpoolTable(2),
    "processing_state": SpoolTable(1),
    "loss": SpoolTable(3),
    "outbox": SpoolTable(),
    "parked": SpoolTable(),
    "quarantine": SpoolTable(),
    "damaged": SpoolTable(),
    "meta": SpoolTable(1),
    "segment": SpoolTable(copied=False),  # only those that can be decoded
}
"""Every table of a spool, in the order in which salvage copies them."""


def is_damage_error(fault: sqlite3.Error) -> bool:
    """Whether an error says that the file itself is damaged, not merely busy, full or forbidden."""
    code = getattr(fault, "sqlite_errorcode", 0) & 0xFF
    return code in _DAMAGE_CODES or (
        code == sqlite3.SQLITE_ERROR and any(word in str(fault) for word in _DAMAGE_MESSAGES)
    )


def suspect_marker_path(path: Path) -> Path:
    """The file that makes the next start check the whole spool first."""
    return path.with_name(path.name + ".suspect")


def find_corruption(connection: sqlite3.Connection, path: Path) -> str | None:
    """What SQLite's check finds, or None; a large spool is checked only when it is marked suspect."""
    if not suspect_marker_path(path).exists() and path.stat().st_size > _ALWAYS_CHECKED_BELOW_BYTES:
        return None
    try:
        found = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    except sqlite3.Error as fault:
        return str(fault)
    return None if found == ["ok"] else "; ".join(found)


def move_aside(path: Path, why: str) -> Path:
    """Rename the spool's files under today's date; returns the new path of the main file."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = path.with_name(f"{path.name}.{stamp}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.{stamp}-{number}.damaged")
    for suffix in _SIDE_FILES:
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    suspect_marker_path(path).unlink(missing_ok=True)
    fsync_folder(path.parent)
    _log.error("the spool %s is damaged (%s); it is kept as %s and a new one is begun", path, why, aside.name)
    return aside


def copy_readable_rows(new: sqlite3.Connection, aside: Path) -> None:
    """Copy every readable row of `aside` into an empty spool, in one transaction."""
    segments = rows = unreadable = 0
    new.execute("BEGIN IMMEDIATE")
    epoch = new.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]
    with suppress(sqlite3.Error), closing(sqlite3.connect(aside, isolation_level=None)) as old:
        old.execute("PRAGMA query_only = 1")
        old.execute("PRAGMA writable_schema = 1")  # so that a faulty schema entry does not hide the others
        for table in (name for name, kind in SPOOL_TABLES.items() if kind.copied):
            for row in _read_rows_from_both_ends(old, table):
                _copy_row(new, table, row)
        known = {row[0] for row in new.execute("SELECT series_no FROM series")}
        for row in _read_rows_from_both_ends(old, "segment"):
            if not _is_readable_segment(row, known):
                unreadable += 1
            elif _copy_row(new, "segment", row):
                segments, rows = segments + 1, rows + row[2]
    new.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (epoch,))
    new.execute("COMMIT")
    _log.error(
        "%d segments with %d records were taken over from %s; %d could not be read",
        segments,
        rows,
        aside.name,
        unreadable,
    )


def _copy_row(new: sqlite3.Connection, table: str, row: tuple[Any, ...]) -> bool:
    conflict = "IGNORE" if table == "segment" else "REPLACE"
    places = ", ".join("?" * len(row))
    try:
        new.execute(f"INSERT OR {conflict} INTO {table} VALUES ({places})", row)  # noqa: S608 - our own names
    except sqlite3.Error:
        return False
    return True


def _read_rows_from_both_ends(old: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a table, from both ends up to what cannot be read."""
    seen: set[object] = set()
    columns_of_key = SPOOL_TABLES[table].key_columns
    key = [str(number + 1) for number in range(columns_of_key)] or ["rowid"]
    for order in ("ASC", "DESC"):
        ordered = ", ".join(f"{column} {order}" for column in key)
        try:
            for row in old.execute(f"SELECT * FROM {table} ORDER BY {ordered}"):  # noqa: S608 - our own names
                identity = row[: columns_of_key or 1]
                if identity in seen:
                    return
                seen.add(identity)
                yield row
        except (sqlite3.Error, UnicodeDecodeError):
            continue
        return


def _is_readable_segment(row: tuple[Any, ...], known: set[int]) -> bool:
    try:
        record_class = RecordClass(row[0] >> 56)
        names = ("series",) if columns.RECORD_TYPES[record_class].has_series else ("time_us",)
        (column,) = columns.decode_columns(row[-1], names, record_class)
    except (FormatError, TypeError, ValueError):
        return False
    return len(column) == row[2] and (names != ("series",) or known.issuperset(column.tolist()))
