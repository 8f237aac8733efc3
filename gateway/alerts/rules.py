"""What raises an alert: rules, the built-in ones, and which readings or rollups break them. Pure."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.model.records import Flag, Severity
from gateway.processing.series_pattern import Pattern

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cloud_sync.model.records import Readings, Rollups

READING_MEMBERS = ("value", "quality", "battery_level", "signal_strength")
ROLLUP_MEMBERS = (
    "mean",
    "minimum",
    "maximum",
    "first",
    "last",
    "deviation",
    "count",
    "flagged",
    "excluded",
)
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
"""What a rule may look at."""


class LimitState(IntEnum):
    """How a reading stands to a rule: BETWEEN is inside the limit, but not by the margin."""

    GOOD = 0
    BETWEEN = 1
    BROKEN = 2


class Rule(NamedTuple):
    """When an alert of some series begins and ends.

    Attributes:
        name: unique among the rules.
        pattern: the series it is for.
        without: series among them that it is not for.
        on: one of `QUANTITIES`. Silence is in seconds since the last arrival, judged by the gateway's own
            time; a rate is the difference to the reading before, per minute of their times.
        above, below: broken by what is greater, or less; infinite for no limit. A flag is broken when set.
        margin: how far back inside the limit ends an alert.
        window_s: length of the windows, of a rollup.
        for_us: how long it must be broken without a break, in the times of the readings.
        cooldown_us: how long after an alert of a series the next of the same series and rule may begin.
        repeat_us: after how long an alert that goes on is told again; 0 for never.
        recovery: whether channels are told of the end too.
        channels: names of those that are told.
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
        """Whether it judges a series."""
        name = sensor_id, sensor_type
        return self.pattern.matches(*name) and not any(pattern.matches(*name) for pattern in self.without)

    @property
    def of_rollups(self) -> bool:
        """Whether it looks at rollups."""
        return self.on.startswith(ROLLUP_PREFIX)

    @property
    def watched_flag(self) -> Flag:
        """The flag it looks at; none for another quantity."""
        return Flag[self.on.removeprefix(FLAG_PREFIX).upper()] if self.on.startswith(FLAG_PREFIX) else Flag(0)

    def levels(self, quantity: NDArray[np.float64]) -> NDArray[np.int8]:
        """The `Level` of each; NaN is good."""
        if self.watched_flag:
            return np.where(quantity > 0, np.int8(LimitState.BROKEN), np.int8(LimitState.GOOD))
        broken = (quantity > self.above) | (quantity < self.below)
        level = np.where(broken, np.int8(LimitState.BROKEN), np.int8(LimitState.GOOD))
        if self.margin:
            near = (quantity > self.above - self.margin) | (quantity < self.below + self.margin)
            level[near & ~broken] = LimitState.BETWEEN
        return level

    def limit_for(self, quantity: float) -> float:
        """The limit that a quantity breaks, or the nearest when it breaks none; NaN when there is none."""
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
"""Rules that are in force unless the configuration has one of the same name, or none of them at all."""


def reading_quantities(rule: Rule, readings: Readings) -> NDArray[np.float64]:
    """What a rule looks at in each reading; shape (rows,). Of a flag 1 where it is set, else 0."""
    if rule.watched_flag:
        is_set: NDArray[np.float64] = ((readings.flags & np.int32(rule.watched_flag)) != 0).astype(np.float64)
        return is_set
    column: NDArray[np.float64] = getattr(readings, rule.on)
    return column


def rollup_quantities(rule: Rule, rollups: Rollups) -> NDArray[np.float64]:
    """What a rule looks at in each rollup; shape (rows,)."""
    member = rule.on.removeprefix(ROLLUP_PREFIX)
    if member == "deviation":
        deviation: NDArray[np.float64] = np.sqrt(np.maximum(rollups.m2, 0) / np.maximum(rollups.count - 1, 1))
        return deviation
    column: NDArray[np.float64] = getattr(rollups, member).astype(np.float64)
    return column
