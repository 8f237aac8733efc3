"""The manual knows every alarm, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_every_alarm_of_the_rules_is_explained_and_no_other():
    rules = set(re.findall(r"alert: (\w+)", (ROOT / "config/prometheus/alerts.yml").read_text()))
    manual = (ROOT / "docs/operations.md").read_text()
    table = manual[manual.index("## What each alarm means") : manual.index("## systemd")]
    assert set(re.findall(r"Tidegate[A-Z]\w+", table)) == rules


def test_what_the_manual_names_is_there():
    manual = (ROOT / "docs/operations.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", manual):
        assert (ROOT / "docs" / link).exists(), link
