"""Writes docs/configuration-keys.md from the settings models: `python -m tests.support.write_references`.

A key that an earlier table has in the same words is not repeated: a row of the later table names it.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gateway.settings.gateway_settings import GatewaySettings
from gateway.settings.reference import ConfigKey, format_toml_value, list_keys

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY_REFERENCE: Final = Path(__file__).parents[2] / "docs" / "configuration-keys.md"
REWRITE: Final = "python -m tests.support.write_references"
_HEAD: Final = """\
# Configuration keys

Every key of `gateway.toml`, generated from the settings models by `{rewrite}`.
`tidegate config explain KEY` shows the whole description, an example and the environment variable. **R**:
a [reload](configuration.md#changing-a-running-gateway) is enough; other keys take a restart. `name[]`
is a table that may be given several times, `name{{}}` are tables by name. The ingest service has
[config/ingest.toml](../config/ingest.toml).

| key | value | default | R | |
|---|---|---|---|---|
"""
_ALL_KINDS: Final = ({"ingest", "influxdb", "file"}, {"webhook", "email"})
_SENTENCE: Final = re.compile(r"(?<=[.?!]) (?=[A-Z\"\[])")
_COMMON_KEYS: Final = (
    "allow_plain",
    "ca_file",
    "cert_file",
    "key_file",
    "password_file",
    "token_file",
    "username",
)
_SAME_AS_CHECKS: Final = "As in [checks]."


def render_key_reference() -> str:
    """The whole page."""
    keys = list_keys(GatewaySettings)
    tables = ["", *(key.path for key in keys if key.is_table)]
    rows = [key for key in keys if not key.is_table and key.name != "kind"]
    rows.sort(key=lambda key: tables.index(key.table))
    first_table: dict[object, str] = {}
    lines: list[str] = []
    for path, group in groupby(rows, key=lambda key: key.table):
        repeated: dict[str, list[ConfigKey]] = {}
        rendered: set[str] = set()
        for key in group:
            about = "" if key.name in _COMMON_KEYS else key.description
            same = (key.name, key.type, key.allowed, key.required, repr(key.default), about)
            table = "checks" if about == _SAME_AS_CHECKS else first_table.setdefault(same, path)
            if table != path:
                repeated.setdefault(table, []).append(key)
            elif key.name not in _COMMON_KEYS or key.name not in rendered:
                lines.append(_render_row(key))
            rendered.add(key.name)
        for table, same_keys in repeated.items():
            names = ", ".join(dict.fromkeys(f"`{key.name}`" for key in same_keys))
            reload = "" if any(key.restart for key in same_keys) else "R"
            lines.append(f"| `{path}`: {names} | | | {reload} | as in `{table}` |".replace("|  |", "| |"))
    return _HEAD.format(rewrite=REWRITE) + "\n".join(lines) + "\n"


def _render_row(key: ConfigKey) -> str:
    kinds = f" ({', '.join(key.kinds)})" if key.kinds and set(key.kinds) not in _ALL_KINDS else ""
    default = (
        "required" if key.required else "" if key.default in (None, []) else format_toml_value(key.default)
    )
    cells = (
        f"`{key.path}`{kinds}",
        " ".join(filter(None, _describe_value(key))),
        default and (default if key.required else f"`{default}`"),
        "" if key.restart else "R",
        _first_sentence(key),
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |".replace(
        "|  |", "| |"
    ).replace("|  |", "| |")


def _describe_value(key: ConfigKey) -> Iterator[str]:
    yield key.type.replace("one of", "").replace("whole number", "integer").strip()
    if "matching" in key.allowed:
        yield "(name)"
    elif key.allowed:
        yield key.allowed.replace('", "', '" or "').replace(", at most", " to").replace("at least ", ">= ")


def _first_sentence(key: ConfigKey) -> str:
    return _SENTENCE.split(key.description)[0].rstrip(".")


if __name__ == "__main__":
    KEY_REFERENCE.write_text(render_key_reference(), encoding="utf-8")
