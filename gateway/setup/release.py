"""A release on the machine: a virtual environment of its own, complete before anything leads to it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.setup import steps
from gateway.setup.layout import EXTRAS
from gateway.setup.steps import SetupFault, Step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.setup.layout import Layout

_WHEEL = re.compile(r"tidegate-(?P<version>[^-]+)-py3-none-any\.whl")
_COMPLETE = "complete"


def version_in(wheels: Path) -> str:
    """The version of the only tidegate wheel in a folder.

    Raises:
        SetupFault: there is none, or more than one.
    """
    found = sorted(m["version"] for p in wheels.glob("tidegate-*.whl") if (m := _WHEEL.fullmatch(p.name)))
    if len(found) != 1:
        raise SetupFault(
            f"{wheels}: expected one tidegate-VERSION-py3-none-any.whl, found {', '.join(found) or 'none'}"
        )
    return found[0]


def steps_of(layout: Layout, version: str, wheels: Path | None, python: str) -> Iterator[Step]:
    """Make a release and lead to it. The one before stays, to go back to.

    Args:
        layout: where.
        version: which release.
        wheels: folder with all wheels it needs; None asks the package index.
        python: the interpreter that it is to run on.
    """
    home = layout.prefix / "releases" / version
    there = layout.at(home)
    have = _extras_of(there)
    wanted = EXTRAS[layout.role]
    if wanted in have:
        yield Step(f"keep the release in {there}")
    else:
        if not have:
            if there.exists():
                yield steps.remove(there)
            yield steps.run(python, "-m", "venv", there, says=f"make a virtual environment in {there}")
        yield from _install(there, version, wanted, wheels)
        yield steps.write(there / _COMPLETE, "\n".join([*have, wanted, ""]))
    yield steps.link(layout.at(layout.prefix / "current"), Path("releases") / version)
    yield steps.link(layout.at(layout.link), layout.program)


def _install(there: Path, version: str, extra: str, wheels: Path | None) -> Iterator[Step]:
    pip = [str(there / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    source = ["--no-index", "--find-links", str(wheels)] if wheels is not None else []
    says = f"install tidegate{extra} {version} from {wheels or 'the package index'}"
    yield steps.run(*pip, "--only-binary=:all:", *source, f"tidegate{extra}=={version}", says=says)


def _extras_of(there: Path) -> list[str]:
    """For which extras a release has been completed; [] when it is not complete."""
    try:
        return (there / _COMPLETE).read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        return []


def releases_of(layout: Layout) -> list[str]:
    """Versions that are there and complete."""
    folder = layout.at(layout.prefix / "releases")
    return sorted(p.name for p in folder.glob("*") if _extras_of(p)) if folder.is_dir() else []
