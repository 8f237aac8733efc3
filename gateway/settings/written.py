"""A configuration as a file with comments: every key with what it is for, the chosen ones in force. Pure.

A line that begins with `#` and a key shows that key with its default, or with an example where there is none.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

from cloud_sync.settings_file import models_in
from gateway.settings.keys import Key, keys_of, kind_of, plain, toml_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from pydantic import BaseModel

_WIDTH: Final = 106
_RULE: Final = "# " + "-" * (_WIDTH - 2)


def text_of(model: type[BaseModel], chosen: Mapping[str, Any], head: str) -> str:
    """The file.

    Args:
        model: the settings.
        chosen: what is to be in force, as the tables of a TOML file.
        head: text that it begins with.
    """
    lines = [*_comment(head), ""]
    lines += _table(model, "", chosen, ())
    return "\n".join(lines).rstrip() + "\n"


def _table(
    model: type[BaseModel],
    prefix: str,
    chosen: Mapping[str, Any],
    kinds: Sequence[str],
    *,
    spoken: bool = True,
) -> Iterator[str]:
    """The keys of a table, then the tables in it. Not `spoken`: all of it commented out."""
    keys = {key.name: key for key in keys_of(model) if "." not in key.path}
    for key in keys.values():
        if not key.is_table:
            yield from _key(key, chosen, kinds, spoken=spoken)
    for name, key in keys.items():
        if key.is_table:
            field = model.model_fields[name]
            inner = models_in(field.annotation)
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield from _inner(key, inner, f"{prefix}{name}", chosen.get(name), default, spoken=spoken)


def _inner(
    key: Key, models: Sequence[type[BaseModel]], path: str, chosen: Any, default: Any, *, spoken: bool
) -> Iterator[str]:
    yield from ("", *([_RULE] if spoken else ()), *_comment(key.description), "")
    if key.type == "table":
        lines = list(_table(models[0], f"{path}.", chosen or {}, (), spoken=spoken))
        if lines and lines[0]:
            yield f"{'' if spoken else '#'}[{path}]"
        yield from lines
        return
    named = key.type == "named tables"
    for entry in (chosen.items() if named else enumerate(chosen)) if chosen else ():
        name, values = entry
        model = next((m for m in models if values.get("kind") in kind_of(m)), models[0])
        yield f"[{path}.{name}]" if named else f"[[{path}]]"
        yield from _table(model, f"{path}.", values, kind_of(model))
        yield ""
    there = {values.get("kind") for values in (chosen.values() if named else chosen)} if chosen else set()
    for model in models:
        if chosen and (not kind_of(model) or set(kind_of(model)) & there):
            continue
        examples = _defaults(default, named=named) or [("NAME", {})]
        for name, values in examples:
            yield f"#[{path}.{name}]" if named else f"#[[{path}]]"
            yield from _table(model, f"{path}.", values, kind_of(model), spoken=False)
            yield ""


def _defaults(default: Any, *, named: bool) -> list[tuple[str, Any]]:
    """The tables that are there when the file has none."""
    if not default:
        return []
    return [(str(n), plain(v)) for n, v in default.items()] if named else [("", plain(v)) for v in default]


def _key(key: Key, chosen: Mapping[str, Any], kinds: Sequence[str], *, spoken: bool) -> Iterator[str]:
    value = chosen.get(key.name)
    if value is None:
        value = kinds[0] if key.name in ("kind", "name") and kinds else key.example
    said = spoken and (key.name in chosen and chosen[key.name] is not None)
    yield from _comment(f"{key.description}{_limits(key)}")
    yield f"{'' if said else '#'}{key.name} = {toml_text(value)}"
    if not kinds:
        yield ""


def _limits(key: Key) -> str:
    """Unit and bounds in brackets, where the description does not say them."""
    parts = [key.unit] if key.unit else []
    if key.type == "one of":
        choices = key.allowed.split(", ")
        if key.name != "kind" and not all(choice in key.description for choice in choices):
            parts.append(" or ".join(choices))
    elif "matching" not in key.allowed and key.allowed not in ("", "more than 0", "at least 0"):
        parts.append(key.allowed)
    return f" ({'; '.join(parts)})" if parts else ""


def _comment(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, _WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"# {line}".rstrip() for line in lines]
