"""The stage that raises alerts: judges what a step brings by the rules, and keeps the course of each alert.

Readings are judged in the order in which they were committed, by their own times; one flagged late, or older
than `stale_us`, is no finding, and one whose time is in doubt counts as of now. Rollups are judged when their
window closes, not when a revision comes. Silence is judged by the arrival of readings at the gateway, in time
during which the gateway was at work: neither a step of the clock nor a pause of the gateway makes anybody
silent. Every series that the spool knows is expected.

What changes is an `Alerts` record, in one transaction with the state and with what is to be told. The state
is a key for each course, "alerts/course/RULE/SERIES", written when it changes in more than its number of
findings: so that series that come and go about a limit cost no flash. After a kill that number may be lower.
Where a rule looks at rates, "alerts/rates" has the readings that the next ones begin at. Every value is a
version byte, then MessagePack.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import msgspec
import numpy as np

from cloud_sync.model.records import Alerts, AlertState, Flag, Severity
from gateway.alerts.alert_state import (
    NO_TIME_US,
    AlertChange,
    AlertInstance,
    advance_instance,
    describe_change,
    is_cooling,
    is_over,
    recover_instance,
)
from gateway.alerts.rules import (
    RATE_QUANTITY,
    SILENCE_QUANTITY,
    LimitState,
    Rule,
    reading_quantities,
    rollup_quantities,
)
from gateway.processing.series_pattern import Pattern, SeriesRuleCache, grow_array
from gateway.processing.stage import StageOutput

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from gateway.processing.stage import StageInput

T = TypeVar("T")

_log = logging.getLogger(__name__)
INSTANCE_KEY, RATES_KEY = "alerts/course", "alerts/rates"
_VERSION = 1
_PAUSE_FROM_US = 30_000_000  # more between two steps is a pause or a step of the clock
_FORGET_AFTER_US = 86_400_000_000
_NOT_SEEN = -1
_RECENT_EVENTS = 50
_CLOCK_IN_DOUBT, _LATE = np.int32(Flag.CLOCK_IN_DOUBT), np.int32(Flag.LATE)

InstanceKey = tuple[int, int]
"""Which alert: the place of its rule, and the series."""


class AlertEvent(NamedTuple):
    """A change of one alert. `rule` may be one that is no longer configured."""

    rule: Rule
    series: int
    change: AlertChange
    threshold: float
    detail: str


class _StoredInstance(NamedTuple):
    """One course on disk, under a key that names its rule and series."""

    severity: int
    instance: AlertInstance


class _OrphanInstance(NamedTuple):
    """A course whose rule is no longer configured, or whose series is gone."""

    key: str
    rule: str
    series: int
    kept: _StoredInstance


_RateState = list[tuple[int, int, float]]
"""Series, time and value of the readings that the next rates begin at."""


class _RatePoints(NamedTuple):
    """The newest reading of some series; each of shape (series,)."""

    series: NDArray[np.int32]
    times: NDArray[np.int64]
    values: NDArray[np.float64]


class _RuleInput(NamedTuple):
    """What a rule looks at; those of a series are in order of arrival. Each of shape (rows,)."""

    series: NDArray[np.int32]
    times: NDArray[np.int64]
    quantity: NDArray[np.float64]
    chosen: NDArray[np.bool_]


@dataclass(slots=True)
class _StepChanges:
    """What accepting a step changes."""

    uptime_us: int
    now_us: int
    instances: dict[InstanceKey, AlertInstance | None] = field(default_factory=dict)
    seen: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    rates: list[_RatePoints] = field(default_factory=list)
    events: list[AlertEvent] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    rates_saved: bool = False


class AlertEvaluator:
    """Implements `Stage`.

    Args:
        rules: those in force.
        name_of: sensor_id and sensor_type of a series number.
        expected: every series the spool knows, as identities.
        tell: puts what channels are to be told into the outbox, within the transaction.
        stale_us: readings and rollups older than this are not judged.
    """

    name = "alerts"

    def __init__(
        self,
        rules: Sequence[Rule],
        name_of: Callable[[int], tuple[str, str]],
        expected: Callable[[], NDArray[np.int32]],
        tell: Callable[[sqlite3.Connection, Sequence[AlertEvent], int], None],
        *,
        stale_us: int = 3_600_000_000,
    ) -> None:
        self.rules = tuple(rules)
        self._name_of, self._expected, self._tell = name_of, expected, tell
        self._stale_us = stale_us
        self._kinds = SeriesRuleCache(
            lambda number: tuple(rule.applies_to(*name_of(number)) for rule in rules)
        )
        self._instances: dict[InstanceKey, AlertInstance] = {}
        self._orphans: list[_OrphanInstance] = []
        self._watched = [np.zeros(1024, np.bool_) for _ in rules]
        self._firing = [np.zeros(1024, np.bool_) for _ in rules]
        self._arrived_us = np.full(1024, _NOT_SEEN, np.int64)
        self._rate_from_us = np.full(1024, NO_TIME_US, np.int64)
        self._rate_from = np.zeros(1024)
        self._uptime_us = 0
        self._now_us: int | None = None
        self._rates_unsaved = False
        self._places = {rule.name: place for place, rule in enumerate(rules)}
        self.fired = self.recovered = 0
        self.recent: deque[AlertEvent] = deque(maxlen=_RECENT_EVENTS)

    @property
    def firing(self) -> dict[Severity, int]:
        """How many alerts are firing, by severity."""
        found: dict[Severity, int] = {}
        for (place, _), instance in list(self._instances.items()):
            if instance.is_firing:
                severity = self.rules[place].severity
                found[severity] = found.get(severity, 0) + 1
        return found

    def firing_alerts(self, most: int) -> list[tuple[Rule, int, int]]:
        """Alerts that fire, the latest first: rule, series, since when."""
        found = [
            (self.rules[place], series, instance.fired_us)
            for (place, series), instance in list(self._instances.items())
            if instance.is_firing
        ]
        return sorted(found, key=lambda alert: -alert[2])[:most]

    def load(self, state: Mapping[str, bytes]) -> None:
        """Take up the durable state. What is of a rule that is gone recovers in the first step."""
        lost = 0
        for key, blob in state.items():
            name, _, numeral = key.removeprefix(f"{INSTANCE_KEY}/").rpartition("/")
            if key == RATES_KEY:
                for series, time_us, value in _decode_state(blob, _RateState) or ():
                    self._grow(series)
                    self._rate_from_us[series], self._rate_from[series] = time_us, value
                continue
            kept = _decode_state(blob, _StoredInstance)
            if kept is None or not numeral.isdecimal():
                lost += 1
                continue
            place, series = self._places.get(name), int(numeral)
            if place is None or not self._is_known(series):  # a salvaged spool may have lost it
                self._orphans.append(_OrphanInstance(key, name, series, kept))
            else:
                self._set((place, series), kept.instance)
        if lost:
            _log.warning("the state of %d alerts is of no known version; they begin anew", lost)

    def take_over(self, before: AlertEvaluator) -> None:
        """Go on where another stage is, between two of its steps. What is of a rule that is gone recovers in
        the next step, as after a restart; a rule of the same name keeps its courses.
        """
        for (place, series), instance in before._instances.items():
            rule = before.rules[place]
            at = self._places.get(rule.name)
            if at is None:
                key = f"{INSTANCE_KEY}/{rule.name}/{series}"
                self._orphans.append(
                    _OrphanInstance(key, rule.name, series, _StoredInstance(rule.severity, instance))
                )
            else:
                self._set((at, series), instance)
        self._orphans += before._orphans
        self._grow(len(before._arrived_us) - 1)
        for name in ("_arrived_us", "_rate_from_us", "_rate_from"):
            old = getattr(before, name)
            getattr(self, name)[: len(old)] = old
        self._uptime_us, self._now_us = before._uptime_us, before._now_us
        self._rates_unsaved = True
        self.fired, self.recovered = before.fired, before.recovered
        self.recent = before.recent

    def step(self, step: StageInput) -> StageOutput:
        """What this step changes of the alerts. Changes nothing here, but for room in arrays."""
        passed_us = 0 if self._now_us is None else step.now_us - self._now_us
        if not 0 <= passed_us <= _PAUSE_FROM_US:
            passed_us = 0
        after = _StepChanges(self._uptime_us + passed_us, step.now_us)
        self._grow(int(max(step.readings.series.max(initial=0), step.rollups.series.max(initial=0))))
        if self._now_us is None or self._orphans:
            self._expect_known_series(after)
        self._judge_readings(step, after)
        self._judge_rollups(step, after)
        self._judge_silence(step, after)
        self._forget(after)
        also = None
        if after.events:
            also = partial(self._told, after)
        return StageOutput(
            records=(_build_alert_records(after.events),) if after.events else (),
            state=dict(self._changes(after)),
            snapshot=partial(self._snapshot, after) if after.rates or self._rates_unsaved else None,
            also=also,
            after=after,
        )

    def accept(self, outcome: StageOutput) -> None:
        """Take over what a step changed."""
        after = outcome.after
        assert isinstance(after, _StepChanges)
        for key, instance in after.instances.items():
            self._set(key, instance)
        for points in after.rates:
            self._rate_from_us[points.series] = points.times
            self._rate_from[points.series] = points.values
        self._arrived_us[after.seen] = after.uptime_us
        self._orphans = []
        self._uptime_us, self._now_us = after.uptime_us, after.now_us
        self._rates_unsaved = not after.rates_saved and outcome.snapshot is not None
        self.recent.extend(after.events)
        for event in after.events:
            if event.change.state is AlertState.FIRING:
                self.fired += 1
            else:
                self.recovered += 1

    def _is_known(self, series: int) -> bool:
        try:
            self._name_of(series)
        except KeyError:
            return False
        return True

    def _told(self, after: _StepChanges, connection: sqlite3.Connection) -> None:
        self._tell(connection, after.events, after.now_us)

    def _expect_known_series(self, after: _StepChanges) -> None:
        """In the first step every series of the spool is expected, and alerts of rules that are gone end."""
        known = self._expected()
        if known.size:
            self._grow(int(known.max()))
            self._arrived_us[known] = np.maximum(self._arrived_us[known], 0)
        for key, rule, series, kept in self._orphans:
            after.gone.append(key)
            if kept.instance.is_firing and self._is_known(series):
                _, change = recover_instance(kept.instance, after.now_us, np.nan)
                gone = Rule(rule, Pattern("*", "*"), "", severity=Severity(kept.severity))
                detail = "the rule is no longer in the configuration"
                after.events.append(AlertEvent(gone, series, change, np.nan, detail))

    def _judge_readings(self, step: StageInput, after: _StepChanges) -> None:
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
                points = _RatePoints(readings.series[chosen], times[chosen], readings.value[chosen])
                self._judge_rates(place, points, after)
                continue
            quantity = reading_quantities(rule, readings)
            findings = _RuleInput(readings.series, times, quantity, chosen & ~np.isnan(quantity))
            self._judge(place, findings, after)

    def _judge_rates(self, place: int, points: _RatePoints, after: _StepChanges) -> None:
        if points.series.size == 0:
            return
        order = np.argsort(points.series, kind="stable")
        series, times, values = points.series[order], points.times[order], points.values[order]
        firsts = np.concatenate(([True], series[1:] != series[:-1]))
        before_us = np.where(firsts, self._rate_from_us[series], np.concatenate((times[:1], times[:-1])))
        before = np.where(firsts, self._rate_from[series], np.concatenate((values[:1], values[:-1])))
        passed = times - before_us
        usable = (before_us != NO_TIME_US) & (passed > 0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            rate = (values - before) / passed * 60e6
        lasts = np.concatenate((firsts[1:], [True]))
        after.rates.append(_RatePoints(series[lasts], times[lasts], values[lasts]))
        self._judge(place, _RuleInput(series, times, rate, usable), after)

    def _judge_rollups(self, step: StageInput, after: _StepChanges) -> None:
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
                found = _RuleInput(rollups.series[order], ends_us[order], quantity[order], chosen[order])
                self._judge(place, found, after)

    def _judge(self, place: int, findings: _RuleInput, after: _StepChanges) -> None:
        """Judge findings by one rule."""
        rule = self.rules[place]
        series, times, quantity, chosen = findings
        level = rule.levels(quantity)
        broken = chosen & (level == LimitState.BROKEN)
        watched = self._watched[place][series]
        if broken.any():
            also = np.zeros(len(self._arrived_us), np.bool_)
            also[series[broken]] = True
            watched |= also[series]
        rows = np.flatnonzero(chosen & watched)
        if rows.size == 0:
            return
        rows = rows[np.argsort(series[rows], kind="stable")]
        owner, level = series[rows], level[rows]
        starts = np.flatnonzero(
            np.concatenate(([True], (owner[1:] != owner[:-1]) | (level[1:] != level[:-1])))
        ).tolist()
        for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
            at = rows[start:stop]
            key = (place, int(owner[start]))
            instance = after.instances.get(key) or self._instances.get(key) or AlertInstance()
            instance, changes = advance_instance(
                rule, instance, LimitState(int(level[start])), times[at], quantity[at]
            )
            after.instances[key] = instance
            for change in changes:
                after.events.append(self._event(rule, key[1], change))

    def _judge_silence(self, step: StageInput, after: _StepChanges) -> None:
        now = np.array([step.now_us])
        for place, rule in enumerate(self.rules):
            if rule.on != SILENCE_QUANTITY:
                continue
            for number in after.seen[self._watched[place][after.seen]].tolist():
                self._end_silence(place, number, after)
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
                after.events += [self._event(rule, number, change) for change in changes]

    def _end_silence(self, place: int, number: int, after: _StepChanges) -> None:
        key, rule = (place, number), self.rules[place]
        instance = self._instances[key]
        if instance.is_firing:
            fired_us = instance.fired_us
            instance, change = recover_instance(instance, after.now_us, (after.now_us - fired_us) / 1e6)
            after.instances[key] = instance
            after.events.append(self._event(rule, number, change))

    def _forget(self, after: _StepChanges) -> None:
        """Drop courses that are over: those that this step touched, and one in a while the others."""
        for key, instance in after.instances.items():
            assert instance is not None
            if instance.uncounted == AlertInstance():
                after.instances[key] = None
        minute = 60_000_000
        if self._now_us is not None and after.now_us // minute != self._now_us // minute:
            forgotten_us = after.now_us - _FORGET_AFTER_US
            for key, instance in self._instances.items():
                if key not in after.instances and is_over(self.rules[key[0]], instance, forgotten_us):
                    after.instances[key] = None

    def _event(self, rule: Rule, series: int, change: AlertChange) -> AlertEvent:
        threshold = rule.limit_for(change.value)
        detail = describe_change(rule, change, threshold)
        if rule.on == SILENCE_QUANTITY:
            change = change._replace(value=float("nan"))
        return AlertEvent(rule, series, change, threshold, detail)

    def _applies(self, series: NDArray[np.int32]) -> NDArray[np.bool_]:
        """For each rule, which of these series it is for; shape (rules, rows)."""
        kind = self._kinds.of(series)
        table = np.array(self._kinds.found, np.bool_).reshape(len(self._kinds.found), len(self.rules))
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
            self._rate_from_us = grow_array(self._rate_from_us, number, NO_TIME_US)
            self._rate_from = grow_array(self._rate_from, number, 0)
            self._watched = [grow_array(watched, number, False) for watched in self._watched]
            self._firing = [grow_array(firing, number, False) for firing in self._firing]

    def _changes(self, after: _StepChanges) -> Iterator[tuple[str, bytes | None]]:
        """The keys of courses that are worth writing."""
        for key in after.gone:
            yield key, None
        for (place, series), instance in after.instances.items():
            before = self._instances.get((place, series))
            rule = self.rules[place]
            key = f"{INSTANCE_KEY}/{rule.name}/{series}"
            if instance is None:
                if before is not None:
                    yield key, None
            elif before is None or before.differs_from(instance):
                yield key, _encode_state(_StoredInstance(rule.severity, instance))

    def _snapshot(self, after: _StepChanges) -> dict[str, bytes | None]:
        after.rates_saved = True
        return {RATES_KEY: _encode_state(list(self._rates(after)))}

    def _rates(self, after: _StepChanges) -> Iterator[tuple[int, int, float]]:
        times, values = self._rate_from_us, self._rate_from
        if after.rates:
            times, values = times.copy(), values.copy()
        for points in after.rates:
            times[points.series], values[points.series] = points.times, points.values
        for series in np.flatnonzero(times != NO_TIME_US).tolist():
            yield series, int(times[series]), float(values[series])


def _encode_state(value: object) -> bytes:
    return bytes([_VERSION]) + msgspec.msgpack.encode(value)


def _decode_state(blob: bytes, kind: type[T]) -> T | None:
    """What `_written` wrote; None when it is of another version or broken."""
    try:
        return msgspec.msgpack.decode(blob[1:], type=kind) if blob[:1] == bytes([_VERSION]) else None
    except msgspec.DecodeError:
        return None


def _build_alert_records(events: list[AlertEvent]) -> Alerts:
    changes = [event.change for event in events]
    return Alerts(
        series=np.array([event.series for event in events], np.int32),
        time_us=np.array([change.at_us for change in changes], np.int64),
        state=np.array([change.state for change in changes], np.int32),
        severity=np.array([event.rule.severity for event in events], np.int32),
        value=np.array([change.value for change in changes], np.float64),
        threshold=np.array([event.threshold for event in events], np.float64),
        count=np.array([min(change.findings, 0x7FFFFFFF) for change in changes], np.int32),
        rule=np.array([event.rule.name for event in events], np.object_),
        detail=np.array([event.detail for event in events], np.object_),
    ).in_order()
