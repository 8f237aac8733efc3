"""`[checks]`, `[clock]`, `[[report_by_exception]]`, `[processing]` and `[rollups]`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gateway.processing.checks import DEFAULT_LIMIT_RULES, LIMIT_NAMES, LimitRule, Limits, PlausibleTimes
from gateway.processing.commit_consumer import ConsumerOptions
from gateway.processing.deadband import Band, BandRule
from gateway.processing.series_pattern import Pattern
from gateway.rollups.open_windows import RollupOptions
from gateway.rollups.rollup import DEFAULT_WINDOWS_S, find_nesting_error
from gateway.settings.schema import Count, Seconds, Table

_DEFAULT_LIMITS = Limits()


def _validate_pattern(text: str) -> str:
    Pattern.of(text)
    return text


def _validate_timestamp(text: str) -> str:
    try:
        zone = datetime.fromisoformat(text).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise ValueError("must be a time with its offset, such as 2000-01-01T00:00:00Z")
    return text


SeriesPattern = Annotated[str, AfterValidator(_validate_pattern)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _reject_nan(value: float) -> float:
    if value != value:  # noqa: PLR0124 - what NaN is told by
        raise ValueError("must be a number, inf or -inf")
    return value


Limit = Annotated[float, AfterValidator(_reject_nan)]


class CheckRule(Table):
    """What is different for some series."""

    series: SeriesPattern = Field(examples=["boiler-*/temperature"])
    """Which: SENSOR_ID/SENSOR_TYPE with "*" for anything, "?" for one character."""
    minimum: Limit | None = Field(default=None, examples=[0])
    """The least value that is in range; -inf for none."""
    maximum: Limit | None = Field(default=None, examples=[95])
    """The greatest value that is in range; inf for none."""
    min_quality: Limit | None = Field(default=None, examples=[80])
    """As in [checks]."""
    min_battery_level: Limit | None = Field(default=None, examples=[10])
    """As in [checks]."""
    min_signal_strength: Limit | None = Field(default=None, examples=[-80])
    """As in [checks]."""
    late_s: NonNegative | None = Field(default=None, examples=[30])
    """As in [checks]."""
    old_s: NonNegative | None = Field(default=None, examples=[86_400])
    """As in [checks]."""
    stuck_readings: Annotated[int, Field(ge=0)] | None = Field(default=None, examples=[60])
    """As in [checks]."""
    stuck_s: NonNegative | None = Field(default=None, examples=[3600])
    """As in [checks]."""
    spike_z: NonNegative | None = Field(default=None, examples=[10])
    """As in [checks]."""
    spike_min: NonNegative | None = Field(default=None, examples=[5])
    """As in [checks]."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError("minimum is above maximum: every value would be out of range")
        return self

    def to_rule(self) -> LimitRule:
        """The rule as the checks take it."""
        given = {name: getattr(self, name) for name in LIMIT_NAMES}
        return LimitRule(Pattern.of(self.series), {k: v for k, v in given.items() if v is not None})


class CheckSettings(Table):
    """What is flagged as suspicious. Flagged readings are kept and delivered like the others."""

    enabled: bool = True
    """Whether readings are checked at all."""
    min_quality: Limit = _DEFAULT_LIMITS.min_quality
    """A quality below it is flagged low_quality."""
    min_battery_level: Limit = _DEFAULT_LIMITS.min_battery_level
    """A battery level below it, in percent, is flagged low_battery."""
    min_signal_strength: Limit = _DEFAULT_LIMITS.min_signal_strength
    """A signal strength below it, in dBm, is flagged weak_signal."""
    late_s: NonNegative = _DEFAULT_LIMITS.late_s
    """A reading is flagged late when its series has one that is newer by more than this."""
    old_s: NonNegative = _DEFAULT_LIMITS.old_s
    """A reading is flagged late, too, when it is older than this as it comes."""
    stuck_readings: Annotated[int, Field(ge=0)] = _DEFAULT_LIMITS.stuck_readings
    """So many equal values in a row are flagged stuck when they span stuck_s; 0 for never."""
    stuck_s: NonNegative = _DEFAULT_LIMITS.stuck_s
    """How long equal values may go on without being flagged stuck."""
    spike_z: NonNegative = _DEFAULT_LIMITS.spike_z
    """A value is flagged spike when it is further from the median of the 16 readings before than this times
    their scale (1.4826 times the median absolute deviation); 0 for never.
    """
    spike_min: NonNegative = _DEFAULT_LIMITS.spike_min
    """The least distance from the median, in the unit of the value, that is a spike."""
    max_ahead_s: NonNegative = 300
    """A device's time further ahead of the gateway's clock is flagged clock_in_doubt."""
    not_before: Annotated[str, AfterValidator(_validate_timestamp)] = "2000-01-01T00:00:00Z"
    """A device's time before it is flagged clock_in_doubt: clocks without a battery begin in 1970."""
    rule: list[CheckRule] = Field(default_factory=list)
    """What is different for some series, one table each; of several the one whose pattern says most wins."""

    @property
    def base(self) -> Limits:
        """What holds for series that no rule is for."""
        return Limits(**{name: getattr(self, name) for name in LIMIT_NAMES if hasattr(self, name)})

    @property
    def rules(self) -> list[LimitRule]:
        """The rules, those that are built in first."""
        return [*DEFAULT_LIMIT_RULES, *(rule.to_rule() for rule in self.rule)]

    @property
    def plausible(self) -> PlausibleTimes:
        """Which device times can be true."""
        return PlausibleTimes(
            round(datetime.fromisoformat(self.not_before).timestamp() * 1e6), round(self.max_ahead_s * 1e6)
        )


