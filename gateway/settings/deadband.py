"""`[[report_by_exception]]`: which readings are close enough to the last one to stay at the gateway."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from gateway.processing.deadband import Band, BandRule
from gateway.processing.patterns import Pattern
from gateway.settings.checks import SeriesPattern  # noqa: TC001 - pydantic reads the annotations
from gateway.settings.tables import Seconds, Table

Width = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class DeadbandRule(Table):
    """The deadband of some series."""

    series: SeriesPattern = Field(examples=["*/temperature"])
    """Which: SENSOR_ID/SENSOR_TYPE with "*" for anything, "?" for one character."""
    absolute: Width | None = Field(default=None, examples=[0.2])
    """A reading that differs from the last reported one by no more, in its own unit, is not delivered."""
    percent: Width | None = Field(default=None, examples=[2])
    """The same in percent of the last reported value. With both, the wider one counts."""
    max_silence_s: Seconds = 900
    """A reading so long after the last reported one is delivered whatever its value."""

    @model_validator(mode="after")
    def _some_band(self) -> Self:
        if self.absolute is None and self.percent is None:
            raise ValueError("needs absolute or percent")
        return self

    def compiled(self) -> BandRule:
        """The rule as the deadband takes it."""
        silence_us = min(round(self.max_silence_s * 1e6), 1 << 61)
        return BandRule(Pattern.of(self.series), Band(self.absolute or 0.0, self.percent or 0.0, silence_us))
