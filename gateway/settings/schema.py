"""The schema of the configuration: base of all tables, its keys, and the commented file. Pure.

A key's path is dotted, with `[]` after a list of tables and `{}` after tables by name: `ingress.listen.port`,
`destinations[].url`, `ingress.rule[].members{}.unit`. The tables of one list may differ by kind; then a key
has an entry for each kind that describes it differently.
"""

from __future__ import annotations

import ipaddress
import json
import textwrap
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr
from pydantic.fields import FieldInfo

from cloud_sync.runtime.settings_file import find_models

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

Port = Annotated[int, Field(ge=0, le=65535)]
Count = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def is_http_url(url: str) -> bool:
    """Whether it is an http:// or https:// address with a host."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _validate_http_url(url: str) -> str:
    if not is_http_url(url):
        raise ValueError("must be an http:// or https:// address with a host")
    return url.rstrip("/")


HttpUrl = Annotated[str, AfterValidator(_validate_http_url)]


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own and reached by nobody else."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def unencrypted_secret_error(what: str, url: str, secure: str) -> str:
    """Why a secret may not go to an address: it would cross the network readable. "" where it may.

    Args:
        what: the secret, in words.
        url: where it goes.
        secure: how an address begins that encrypts, such as "https://".
    """
    if url.startswith(secure) or is_loopback(urlsplit(url).hostname or ""):
        return ""
    return (
        f"{what} would cross the network readable: use {secure}, or say allow_plain = true where something "
        "else encrypts, as a VPN"
    )


class Table(BaseModel):
    """A table of the file. Unknown keys are faults; the docstring under a key is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    _configured: dict[str, Path] = PrivateAttr(default_factory=dict)

    def hand_over(self, key: str, given: Path) -> None:
        """Have `key` lead to `given`, where systemd put a copy, and remember what the configuration says."""
        self._configured[key] = getattr(self, key)
        setattr(self, key, given)

    def configured(self, key: str) -> Any:
        """What the configuration says of `key`, wherever that was handed over."""
        return self._configured.get(key, getattr(self, key))


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
_TYPE_NAMES: Final = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
_EMPTY_VALUES: Final[tuple[Any, ...]] = (None, [], {}, (), "")


@dataclass(frozen=True, slots=True)
class ConfigKey:
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


def list_keys(model: type[BaseModel]) -> list[ConfigKey]:
    """Every key that a settings model takes, tables included, in the order of the model."""
    return _merge_kinds(list(_walk_keys(model, "", ())))


def _walk_keys(model: type[BaseModel], prefix: str, kinds: tuple[str, ...]) -> Iterator[ConfigKey]:
    for name, field in model.model_fields.items():
        inner = find_models(field.annotation)
        key = _describe_key(prefix + name, field, kinds)
        if not inner:
            yield key
            continue
        steps: dict[Any, str] = {list: "[]", tuple: "[]", dict: "{}"}
        step = steps.get(get_origin(field.annotation), "")
        what = {"[]": "list of tables", "{}": "named tables"}.get(step, "table")
        yield replace(key, path=key.path + step, type=what, allowed="", default=None, example=None)
        for table in inner:
            yield from _walk_keys(table, f"{key.path}{step}.", find_kinds(table) if len(inner) > 1 else kinds)


def find_kinds(model: type[BaseModel]) -> tuple[str, ...]:
    """The value of a table's `kind` that means this model; empty when it has none."""
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return ()
    return tuple(map(str, get_args(field.annotation)))


def _describe_key(path: str, field: FieldInfo, kinds: tuple[str, ...]) -> ConfigKey:
    words, bounds = _describe_type(field.annotation)
    bounds = [*bounds, *_describe_bounds(field.metadata)]
    name = path.rpartition(".")[2]
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    example = field.examples[0] if field.examples else default
    if example in _EMPTY_VALUES and not isinstance(example, bool) and example != default:
        example = None
    if example is None:
        example = _default_example(field.annotation)
    return ConfigKey(
        path=path,
        kinds=kinds,
        type=words,
        allowed=", ".join(bounds),
        unit=next((unit for end, unit in _UNITS_BY_SUFFIX.items() if name.endswith(end)), ""),
        required=field.is_required(),
        default=to_plain_value(default),
        example=to_plain_value(example),
        description=" ".join((field.description or "").split()),
    )


def _describe_type(annotation: Any) -> tuple[str, list[str]]:
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
    return _TYPE_NAMES.get(annotation, getattr(annotation, "__name__", str(annotation))), []


