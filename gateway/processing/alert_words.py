"""What an alert says to a person. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloud_sync.notices import AlertState
from gateway.processing.alert_rules import FLAG_PREFIX, RATE, SILENCE

if TYPE_CHECKING:
    from gateway.processing.alert_course import Change
    from gateway.processing.alert_rules import Rule


def detail_of(rule: Rule, change: Change, threshold: float) -> str:
    """One line: what was seen and what it was compared with."""
    firing = change.state is AlertState.FIRING
    if rule.on == SILENCE:
        if firing:
            return f"no data for {change.value:.0f} s"
        return f"data again, {change.value:.0f} s after the alert"
    if rule.on.startswith(FLAG_PREFIX):
        name = rule.on.removeprefix(FLAG_PREFIX)
        return f"flagged {name}" if firing else f"no longer flagged {name}"
    what = "rate per minute" if rule.on == RATE else rule.on.replace(".", " ").replace("_", " ")
    if not firing:
        return f"{what} is back at {change.value:g}"
    side = "above" if threshold == rule.above else "below"
    return f"{what} {change.value:g} is {side} {threshold:g}"
