"""`[checks]`, `[clock]`, `[[report_by_exception]]`, `[processing]` and `[rollups]`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from gateway.processing.checks import DEFAULT_LIMIT_RULES, LIMIT_NAMES, LimitRule, Limits, PlausibleTimes
from gateway.processing.commit_consumer import ConsumerOptions
from gateway.processing.deadband import Band, BandRule
from gateway.processing.series_pattern import Pattern
from gateway.rollups.open_windows import RollupOptions
from gateway.rollups.rollup import DEFAULT_WINDOWS_S, find_nesting_error
from gateway.settings.schema import (
    Count,
    CountOrZero,
    Limit,
    NonNegative,
    Reloadable,
    Restart,
    Seconds,
    SeriesPattern,
    Table,
    Timestamp,
    parse_timestamp,
    to_microseconds,
)

_DEFAULT_LIMITS = Limits()


class CheckRule(Table):
    """Limits of some series that differ from [checks]."""

    series: SeriesPattern = Field(examples=["boiler-*/temperature"])
    """The series: SENSOR_ID/SENSOR_TYPE with "*" for any text, "?" for one character."""
    minimum: Limit | None = Field(default=None, examples=[0])
    """The smallest valid value; -inf for no limit."""
    maximum: Limit | None = Field(default=None, examples=[95])
    """The largest valid value; inf for no limit."""
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
    stuck_readings: CountOrZero | None = Field(default=None, examples=[60])
    """As in [checks]."""
    stuck_s: NonNegative | None = Field(default=None, examples=[3600])
    """As in [checks]."""
    spike_z: NonNegative | None = Field(default=None, examples=[10])
    """As in [checks]."""
    spike_min: NonNegative | None = Field(default=None, examples=[5])
    """As in [checks]."""

    @model_validator(mode="after")
    def _validate_range(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError("minimum is above maximum: every value would be out of range")
        return self

    def to_rule(self) -> LimitRule:
        """The rule as the checks have it."""
        limits = self.model_dump(include=set(LIMIT_NAMES), exclude_none=True)
        return LimitRule(Pattern.parse(self.series), limits)


class CheckSettings(Table):
    """Which readings are flagged as suspicious. Flagged readings are stored and delivered like the others."""

    enabled: bool = True
    """Whether readings are checked at all."""
    min_quality: Limit = _DEFAULT_LIMITS.min_quality
    """A quality below it is flagged low_quality."""
    min_battery_level: Limit = _DEFAULT_LIMITS.min_battery_level
    """A battery level below it, in percent, is flagged low_battery."""
    min_signal_strength: Limit = _DEFAULT_LIMITS.min_signal_strength
    """A signal strength below it, in dBm, is flagged weak_signal."""
    late_s: NonNegative = _DEFAULT_LIMITS.late_s
    """A reading is flagged late if its series has one that is newer by more than this."""
    old_s: NonNegative = _DEFAULT_LIMITS.old_s
    """A reading is also flagged late if it is older than this on arrival."""
    stuck_readings: CountOrZero = _DEFAULT_LIMITS.stuck_readings
    """So many equal values in a row are flagged stuck if they span stuck_s; 0 for never."""
    stuck_s: NonNegative = _DEFAULT_LIMITS.stuck_s
    """How long equal values may go on without being flagged stuck."""
    spike_z: NonNegative = _DEFAULT_LIMITS.spike_z
    """A value is flagged spike if its distance from the median of the 16 readings before exceeds this times
    their scale (1.4826 times the median absolute deviation); 0 for never.
    """
    spike_min: NonNegative = _DEFAULT_LIMITS.spike_min
    """The smallest distance from the median, in the unit of the value, that counts as a spike."""
    max_ahead_s: NonNegative = 300
    """A reading further ahead of the gateway's clock is flagged clock_in_doubt."""
    not_before: Timestamp = "2000-01-01T00:00:00Z"
    """A reading before it is flagged clock_in_doubt: clocks without a battery start in 1970."""
    rule: list[CheckRule] = Field(default_factory=list)
    """Exceptions for some series, one table each; the most specific pattern wins."""

    @property
    def base(self) -> Limits:
        """The limits of series without a rule."""
        return Limits(**{name: getattr(self, name) for name in LIMIT_NAMES if hasattr(self, name)})

    @property
    def rules(self) -> list[LimitRule]:
        """The rules, the built-in ones first."""
        return [*DEFAULT_LIMIT_RULES, *(rule.to_rule() for rule in self.rule)]

    @property
    def plausible(self) -> PlausibleTimes:
        """Which device times are plausible."""
        return PlausibleTimes(
            round(parse_timestamp(self.not_before).timestamp() * 1e6), round(self.max_ahead_s * 1e6)
        )