def _describe_bounds(metadata: Sequence[Any]) -> list[str]:
    found = []
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            found += _describe_bounds(entry.metadata)
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


def _default_example(annotation: Any) -> Any:
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


def to_plain_value(value: Any) -> Any:
    """A setting as TOML and JSON know it."""
    if isinstance(value, BaseModel):
        return {name: to_plain_value(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, list | tuple):
        return [to_plain_value(entry) for entry in value]
    if isinstance(value, dict):
        return {str(name): to_plain_value(entry) for name, entry in value.items()}
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _merge_kinds(keys: list[ConfigKey]) -> list[ConfigKey]:
    """One entry for the kinds that say the same of a key."""
    found: dict[tuple[Any, ...], ConfigKey] = {}
    for key in keys:
        same = (key.path, key.type, key.allowed, repr(key.default), key.description, key.required)
        before = found.get(same)
        found[same] = key if before is None else replace(before, kinds=(*before.kinds, *key.kinds))
    return list(found.values())


def format_toml_value(value: Any) -> str:
    """A value as it stands in a TOML file."""
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)  # noqa: PLR2004 - exact
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
    """The file.

    Args:
        model: the settings.
        chosen: what is to be in force, as the tables of a TOML file.
        head: text that it begins with.
    """
    lines = [*_render_comment(head), ""]
    lines += _render_table(model, "", chosen, ())
    return "\n".join(lines).rstrip() + "\n"


def _render_table(
    model: type[BaseModel],
    prefix: str,
    chosen: Mapping[str, Any],
    kinds: Sequence[str],
    *,
    spoken: bool = True,
) -> Iterator[str]:
    """The keys of a table, then the tables in it. Not `spoken`: all of it commented out."""
    keys = {key.name: key for key in list_keys(model) if "." not in key.path}
    for key in keys.values():
        if not key.is_table:
            yield from _render_key(key, chosen, kinds, spoken=spoken)
    for name, key in keys.items():
        if key.is_table:
            field = model.model_fields[name]
            inner = find_models(field.annotation)
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            yield from _render_subtables(
                key, inner, f"{prefix}{name}", chosen.get(name), default, spoken=spoken
            )


def _render_subtables(
    key: ConfigKey, models: Sequence[type[BaseModel]], path: str, chosen: Any, default: Any, *, spoken: bool
) -> Iterator[str]:
    yield from ("", *([_SEPARATOR] if spoken else ()), *_render_comment(key.description), "")
    if key.type == "table":
        lines = list(_render_table(models[0], f"{path}.", chosen or {}, (), spoken=spoken))
        if lines and lines[0]:
            yield f"{'' if spoken else '#'}[{path}]"
        yield from lines
        return
    named = key.type == "named tables"
    for entry in (chosen.items() if named else enumerate(chosen)) if chosen else ():
        name, values = entry
        model = next((m for m in models if values.get("kind") in find_kinds(m)), models[0])
        yield f"[{path}.{name}]" if named else f"[[{path}]]"
        yield from _render_table(model, f"{path}.", values, find_kinds(model))
        yield ""
    there = {values.get("kind") for values in (chosen.values() if named else chosen)} if chosen else set()
    for model in models:
        if chosen and (not find_kinds(model) or set(find_kinds(model)) & there):
            continue
        examples = _default_tables(default, named=named) or [("NAME", {})]
        for name, values in examples:
            yield f"#[{path}.{name}]" if named else f"#[[{path}]]"
            yield from _render_table(model, f"{path}.", values, find_kinds(model), spoken=False)
            yield ""


def _default_tables(default: Any, *, named: bool) -> list[tuple[str, Any]]:
    """The tables that are there when the file has none."""
    if not default:
        return []
    return (
        [(str(n), to_plain_value(v)) for n, v in default.items()]
        if named
        else [("", to_plain_value(v)) for v in default]
    )


def _render_key(
    key: ConfigKey, chosen: Mapping[str, Any], kinds: Sequence[str], *, spoken: bool
) -> Iterator[str]:
    value = chosen.get(key.name)
    if value is None:
        value = kinds[0] if key.name in ("kind", "name") and kinds else key.example
    said = spoken and (key.name in chosen and chosen[key.name] is not None)
    yield from _render_comment(f"{key.description}{_render_bounds(key)}")
    yield f"{'' if said else '#'}{key.name} = {format_toml_value(value)}"
    if not kinds:
        yield ""


def _render_bounds(key: ConfigKey) -> str:
    """Unit and bounds in brackets, where the description does not say them."""
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
