"""SQL kept in `cloud_sync/sql`: named statements, and the numbered migrations.

A file of statements is a series of `-- name: NAME` lines, each followed by one statement.
A migration is a file `NNN_words.sql`; numbers start at 1 and leave no gap.
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

_FOLDER = resources.files("cloud_sync") / "sql"
_NAME = "-- name:"


class Migration(NamedTuple):
    """One step of the schema."""

    version: int
    name: str
    sql: str


def named(file_name: str) -> Mapping[str, str]:
    """The statements of one file by name."""
    found = {}
    for part in _FOLDER.joinpath(file_name).read_text(encoding="utf-8").split(_NAME)[1:]:
        name, _, statement = part.partition("\n")
        found[name.strip()] = statement.strip().removesuffix(";")
    return found


def migrations() -> tuple[Migration, ...]:
    """Every migration of this release, oldest first."""
    files = (f for f in _FOLDER.iterdir() if f.name[:3].isdigit() and f.name.endswith(".sql"))
    found = tuple(
        Migration(int(f.name[:3]), f.name.removesuffix(".sql"), f.read_text(encoding="utf-8"))
        for f in sorted(files, key=lambda f: f.name)
    )
    assert [m.version for m in found] == list(range(1, len(found) + 1))
    return found
