"""Killed while it gives something up: what is kept and what is declared is what was acknowledged."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from cloud_sync.codec import columns
from cloud_sync.model.records import Declarations, RecordClass
from gateway.spooltools.checker import check_spool
from tests.support.programs import ROOT


def run_loser(path, crash_at: str) -> int:
    environment = {k: v for k, v in os.environ.items() if k != "TIDEGATE_CRASH_AT"}
    if crash_at:
        environment["TIDEGATE_CRASH_AT"] = crash_at
    ended = subprocess.run(
        [sys.executable, "-m", "tests.crash.loser", str(path)],
        env={**environment, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    return ended.returncode


def account(path) -> tuple[int, int, int, int]:
    """Readings ever committed, kept, lost by the table, and declared."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        reading, declaration = int(RecordClass.READING) << 56, int(RecordClass.DECLARATION) << 56
        kept, newest = connection.execute(
            "SELECT sum(rows), max(last_commit) FROM segment WHERE position >= ?", (reading,)
        ).fetchone()
        (lost,) = connection.execute("SELECT coalesce(sum(rows), 0) FROM loss").fetchone()
        declared = 0
        for (block,) in connection.execute(
            "SELECT block FROM segment WHERE position BETWEEN ? AND ?", (declaration, declaration + (1 << 55))
        ):
            records = columns.decode_records(block, RecordClass.DECLARATION)
            assert isinstance(records, Declarations)
            declared += int(records.lost.sum())
    return newest * 400, kept, lost, declared


@pytest.mark.parametrize("count", [1, 2, 7])
def test_what_is_kept_and_declared_is_what_was_acknowledged(tmp_path, count):
    path = tmp_path / "spool.db"
    assert run_loser(path, f"in_eviction:{count}") == -signal.SIGKILL
    ever, kept, lost, declared = account(path)
    assert kept + lost == ever
    assert declared == lost
    assert (lost > 0) == (count > 1)

    assert run_loser(path, "") == 0
    ever, kept, lost, declared = account(path)
    assert kept + lost == ever == 600 * 400
    assert declared == lost > 0
    assert check_spool(path).problems == []
