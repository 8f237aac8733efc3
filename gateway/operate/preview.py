"""What a payload on a topic would become, and under which rule; for whoever tries rules out. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.ingress.formats import shapes
from gateway.ingress.formats.measurement import Fault
from gateway.ingress.formats.rule import Rule, rule_of
from gateway.ingress.topics import fault_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.ingress.formats.measurement import Measurement
    from gateway.ingress.formats.rules import Rules


@dataclass(frozen=True, slots=True)
class Preview:
    """What would become of a payload.

    Attributes:
        rule_no: of the rule that is for the topic, from 1 in the order they are tried; None when none is.
        rule: that rule; the listener's topic as a rule when none is for it, None when that does not fit.
        measurements: the readings.
        faults: what would go into quarantine.
    """

    rule_no: int | None
    rule: Rule | None
    measurements: Sequence[Measurement]
    faults: Sequence[Fault]


def preview(rules: Rules, topic: str, payload: bytes, *, now_us: int) -> Preview:
    """What one payload on one topic would become."""
    rule = rules.rule_for(topic)
    rule_no = None if rule is None else next(n for n, r in enumerate(rules.rules, 1) if r is rule)
    if rule is None:
        rule = rule_of(rules.template.template, "reading")
    decoder = shapes.decoder_of(rule, topic, rules.births)
    if decoder is None:
        what = f"no rule is for this topic, and it does not fit {rules.template.template!r}"
        return Preview(None, None, (), (Fault("unknown_topic", what, payload),))
    found, faults = decoder(payload, now_us)
    taken, bad = [], list(faults)
    for measurement in found:
        fault = fault_in(measurement.name)
        if fault is None:
            taken.append(measurement)
        else:
            bad.append(Fault("bad_name", fault, payload))
    return Preview(rule_no, rule, taken, bad)