class ClockSettings(Table):
    """When the gateway's own clock is relied on."""

    trust: Literal["auto", "synchronised", "always"] = "auto"
    """"auto": once it is synchronised, or where nothing synchronises it as long as it is past every time that
    is known to have been. "synchronised": nothing less. "always": whatever it says.
    """
    wait_max_s: Annotated[float, Field(ge=0, le=1e9)] = 600
    """How long readings without a time of their own wait in the spool for a clock in doubt, to get their
    true times. What comes or waits longer is delivered as it was stamped, flagged clock_in_doubt.
    """


BandWidth = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DeadbandRule(Table):
    """The deadband of some series."""

    series: SeriesPattern = Field(examples=["*/temperature"])
    """Which: SENSOR_ID/SENSOR_TYPE with "*" for anything, "?" for one character."""
    absolute: BandWidth | None = Field(default=None, examples=[0.2])
    """A reading that differs from the last reported one by no more, in its own unit, is not delivered."""
    percent: BandWidth | None = Field(default=None, examples=[2])
    """The same in percent of the last reported value. With both, the wider one counts."""
    max_silence_s: Seconds = 900
    """A reading so long after the last reported one is delivered whatever its value."""

    @model_validator(mode="after")
    def _require_band(self) -> Self:
        if self.absolute is None and self.percent is None:
            raise ValueError("needs absolute or percent")
        return self

    def to_rule(self) -> BandRule:
        """The rule as the deadband takes it."""
        silence_us = min(round(self.max_silence_s * 1e6), 1 << 61)
        return BandRule(Pattern.of(self.series), Band(self.absolute or 0.0, self.percent or 0.0, silence_us))


_CONSUMER_DEFAULTS = ConsumerOptions()
_ROLLUP_DEFAULTS = RollupOptions()


def _validate_nesting(lengths: list[int]) -> list[int]:
    fault = find_nesting_error(lengths)
    if fault is not None:
        raise ValueError(f"{fault}; for example {list(DEFAULT_WINDOWS_S)}")
    return lengths


NonNegativeDuration = Annotated[float, Field(ge=0, allow_inf_nan=False)]
WindowLength = Annotated[int, Field(ge=1, le=366 * 86400)]


class ProcessingSettings(Table):
    """How processing follows the commits."""

    interval_s: Annotated[float, Field(ge=0, le=60)] = _CONSUMER_DEFAULTS.interval_s
    """New commits are looked at at most so often: rollups and alerts come as much later, and cost less."""
    checkpoint_s: Annotated[float, Field(ge=0, le=3600)] = _CONSUMER_DEFAULTS.checkpoint_s
    """What processing has to remember is written at least so often. What is newer is read again after a
    crash; less costs more writing.
    """

    @property
    def terms(self) -> ConsumerOptions:
        """The same for the follower."""
        return ConsumerOptions(interval_s=self.interval_s, checkpoint_s=self.checkpoint_s)


class RollupSettings(Table):
    """How readings are summarised."""

    enabled: bool = True
    """Whether there are rollups."""
    windows_s: Annotated[list[WindowLength], AfterValidator(_validate_nesting)] = list(DEFAULT_WINDOWS_S)  # noqa: RUF012 - pydantic copies it
    """Lengths of the windows in seconds, rising; each must hold whole ones of the one before."""
    lateness_s: NonNegativeDuration = _ROLLUP_DEFAULTS.lateness_s
    """How long after its end a window waits, by the times of its own series. What comes later makes a
    revision.
    """
    idle_s: NonNegativeDuration = _ROLLUP_DEFAULTS.idle_s
    """A window whose series is silent is closed by the clock once nothing came for it for so long."""
    close_every_s: NonNegativeDuration = _ROLLUP_DEFAULTS.close_every_s
    """Windows are closed at most so often; each time is a commit of its own."""
    keep_d: NonNegativeDuration = 90
    """How many days rollups, alerts and declarations stay once every destination has given its receipt; while
    the spool is full one at most.
    """
    max_open_windows: Count = _ROLLUP_DEFAULTS.max_open
    """How many windows of one length may be open at once. Beyond it those that nothing came for longest are
    closed early, and may get a revision.
    """

    @property
    def terms(self) -> RollupOptions:
        """The same for the roller."""
        return RollupOptions(
            windows_s=tuple(self.windows_s),
            lateness_s=self.lateness_s,
            idle_s=self.idle_s,
            close_every_s=self.close_every_s,
            max_open=self.max_open_windows,
        )
