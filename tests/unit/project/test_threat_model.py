"""docs/security.md: every threat names tests, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
THREATS = [
    line.split("|")[1:-1]
    for line in (ROOT / "docs" / "security.md")
    .read_text(encoding="utf-8")
    .partition("## Threats")[2]
    .partition("\n## ")[0]
    .splitlines()
    if line.startswith("| ") and not line.startswith("| who |")
]


@pytest.mark.parametrize("threat", THREATS, ids=lambda threat: " ".join(threat[:2]))
def test_every_threat_names_tests_that_exist(threat: list[str]) -> None:
    assert len(threat) == 4
    named = re.findall(r"(\S+\.py)::(\w+)", threat[3])
    assert named
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {test}\(", source, re.MULTILINE), f"{file}::{test} is gone"


def test_the_table_is_read_whole() -> None:
    assert len(THREATS) > 15
