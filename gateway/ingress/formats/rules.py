"""The rules of a gateway, in order: which one is for a topic, and whose readings it carries.

The first rule whose topic fits counts. A topic that fits none is for the default: JSON readings on the
gateway's topic template.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.ingress.formats import shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ingress.formats.rule import Rule
    from gateway.ingress.formats.shapes import Decoder
    from gateway.ingress.topics import TopicTemplate


class Rules:
    """What a gateway is told about topics: its template, and rules that go before it."""

    def __init__(self, template: TopicTemplate, rules: Sequence[Rule] = ()) -> None:
        self.template = template
        self.rules = tuple(rules)

    def rule_for(self, topic: str) -> Rule | None:
        """The first rule for a topic; None when the template is for it."""
        return next((rule for rule in self.rules if rule.names_of(topic) is not None), None)

    def decoder_for(self, topic: str) -> Decoder | None:
        """What decodes the payloads of a topic; None when the template is for it."""
        rule = self.rule_for(topic)
        return None if rule is None else shapes.decoder_of(rule, topic)

    def sensor_id_in(self, topic: str) -> str | None:
        """The sensor_id that a topic alone names.

        None when it names none: it fits nothing, or its payloads name their devices (`names_in_payload`).
        """
        rule = self.rule_for(topic)
        if rule is None:
            series = self.template.match(topic)
            return None if series is None else series.sensor_id
        return rule.sensor_id.filled(rule.names_of(topic) or {}).text

    def names_in_payload(self, topic: str) -> bool:
        """Whether what a payload carries, not its topic, says whose readings these are."""
        rule = self.rule_for(topic)
        if rule is None or rule.format == "ignore":
            return False
        return rule.sensor_id.filled(rule.names_of(topic) or {}).text is None
