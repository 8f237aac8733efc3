"""Alert rules: their quantities, limits and defaults. Pure but for `RateTracker`, which keeps state."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.model.records import Flag, Severity
from gateway.processing.series_pattern import NEVER_US, Pattern, grow_array, mark_run_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cloud_sync.model.records import Readings, Rollups

READING_MEMBERS = ("value", "quality", "battery_level", "signal_strength")
ROLLUP_MEMBERS = ("mean", "minimum", "maximum", "first", "last", "deviation", "count", "flagged", "excluded")
FLAG_NAMES = tuple((flag.name or "").lower() for flag in Flag if flag is not Flag.SUPPRESSED)
RATE_QUANTITY, SILENCE_QUANTITY = "rate_per_min", "silence"
FLAG_PREFIX, ROLLUP_PREFIX = "flag.", "rollup."
QUANTITIES = (
    *READING_MEMBERS,
    RATE_QUANTITY,
    SILENCE_QUANTITY,
    *(f"{FLAG_PREFIX}{name}" for name in FLAG_NAMES),
    *(f"{ROLLUP_PREFIX}{name}" for name in ROLLUP_MEMBERS),
)
"""What a rule can evaluate."""


class LimitState(IntEnum):
    """A reading against a rule: BETWEEN is inside the limit, but not by the margin."""

    GOOD = 0
    BETWEEN = 1
    BROKEN = 2


class Rule(NamedTuple):
    """When an alert of the series that match `pattern`, but not `without`, begins and ends.

    `on` is one of `QUANTITIES`: silence is in seconds since the last arrival, in the gateway's own time; a
    rate is the difference to the reading before, per minute of their times. A flag is broken when it is set.

    An alert begins once the rule was broken for `for_us` without interruption, in the times of the readings,
    and `cooldown_us` after the one before. It is repeated every `repeat_us` (0: never) and ends when the
    value is inside the limit by `margin`. `recovery`: channels are notified of the end too.
    """

    name: str
    pattern: Pattern
    on: str
    above: float = np.inf
    below: float = -np.inf
    margin: float = 0.0
    window_s: int = 60
    for_us: int = 0
    severity: Severity = Severity.WARNING
    cooldown_us: int = 300_000_000
    repeat_us: int = 0
    recovery: bool = True
    channels: tuple[str, ...] = ()
    without: tuple[Pattern, ...] = ()

    def applies_to(self, sensor_id: str, sensor_type: str) -> bool:
        """Whether the rule evaluates a series."""
        name = sensor_id, sensor_type
        return self.pattern.matches(*name) and not any(pattern.matches(*name) for pattern in self.without)

    @property
    def of_rollups(self) -> bool:
        """Whether the rule evaluates rollups."""
        return self.on.startswith(ROLLUP_PREFIX)

    @property
    def watched_flag(self) -> Flag:
        """The flag the rule evaluates; `Flag(0)` for another quantity."""
        return Flag[self.on.removeprefix(FLAG_PREFIX).upper()] if self.on.startswith(FLAG_PREFIX) else Flag(0)

    def levels(self, quantity: NDArray[np.float64]) -> NDArray[np.int8]:
        """The `LimitState` of each value; NaN is good."""
        if self.watched_flag:
            return np.where(quantity > 0, np.int8(LimitState.BROKEN), np.int8(LimitState.GOOD))
        broken = (quantity > self.above) | (quantity < self.below)
        level = np.where(broken, np.int8(LimitState.BROKEN), np.int8(LimitState.GOOD))
        if self.margin:
            near = (quantity > self.above - self.margin) | (quantity < self.below + self.margin)
            level[near & ~broken] = LimitState.BETWEEN
        return level

    def limit_for(self, quantity: float) -> float:
        """The limit that a quantity breaks, else the nearest one; NaN when there is none."""
        if self.watched_flag:
            return np.nan
        if quantity > self.above or quantity - self.below > self.above - quantity:
            return self.above
        return self.below


DEFAULT_ALERT_RULES = (
    Rule(
        "temperature", Pattern("*", "temperature"), "value", above=35, below=-10, severity=Severity.CRITICAL
    ),
    Rule("battery", Pattern("*", "*"), "battery_level", below=20, cooldown_us=3_600_000_000),
    Rule("quality", Pattern("*", "*"), "quality", below=80, cooldown_us=1_800_000_000),
    Rule(
        "silence",
        Pattern("*", "*"),
        SILENCE_QUANTITY,
        above=300,
        severity=Severity.CRITICAL,
        cooldown_us=600_000_000,
    ),
)
"""Active unless the configuration has a rule of the same name or disables them."""


def reading_quantities(rule: Rule, readings: Readings) -> NDArray[np.float64]:
    """The rule's quantity in each reading; shape (rows,). A flag is 1 where it is set, else 0."""
    if rule.watched_flag:
        is_set: NDArray[np.float64] = ((readings.flags & np.int32(rule.watched_flag)) != 0).astype(np.float64)
        return is_set
    column: NDArray[np.float64] = getattr(readings, rule.on)
    return column


