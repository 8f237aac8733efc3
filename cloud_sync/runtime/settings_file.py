"""Settings of a program: one TOML file, overridden by the environment, every fault reported at once.

A settings model is a `pydantic_settings.BaseSettings` with `extra="forbid"`, its tables plain
`pydantic.BaseModel`. With the prefix `TIDEGATE_INGEST_`, `listen.port` is
`TIDEGATE_INGEST_LISTEN__PORT`. Unknown variables are faults like unknown keys; values of keys that look
like secrets are never shown.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from cloud_sync.runtime.secret_files import redact_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


M = TypeVar("M", bound=BaseSettings)

_SECRET_WORDS = ("password", "token", "secret", "dsn", "key")
_SHOWN_CHARACTERS = 60


class Fault(NamedTuple):
    """One thing wrong with the settings, in a file or an environment variable (`source`).

    `key` is dotted, "" for the file as a whole; `allowed` says what would be right, "" when `what` does.
    """

    source: str
    key: str
    what: str
    allowed: str

    def __str__(self) -> str:
        where = f"{self.source}: {self.key}" if self.key else self.source
        return f"{where}: {self.what}" + (f"; allowed: {self.allowed}" if self.allowed else "")


class InvalidSettingsError(Exception):
    """The settings cannot be used. `faults` has every reason; `str()` gives one line for each."""

    def __init__(self, faults: Iterable[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(map(str, self.faults)))


def load_settings(model: type[M], path: Path, env_prefix: str) -> M:
    """Settings from a file and the environment; an InvalidSettingsError has every fault found."""
    table = read_toml(path)

    class Bound(model):  # type: ignore[valid-type,misc]  # the model is a variable on purpose
        """The model with its two sources bound: environment over file."""

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], **_defaults: PydanticBaseSettingsSource
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (
                EnvSettingsSource(settings_cls, env_prefix=env_prefix, env_nested_delimiter="__"),
                InitSettingsSource(settings_cls, init_kwargs=table),
            )

    Bound.__name__ = Bound.__qualname__ = model.__name__
    strangers = _unknown_variables(model, os.environ, env_prefix)
    try:
        settings: M = Bound()
    except SettingsError as fault:
        raise InvalidSettingsError(
            [*strangers, Fault(f"environment {env_prefix}*", "", str(fault), "")]
        ) from fault
    except ValidationError as fault:
        found = [
            _fault_from_error(dict(error), model, path, env_prefix)
            for error in fault.errors(include_url=False)
        ]
        raise InvalidSettingsError([*strangers, *found]) from fault
    if strangers:
        raise InvalidSettingsError(strangers)
    return settings


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file says, unchecked."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as fault:
        raise InvalidSettingsError([Fault(str(path), "", "there is no such file", "")]) from fault
    except OSError as fault:
        raise InvalidSettingsError([Fault(str(path), "", f"cannot be read: {fault.strerror}", "")]) from fault
    except UnicodeDecodeError as fault:
        raise InvalidSettingsError(
            [Fault(str(path), "", f"is not UTF-8 text at byte {fault.start}", "")]
        ) from fault
    except tomllib.TOMLDecodeError as fault:
        raise InvalidSettingsError([Fault(str(path), "", f"is not valid TOML: {fault}", "")]) from fault


def _unknown_variables(model: type[BaseModel], environ: Mapping[str, str], env_prefix: str) -> list[Fault]:
    known = {name.lower() for name in model.model_fields}
    faults = []
    for variable in sorted(environ):
        if not variable.upper().startswith(env_prefix):
            continue
        first = variable[len(env_prefix) :].split("__")[0].lower()
        if first not in known:
            faults.append(_unknown_key(f"environment {variable}", first, first, known))
    return faults


def _fault_from_error(error: dict[str, Any], model: type[BaseModel], path: Path, env_prefix: str) -> Fault:
    """One pydantic error as a fault: its place in the words of the file, and what is allowed there."""
    names, level = _locate(error["loc"], model)
    key = _dotted_path(names)
    variable = env_prefix + "__".join(str(n) for n in names)
    source = next((f"environment {v}" for v in os.environ if v.upper() == variable.upper()), str(path))
    if error["type"] == "extra_forbidden":
        known = {field for candidate in level for field in candidate.model_fields}
        return _unknown_key(source, key, str(names[-1]), known)
    if error["type"] == "missing":
        return Fault(source, key, "is missing", _describe_key(level, str(names[-1])))
    what = str(error["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    what = what[:1].lower() + what[1:]
    simple = isinstance(error["input"], str | int | float)
    if names and simple and not any(word in str(names[-1]).lower() for word in _SECRET_WORDS):
        what = f"{redact_text(str(error['input']))[:_SHOWN_CHARACTERS]!r}: {what}"
    return Fault(source, key, what, "")


def _locate(
    loc: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[list[str | int], list[type[BaseModel]]]:
    """Follow an error's path: the names as in the file (no union tags), and the models that hold the last."""
    names: list[str | int] = []
    level: list[type[BaseModel]] = [model]
    inside: list[type[BaseModel]] = [model]
    for position, step in enumerate(loc):
        tagged = [m for m in inside if isinstance(step, str) and step in _union_tags(m)]
        if tagged and len(inside) > 1:
            inside = tagged
            continue
        names.append(step)
        if isinstance(step, int):
            continue
        level = inside
        fields = [m.model_fields[step] for m in inside if step in m.model_fields]
        if fields or position + 1 < len(loc):
            inside = [found for field in fields for found in find_models(field.annotation)]
    return names, level


def find_models(annotation: Any) -> list[type[BaseModel]]:
    """Every settings model inside an annotation: through lists, dictionaries, unions and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return find_models(get_args(annotation)[0])
    if get_origin(annotation) is Union or get_args(annotation):
        return [found for inner in get_args(annotation) for found in find_models(inner)]
    return []


def _union_tags(model: type[BaseModel]) -> set[str]:
    """Values that a discriminated union may know the model by."""
    return {
        value
        for field in model.model_fields.values()
        if get_origin(field.annotation) is Literal
        for value in get_args(field.annotation)
        if isinstance(value, str)
    }


def _describe_key(level: list[type[BaseModel]], name: str) -> str:
    """What a key is for, in one sentence, with an example where there is one."""
    described = [m.model_fields[name] for m in level if name in m.model_fields]
    field = next((found for found in described if found.description), None)
    if field is None or field.description is None:
        return ""
    sentence = " ".join(field.description.split()).partition(". ")[0].removesuffix(".")
    return sentence + (f", e.g. {field.examples[0]}" if field.examples else "")


def _unknown_key(source: str, key: str, name: str, known: set[str]) -> Fault:
    close = difflib.get_close_matches(name, known, n=1)
    what = f"unknown key; did you mean {close[0]!r}?" if close else "unknown key"
    return Fault(source, key, what, ", ".join(sorted(known)))


def _dotted_path(names: list[str | int]) -> str:
    text = ""
    for name in names:
        text += f"[{name}]" if isinstance(name, int) else f".{name}" if text else name
    return text
