"""Flags suspicious readings, which are kept: each by itself and against its series. Pure.

By itself: the value against a range, quality, battery level and signal strength against minima, the time
against the gateway's clock. Against its series: `late` (older than the newest by more than `late_s`), `stuck`
(many equal values over a long time) and `spike` (far from the median of the values before it).

`stuck` and `spike` consider only readings newer than the newest of their series. A time ahead of the clock is
in doubt and does not become the newest. State is about 250 bytes a series and is lost at a restart.

A spike is further from the median than `spike_z` times the scale (1.4826 times the median absolute deviation,
Hampel's identifier) and further than `spike_min`. Both are computed from the last `HISTORY_READINGS` values
once every `REFRESH_EVERY_READINGS`; a series with fewer values has no spikes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cloud_sync.model.records import Flag
from gateway.processing.series_pattern import (
    NEVER_US,
    Pattern,
    SeriesRuleCache,
    grow_array,
    mark_run_starts,
    newest_times_before,
    order_by_series,
    sort_by_specificity,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from cloud_sync.model.records import Readings

HISTORY_READINGS = 16
REFRESH_EVERY_READINGS = 8
_LONG_RUN_ROWS = 64  # more readings of one series in one group are checked together
_FAR_FUTURE_US = 1 << 62
_TIME_ASSIGNED = np.int32(Flag.TIME_ASSIGNED)
_MAD_SCALE = 1.4826
_FLAG_BITS = 8  # flags up to SPIKE are the bits of one byte
_BIT_INDEX = {flag: int(flag).bit_length() - 1 for flag in Flag if flag < 1 << _FLAG_BITS}


@dataclass(frozen=True, slots=True)
class Limits:
    """The normal range of a series.

    `minimum` and `maximum` are inclusive; missing quality, battery level and signal strength are not flagged.
    A reading is late when its series has one newer by more than `late_s`, or when it is older than `old_s` on
    arrival. 0 `stuck_readings` or `spike_z` disables that check; `spike_min` is in the unit of the value.
    """

    minimum: float = -np.inf
    maximum: float = np.inf
    min_quality: float = 80
    min_battery_level: float = 10
    min_signal_strength: float = -80
    late_s: float = 30
    old_s: float = 86_400
    stuck_readings: int = 0
    stuck_s: float = 3600
    spike_z: float = 0
    spike_min: float = 0


LIMIT_NAMES = tuple(field.name for field in fields(Limits))


class LimitRule(NamedTuple):
    """Limits that differ for some series, by name."""

    pattern: Pattern
    limits: Mapping[str, float]


DEFAULT_LIMIT_RULES = (
    LimitRule(
        Pattern("*", "temperature"),
        {"minimum": -50, "maximum": 100, "stuck_readings": 60, "spike_z": 10, "spike_min": 5},
    ),
    LimitRule(Pattern("*", "humidity"), {"minimum": 0, "maximum": 100, "spike_z": 10, "spike_min": 20}),
    LimitRule(
        Pattern("*", "pressure"),
        {"minimum": 800, "maximum": 1200, "stuck_readings": 60, "spike_z": 10, "spike_min": 10},
    ),
)
"""Overridden by rules of the configuration."""


@dataclass(frozen=True, slots=True)
class PlausibleTimes:
    """The range of device times that are believed."""

    not_before_us: int = 946_684_800_000_000
    max_ahead_us: int = 300_000_000


class ReadingChecker:
    """Flags the readings of commit groups; not thread-safe.

    `name_of` gives sensor_id and sensor_type of a series number; `identities` maps numbers to the number of
    their series' first attribute state.
    """

    def __init__(
        self,
        name_of: Callable[[int], tuple[str, str]],
        identities: Callable[[NDArray[np.int32]], NDArray[np.int32]],
        *,
        base: Limits = Limits(),
        rules: Sequence[LimitRule] = DEFAULT_LIMIT_RULES,
        plausible: PlausibleTimes = PlausibleTimes(),
    ) -> None:
        self._identities = identities
        self._plausible = plausible
        ranked = sort_by_specificity([(rule.pattern, rule.limits) for rule in rules])

        def resolve_limits(number: int) -> Limits:
            name, resolved = name_of(number), base
            for pattern, limits in ranked:
                if pattern.matches(*name):
                    resolved = replace(resolved, **limits)  # type: ignore[arg-type]  # all are floats
            return resolved

        self._kinds = SeriesRuleCache(resolve_limits)
        self._table = _LimitTable([])
        self._newest_us = np.full(1024, NEVER_US, np.int64)
        self._runs = _StuckDetector(1024)
        self._histories = _SpikeDetector(1024)

    def check(self, readings: Readings, now_us: int | None) -> Readings:
        """The readings, in order of arrival, with flags added.

        `now_us` is None while the clock is not trusted: then no time is too old or too far ahead, and times
        that the gateway assigned are in doubt.
        """
        if readings.rows == 0:
            return readings
        series = self._identities(readings.series)
        kind = self._kinds.find(series)
        if len(self._kinds.results) != len(self._table.maximum):
            self._table = _LimitTable(self._kinds.results)
        table, value = self._table, readings.value
        bits = np.zeros((_FLAG_BITS, readings.rows), np.bool_)
        bits[_BIT_INDEX[Flag.OUT_OF_RANGE]] = (value < table.minimum[kind]) | (value > table.maximum[kind])
        np.less(readings.quality, table.min_quality[kind], out=bits[_BIT_INDEX[Flag.LOW_QUALITY]])
        np.less(readings.battery_level, table.min_battery_level[kind], out=bits[_BIT_INDEX[Flag.LOW_BATTERY]])
        np.less(
            readings.signal_strength, table.min_signal_strength[kind], out=bits[_BIT_INDEX[Flag.WEAK_SIGNAL]]
        )
        doubtful = self._check_against_series(series, kind, readings, now_us, bits)
        flags = readings.flags | np.packbits(bits, axis=0, bitorder="little")[0]
        if doubtful is not None:
            flags[doubtful] |= int(Flag.CLOCK_IN_DOUBT)
        return replace(readings, flags=flags)

    def _check_against_series(
        self,
        series: NDArray[np.int32],
        kind: NDArray[np.int16],
        readings: Readings,
        now_us: int | None,
        bits: NDArray[np.bool_],
    ) -> NDArray[np.bool_] | None:
        """Set the bits of late, stuck and spike; returns which times are in doubt, None for none."""
        table, times = self._table, readings.time_us
        limit_us = _FAR_FUTURE_US if now_us is None else now_us + self._plausible.max_ahead_us
        ahead = bool(times.max() > limit_us)
        doubtful = None
        if ahead or times.min() < self._plausible.not_before_us:
            doubtful = (times > limit_us) | (times < self._plausible.not_before_us)
        if now_us is None:
            now_us = NEVER_US
            assigned = readings.flags & _TIME_ASSIGNED != 0
            doubtful = assigned if doubtful is None else doubtful | assigned
        if self._newest_us.size <= (top := int(series.max())):
            self._newest_us = grow_array(self._newest_us, top, NEVER_US)
            self._runs.grow(top)
            self._histories.grow(top)
        order = order_by_series(series, self._histories.scratch)
        if order is None:
            rows: slice | NDArray[np.intp] = slice(None)
            own, own_times, firsts = series, times, None
        else:
            rows = order
            own, own_times = series[order], times[order]
            firsts = mark_run_starts(own)
        trusted = np.where(own_times > limit_us, NEVER_US, own_times) if ahead else own_times
        before = self._newest_us[own]
        if firsts is not None:
            before = newest_times_before(trusted, firsts, before)
        newest = np.maximum(before, trusted)
        self._newest_us[own] = newest  # of several of one series the last is written last
        kinds = kind[rows]
        late = bits[_BIT_INDEX[Flag.LATE]]
        late[rows] = (own_times < before - table.late_us[kinds]) | (own_times < now_us - table.old_us[kinds])
        if table.any_watched:
            part = np.flatnonzero((trusted > before) & table.watched[kinds])
            if part.size:
                chosen = part if order is None else order[part]
                newer = _NewerReadings(
                    own[part], own_times[part], readings.value[chosen], kinds[part], firsts is None
                )
                bits[_BIT_INDEX[Flag.STUCK]][chosen] = self._runs.detect(newer, table)
                bits[_BIT_INDEX[Flag.SPIKE]][chosen] = self._histories.detect(newer, table)
        return doubtful


class _NewerReadings(NamedTuple):
    """Readings newer than the newest of their series, by series and time; `single`: one for each series."""

    series: NDArray[np.int32]
    times: NDArray[np.int64]
    value: NDArray[np.float64]
    kind: NDArray[np.int16]
    single: bool


class _LimitTable:
    """The distinct limits as columns."""

    def __init__(self, kinds: list[Limits]) -> None:
        column = {name: np.array([getattr(kind, name) for kind in kinds], np.float64) for name in LIMIT_NAMES}
        self.minimum, self.maximum = column["minimum"], column["maximum"]
        self.min_quality = column["min_quality"]
        self.min_battery_level = column["min_battery_level"]
        self.min_signal_strength = column["min_signal_strength"]
        self.late_us, self.old_us, self.stuck_us = (
            (np.minimum(column[name] * 1e6, 1e17)).astype(np.int64) for name in ("late_s", "old_s", "stuck_s")
        )
        self.stuck_readings = column["stuck_readings"].astype(np.int64)
        self.spike_z, self.spike_min = column["spike_z"], column["spike_min"]
        self.watched = (self.stuck_readings > 0) | (self.spike_z > 0)
        self.any_watched = bool(self.watched.any())


class _StuckDetector:
    """The current run of equal values of each series."""

    def __init__(self, room: int) -> None:
        self._value = np.full(room, np.nan)
        self._count = np.zeros(room, np.int64)
        self._since_us = np.zeros(room, np.int64)

    def grow(self, number: int) -> None:
        self._value = grow_array(self._value, number, np.nan)
        self._count = grow_array(self._count, number, 0)
        self._since_us = grow_array(self._since_us, number, 0)

    def detect(self, seen: _NewerReadings, table: _LimitTable) -> NDArray[np.bool_]:
        """Which readings are stuck; shape (rows,)."""
        series, times, value = seen.series, seen.times, seen.value
        same = value == self._value[series]
        if seen.single:
            count = np.where(same, self._count[series] + 1, 1)
            since_us = np.where(same, self._since_us[series], times)
        else:
            at = np.arange(len(series))
            firsts = mark_run_starts(series)
            np.copyto(same[1:], value[1:] == value[:-1], where=~firsts[1:])
            begins = ~same | firsts
            begin = np.maximum.accumulate(np.where(begins, at, 0))
            continued = same[begin]
            count = at - begin + 1 + np.where(continued, self._count[series], 0)
            since_us = np.where(continued, self._since_us[series], times[begin])
        self._value[series] = value
        self._count[series] = count
        self._since_us[series] = since_us
        enough = table.stuck_readings[seen.kind]
        stuck: NDArray[np.bool_] = (
            (enough > 0) & (count >= enough) & (times - since_us >= table.stuck_us[seen.kind])
        )
        return stuck


class _SpikeDetector:
    """The latest values of each series in a ring, their median, and how far from it a spike is."""

    def __init__(self, room: int) -> None:
        self._ring = np.zeros((room, HISTORY_READINGS))
        self._count = np.zeros(room, np.int64)
        self._median = np.zeros(room)
        self._reach = np.full(room, np.inf)
        self.scratch = np.zeros(room, np.int64)

    def grow(self, number: int) -> None:
        self._ring = grow_array(self._ring, number, 0)
        self._count = grow_array(self._count, number, 0)
        self._median = grow_array(self._median, number, 0)
        self._reach = grow_array(self._reach, number, np.inf)
        self.scratch = grow_array(self.scratch, number, 0)

    def detect(self, seen: _NewerReadings, table: _LimitTable) -> NDArray[np.bool_]:
        """Which readings are spikes; shape (rows,)."""
        with np.errstate(over="ignore"):
            if seen.single:
                number = self._count[seen.series]
                return self._detect_until_refresh(seen.series, number, seen.value, seen.kind, table)
            return self._detect_several_each(seen, table)

    def _detect_until_refresh(
        self,
        series: NDArray[np.int32],
        number: NDArray[np.int64],
        value: NDArray[np.float64],
        kind: NDArray[np.int16],
        table: _LimitTable,
    ) -> NDArray[np.bool_]:
        """Check readings of which no series has more than up to its next refresh; `number` counts them."""
        spike: NDArray[np.bool_] = np.abs(value - self._median[series]) > self._reach[series]
        self._ring[series, number % HISTORY_READINGS] = value
        count = number + 1
        self._count[series] = count
        due = np.flatnonzero((count % REFRESH_EVERY_READINGS == 0) & (count >= HISTORY_READINGS))
        if due.size:
            refreshed = series[due]
            self._median[refreshed], self._reach[refreshed] = _compute_spike_bounds(
                self._ring[refreshed], kind[due], table
            )
        return spike

    def _detect_several_each(self, seen: _NewerReadings, table: _LimitTable) -> NDArray[np.bool_]:
        """Check the readings of every series up to its next refresh, then the next ones."""
        series, value = seen.series, seen.value
        spike = np.zeros(len(series), np.bool_)
        at = np.arange(len(series))
        begins = mark_run_starts(series)
        rank = at - np.maximum.accumulate(np.where(begins, at, 0))
        short = at
        if rank.max() >= _LONG_RUN_ROWS:
            starts = np.flatnonzero(begins)
            lengths = np.diff(starts, append=len(series))
            is_long = lengths > _LONG_RUN_ROWS
            for start, length in zip(starts[is_long], lengths[is_long], strict=True):
                run = slice(start, start + length)
                spike[run] = self._detect_long_run(
                    int(series[start]), value[run], int(seen.kind[start]), table
                )
            short = np.flatnonzero(np.repeat(~is_long, lengths))
            if short.size == 0:
                return spike
            rank = rank[short]
        own = series[short]
        number = self._count[own] + rank
        turn = number // REFRESH_EVERY_READINGS - self._count[own] // REFRESH_EVERY_READINGS
        for now in range(int(turn.max()) + 1):
            rows = np.flatnonzero(turn == now)
            chosen = short[rows]
            spike[chosen] = self._detect_until_refresh(
                own[rows], number[rows], value[chosen], seen.kind[chosen], table
            )
        return spike

    def _detect_long_run(
        self, series: int, value: NDArray[np.float64], kind: int, table: _LimitTable
    ) -> NDArray[np.bool_]:
        old = int(self._count[series])
        stored = min(old, HISTORY_READINGS)
        known = np.concatenate([self._ring[series, np.arange(old - stored, old) % HISTORY_READINGS], value])
        total = old + len(value)
        first = max(HISTORY_READINGS, (old // REFRESH_EVERY_READINGS + 1) * REFRESH_EVERY_READINGS)
        refreshed = np.arange(first, total + 1, REFRESH_EVERY_READINGS)
        median, reach = np.array([self._median[series]]), np.array([self._reach[series]])
        if refreshed.size:
            windows = np.lib.stride_tricks.sliding_window_view(known, HISTORY_READINGS)
            newest = windows[refreshed - HISTORY_READINGS - (old - stored)]
            later, further = _compute_spike_bounds(newest, np.full(len(refreshed), kind), table)
            median, reach = np.concatenate([median, later]), np.concatenate([reach, further])
        judged = np.searchsorted(refreshed, np.arange(old, total), side="right")
        spike: NDArray[np.bool_] = np.abs(value - median[judged]) > reach[judged]
        self._median[series], self._reach[series] = median[-1], reach[-1]
        left = known[-min(len(known), HISTORY_READINGS) :]
        self._ring[series, np.arange(total - len(left), total) % HISTORY_READINGS] = left
        self._count[series] = total
        return spike


def _compute_spike_bounds(
    history: NDArray[np.float64], kind: NDArray[np.integer], table: _LimitTable
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Median of each row of `history`, and how far from it a spike is."""
    median = _row_medians(history)
    deviation = _row_medians(np.abs(history - median[:, None]))
    z = table.spike_z[kind]
    reach = np.maximum(z * _MAD_SCALE * deviation, table.spike_min[kind])
    return median, np.where(z > 0, reach, np.inf)


def _row_medians(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    middle = HISTORY_READINGS // 2
    parted = np.partition(rows, (middle - 1, middle), axis=1)
    median: NDArray[np.float64] = parted[:, middle - 1] / 2 + parted[:, middle] / 2
    return median
