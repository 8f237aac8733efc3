"""Which readings a person asked for: a span of time and some series. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from cloud_sync.records import Readings, Series

_EARLIEST_US, _LATEST_US = -(1 << 63), (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Selection:
    """Readings with since_us <= time < until_us of series that any of `patterns` names.

    A pattern is SENSOR_ID/SENSOR_TYPE, exact or with `*`, `?` and `[...]`; without a slash it names a
    sensor, with all its types. No pattern means every series.
    """

    since_us: int | None = None
    until_us: int | None = None
    patterns: tuple[str, ...] = ()

    def touches(self, min_time_us: int, max_time_us: int) -> bool:
        """Whether a segment of these times can hold a selected reading."""
        return max_time_us >= self._since_us and min_time_us < self._until_us

    def names(self, series: Series) -> bool:
        """Whether the readings of a series are selected."""
        if not self.patterns:
            return True
        name = f"{series.sensor_id}/{series.sensor_type}"
        return any(
            pattern in (name, series.sensor_id)
            or fnmatchcase(name if "/" in pattern else series.sensor_id, pattern)
            for pattern in self.patterns
        )

    def of(self, readings: Readings, named: NDArray[np.bool_]) -> Readings:
        """The selected readings; `named` says of each series number whether it is."""
        mask = named[readings.series]
        if not self.touches_all(int(readings.time_us.min()), int(readings.time_us.max())):
            mask &= (readings.time_us >= self._since_us) & (readings.time_us < self._until_us)
        return readings if mask.all() else readings.take(mask)

    def touches_all(self, min_time_us: int, max_time_us: int) -> bool:
        """Whether a segment of these times holds no reading outside the span."""
        return min_time_us >= self._since_us and max_time_us < self._until_us

    @property
    def _since_us(self) -> int:
        return _EARLIEST_US if self.since_us is None else self.since_us

    @property
    def _until_us(self) -> int:
        return _LATEST_US if self.until_us is None else self.until_us