class ClockSettings(Table):
    """When the gateway's own clock is trusted."""

    trust: Literal["auto", "synchronised", "always"] = "auto"
    """"auto": once it is synchronised; without a synchronisation service, as long as it is past every time
    that has been recorded. "synchronised": only then. "always": without any check.
    """
    wait_max_s: Annotated[float, Field(ge=0, le=1e9)] = 600
    """How long readings without a time of their own wait in the spool for a trusted clock to get correct
    times. Readings that arrive later or wait longer keep their time and are flagged clock_in_doubt.
    """


class DeadbandRule(Table):
    """The deadband of some series."""

    series: SeriesPattern = Field(examples=["*/temperature"])
    """The series: SENSOR_ID/SENSOR_TYPE with "*" for any text, "?" for one character."""
    absolute: NonNegative | None = Field(default=None, examples=[0.2])
    """A reading that differs from the last reported one by at most this is not delivered."""
    percent: NonNegative | None = Field(default=None, examples=[2])
    """The same in percent of the last reported value. With both, the wider one counts."""
    max_silence_s: Seconds = 900
    """A reading so long after the last reported one is delivered in any case."""

    @model_validator(mode="after")
    def _require_band(self) -> Self:
        if self.absolute is None and self.percent is None:
            raise ValueError("needs absolute or percent")
        return self

    def to_rule(self) -> BandRule:
        """The rule as the deadband has it."""
        band = Band(self.absolute or 0.0, self.percent or 0.0, to_microseconds(self.max_silence_s))
        return BandRule(Pattern.parse(self.series), band)


_CONSUMER_DEFAULTS = ConsumerOptions()
_ROLLUP_DEFAULTS = RollupOptions()


def _validate_nesting(lengths: list[int]) -> list[int]:
    fault = find_nesting_error(lengths)
    if fault is not None:
        raise ValueError(f"{fault}; for example {list(DEFAULT_WINDOWS_S)}")
    return lengths


WindowLength = Annotated[int, Field(ge=1, le=366 * 86400)]


class ProcessingSettings(Table):
    """How processing reads the commits."""

    interval_s: Annotated[float, Field(ge=0, le=60)] = _CONSUMER_DEFAULTS.interval_s
    """The shortest time between two steps: more delays rollups and alerts, and costs less."""
    checkpoint_s: Annotated[float, Field(ge=0, le=3600)] = _CONSUMER_DEFAULTS.checkpoint_s
    """How often the state of processing is saved. Newer commits are read again after a crash; less costs more
    writing.
    """

    @property
    def consumer_options(self) -> ConsumerOptions:
        """The options of the commit consumer."""
        return ConsumerOptions(interval_s=self.interval_s, checkpoint_s=self.checkpoint_s)


class RollupSettings(Table):
    """How readings are summarised."""

    enabled: Annotated[bool, Restart("rollups start and stop with the gateway, to keep windows whole")] = True
    """Whether there are rollups."""
    windows_s: Annotated[
        list[WindowLength],
        AfterValidator(_validate_nesting),
        Restart("windows of the old lengths are open; they are closed at the start"),
    ] = Field(default=list(DEFAULT_WINDOWS_S))
    """Lengths of the windows, ascending; each must be a multiple of the one before."""
    lateness_s: Reloadable[NonNegative] = _ROLLUP_DEFAULTS.lateness_s
    """How long after its end a window stays open, by the times of its own series. Later readings make a
    revision.
    """
    idle_s: Reloadable[NonNegative] = _ROLLUP_DEFAULTS.idle_s
    """A window of a silent series is closed by the clock after so long without a reading."""
    close_every_s: Reloadable[NonNegative] = _ROLLUP_DEFAULTS.close_every_s
    """The shortest time between two closings; each is a commit of its own."""
    keep_d: Reloadable[NonNegative] = 90
    """How many days rollups, alerts and declarations are kept once they are delivered everywhere; at most one
    while the spool is full.
    """
    max_open_windows: Reloadable[Count] = _ROLLUP_DEFAULTS.max_open
    """The limit of open windows of one length. Beyond it the windows without a reading for longest are closed
    early, and may get a revision.
    """

    @property
    def roller_options(self) -> RollupOptions:
        """The options of the roller."""
        return RollupOptions(
            windows_s=tuple(self.windows_s),
            lateness_s=self.lateness_s,
            idle_s=self.idle_s,
            close_every_s=self.close_every_s,
            max_open=self.max_open_windows,
        )