def rollup_quantities(rule: Rule, rollups: Rollups) -> NDArray[np.float64]:
    """The rule's quantity in each rollup; shape (rows,)."""
    member = rule.on.removeprefix(ROLLUP_PREFIX)
    if member == "deviation":
        deviation: NDArray[np.float64] = np.sqrt(np.maximum(rollups.m2, 0) / np.maximum(rollups.count - 1, 1))
        return deviation
    column: NDArray[np.float64] = getattr(rollups, member).astype(np.float64)
    return column


class RuleInput(NamedTuple):
    """Quantities to evaluate, each of shape (rows,); those of one series are in order of arrival."""

    series: NDArray[np.int32]
    times: NDArray[np.int64]
    quantity: NDArray[np.float64]
    chosen: NDArray[np.bool_]


class RatePoints(NamedTuple):
    """Readings as columns, each of shape (rows,)."""

    series: NDArray[np.int32]
    times: NDArray[np.int64]
    values: NDArray[np.float64]


RateState = list[tuple[int, int, float]]
"""Series, time and value of the newest reading of each series."""


class RateTracker:
    """The newest reading of each series, from which its next rate is computed."""

    def __init__(self) -> None:
        self._newest_us = np.full(1024, NEVER_US, np.int64)
        self._value = np.zeros(1024)

    def compute_rates(self, points: RatePoints) -> tuple[RuleInput, RatePoints]:
        """Rates per minute of `points`, by series, and the newest point of each series for `advance`."""
        order = np.argsort(points.series, kind="stable")
        series, times, values = points.series[order], points.times[order], points.values[order]
        self._grow(int(series[-1]))
        firsts = mark_run_starts(series)
        before_us = np.where(firsts, self._newest_us[series], np.roll(times, 1))
        before = np.where(firsts, self._value[series], np.roll(values, 1))
        passed = times - before_us
        usable = (before_us != NEVER_US) & (passed > 0)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            rate = (values - before) / passed * 60e6
        lasts = np.append(firsts[1:], [True])
        return RuleInput(series, times, rate, usable), RatePoints(series[lasts], times[lasts], values[lasts])

    def advance(self, newest: list[RatePoints]) -> None:
        """Rates continue from these points."""
        for points in newest:
            self._newest_us[points.series], self._value[points.series] = points.times, points.values

    def restore(self, state: RateState) -> None:
        """Rates continue from a stored state."""
        for series, time_us, value in state:
            self._grow(series)
            self._newest_us[series], self._value[series] = time_us, value

    def state_after(self, newest: list[RatePoints]) -> RateState:
        """The state to store once these points are accepted."""
        later = RateTracker()
        later._newest_us, later._value = self._newest_us.copy(), self._value.copy()
        later.advance(newest)
        known = np.flatnonzero(later._newest_us != NEVER_US)
        return list(
            zip(known.tolist(), later._newest_us[known].tolist(), later._value[known].tolist(), strict=True)
        )

    def _grow(self, number: int) -> None:
        self._newest_us = grow_array(self._newest_us, number, NEVER_US)
        self._value = grow_array(self._value, number, 0)
