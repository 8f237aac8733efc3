"""Names in topics and payloads: topic patterns, and the templates that make a sensor_id of them. Pure.

A topic pattern is an MQTT topic filter in which a level may be named: `tele/{device}/SENSOR`. `{name}` stands
for one level as `+` does, `{name#}` for all that follow as `#` does, with "/" written as ".". Neither stands
for a level that begins with "$", by which brokers and Homie mark what is no data.

A template is text with names in braces: `{device}:{member}`. A name is a level of the topic, else something
of the payload: what, is said by the shape.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LEVEL = re.compile(r"\{(\w+)(#?)\}")
_PIECE = re.compile(r"\{([^{}]*)\}")


class TopicPattern:
    """A topic filter with named levels.

    Raises:
        ValueError: it is none; the message says which level is wrong.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        levels = pattern.split("/")
        parts: list[str] = []
        names: list[str] = []
        for position, level in enumerate(levels):
            is_last = position == len(levels) - 1
            named = _LEVEL.fullmatch(level)
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
        self._hides_system = levels[0][:1] in ("+", "#", "{")
        self._pattern = re.compile("/".join(parts), re.DOTALL)

    def match(self, topic: str) -> dict[str, str] | None:
        """The named levels of a topic, or None when it does not fit. `+` and `#` do not stand for `$SYS`."""
        if self._hides_system and topic.startswith("$"):
            return None
        found = self._pattern.fullmatch(topic)
        return None if found is None else {k: v.replace("/", ".") for k, v in found.groupdict().items()}

    @property
    def filter(self) -> str:
        """The same as an MQTT topic filter, to subscribe with."""
        levels = [_LEVEL.fullmatch(level) for level in self.pattern.split("/")]
        plain = self.pattern.split("/")
        return "/".join(
            plain[i] if named is None else ("#" if named[2] else "+") for i, named in enumerate(levels)
        )


class Template:
    """Text with names in braces.

    Raises:
        ValueError: a brace without its partner, or an empty name.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        pieces = _PIECE.split(template)
        self._texts, self._names = pieces[::2], tuple(pieces[1::2])
        if any("{" in text or "}" in text for text in self._texts) or "" in self._names or not template:
            raise ValueError(f"{template!r} must be text with names in braces, such as {{device}}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names it needs."""
        return self._names

    def filled(self, known: Mapping[str, str]) -> Template:
        """The same with what is known filled in."""
        made = Template.__new__(Template)
        made.template = self.template
        texts, names, text = [], [], self._texts[0]
        for name, after in zip(self._names, self._texts[1:], strict=True):
            if name in known:
                text += known[name] + after
            else:
                texts.append(text)
                names.append(name)
                text = after
        texts.append(text)
        made._texts, made._names = texts, tuple(names)  # noqa: SLF001 - of the same class
        return made

    @property
    def text(self) -> str | None:
        """The text it always makes; None while it needs names."""
        return None if self._names else self._texts[0]

    def render(self, lookup: Callable[[str], str]) -> str:
        """The text with every name looked up; what `lookup` raises, this does."""
        made = self._texts[0]
        for name, text in zip(self._names, self._texts[1:], strict=True):
            made += lookup(name) + text
        return made
