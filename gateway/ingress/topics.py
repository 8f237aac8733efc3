"""Topic templates: which series a topic names. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple, Protocol

NAME_MAX_CHARACTERS = 256

_MEMBER = re.compile(r"\{(\w+)\}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class Naming(Protocol):
    """Knows whose readings a topic carries."""

    def sensor_id_in(self, topic: str) -> str | None:
        """The sensor_id that the topic alone names, None when it names none."""
        ...

    def leaves_owner_open(self, topic: str) -> bool:
        """Whether payloads on this topic say whose readings they are, so that each has to be asked about."""
        ...


class SeriesName(NamedTuple):
    """Whose readings a topic carries."""

    sensor_id: str
    sensor_type: str


class TopicTemplate:
    """A template such as `sensors/{sensor_id}/{sensor_type}`; each member stands for one topic level.

    Raises:
        ValueError: when the template lacks a member, names an unknown one or mixes one with other text.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        parts = []
        for level in template.split("/"):
            member = _MEMBER.fullmatch(level)
            if member is None and ("{" in level or "}" in level):
                raise ValueError(f"level {level!r} must be plain text or one member in braces")
            parts.append(f"(?P<{member[1]}>[^/]+)" if member else re.escape(level))
        names = _MEMBER.findall(template)
        if sorted(names) != ["sensor_id", "sensor_type"]:
            raise ValueError(
                "a template needs {sensor_id} and {sensor_type}, each once, and nothing else in braces"
            )
        self._pattern = re.compile("/".join(parts))

    def match(self, topic: str) -> SeriesName | None:
        """The series a topic names, or None when the topic does not fit the template."""
        found = self._pattern.fullmatch(topic)
        return SeriesName(found["sensor_id"], found["sensor_type"]) if found else None

    def sensor_id_in(self, topic: str) -> str | None:
        """The sensor_id that a topic names, None when it does not fit."""
        found = self.match(topic)
        return None if found is None else found.sensor_id

    def leaves_owner_open(self, topic: str) -> bool:  # noqa: ARG002 - of every `Naming`
        """Never: here it is the topic that says whose readings it carries."""
        return False


def fault_in(name: SeriesName) -> str | None:
    """Why a name cannot be stored, or None when it can."""
    for member, text in zip(SeriesName._fields, name, strict=True):
        if not text:
            return f"{member} is empty"
        if len(text) > NAME_MAX_CHARACTERS:
            return f"{member} has {len(text)} characters; at most {NAME_MAX_CHARACTERS} are taken"
        if _UNPRINTABLE.search(text):
            return f"{member} holds control characters"
    return None
