"""The documents: the generated reference is current, links and named files exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.write_references import KEY_REFERENCE, REWRITE, render_key_reference

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
MAX_LINES = 2_400
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
PRODUCT_FILE = re.compile(
    r"`((?:gateway|cloud_sync|firmware_sim|tests|benchmarks|config|docs|systemd|packaging)/[\w./-]*)`"
)


def find_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = [re.sub(r"[`*]", "", title).lower() for title in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def test_the_key_reference_is_the_one_of_the_settings_models():
    message = f"docs/configuration-keys.md is not current: run `{REWRITE}`"
    assert KEY_REFERENCE.read_text(encoding="utf-8") == render_key_reference(), message


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_and_every_named_file_exists(document):
    text = document.read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in find_anchors(target.read_text(encoding="utf-8")), f"{link}: no such heading"
    for name in PRODUCT_FILE.findall(text):
        assert (ROOT / name).exists(), f"{name}: no such file"


def test_the_documents_stay_short():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "docs").rglob("*.md"))
    assert lines <= MAX_LINES
