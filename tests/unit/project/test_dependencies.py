"""What is installed is what was looked at: `licences.txt` has every package with its version and licence."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ALLOWED = {
    *(
        "0BSD",
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "ISC",
        "MIT",
        "MIT-CMU",
        "PSF-2.0",
        "Zlib",
    ),
    "LicenseRef-apsw",  # any OSI-approved licence, as its author says
    "MPL-2.0",  # files of theirs that we do not change
}
WORDS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
TEXTS = {
    "Apache 2.0": "Apache-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "any-OSI": "LicenseRef-apsw",
    "ISC License": "ISC",
    "MIT License": "MIT",
    "The MIT License (MIT)": "MIT",
}


def listed(name: str) -> dict[str, str]:
    """name==version -> the rest of the line."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return {pin: rest.strip() for pin, _, rest in pairs}


PINS, LICENCES = listed("constraints.txt"), listed("licences.txt")


def licence_of(name: str) -> str:
    """What an installed package says of itself, as an SPDX expression."""
    about: Any = metadata.metadata(name)
    if about.get("License-Expression"):
        return str(about["License-Expression"])
    text = (about.get("License") or "").strip()
    if text and "\n" not in text:
        return TEXTS.get(text, text)
    kinds = [c.rpartition(" :: ")[2] for c in about.get_all("Classifier") or [] if c.startswith("License")]
    return " AND ".join(sorted({WORDS.get(kind, kind) for kind in kinds}))


def test_every_pinned_package_was_looked_at_and_nothing_else_is_listed() -> None:
    assert sorted(set(PINS) - set(LICENCES)) == [], "look at the licence, then add a line to licences.txt"
    assert sorted(set(LICENCES) - set(PINS)) == [], "no longer pinned: take it out of licences.txt"


@pytest.mark.parametrize("pin", LICENCES)
def test_a_licence_is_one_that_may_be_used(pin: str) -> None:
    choices = [set(re.split(r" AND ", choice.strip("()"))) for choice in LICENCES[pin].split(" OR ")]
    assert any(choice <= ALLOWED for choice in choices), LICENCES[pin]


@pytest.mark.parametrize("pin", LICENCES)
def test_what_is_installed_has_the_version_and_the_licence_that_were_looked_at(pin: str) -> None:
    name, _, version = pin.partition("==")
    try:
        installed = metadata.version(name)
    except metadata.PackageNotFoundError:
        return  # of an extra that is not installed here
    assert (installed, licence_of(name)) == (version, LICENCES[pin])
