"""Named SQL statements kept in `.sql` files, and the numbered migrations of `cloud_sync/sql`.

A file holds statements, each under a line `-- name: NAME`. A migration is a file `NNN_words.sql`;
numbers start at 1 and leave no gap.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

_MARK = "-- name:"


def load_statements(package: str, *path: str) -> dict[str, str]:
    """Statements by name from the file at `path` inside `package`."""
    text = files(package).joinpath(*path).read_text(encoding="utf-8")
    statements: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if line.startswith(_MARK):
            current = statements.setdefault(line.removeprefix(_MARK).strip(), [])
        elif current is not None and not line.lstrip().startswith("--"):
            current.append(line)
    return {name: "\n".join(lines).strip().rstrip(";") for name, lines in statements.items()}


_FOLDER = resources.files("cloud_sync") / "sql"
_NAME = "-- name:"


class Migration(NamedTuple):
    """One step of the schema."""

    version: int
    name: str
    sql: str


def load_cloud_statements(file_name: str) -> Mapping[str, str]:
    """The statements of one file by name."""
    found = {}
    for part in _FOLDER.joinpath(file_name).read_text(encoding="utf-8").split(_NAME)[1:]:
        name, _, statement = part.partition("\n")
        found[name.strip()] = statement.strip().removesuffix(";")
    return found


def load_migrations() -> tuple[Migration, ...]:
    """Every migration of this release, oldest first."""
    files = (f for f in _FOLDER.iterdir() if f.name[:3].isdigit() and f.name.endswith(".sql"))
    found = tuple(
        Migration(int(f.name[:3]), f.name.removesuffix(".sql"), f.read_text(encoding="utf-8"))
        for f in sorted(files, key=lambda f: f.name)
    )
    assert [m.version for m in found] == list(range(1, len(found) + 1))
    return found
