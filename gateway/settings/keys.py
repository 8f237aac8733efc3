"""The keys of the configuration as a person meets them, read off the settings models. Pure.

A key's path is dotted, with `[]` after a list of tables and `{}` after tables by name: `ingress.listen.port`,
`destinations[].url`, `ingress.rule[].members{}.unit`. The tables of one list may differ by kind; then a key
has an entry for each kind that words it differently.
"""

from __future__ import annotations

import json
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cloud_sync.settings_file import models_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_UNITS: Final = {
    "_bytes_per_s": "bytes per second",
    "_per_s": "per second",
    "_bytes": "bytes",
    "_rows": "rows",
    "_days": "days",
    "_tb": "terabytes",
    "_h": "hours",
    "_ms": "milliseconds",
    "_s": "seconds",
    "_percent": "percent",
}
_SIMPLE: Final = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_EMPTY: Final[tuple[Any, ...]] = (None, [], {}, (), "")


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the file.

    Attributes:
        path: where it is.
        kinds: the kinds of table that have it, where they differ by kind.
        type: what to write, in words; "table" and "list of tables" for those.
        allowed: bounds or choices, "" when everything of the type is.
        unit: "" for none.
        required: whether there is no default.
        default: what is in force without the key; None for nothing.
        example: a value to write; None for a table.
        description: what it is for.
    """

    path: str
    kinds: tuple[str, ...]
    type: str
    allowed: str
    unit: str
    required: bool
    default: Any
    example: Any
    description: str

    @property
    def name(self) -> str:
        """Its last part, which is what the file says."""
        return self.path.rpartition(".")[2].removesuffix("[]").removesuffix("{}")

    @property
    def table(self) -> str:
        """The table it is in, "" for the top."""
        return self.path.rpartition(".")[0]

    @property
    def is_table(self) -> bool:
        """Whether it holds other keys."""
        return self.type.endswith(("table", "tables"))


def keys_of(model: type[BaseModel]) -> list[Key]:
    """Every key that a settings model takes, tables included, in the order of the model."""
    return _merged(list(_walk(model, "", ())))


def _walk(model: type[BaseModel], prefix: str, kinds: tuple[str, ...]) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        key = _key(prefix + name, field, kinds)
        if not inner:
            yield key
            continue
        steps: dict[Any, str] = {list: "[]", tuple: "[]", dict: "{}"}
        step = steps.get(get_origin(field.annotation), "")
        what = {"[]": "list of tables", "{}": "named tables"}.get(step, "table")
        yield replace(key, path=key.path + step, type=what, allowed="", default=None, example=None)
        for table in inner:
            yield from _walk(table, f"{key.path}{step}.", kind_of(table) if len(inner) > 1 else kinds)


def kind_of(model: type[BaseModel]) -> tuple[str, ...]:
    """The value of a table's `kind` that means this model; empty when it has none."""
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    return tuple(map(str, get_args(field.annotation)))


def _key(path: str, field: FieldInfo, kinds: tuple[str, ...]) -> Key:
    words, bounds = _type(field.annotation)
    bounds = [*bounds, *_bounds(field.metadata)]
    name = path.rpartition(".")[2]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    example = field.examples[0] if field.examples else default
    if example in _EMPTY and not isinstance(example, bool) and example != default:
        example = None
    if example is None:
        example = _example_of(field.annotation)
    return Key(
        path=path,
        kinds=kinds,
        type=words,
        allowed=", ".join(bounds),
        unit=next((unit for end, unit in _UNITS.items() if name.endswith(end)), ""),
        required=field.is_required(),
        default=plain(default),
        example=plain(example),
        description=" ".join((field.description or "").split()),
    )


def _type(annotation: Any) -> tuple[str, list[str]]:
    """An annotation in words, and what bounds it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words, bounds = _type(inner[0])
        return words, [*bounds, *_bounds(inner[1:])]
    if origin is Literal:
        return "one of", [toml_text(value) for value in inner]
    if origin in (Union, types.UnionType):
        parts = [_type(a) for a in inner if a is not type(None)]
        return " or ".join(dict.fromkeys(w for w, _ in parts)), [b for _, bounds in parts for b in bounds]
    if origin in (list, tuple):
        words, bounds = _type(inner[0])
        return f"list of {words}", bounds
    if origin is dict:
        words, bounds = _type(inner[1])
        return f"table of {words} by name", bounds
    return _SIMPLE.get(annotation, getattr(annotation, "__name__", str(annotation))), []


def _bounds(metadata: Sequence[Any]) -> list[str]:
    found = []
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            found += _bounds(entry.metadata)
            continue
        for attribute, words in (
            ("ge", "at least"),
            ("gt", "more than"),
            ("le", "at most"),
            ("lt", "less than"),
        ):
            if getattr(entry, attribute, None) is not None:
                found.append(f"{words} {getattr(entry, attribute)}")
        if getattr(entry, "max_length", None) is not None:
            found.append(f"at most {entry.max_length} characters")
        if getattr(entry, "pattern", None) is not None:
            found.append(f"matching {entry.pattern}")
    return found


def _example_of(annotation: Any) -> Any:
    """A value for a key that has neither an example nor a default."""
    leaves = [annotation]
    while leaves and get_args(leaves[0]) and get_origin(leaves[0]) is not Literal:
        if get_origin(leaves[0]) in (list, tuple):
            return []
        if get_origin(leaves[0]) is dict:
            return {}
        leaves = [a for a in get_args(leaves[0]) if a is not type(None)]
    kind = leaves[0] if leaves else str
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return {bool: False, int: 1, float: 1.0, Path: "FILE"}.get(kind, "TEXT")


def plain(value: Any) -> Any:
    """A setting as TOML and JSON know it."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, dict):
        return {str(name): plain(entry) for name, entry in value.items()}
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _merged(keys: list[Key]) -> list[Key]:
    """One entry for the kinds that say the same of a key."""
    found: dict[tuple[Any, ...], Key] = {}
    for key in keys:
        same = (key.path, key.type, key.allowed, repr(key.default), key.description, key.required)
        before = found.get(same)
        found[same] = key if before is None else replace(before, kinds=(*before.kinds, *key.kinds))
    return list(found.values())


def toml_text(value: Any) -> str:
    """A value as it stands in a TOML file."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)  # noqa: PLR2004 - exact
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_text, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(f"{_bare(k)} = {toml_text(v)}" for k, v in value.items() if v is not None)
        return f"{{ {inside} }}" if inside else "{}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _bare(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else toml_text(name)
