"""Every key of a settings model: for `config explain`, the key reference and the commented file. Pure.

A key's path is dotted, with `[]` after a list of tables and `{}` after tables by name: `ingress.listen.port`,
`destinations[].url`, `ingress.rule[].members{}.unit`. The tables of one list may differ by kind; then a key
has an entry for each kind that describes it differently.
"""

from __future__ import annotations

import json
import textwrap
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cloud_sync.runtime.settings_file import find_models
from gateway.settings.schema import DEFAULT_RESTART_REASON, Restart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_UNITS_BY_SUFFIX: Final = {
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
_MAX_EXACT: Final = 1e15
_TYPE_NAMES: Final = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}


@dataclass(frozen=True, slots=True)
class ConfigKey:
    """One key of the file.

    `kinds` are the kinds of table that have it, where they differ; `type` says in words what to write, and
    `allowed` the bounds or choices. `restart` is why changing it takes a restart, "" when a reload suffices.
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
    restart: str

    @property
    def name(self) -> str:
        """The last part of the path, as the file has it."""
        return self.path.rpartition(".")[2].removesuffix("[]").removesuffix("{}")

    @property
    def table(self) -> str:
        """The path of the table it is in, "" at the top."""
        return self.path.rpartition(".")[0]

    @property
    def is_table(self) -> bool:
        """Whether it holds other keys."""
        return self.type.endswith(("table", "tables"))


def list_keys(model: type[BaseModel]) -> list[ConfigKey]:
    """Every key of a settings model, tables included, in the order of the model."""
    return _merge_kinds(_walk_keys(model, "", (), DEFAULT_RESTART_REASON))


def _walk_keys(
    model: type[BaseModel], prefix: str, kinds: tuple[str, ...], restart: str
) -> Iterator[ConfigKey]:
    for name, field in model.model_fields.items():
        inner = find_models(field.annotation)
        marked = [entry.reason for entry in field.metadata if isinstance(entry, Restart)]
        key = _describe_key(prefix + name, field, kinds, marked[-1] if marked else restart)
        if not inner:
            yield key
            continue
        steps: dict[object, tuple[str, str]] = {list: ("[]", "list of tables"), dict: ("{}", "named tables")}
        step, what = steps.get(get_origin(field.annotation), ("", "table"))
        yield replace(key, path=key.path + step, type=what, allowed="", default=None, example=None)
        for table in inner:
            inner_kinds = find_kinds(table) if len(inner) > 1 else kinds
            yield from _walk_keys(table, f"{key.path}{step}.", inner_kinds, key.restart)


def find_kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """The values of a table's `kind` that select this model; empty when it has none."""
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    return tuple(map(str, get_args(field.annotation)))


def _describe_key(path: str, field: FieldInfo, kinds: tuple[str, ...], restart: str) -> ConfigKey:
    words, bounds = _describe_type(field.annotation)
    name = path.rpartition(".")[2]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    example = field.examples[0] if field.examples else default
    if example in (None, [], {}, (), "") and example != default:
        example = None
    return ConfigKey(
        path=path,
        kinds=kinds,
        type=words,
        allowed=", ".join([*bounds, *_describe_bounds(field.metadata)]),
        unit=next((unit for end, unit in _UNITS_BY_SUFFIX.items() if name.endswith(end)), ""),
        required=field.is_required(),
        default=to_plain_value(default),
        example=to_plain_value(_default_example(field.annotation) if example is None else example),
        description=" ".join((field.description or "").split()),
        restart=restart,
    )


