"""`[checks]`: what is flagged as suspicious."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from gateway.processing.checks import DEFAULT_RULES, LIMIT_NAMES, LimitRule, Limits, Plausible
from gateway.processing.patterns import Pattern
from gateway.settings.tables import Table

_DEFAULT = Limits()


def _pattern(text: str) -> str:
    Pattern.of(text)
    return text


def _moment(text: str) -> str:
    try:
        zone = datetime.fromisoformat(text).tzinfo
    except ValueError:
        zone = None
    if zone is None:
        raise ValueError("must be a time with its offset, such as 2000-01-01T00:00:00Z")
    return text


SeriesPattern = Annotated[str, AfterValidator(_pattern)]
NoLess = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _a_number(value: float) -> float:
    if value != value:  # noqa: PLR0124 - what NaN is told by
        raise ValueError("must be a number, inf or -inf")
    return value


Limit = Annotated[float, AfterValidator(_a_number)]


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
    late_s: NoLess | None = Field(default=None, examples=[30])
    """As in [checks]."""
    old_s: NoLess | None = Field(default=None, examples=[86_400])
    """As in [checks]."""
    stuck_readings: Annotated[int, Field(ge=0)] | None = Field(default=None, examples=[60])
    """As in [checks]."""
    stuck_s: NoLess | None = Field(default=None, examples=[3600])
    """As in [checks]."""
    spike_z: NoLess | None = Field(default=None, examples=[10])
    """As in [checks]."""
    spike_min: NoLess | None = Field(default=None, examples=[5])
    """As in [checks]."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError("minimum is above maximum: every value would be out of range")
        return self

    def compiled(self) -> LimitRule:
        """The rule as the checks take it."""
        given = {name: getattr(self, name) for name in LIMIT_NAMES}
        return LimitRule(Pattern.of(self.series), {k: v for k, v in given.items() if v is not None})


class CheckSettings(Table):
    """What is flagged as suspicious. Flagged readings are kept and delivered like the others."""

    enabled: bool = True
    """Whether readings are checked at all."""
    min_quality: Limit = _DEFAULT.min_quality
    """A quality below it is flagged low_quality."""
    min_battery_level: Limit = _DEFAULT.min_battery_level
    """A battery level below it, in percent, is flagged low_battery."""
    min_signal_strength: Limit = _DEFAULT.min_signal_strength
    """A signal strength below it, in dBm, is flagged weak_signal."""
    late_s: NoLess = _DEFAULT.late_s
    """A reading is flagged late when its series has one that is newer by more than this."""
    old_s: NoLess = _DEFAULT.old_s
    """A reading is flagged late, too, when it is older than this as it comes."""
    stuck_readings: Annotated[int, Field(ge=0)] = _DEFAULT.stuck_readings
    """So many equal values in a row are flagged stuck when they span stuck_s; 0 for never."""
    stuck_s: NoLess = _DEFAULT.stuck_s
    """How long equal values may go on without being flagged stuck."""
    spike_z: NoLess = _DEFAULT.spike_z
    """A value is flagged spike when it is further from the median of the 16 readings before than this times
    their scale (1.4826 times the median absolute deviation); 0 for never.
    """
    spike_min: NoLess = _DEFAULT.spike_min
    """The least distance from the median, in the unit of the value, that is a spike."""
    max_ahead_s: NoLess = 300
    """A device's time further ahead of the gateway's clock is flagged clock_in_doubt."""
    not_before: Annotated[str, AfterValidator(_moment)] = "2000-01-01T00:00:00Z"
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
        return [*DEFAULT_RULES, *(rule.compiled() for rule in self.rule)]

    @property
    def plausible(self) -> Plausible:
        """Which device times can be true."""
        return Plausible(
            round(datetime.fromisoformat(self.not_before).timestamp() * 1e6), round(self.max_ahead_s * 1e6)
        )
