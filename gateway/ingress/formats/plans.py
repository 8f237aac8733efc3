"""Plans: what a member of a payload becomes under a rule, worked out once for each path. Pure."""

from __future__ import annotations

import math
import re
from fnmatch import translate
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from gateway.ingress.formats.measurement import NotDecodable
from gateway.ingress.topics import SeriesName

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.ingress.formats.naming import Template
    from gateway.ingress.formats.rule import Member, Rule

_PLANS_MAX: Final = 10_000
_DEVICES_MAX: Final = 10_000
_SHOWN: Final = 64
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)


class Plan(NamedTuple):
    """What one member becomes; `is_named` when the rule speaks of it by its own name."""

    name: SeriesName
    member: Member
    unit: str | None
    values: Mapping[str, float]
    is_plain: bool
    is_named: bool


class Selection:
    """Which paths a rule takes, and as what."""

    def __init__(self, rule: Rule) -> None:
        self._otherwise = rule.otherwise
        self._exact = {path: m for path, m in rule.members.items() if not _has_star(path)}
        self._members = [(_pattern(path), m) for path, m in rule.members.items() if _has_star(path)]
        self._include = [_pattern(path) for path in rule.include]
        self._exclude = [_pattern(path) for path in rule.exclude]
        self._named = {path for path in rule.include if not _has_star(path)} | set(self._exact)
        self._beside = {*rule.companions.values(), rule.time} - self._named

    def of(self, path: str) -> tuple[Member, bool] | None:
        """What the member at `path` is to become, and whether it is named; None when it is left out."""
        if path in self._beside or any(pattern(path) for pattern in self._exclude):
            return None
        found = self._exact.get(path) or next((m for pattern, m in self._members if pattern(path)), None)
        if found is None:
            if self._include and not any(pattern(path) for pattern in self._include):
                return None
            found = self._otherwise
        return found, path in self._named


class Plans:
    """The plans of one device under one rule, by path."""

    def __init__(self, selection: Selection, rule: Rule, sensor_id: str, sensor_type: Template) -> None:
        self._selection = selection
        self._otherwise = rule.otherwise
        self._sensor_id = sensor_id
        self._sensor_type = sensor_type
        self._plans: dict[str, Plan | None] = {}
        self.known = self._plans.get

    def of(self, path: str) -> Plan | None:
        """The plan of a path, None when it is left out."""
        if len(self._plans) >= _PLANS_MAX:
            self._plans.clear()
        plan = self._plans[path] = self._made(path)
        return plan

    def _made(self, path: str) -> Plan | None:
        found = self._selection.of(path)
        if found is None:
            return None
        member, is_named = found
        sensor_type = self._sensor_type.render(lambda _: member.name or path)
        return Plan(
            SeriesName(self._sensor_id, sensor_type),
            member,
            member.unit or self._otherwise.unit,
            member.values or self._otherwise.values,
            member.is_plain,
            is_named,
        )


class PlanBook:
    """All plans of one topic under one rule: one `Plans` for each device that its payloads speak of.

    `names` are what the templates need of the payload, `member` aside.
    """

    def __init__(self, rule: Rule, levels: Mapping[str, str]) -> None:
        self._rule = rule
        self._selection = Selection(rule)
        self._sensor_id = rule.sensor_id.filled(levels)
        self._sensor_type = rule.sensor_type.filled(levels)
        needed = dict.fromkeys((*self._sensor_id.names, *self._sensor_type.names))
        self.names = tuple(name for name in needed if name != "member")
        self._books: dict[tuple[str, ...], Plans] = {}
        self.only = None if self.names else self.of(())

    def of(self, texts: tuple[str, ...]) -> Plans:
        """The plans where `names` are these texts."""
        plans = self._books.get(texts)
        if plans is None:
            if len(self._books) >= _DEVICES_MAX:
                self._books.clear()
            known = dict(zip(self.names, texts, strict=True))
            sensor_id = self._sensor_id.filled(known).text
            assert sensor_id is not None
            sensor_type = self._sensor_type.filled(known)
            plans = self._books[texts] = Plans(self._selection, self._rule, sensor_id, sensor_type)
        return plans


def number_of(plan: Plan, path: str, value: object, *, text_counts: bool = False) -> float | None:
    """The number a member stands for; None when it stands for none and nobody said that it must.

    Raises:
        NotDecodable: it should be a number; says what was expected.
    """
    kind = type(value)
    number: float
    if kind is float:
        number = value  # type: ignore[assignment]  # its type is looked at just above
    elif kind is int:
        try:
            number = float(value)  # type: ignore[arg-type]  # the same
        except OverflowError:
            raise NotDecodable("bad_member", f"{path}: a number beyond what 64-bit floats hold") from None
    elif kind is bool:
        number = plan.values.get("true" if value else "false", float(value))  # type: ignore[arg-type]  # the same
    elif kind is str:
        return _number_of_text(plan, path, value, text_counts=text_counts)  # type: ignore[arg-type]  # the same
    elif value is None or not plan.is_named:
        return None
    else:
        raise NotDecodable("bad_member", f"{path}: expected a number, found {_kind(value)}")
    return number if plan.is_plain else scaled(plan.member, path, number)


def scaled(member: Member, path: str, number: float) -> float:
    """The number after the member's scale and offset.

    Raises:
        NotDecodable: it is then beyond what can be stored.
    """
    made = number * member.scale + member.offset
    if not math.isfinite(made):
        raise NotDecodable("bad_member", f"{path}: {number!r} is beyond what can be stored once it is scaled")
    return made


def _number_of_text(plan: Plan, path: str, text: str, *, text_counts: bool) -> float | None:
    number = plan.values.get(text)
    if number is None and (text_counts or plan.is_named) and _NUMBER.fullmatch(text):
        number = float(text)
        if not math.isfinite(number):
            raise NotDecodable("bad_member", f"{path}: {text[:_SHOWN]!r} is beyond what 64-bit floats hold")
    if number is not None:
        return number if plan.is_plain else scaled(plan.member, path, number)
    if not (text_counts or plan.is_named):
        return None
    expected = f"a number or one of {', '.join(plan.values)}" if plan.values else "a number"
    raise NotDecodable("bad_member", f"{path}: expected {expected}, found {text[:_SHOWN]!r}")


def _kind(value: object) -> str:
    if isinstance(value, dict):
        return "an object"
    return "an array" if isinstance(value, list) else type(value).__name__


def _has_star(path: str) -> bool:
    return "*" in path


def _pattern(path: str) -> Callable[[str], object]:
    """Matches paths; * stands for any text, all else for itself."""
    escaped = path.replace("[", "[[]").replace("?", "[?]")
    return partial(re.compile(translate(escaped)).match)
