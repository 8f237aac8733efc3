"""From changes of alerts to what people read: notices, and the message that several of them make. Pure.

Whatever one rule has to say at one time is one message: how many series it is of, and the first few by name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_sync.notices import AlertState, Severity
from gateway.spool.outbox import EXAMPLES_MAX, Example, Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gateway.processing.alerts import Event

_SYMBOLS = {Severity.INFO: "info", Severity.WARNING: "WARNING", Severity.CRITICAL: "CRITICAL"}


class Message(NamedTuple):
    """What one rule has to say on one channel.

    Attributes:
        gateway_id: who says it.
        rule: its name.
        severity: of the rule.
        firing, recovered: how many alerts began and ended.
        examples: the first few of each, those that began first.
    """

    gateway_id: str
    rule: str
    severity: Severity
    firing: int
    recovered: int
    examples: tuple[tuple[AlertState, Example], ...]

    @property
    def subject(self) -> str:
        """One line."""
        names = {f"{e.sensor_id}/{e.sensor_type}" for _, e in self.examples}
        if self.firing + self.recovered == 1 and self.examples:
            (name,) = names
            what = "" if self.firing else " recovered"
            return f"{_SYMBOLS[self.severity]}{what}: {self.rule} of {name} at {self.gateway_id}"
        said = [
            f"{number} {what}"
            for number, what in ((self.firing, "firing"), (self.recovered, "recovered"))
            if number
        ]
        return f"{_SYMBOLS[self.severity]}: {self.rule}, {' and '.join(said)} at {self.gateway_id}"

    @property
    def text(self) -> str:
        """The subject, and a line for each example."""
        lines = [self.subject]
        for state, example in self.examples:
            mark = "" if state is AlertState.FIRING else "recovered: "
            lines.append(f"{mark}{example.sensor_id}/{example.sensor_type}: {example.detail}")
        more = self.firing + self.recovered - len(self.examples)
        return "\n".join([*lines, f"and {more} more"] if more > 0 else lines)

    def document(self) -> dict[str, Any]:
        """The same for a program; times are microseconds since 1970 UTC."""
        return {
            "text": self.text,
            "gateway_id": self.gateway_id,
            "rule": self.rule,
            "severity": self.severity.name.lower(),
            "firing": self.firing,
            "recovered": self.recovered,
            "alerts": [
                {"state": state.name.lower(), **{name: getattr(e, name) for name in e.__struct_fields__}}
                for state, e in self.examples
            ],
        }


def notices_of(
    events: Sequence[Event], name_of: Callable[[int], tuple[str, str]]
) -> Iterator[tuple[tuple[str, ...], Notice]]:
    """For each rule and state among `events` one notice, with the channels it is for."""
    groups: dict[tuple[str, AlertState], list[Event]] = {}
    for event in events:
        if event.change.state is AlertState.FIRING or event.rule.recovery:
            groups.setdefault((event.rule.name, event.change.state), []).append(event)
    for (rule, state), group in groups.items():
        examples = tuple(
            Example(
                *name_of(event.series),
                event.change.at_us,
                _known(event.change.value),
                _known(event.threshold),
                event.change.findings,
                event.detail,
            )
            for event in group[:EXAMPLES_MAX]
        )
        yield (
            group[0].rule.channels,
            Notice(rule, int(group[0].rule.severity), int(state), len(group), examples),
        )


def message_of(gateway_id: str, notices: Sequence[Notice]) -> Message:
    """One message of all notices of one rule."""
    examples = [(AlertState(n.state), example) for n in notices for example in n.examples]
    examples.sort(key=lambda pair: pair[0])
    return Message(
        gateway_id,
        notices[-1].rule,
        Severity(max(n.severity for n in notices)),
        sum(n.series for n in notices if n.state == AlertState.FIRING),
        sum(n.series for n in notices if n.state == AlertState.RECOVERED),
        tuple(examples[:EXAMPLES_MAX]),
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) or math.isinf(value) else value
