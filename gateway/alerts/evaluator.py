"""The processing stage that evaluates alert rules.

Readings are evaluated in commit order by their own times; late ones and those older than `stale_us` are
ignored, one whose time is in doubt counts as of now. Rollups are evaluated when their window first closes.
Silence is measured by arrival, in time during which the gateway ran: neither a step of the clock nor a pause
of the gateway makes a series silent. Every series in the spool is expected to report.

Every change is an `Alerts` record, written in one transaction with the state and the queued notices. Each
alert has a key "alerts/course/RULE/SERIES", written when more than its count of findings changes, to spare
the flash; after a kill that count may be lower. "alerts/rates" holds the readings that the next rates start
from. Every value is a version byte, then MessagePack.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from cloud_sync.model.records import AlertState, Flag, Severity
from gateway.alerts.alert_state import (
    INSTANCE_KEY,
    AlertEvent,
    AlertInstance,
    StoredInstance,
    advance_instance,
    build_alert_records,
    build_event,
    decode_state,
    encode_state,
    instance_key,
    is_cooling,
    is_over,
    recover_instance,
)
from gateway.alerts.rules import (
    RATE_QUANTITY,
    SILENCE_QUANTITY,
    LimitState,
    RatePoints,
    RateState,
    RateTracker,
    Rule,
    RuleInput,
    reading_quantities,
    rollup_quantities,
)
from gateway.processing.series_pattern import Pattern, SeriesRuleCache, grow_array, mark_run_starts
from gateway.processing.stage import StageOutput

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from gateway.processing.stage import StageInput

_log = logging.getLogger(__name__)
RATES_KEY = "alerts/rates"
_PAUSE_FROM_US = 30_000_000  # more between two steps is a pause or a step of the clock
_FORGET_AFTER_US = 86_400_000_000
_NOT_SEEN = -1
_RECENT_EVENTS = 50
_CLOCK_IN_DOUBT, _LATE = np.int32(Flag.CLOCK_IN_DOUBT), np.int32(Flag.LATE)

InstanceKey = tuple[int, int]
"""Index of the rule, series number."""


@dataclass(slots=True)
class _StepChanges:
    """What accepting a step changes."""

    uptime_us: int
    now_us: int
    instances: dict[InstanceKey, AlertInstance | None] = field(default_factory=dict)
    seen: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    rates: list[RatePoints] = field(default_factory=list)
    events: list[AlertEvent] = field(default_factory=list)
    removed_keys: list[str] = field(default_factory=list)


class AlertEvaluator:
    """Implements `ProcessingStage`.

    `name_of` gives sensor_id and sensor_type of a series number, `expected` every series in the spool, as
    identities. `queue_events` queues notices for the channels, inside the transaction.
    """

    name = "alerts"

    def __init__(
        self,
        rules: Sequence[Rule],
        name_of: Callable[[int], tuple[str, str]],
        expected: Callable[[], NDArray[np.int32]],
        queue_events: Callable[[sqlite3.Connection, Sequence[AlertEvent], int], None],
        *,
        stale_us: int = 3_600_000_000,
    ) -> None:
        self.rules = tuple(rules)
        self._name_of, self._expected, self._queue_events = name_of, expected, queue_events
        self._stale_us = stale_us
        self._kinds = SeriesRuleCache(lambda n: tuple(rule.applies_to(*name_of(n)) for rule in rules))
        self._instances: dict[InstanceKey, AlertInstance] = {}
        self._orphans: dict[tuple[str, int], StoredInstance] = {}  # of a rule or series that is gone
        self._watched = [np.zeros(1024, np.bool_) for _ in rules]
        self._firing = [np.zeros(1024, np.bool_) for _ in rules]
        self._arrived_us = np.full(1024, _NOT_SEEN, np.int64)
        self._rates = RateTracker()
        self._uptime_us = 0
        self._now_us: int | None = None
        self._rates_unsaved = False
        self._places = {rule.name: place for place, rule in enumerate(rules)}
        self.fired = self.recovered = 0
        self.recent: deque[AlertEvent] = deque(maxlen=_RECENT_EVENTS)

    def firing_alerts(self) -> list[tuple[Rule, int, int]]:
        """Rule, series and start of every firing alert, the latest first."""
        firing = [
            (self.rules[place], series, instance.fired_us)
            for (place, series), instance in list(self._instances.items())
            if instance.is_firing
        ]
        return sorted(firing, key=lambda alert: -alert[2])

    def restore(self, state: Mapping[str, bytes]) -> None:
        """Restore the durable state. Alerts of rules that are gone recover in the first step."""
        lost = 0
        for key, blob in state.items():
            if key == RATES_KEY:
                self._rates.restore(decode_state(blob, RateState) or [])
                continue
            name, _, numeral = key.removeprefix(f"{INSTANCE_KEY}/").rpartition("/")
            stored = decode_state(blob, StoredInstance)
            if stored is None or not numeral.isdecimal():
                lost += 1
            else:
                self._restore_instance(name, int(numeral), stored)
        if lost:
            _log.warning("the state of %d alerts cannot be decoded; they start again from good", lost)

    def take_over(self, before: AlertEvaluator) -> None:
        """Continue from another evaluator's state, between two of its steps.

        Alerts of rules that are gone recover in the next step; rules of the same name keep their alerts.
        """
        for (place, series), instance in before._instances.items():
            rule = before.rules[place]
            self._restore_instance(rule.name, series, StoredInstance(rule.severity, instance))
        self._orphans |= before._orphans
        self._grow(len(before._arrived_us) - 1)
        self._arrived_us[: len(before._arrived_us)] = before._arrived_us
        self._rates = before._rates
        self._uptime_us, self._now_us = before._uptime_us, before._now_us
        self._rates_unsaved = True
        self.fired, self.recovered = before.fired, before.recovered
        self.recent = before.recent

    def step(self, step: StageInput) -> StageOutput:
        """The changes of this step; the evaluator itself changes only in `accept`."""
        passed_us = 0 if self._now_us is None else step.now_us - self._now_us
        uptime_us = self._uptime_us + (passed_us if 0 <= passed_us <= _PAUSE_FROM_US else 0)
        after = _StepChanges(uptime_us, step.now_us)
        self._grow(int(max(step.readings.series.max(initial=0), step.rollups.series.max(initial=0))))
        if self._now_us is None or self._orphans:
            self._expect_known_series(after)
        inputs = chain(self._inputs_of_readings(step, after), self._inputs_of_rollups(step))
        for place, rule_input in inputs:
            self._evaluate(place, rule_input, after)
        self._evaluate_silence(step, after)
        self._forget(after)

        def snapshot() -> dict[str, bytes | None]:
            return {RATES_KEY: encode_state(self._rates.state_after(after.rates))}

        return StageOutput(
            records=(build_alert_records(after.events),) if after.events else (),
            state=dict(self._changed_keys(after)),
            snapshot=snapshot if after.rates or self._rates_unsaved else None,
            also=(lambda c: self._queue_events(c, after.events, step.now_us)) if after.events else None,
            after=after,
        )

    def accept(self, outcome: StageOutput, *, durable: bool) -> None:
        """Apply the changes of a step."""
        after = outcome.after
        assert isinstance(after, _StepChanges)
        for key, instance in after.instances.items():
            self._set(key, instance)
        self._rates.advance(after.rates)
        self._arrived_us[after.seen] = after.uptime_us
        self._orphans = {}
        self._uptime_us, self._now_us = after.uptime_us, after.now_us
        self._rates_unsaved = outcome.snapshot is not None and not durable
        self.recent.extend(after.events)
        fired = sum(event.state is AlertState.FIRING for event in after.events)
        self.fired += fired
        self.recovered += len(after.events) - fired

    def _is_known(self, series: int) -> bool:
        try:
            self._name_of(series)
        except KeyError:
            return False
        return True

    def _restore_instance(self, rule: str, series: int, stored: StoredInstance) -> None:
        place = self._places.get(rule)
        if place is None or not self._is_known(series):  # a salvaged spool may have lost the series
            self._orphans[rule, series] = stored
        else:
            self._set((place, series), stored.instance)

    def _expect_known_series(self, after: _StepChanges) -> None:
        """Expect every series of the spool, and end the alerts of rules that are gone."""
        known = self._expected()
        if known.size:
            self._grow(int(known.max()))
            self._arrived_us[known] = np.maximum(self._arrived_us[known], 0)
        for (rule, series), (severity, instance) in self._orphans.items():
            after.removed_keys.append(instance_key(rule, series))
            if instance.is_firing and self._is_known(series):
                _, change = recover_instance(instance, after.now_us, np.nan)
                removed = Rule(rule, Pattern("*", "*"), "", severity=Severity(severity))
                detail = "the rule is no longer in the configuration"
                after.events.append(AlertEvent(removed, series, *change, np.nan, detail))

    def _inputs_of_readings(self, step: StageInput, after: _StepChanges) -> Iterator[tuple[int, RuleInput]]:
        """What each rule about readings must evaluate, with the rule's index."""
        readings = step.readings
        if readings.rows == 0:
            return
        after.seen = np.unique(readings.series)
        times = readings.time_us
        usable = readings.flags & _LATE == 0
        if (in_doubt := readings.flags & _CLOCK_IN_DOUBT != 0).any():
            times = np.where(in_doubt, step.now_us, times)
        if step.clock_trusted and times.min() < step.now_us - self._stale_us:
            usable &= times >= step.now_us - self._stale_us
        applies = self._applies(readings.series)
        for place, rule in enumerate(self.rules):
            if rule.on == SILENCE_QUANTITY or rule.of_rollups or not applies[place].any():
                continue
            chosen = applies[place] & usable
            if rule.on == RATE_QUANTITY:
                points = RatePoints(readings.series[chosen], times[chosen], readings.value[chosen])
                if points.series.size:
                    rates, newest = self._rates.compute_rates(points)
                    after.rates.append(newest)
                    yield place, rates
                continue
            quantity = reading_quantities(rule, readings)
            yield place, RuleInput(readings.series, times, quantity, chosen & ~np.isnan(quantity))

    def _inputs_of_rollups(self, step: StageInput) -> Iterator[tuple[int, RuleInput]]:
        rollups = step.rollups
        if rollups.rows == 0:
            return
        ends_us = rollups.time_us + rollups.window_s.astype(np.int64) * 1_000_000
        first = rollups.revision == 1
        if step.clock_trusted:
            first &= ends_us >= step.now_us - self._stale_us
        applies = self._applies(rollups.series)
        for place, rule in enumerate(self.rules):
            if rule.of_rollups:
                quantity = rollup_quantities(rule, rollups)
                chosen = applies[place] & first & (rollups.window_s == rule.window_s) & ~np.isnan(quantity)
                order = np.lexsort((ends_us, rollups.series))
                yield (
                    place,
                    RuleInput(rollups.series[order], ends_us[order], quantity[order], chosen[order]),
                )

    def _evaluate(self, place: int, rule_input: RuleInput, after: _StepChanges) -> None:
        rule = self.rules[place]
        series, times, quantity, chosen = rule_input
        level = rule.levels(quantity)
        broken = chosen & (level == LimitState.BROKEN)
        watched = self._watched[place][series]
        if broken.any():
            watched |= np.isin(series, series[broken])
        rows = np.flatnonzero(chosen & watched)
        if rows.size == 0:
            return
        rows = rows[np.argsort(series[rows], kind="stable")]
        owner, level = series[rows], level[rows]
        starts = np.flatnonzero(mark_run_starts(owner, level)).tolist()
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            at = rows[start:stop]
            key = (place, int(owner[start]))
            instance = after.instances.get(key) or self._instances.get(key) or AlertInstance()
            instance, changes = advance_instance(
                rule, instance, LimitState(int(level[start])), times[at], quantity[at]
            )
            after.instances[key] = instance
            after.events += [build_event(rule, key[1], change) for change in changes]

    def _evaluate_silence(self, step: StageInput, after: _StepChanges) -> None:
        now = np.array([step.now_us])
        for place, rule in enumerate(self.rules):
            if rule.on != SILENCE_QUANTITY:
                continue
            for number in after.seen[self._watched[place][after.seen]].tolist():
                instance = self._instances[place, number]
                if instance.is_firing:
                    lasted_s = (step.now_us - instance.fired_us) / 1e6
                    instance, change = recover_instance(instance, step.now_us, lasted_s)
                    after.instances[place, number] = instance
                    after.events.append(build_event(rule, number, change))
            limit_us = int(rule.above * 1e6) + rule.for_us
            silent = (self._arrived_us != _NOT_SEEN) & (after.uptime_us - self._arrived_us > limit_us)
            silent[after.seen] = False
            if not rule.repeat_us:
                silent &= ~self._firing[place]
            numbers = np.flatnonzero(silent).astype(np.int32)
            for number in numbers[self._applies(numbers)[place]].tolist() if numbers.size else ():
                instance = self._instances.get((place, number), AlertInstance())
                if instance.is_firing:
                    if step.now_us < instance.notified_us + rule.repeat_us:
                        continue
                elif is_cooling(rule, instance, step.now_us):
                    continue
                silent_s = (after.uptime_us - self._arrived_us[number]) / 1e6
                instance, changes = advance_instance(
                    rule._replace(for_us=0), instance, LimitState.BROKEN, now, np.array([silent_s])
                )
                after.instances[place, number] = instance
                after.events += [build_event(rule, number, change) for change in changes]

    def _forget(self, after: _StepChanges) -> None:
        """Drop alerts that are over: those of this step, and once a minute the others."""
        for key, instance in after.instances.items():
            if instance is not None and instance.uncounted == AlertInstance():
                after.instances[key] = None
        minute = 60_000_000
        if self._now_us is not None and after.now_us // minute != self._now_us // minute:
            forgotten_us = after.now_us - _FORGET_AFTER_US
            for key, instance in self._instances.items():
                if key not in after.instances and is_over(self.rules[key[0]], instance, forgotten_us):
                    after.instances[key] = None

    def _applies(self, series: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which rules apply to which series; shape (rules, rows)."""
        kind = self._kinds.find(series)
        table = np.array(self._kinds.results, np.bool_).reshape(len(self._kinds.results), len(self.rules))
        applies: NDArray[np.bool_] = table.T[:, kind]
        return applies

    def _set(self, key: InstanceKey, instance: AlertInstance | None) -> None:
        place, series = key
        self._grow(series)
        self._watched[place][series] = instance is not None
        self._firing[place][series] = instance is not None and instance.is_firing
        if instance is None:
            self._instances.pop(key, None)
        else:
            self._instances[key] = instance

    def _grow(self, number: int) -> None:
        if number >= len(self._arrived_us):
            self._arrived_us = grow_array(self._arrived_us, number, _NOT_SEEN)
            self._watched = [grow_array(watched, number, False) for watched in self._watched]
            self._firing = [grow_array(firing, number, False) for firing in self._firing]

    def _changed_keys(self, after: _StepChanges) -> Iterator[tuple[str, bytes | None]]:
        for key in after.removed_keys:
            yield key, None
        for (place, series), instance in after.instances.items():
            before = self._instances.get((place, series))
            rule = self.rules[place]
            key = instance_key(rule.name, series)
            if instance is None and before is not None:
                yield key, None
            elif instance is not None and (before is None or before.differs_from(instance)):
                yield key, encode_state(StoredInstance(rule.severity, instance))
