"""State machine of one alert (one rule, one series), its description, records and stored form. Pure.

    good ──broken──> pending ──broken for `for`, no cooldown──> firing ──good──> cooling ──in time──> good
                        └──good──> good                            └──every `repeat`: notified again

Times are those of the readings (for silence: the gateway's). A series without an instance is good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec
import numpy as np

from cloud_sync.model.records import Alerts, AlertState
from gateway.alerts.rules import FLAG_PREFIX, RATE_QUANTITY, SILENCE_QUANTITY, LimitState
from gateway.processing.series_pattern import NEVER_US

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from gateway.alerts.rules import Rule

INSTANCE_KEY = "alerts/course"
_VERSION = 1
T = TypeVar("T")


class AlertInstance(NamedTuple):
    """State of the alert of one rule and one series; `NEVER_US` for none.

    `since_us` is set while it is pending, `fired_us` while it is firing; `notified_us` is when it last fired
    or was repeated. `findings` counts broken readings since `recorded_us`, the time of its latest record.
    """

    since_us: int = NEVER_US
    fired_us: int = NEVER_US
    notified_us: int = NEVER_US
    recorded_us: int = NEVER_US
    findings: int = 0

    @property
    def uncounted(self) -> AlertInstance:
        """The state without its findings."""
        return self._replace(findings=0)

    def differs_from(self, later: AlertInstance) -> bool:
        """Whether the later state must be written: more than more findings."""
        return self.uncounted != later.uncounted or later.findings < self.findings

    @property
    def is_firing(self) -> bool:
        """Whether it has begun and not ended."""
        return self.fired_us != NEVER_US


class AlertChange(NamedTuple):
    """An alert began, was repeated or ended; `at_us` is unique among the changes of one alert."""

    state: AlertState
    at_us: int
    value: float
    findings: int


class AlertEvent(NamedTuple):
    """An `AlertChange` with its rule, which may no longer be configured, and its description."""

    rule: Rule
    series: int
    state: AlertState
    at_us: int
    value: float
    findings: int
    threshold: float
    detail: str


def advance_instance(
    rule: Rule,
    instance: AlertInstance,
    level: LimitState,
    times: NDArray[np.int64],
    values: NDArray[np.float64],
) -> tuple[AlertInstance, list[AlertChange]]:
    """Apply the next readings of a series, all of one level; returns the new state and the changes."""
    instance = _drop_future_times(rule, instance, int(times[0]))
    if level is LimitState.GOOD or (level is LimitState.BETWEEN and not instance.is_firing):
        return _apply_good(rule, instance, times, values)
    changes: list[AlertChange] = []
    at = 0
    if not instance.is_firing:
        since_us = instance.since_us if instance.since_us != NEVER_US else int(times[0])
        due_us = max(since_us + rule.for_us, instance.notified_us + rule.cooldown_us)
        at = _first_index_from(times, due_us)
        instance = instance._replace(
            since_us=since_us if rule.for_us else NEVER_US,
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
    """End a firing alert."""
    at_us += at_us == instance.recorded_us
    change = AlertChange(AlertState.RECOVERED, at_us, value, max(instance.findings, 1))
    return instance._replace(since_us=NEVER_US, fired_us=NEVER_US, recorded_us=at_us, findings=0), change


def is_cooling(rule: Rule, instance: AlertInstance, now_us: int) -> bool:
    """Whether the cooldown after the last alert still prevents the next one."""
    return (
        instance.notified_us <= now_us + rule.cooldown_us and now_us < instance.notified_us + rule.cooldown_us
    )


def is_over(rule: Rule, instance: AlertInstance, now_us: int) -> bool:
    """Whether the state can be dropped: nothing is broken and the cooldown has passed."""
    idle = instance.since_us == NEVER_US and not instance.is_firing
    return idle and instance.notified_us + rule.cooldown_us <= now_us


def _drop_future_times(rule: Rule, instance: AlertInstance, now_us: int) -> AlertInstance:
    """Drop times that are in the future because the clock was set back."""
    if instance.notified_us > now_us + rule.cooldown_us:
        instance = instance._replace(notified_us=NEVER_US)
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
    return instance._replace(since_us=NEVER_US, findings=instance.findings if cooling else 0), []


def _fire(instance: AlertInstance, at_us: int, value: float, changes: list[AlertChange]) -> AlertInstance:
    at_us += at_us == instance.recorded_us
    changes.append(AlertChange(AlertState.FIRING, at_us, value, instance.findings))
    fired_us = instance.fired_us if instance.is_firing else at_us
    return instance._replace(fired_us=fired_us, notified_us=at_us, recorded_us=at_us, findings=0)


def _first_index_from(times: NDArray[np.int64], due_us: int) -> int:
    """Index of the first time from `due_us` on; the number of times when there is none."""
    reached = times >= due_us
    return int(reached.argmax()) if reached.any() else len(times)


def describe_change(rule: Rule, change: AlertChange, threshold: float) -> str:
    """One line: the value and the limit it broke."""
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


class StoredInstance(NamedTuple):
    """The value of a key that names rule and series."""

    severity: int
    instance: AlertInstance


def instance_key(rule: str, series: int) -> str:
    """The key of a `StoredInstance`."""
    return f"{INSTANCE_KEY}/{rule}/{series}"


def encode_state(value: object) -> bytes:
    """A version byte, then MessagePack."""
    return bytes([_VERSION]) + msgspec.msgpack.encode(value)


def decode_state(blob: bytes, kind: type[T]) -> T | None:
    """Decode what `encode_state` wrote; None when it is damaged or of another version."""
    try:
        return msgspec.msgpack.decode(blob[1:], type=kind) if blob[:1] == bytes([_VERSION]) else None
    except msgspec.DecodeError:
        return None


def build_event(rule: Rule, series: int, change: AlertChange) -> AlertEvent:
    """The event of a change, described."""
    threshold = rule.limit_for(change.value)
    detail = describe_change(rule, change, threshold)
    if rule.on == SILENCE_QUANTITY:
        change = change._replace(value=np.nan)
    return AlertEvent(rule, series, *change, threshold, detail)


def build_alert_records(events: list[AlertEvent]) -> Alerts:
    """The records of events, in canonical order."""
    return Alerts(
        series=np.array([event.series for event in events], np.int32),
        time_us=np.array([event.at_us for event in events], np.int64),
        state=np.array([event.state for event in events], np.int32),
        severity=np.array([event.rule.severity for event in events], np.int32),
        value=np.array([event.value for event in events], np.float64),
        threshold=np.array([event.threshold for event in events], np.float64),
        count=np.array([min(event.findings, 0x7FFFFFFF) for event in events], np.int32),
        rule=np.array([event.rule.name for event in events], np.object_),
        detail=np.array([event.detail for event in events], np.object_),
    ).in_order()
