"""Series names, and the topic templates and patterns they are taken from. Pure.

A topic pattern is an MQTT topic filter whose levels may be named: `tele/{device}/SENSOR`. `{name}` matches
one level as `+` does, `{name#}` all remaining levels as `#` does, with "/" replaced by ".". Neither matches
a level that begins with "$". A name template is text with names in braces, `{device}:{member}`, filled from
topic levels and the payload.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

NAME_MAX_CHARACTERS = 256

_TEMPLATE_MEMBER = re.compile(r"\{(\w+)\}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class TopicResolver(Protocol):
    """Finds the sensor that a topic names."""

    def sensor_id_from_topic(self, topic: str) -> str | None:
        """The sensor_id if the topic alone names it."""
        ...

    def has_sensor_id_in_payload(self, topic: str, /) -> bool:
        """Whether payloads on this topic name sensors, so that each reading has to be checked."""
        ...


class SeriesName(NamedTuple):
    """A series without its attributes."""

    sensor_id: str
    sensor_type: str


class TopicTemplate:
    """A template such as `sensors/{sensor_id}/{sensor_type}`; each member stands for one topic level."""

    def __init__(self, template: str) -> None:
        self.template = template
        parts = []
        for level in template.split("/"):
            member = _TEMPLATE_MEMBER.fullmatch(level)
            if member is None and ("{" in level or "}" in level):
                raise ValueError(f"level {level!r} must be plain text or one member in braces")
            parts.append(f"(?P<{member[1]}>[^/]+)" if member else re.escape(level))
        names = _TEMPLATE_MEMBER.findall(template)
        if sorted(names) != ["sensor_id", "sensor_type"]:
            raise ValueError(
                "a template needs {sensor_id} and {sensor_type}, each once, and nothing else in braces"
            )
        self._pattern = re.compile("/".join(parts))

    def match(self, topic: str) -> SeriesName | None:
        """The series a topic names, None when the topic does not fit."""
        match = self._pattern.fullmatch(topic)
        return SeriesName(match["sensor_id"], match["sensor_type"]) if match else None

    def sensor_id_from_topic(self, topic: str) -> str | None:
        """The sensor_id that a topic names, None when it does not fit."""
        name = self.match(topic)
        return None if name is None else name.sensor_id

    def has_sensor_id_in_payload(self, _topic: str, /) -> bool:
        """Never."""
        return False


def find_series_name_fault(name: SeriesName) -> str | None:
    """Why a name cannot be stored, or None when it can."""
    for member, text in zip(SeriesName._fields, name, strict=True):
        if not text:
            return f"{member} is empty"
        if len(text) > NAME_MAX_CHARACTERS:
            return f"{member} has {len(text)} characters; at most {NAME_MAX_CHARACTERS} are allowed"
        if _UNPRINTABLE.search(text):
            return f"{member} holds control characters"
    return None


_NAMED_LEVEL = re.compile(r"\{(\w+)(#?)\}")
_BRACED_NAME = re.compile(r"\{([^{}]*)\}")


class TopicPattern:
    """A topic filter with named levels; ValueError says which level is wrong."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        levels = pattern.split("/")
        parts: list[str] = []
        names: list[str] = []
        for position, level in enumerate(levels):
            is_last = position == len(levels) - 1
            named = _NAMED_LEVEL.fullmatch(level)
            if level == "#" or (named and named[2]):
                if not is_last:
                    raise ValueError(
                        f"level {level!r} stands for all that follow, so it must be the last one"
                    )
                head = "/".join(parts)
                group = f"(?P<{named[1]}>[^$].*)" if named else ".*"
                if named:
                    names.append(named[1])
                    parts = [f"{head}/{group}" if head else group]
                else:
                    parts = [f"{head}(?:/{group})?" if head else group]
            elif named:
                names.append(named[1])
                parts.append(f"(?P<{named[1]}>[^/$][^/]*)")
            elif level == "+":
                parts.append("[^/]*")
            elif any(sign in level for sign in "+#{}\0"):
                raise ValueError(
                    f"level {level!r} must be plain text, +, # (the last one) or a name in braces"
                )
            else:
                parts.append(re.escape(level))
        if not pattern:
            raise ValueError("a topic pattern has at least one character")
        if len(set(names)) < len(names):
            raise ValueError(f"a name stands twice in {pattern!r}")
        self.names = tuple(names)
        self._excludes_system_topics = levels[0][:1] in ("+", "#", "{")
        self._pattern = re.compile("/".join(parts), re.DOTALL)

    def match(self, topic: str) -> dict[str, str] | None:
        """The named levels of a topic, or None when it does not fit. `+` and `#` do not stand for `$SYS`."""
        if self._excludes_system_topics and topic.startswith("$"):
            return None
        match = self._pattern.fullmatch(topic)
        return None if match is None else {k: v.replace("/", ".") for k, v in match.groupdict().items()}

    @property
    def filter(self) -> str:
        """The same as an MQTT topic filter, to subscribe with."""
        return _NAMED_LEVEL.sub(lambda named: "#" if named[2] else "+", self.pattern)


class NameTemplate:
    """Text with names in braces, some of which may be `known` already."""

    def __init__(self, template: str, known: Mapping[str, str] | None = None) -> None:
        self.template = template
        pieces = _BRACED_NAME.split(template)
        self._texts, self._names, self._known = pieces[::2], pieces[1::2], known or {}
        if any("{" in text or "}" in text for text in self._texts) or "" in self._names or not template:
            raise ValueError(f"{template!r} must be text with names in braces, such as {{device}}")
        self.names = tuple(name for name in self._names if name not in self._known)

    def fill(self, known: Mapping[str, str]) -> NameTemplate:
        """The same with more names known."""
        return NameTemplate(self.template, {**self._known, **known})

    @property
    def text(self) -> str | None:
        """The text it always makes; None while it needs names."""
        return None if self.names else self.render(self._known.__getitem__)

    def render(self, lookup: Callable[[str], str]) -> str:
        """The text with every unknown name looked up; what `lookup` raises, this does."""
        rendered = self._texts[0]
        for name, text in zip(self._names, self._texts[1:], strict=True):
            rendered += (self._known[name] if name in self._known else lookup(name)) + text
        return rendered
