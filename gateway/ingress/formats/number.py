"""A bare number: the whole payload is `21.5`, or a text that the rule gives a number (`ON`). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.ingress.formats.measurement import Fault, Measurement, NotDecodable
from gateway.ingress.formats.plans import PlanBook, number_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gateway.ingress.formats.measurement import Decoded
    from gateway.ingress.formats.rule import Rule

_WORDS = {"true": 1.0, "false": 0.0}


def decoder(rule: Rule, levels: Mapping[str, str]) -> Callable[[bytes, int], Decoded]:
    """What decodes the payloads of one topic, whose named levels are given."""
    plans = PlanBook(rule, levels).only
    assert plans is not None
    plan = plans.of("value")
    assert plan is not None
    may_be_empty = rule.may_be_empty
    plan = plan._replace(values={**_WORDS, **plan.values})

    def decode(payload: bytes, now_us: int) -> Decoded:  # noqa: ARG001 - of every decoder
        try:
            text = payload.decode().strip()
            number = number_of(plan, "payload", text, text_counts=True)
        except UnicodeDecodeError:
            return (), [Fault("not_utf8", "expected a number as text", payload)]
        except NotDecodable as fault:
            return (), [] if may_be_empty else [fault.fault(payload)]
        assert number is not None
        return (Measurement(plan.name, number, unit=plan.unit),), []

    return decode