def _describe_type(annotation: object) -> tuple[str, list[str]]:
    """An annotation in words, and what bounds it."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        words, bounds = _describe_type(inner[0])
        return words, [*bounds, *_describe_bounds(inner[1:])]
    if origin is Literal:
        return "one of", [format_toml_value(value) for value in inner]
    if origin in (Union, types.UnionType):
        parts = [_describe_type(a) for a in inner if a is not type(None)]
        return " or ".join(dict.fromkeys(w for w, _ in parts)), [b for _, bounds in parts for b in bounds]
    if origin in (list, tuple):
        words, bounds = _describe_type(inner[0])
        return f"list of {words}", bounds
    if origin is dict:
        words, bounds = _describe_type(inner[1])
        return f"table of {words} by name", bounds
    assert isinstance(annotation, type)
    return _TYPE_NAMES.get(annotation, annotation.__name__), []


def _describe_bounds(metadata: Sequence[Any]) -> list[str]:
    found = []
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            found += _describe_bounds(entry.metadata)
            continue
        for attribute, words in (("ge", "at least"), ("gt", "more than"), ("le", "at most")):
            if getattr(entry, attribute, None) is not None:
                found.append(f"{words} {getattr(entry, attribute)}")
        if getattr(entry, "max_length", None) is not None:
            found.append(f"at most {entry.max_length} characters")
        if getattr(entry, "pattern", None) is not None:
            found.append(f"matching {entry.pattern}")
    return found


def _default_example(annotation: Any) -> Any:
    """A value for a key that has neither an example nor a default."""
    kind = annotation
    while get_args(kind) and get_origin(kind) is not Literal:
        if get_origin(kind) in (list, dict):
            return get_origin(kind)()
        kind = next(argument for argument in get_args(kind) if argument is not type(None))
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    return {bool: False, int: 1, float: 1.0, Path: "FILE"}.get(kind, "TEXT")


def to_plain_value(value: object) -> Any:
    """A setting as TOML and JSON have it."""
    if isinstance(value, BaseModel):
        return {name: to_plain_value(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list | tuple):
        return [to_plain_value(entry) for entry in value]
    if isinstance(value, dict):
        return {str(name): to_plain_value(entry) for name, entry in value.items()}
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _merge_kinds(keys: Iterator[ConfigKey]) -> list[ConfigKey]:
    """One entry for kinds that describe a key in the same way."""
    found: dict[tuple[object, ...], ConfigKey] = {}
    for key in keys:
        same = (key.path, key.type, key.allowed, repr(key.default), key.description, key.required)
        before = found.get(same)
        found[same] = key if before is None else replace(before, kinds=(*before.kinds, *key.kinds))
    return list(found.values())


def format_toml_value(value: object) -> str:
    """A value as a TOML file has it."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < _MAX_EXACT else repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_toml_value, value))}]"
    if isinstance(value, dict):
        inside = ", ".join(
            f"{_format_toml_key(k)} = {format_toml_value(v)}" for k, v in value.items() if v is not None
        )
        return f"{{ {inside} }}" if inside else "{}"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


def _format_toml_key(name: str) -> str:
    return (
        name
        if name.replace("-", "").replace("_", "").isalnum() and name.isascii()
        else format_toml_value(name)
    )


_LINE_WIDTH: Final = 106
_SEPARATOR: Final = "# " + "-" * (_LINE_WIDTH - 2)


def render_config_file(model: type[BaseModel], chosen: Mapping[str, Any], head: str) -> str:
    """A file with every key: what `chosen` has is set, the rest is commented out; `head` comes first."""
    lines = [*_render_comment(head), "", *_render_table(model, "", chosen, ())]
    return "\n".join(lines).rstrip() + "\n"


def _render_table(
    model: type[BaseModel],
    prefix: str,
    chosen: Mapping[str, Any],
    kinds: Sequence[str],
    *,
    commented: bool = False,
) -> Iterator[str]:
    """The keys of a table, then the tables in it; all of it commented out if `commented`."""
    mark = "#" if commented else ""
    keys = [key for key in list_keys(model) if "." not in key.path]
    for key in keys:
        if not key.is_table:
            yield from _render_key(key, chosen, kinds, commented=commented)
    for key in keys:
        if not key.is_table:
            continue
        models = find_models(model.model_fields[key.name].annotation)
        path, inner = f"{prefix}{key.name}", chosen.get(key.name) or {}
        yield from ("", *(() if commented else [_SEPARATOR]), *_render_comment(key.description), "")
        if key.type == "table":
            lines = list(_render_table(models[0], f"{path}.", inner, (), commented=commented))
            yield from ([f"{mark}[{path}]"] if lines and lines[0] else []) + lines
            continue
        tables = inner.items() if key.type == "named tables" else [("", values) for values in inner]
        written = set()
        for name, values in tables:
            kind = next((m for m in models if values.get("kind") in find_kinds(m)), models[0])
            written.add(kind)
            yield f"[{path}.{name}]" if name else f"[[{path}]]"
            yield from _render_table(kind, f"{path}.", values, find_kinds(kind))
            yield ""
        for kind in models:
            if kind not in written:
                yield f"#[{path}.NAME]" if key.type == "named tables" else f"#[[{path}]]"
                yield from _render_table(kind, f"{path}.", {}, find_kinds(kind), commented=True)
                yield ""


def _render_key(
    key: ConfigKey, chosen: Mapping[str, Any], kinds: Sequence[str], *, commented: bool
) -> Iterator[str]:
    value = chosen.get(key.name)
    if value is None:
        value = kinds[0] if key.name in ("kind", "name") and kinds else key.example
    is_set = not commented and chosen.get(key.name) is not None
    yield from _render_comment(f"{key.description}{_render_bounds(key)}")
    yield f"{'' if is_set else '#'}{key.name} = {format_toml_value(value)}"
    if not kinds:
        yield ""


def _render_bounds(key: ConfigKey) -> str:
    """Unit and bounds in brackets, unless the description has them."""
    parts = [key.unit] if key.unit else []
    if key.type == "one of":
        choices = key.allowed.split(", ")
        if key.name != "kind" and not all(choice in key.description for choice in choices):
            parts.append(" or ".join(choices))
    elif "matching" not in key.allowed and key.allowed not in ("", "more than 0", "at least 0"):
        parts.append(key.allowed)
    return f" ({'; '.join(parts)})" if parts else ""


def _render_comment(text: str) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines += textwrap.wrap(paragraph, _LINE_WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"# {line}".rstrip() for line in lines]
