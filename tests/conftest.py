"""Fixtures of servers live in tests/support/fixtures_*.py, one file a kind of server.

A test that needs a server which is not installed is skipped and named in the last lines; with
TIDEGATE_REQUIRE_REAL=1 that is a failure.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

SUPPORT = Path(__file__).parent / "support"

pytest_plugins = [f"tests.support.{path.stem}" for path in sorted(SUPPORT.glob("fixtures_*.py"))]

REQUIRE_REAL = "TIDEGATE_REQUIRE_REAL"


def _is_required() -> bool:
    return os.environ.get(REQUIRE_REAL, "") not in ("", "0")


def pytest_terminal_summary(terminalreporter: TerminalReporter) -> None:
    reasons = Counter(_reason_of(report) for report in terminalreporter.stats.get("skipped", ()))
    if not reasons:
        return
    word = "failed, because a skip is a failure here" if _is_required() else "skipped"
    terminalreporter.write_line("")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{word}: {count} tests: {reason}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus == pytest.ExitCode.OK and _is_required() and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)
