"""State machine of one alert (one rule, one series), and its one-line description. Pure.

    good ──broken──> pending ──broken for `for`, no cooldown──> firing ──good──> cooling ──in time──> good
                        └──good──> good                            └──every `repeat`: notified again

Times are those of the readings (for silence: the gateway's). A series without an instance is good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from cloud_sync.model.records import AlertState
from gateway.alerts.rules import FLAG_PREFIX, RATE_QUANTITY, SILENCE_QUANTITY, LimitState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gateway.alerts.rules import Rule

NO_TIME_US = -(1 << 62)


class AlertInstance(NamedTuple):
    """Where an alert of one rule and one series stands; times in microseconds, `NEVER` for none.

    Attributes:
        since_us: since when the rule is broken, where it has to be so for some time.
        fired_us: when it fired, while it is firing.
        told_us: when it was told last, firing.
        noted_us: the time of the latest record of it, so that each has its own.
        findings: how many there were since then.
    """

    since_us: int = NO_TIME_US
    fired_us: int = NO_TIME_US
    notified_us: int = NO_TIME_US
    recorded_us: int = NO_TIME_US
    findings: int = 0

    @property
    def uncounted(self) -> AlertInstance:
        """The same without its findings."""
        return self._replace(findings=0)

    def differs_from(self, later: AlertInstance) -> bool:
        """Whether what has become of it is worth writing: more than more findings."""
        return self.uncounted != later.uncounted or later.findings < self.findings

    @property
    def is_firing(self) -> bool:
        """Whether the alert has begun and not ended."""
        return self.fired_us != NO_TIME_US


class AlertChange(NamedTuple):
    """Something to be told of an alert; `at_us` is no other's of the same course."""

    state: AlertState
    at_us: int
    value: float
    findings: int


def advance_instance(
    rule: Rule,
    instance: AlertInstance,
    level: LimitState,
    times: NDArray[np.int64],
    values: NDArray[np.float64],
) -> tuple[AlertInstance, list[AlertChange]]:
    """Take the next findings of a series, all of one level; returns the new course and what it tells."""
    instance = _drop_future_times(rule, instance, int(times[0]))
    if level is LimitState.GOOD or (level is LimitState.BETWEEN and not instance.is_firing):
        return _apply_good(rule, instance, times, values)
    changes: list[AlertChange] = []
    at = 0
    if not instance.is_firing:
        since_us = instance.since_us if instance.since_us != NO_TIME_US else int(times[0])
        due_us = max(since_us + rule.for_us, instance.notified_us + rule.cooldown_us)
        at = _first_index_from(times, due_us)
        instance = instance._replace(
            since_us=since_us if rule.for_us else NO_TIME_US,
            findings=instance.findings + min(at + 1, len(times)),
        )
        if at == len(times):
            return instance, []
        instance = _fire(instance, int(times[at]), float(values[at]), changes)
        at += 1
    while rule.repeat_us and (
        to := at + _first_index_from(times[at:], instance.notified_us + rule.repeat_us)
    ) < len(times):
        instance = instance._replace(findings=instance.findings + to + 1 - at)
        instance = _fire(instance, int(times[to]), float(values[to]), changes)
        at = to + 1
    return instance._replace(findings=instance.findings + len(times) - at), changes


def recover_instance(instance: AlertInstance, at_us: int, value: float) -> tuple[AlertInstance, AlertChange]:
    """A firing alert ends."""
    at_us += at_us == instance.recorded_us
    change = AlertChange(AlertState.RECOVERED, at_us, value, max(instance.findings, 1))
    return instance._replace(since_us=NO_TIME_US, fired_us=NO_TIME_US, recorded_us=at_us, findings=0), change


def is_cooling(rule: Rule, instance: AlertInstance, now_us: int) -> bool:
    """Whether the cooldown after an alert still holds the next one back."""
    return (
        instance.notified_us <= now_us + rule.cooldown_us and now_us < instance.notified_us + rule.cooldown_us
    )


def is_over(rule: Rule, instance: AlertInstance, now_us: int) -> bool:
    """Whether a course can be forgotten: nothing is broken and the cooldown has passed."""
    idle = instance.since_us == NO_TIME_US and not instance.is_firing
    return idle and instance.notified_us + rule.cooldown_us <= now_us


def _drop_future_times(rule: Rule, instance: AlertInstance, now_us: int) -> AlertInstance:
    """A course without times that a clock stepping back has left in the future."""
    if instance.notified_us > now_us + rule.cooldown_us:
        instance = instance._replace(notified_us=NO_TIME_US)
    if instance.since_us > now_us:
        instance = instance._replace(since_us=now_us)
    return instance


def _apply_good(
    rule: Rule, instance: AlertInstance, times: NDArray[np.int64], values: NDArray[np.float64]
) -> tuple[AlertInstance, list[AlertChange]]:
    if instance.is_firing:
        instance, change = recover_instance(instance, int(times[0]), float(values[0]))
        return instance, [change]
    cooling = is_cooling(rule, instance, int(times[-1]))
    return instance._replace(since_us=NO_TIME_US, findings=instance.findings if cooling else 0), []


def _fire(instance: AlertInstance, at_us: int, value: float, changes: list[AlertChange]) -> AlertInstance:
    at_us += at_us == instance.recorded_us
    changes.append(AlertChange(AlertState.FIRING, at_us, value, instance.findings))
    fired_us = instance.fired_us if instance.is_firing else at_us
    return instance._replace(fired_us=fired_us, notified_us=at_us, recorded_us=at_us, findings=0)


def _first_index_from(times: NDArray[np.int64], due_us: int) -> int:
    """Where the first time that is not before `due_us` stands; their number when there is none."""
    reached = times >= due_us
    return int(reached.argmax()) if reached.any() else len(times)


def describe_change(rule: Rule, change: AlertChange, threshold: float) -> str:
    """One line: what was seen and what it was compared with."""
    firing = change.state is AlertState.FIRING
    if rule.on == SILENCE_QUANTITY:
        if firing:
            return f"no data for {change.value:.0f} s"
        return f"data again, {change.value:.0f} s after the alert"
    if rule.on.startswith(FLAG_PREFIX):
        name = rule.on.removeprefix(FLAG_PREFIX)
        return f"flagged {name}" if firing else f"no longer flagged {name}"
    what = "rate per minute" if rule.on == RATE_QUANTITY else rule.on.replace(".", " ").replace("_", " ")
    if not firing:
        return f"{what} is back at {change.value:g}"
    side = "above" if threshold == rule.above else "below"
    return f"{what} {change.value:g} is {side} {threshold:g}"
