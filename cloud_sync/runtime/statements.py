"""Named SQL statements kept in `.sql` files, each under a line `-- name: NAME`; comment lines are dropped."""

from __future__ import annotations

from importlib.resources import files

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
