"""Report by exception: readings close to the last reported one are stored but not delivered. Pure.

A reading is suppressed when it is newer than the newest of its series, within the band around the last
reported value, has the same flags as that one, and came less than `max_silence_s` after it. The first reading
after a start, late readings and those with a time in doubt are always reported. State is about 30 bytes a
series and is lost at a restart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.model.records import Flag
from gateway.processing.series_pattern import (
    NEVER_US,
    Pattern,
    SeriesRuleCache,
    grow_array,
    mark_run_starts,
    sort_by_specificity,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from cloud_sync.model.records import Readings

_LONG_RUN_ROWS = 64  # readings of one series in one group are processed one by one
_CLOCK_IN_DOUBT = int(Flag.CLOCK_IN_DOUBT)
_SUPPRESSED = np.int32(Flag.SUPPRESSED)


class Band(NamedTuple):
    """Within `absolute` or within `percent` of the last reported value, for `max_silence_us` after it."""

    absolute: float
    percent: float
    max_silence_us: int


class BandRule(NamedTuple):
    """The deadband of matching series."""

    pattern: Pattern
    band: Band


_NO_BAND = Band(-1.0, 0.0, 0)


class Deadband:
    """Marks the readings of commit groups; not thread-safe. The callables are as in `ReadingChecker`."""

    def __init__(
        self,
        name_of: Callable[[int], tuple[str, str]],
        identities: Callable[[NDArray[np.int32]], NDArray[np.int32]],
        rules: Sequence[BandRule],
    ) -> None:
        self._identities = identities
        ranked = sort_by_specificity([(rule.pattern, rule.band) for rule in rules])

        def resolve_band(number: int) -> Band:
            name = name_of(number)
            return next((band for pattern, band in reversed(ranked) if pattern.matches(*name)), _NO_BAND)

        self._kinds = SeriesRuleCache(resolve_band, [_NO_BAND])
        self._value = np.zeros(1024)
        self._flags = np.zeros(1024, np.int32)
        self._reported_us = np.full(1024, NEVER_US, np.int64)
        self._newest_us = np.full(1024, NEVER_US, np.int64)

    def mark(self, readings: Readings) -> Readings:
        """The readings, in order of arrival, with SUPPRESSED set on those within their deadband."""
        series = self._identities(readings.series)
        kind = self._kinds.find(series)
        rows = np.flatnonzero((kind > 0) & (readings.flags & _CLOCK_IN_DOUBT == 0))
        if rows.size == 0:
            return readings
        top = int(series.max())
        self._value, self._flags = grow_array(self._value, top, 0), grow_array(self._flags, top, 0)
        self._reported_us = grow_array(self._reported_us, top, NEVER_US)
        self._newest_us = grow_array(self._newest_us, top, NEVER_US)
        rows = rows[np.argsort(series[rows], kind="stable")]
        suppressed = self._find_suppressed(readings, series[rows], kind[rows], rows)
        if not suppressed.size:
            return readings
        flags = readings.flags.copy()
        flags[suppressed] |= _SUPPRESSED
        return replace(readings, flags=flags)

    def _find_suppressed(
        self, readings: Readings, series: NDArray[np.int32], kind: NDArray[np.int16], rows: NDArray[np.intp]
    ) -> NDArray[np.intp]:
        """Which of `rows`, grouped by series, are within their deadband."""
        starts = np.flatnonzero(mark_run_starts(series))
        lengths = np.diff(starts, append=len(series))
        found = []
        bands = np.array(self._kinds.results)
        for length in range(int(min(lengths.max(), _LONG_RUN_ROWS))):
            at = starts[(lengths > length) & (lengths <= _LONG_RUN_ROWS)] + length
            own, index = series[at], rows[at]
            absolute, percent, silence_us = bands[kind[at]].T
            value, times, flags = readings.value[index], readings.time_us[index], readings.flags[index]
            last = self._value[own]
            with np.errstate(over="ignore"):
                near = np.abs(value - last) <= np.maximum(absolute, percent / 100 * np.abs(last))
            newer = times > self._newest_us[own]
            near &= (times - self._reported_us[own] < silence_us) & (flags == self._flags[own])
            self._newest_us[own[newer]] = times[newer]
            report = newer & ~near
            reported = own[report]
            self._value[reported], self._flags[reported] = value[report], flags[report]
            self._reported_us[reported] = times[report]
            found.append(index[newer & near])
        is_long = lengths > _LONG_RUN_ROWS
        for start, length in zip(starts[is_long], lengths[is_long], strict=True):
            index = rows[start : start + length]
            band = self._kinds.results[int(kind[start])]
            found.append(index[self._suppress_long_run(int(series[start]), readings, index, band)])
        return np.concatenate(found)

    def _suppress_long_run(
        self, series: int, readings: Readings, rows: NDArray[np.intp], band: Band
    ) -> list[bool]:
        """Many readings of one series."""
        last, known = float(self._value[series]), int(self._flags[series])
        reported_us, newest_us = int(self._reported_us[series]), int(self._newest_us[series])
        found = []
        for value, time_us, flags in zip(
            readings.value[rows].tolist(),
            readings.time_us[rows].tolist(),
            readings.flags[rows].tolist(),
            strict=True,
        ):
            newer = time_us > newest_us
            near = (
                newer
                and abs(value - last) <= max(band.absolute, band.percent / 100 * abs(last))
                and time_us - reported_us < band.max_silence_us
                and flags == known
            )
            found.append(near)
            if newer:
                newest_us = time_us
                if not near:
                    last, known, reported_us = value, flags, time_us
        self._value[series], self._flags[series] = last, known
        self._reported_us[series], self._newest_us[series] = reported_us, newest_us
        return found
