"""`tidegate query` as a person runs it."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest

from tests.support.open_spool import NOW_US, open_spool

_START_US = NOW_US // 3_600_000_000 * 3_600_000_000


def query(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (sys.executable, "-m", "gateway", "query", *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
async def spool(tmp_path):
    path = tmp_path / "spool.db"
    async with open_spool(path) as opened:
        rows = [("boiler-1", _START_US + n * 1_000_000, float(n)) for n in range(600)]
        await opened.append([*rows, ("boiler-2", _START_US, 1.0)])
    return str(path)


_SPAN = ("--since", "2026-09-21T14:00Z", "--until", "2026-09-21T15:00Z")


def test_windows_come_as_a_table_csv_and_json(spool) -> None:
    shown = query("boiler-1/t", spool, *_SPAN, "--every", "1m")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert len(shown.stdout.splitlines()) == 11
    told = query("boiler-1", spool, *_SPAN, "--every", "5m", "--average", "2", "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(told.stdout)))
    assert [row["count"] for row in rows] == ["300", "300"]
    assert float(rows[1]["average"]) == 299.5
    document = json.loads(query("boiler-1", spool, *_SPAN, "--every", "raw", "--format", "json").stdout)
    assert document["columns"]["value"] == [float(n) for n in range(600)]


def test_a_chart_has_its_name_its_extremes_and_its_span(spool) -> None:
    shown = query("boiler-1", spool, *_SPAN, "--format", "chart")
    assert shown.returncode == 0
    assert shown.stdout.startswith("boiler-1/t\n")
    assert "599 │" in shown.stdout
    assert "2026-09-21 15:00:00Z" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("boiler-*",), "2 series match boiler-*; name one of them"),
        (("cellar",), "no series is called cellar"),
        (("boiler-1", "--every", "often"), "--every: 'often' is not a duration"),
        (("boiler-1", "--since", "yore"), "--since: 'yore' is not a time"),
        (("boiler-1", "--until", "2020-01-01"), "--until must be later"),
        (("boiler-1", "--every", "raw", "--average", "3"), "--average needs windows"),
    ],
)
def test_a_question_that_cannot_be_answered_says_why(spool, arguments, words) -> None:
    refused = query(arguments[0], spool, *arguments[1:])
    assert refused.returncode == 2
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr
