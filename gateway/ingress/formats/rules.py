"""The rules of a gateway, in order: which one is for a topic, and whose readings it carries.

The first rule whose topic fits counts. A topic that fits none is for the default: JSON readings on the
gateway's topic template.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.ingress.formats import shapes
from gateway.ingress.formats.births import Births

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ingress.formats.rule import Rule
    from gateway.ingress.formats.shapes import Decoder
    from gateway.ingress.topics import TopicTemplate


class Rules:
    """What a gateway is told about topics: its template, and rules that go before it. A `Naming`.

    `births` is what Sparkplug's nodes said of themselves on the topics decoded here.
    """

    def __init__(
        self, template: TopicTemplate, rules: Sequence[Rule] = (), births: Births | None = None
    ) -> None:
        self.template = template
        self.rules = tuple(rules)
        self.births = Births() if births is None else births

    def replace(self, rules: Sequence[Rule]) -> None:
        """Go on with other rules. What was asked about topics before is to be asked again."""
        self.rules = tuple(rules)

    def rule_for(self, topic: str) -> Rule | None:
        """The first rule for a topic; None when the template is for it."""
        return next((rule for rule in self.rules if rule.names_of(topic) is not None), None)

    def decoder_for(self, topic: str) -> Decoder | None:
        """What decodes the payloads of a topic; None when the template is for it."""
        rule = self.rule_for(topic)
        return None if rule is None else shapes.decoder_of(rule, topic, self.births)

    def sensor_id_in(self, topic: str) -> str | None:
        """The sensor_id that the topic alone names, None when it names none."""
        rule = self.rule_for(topic)
        if rule is None:
            return self.template.sensor_id_in(topic)
        return rule.sensor_id.filled(rule.names_of(topic) or {}).text

    def leaves_owner_open(self, topic: str) -> bool:
        """Whether a rule is for this topic that takes the sensor_id from payloads, or takes nothing."""
        rule = self.rule_for(topic)
        return rule is not None and (rule.format == "ignore" or self.sensor_id_in(topic) is None)
