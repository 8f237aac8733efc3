from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest

from gateway.spool.database import APPLICATION_ID, open_read_only
from gateway.spool.errors import SpoolError

STATEMENTS = {
    "is no spool": "CREATE TABLE other (x)",
    "format version 99": f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = 99",
}


def open_files() -> set[Path]:
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.add(fd.readlink())
    return found


@pytest.mark.parametrize("message", STATEMENTS)
def test_a_failed_read_only_open_leaves_no_connection(tmp_path, message):
    path = tmp_path / "spool.db"
    with closing(sqlite3.connect(path)) as other:
        other.executescript(STATEMENTS[message])
    with pytest.raises(SpoolError, match=message) as failure:
        open_read_only(path)
    assert failure.traceback, "its frames are alive, and with them what they left open"
    assert path not in open_files()


def test_nor_does_one_of_a_file_that_is_no_database(tmp_path):
    path = tmp_path / "spool.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(SpoolError, match="not a database") as failure:
        open_read_only(path)
    assert failure.traceback
    assert path not in open_files()
