"""Glob patterns over sensor_id/sensor_type, and a cache of rule results by series number. Pure.

"boiler-*/temperature": "*" matches any characters, "?" exactly one, "[ab]" one of a set. When several rules
match a series, the pattern with the most literal characters wins, and among equals the later rule.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

_WILDCARD = re.compile(r"\*|\?|\[[^]]*\]")
_UNKNOWN = -1
_UINT16_MAX = 0xFFFF
NEVER_US = -(1 << 62)
"""A time before all others."""

T = TypeVar("T")


class Pattern(NamedTuple):
    """A glob for sensor_id and one for sensor_type."""

    sensor_id: str
    sensor_type: str

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse "SENSOR_ID/SENSOR_TYPE"; ValueError when a half is missing."""
        sensor_id, slash, sensor_type = text.rpartition("/")
        if not (slash and sensor_id and sensor_type):
            raise ValueError('must be SENSOR_ID/SENSOR_TYPE, with "*" for any, as in "*/temperature"')
        return cls(sensor_id, sensor_type)

    def matches(self, sensor_id: str, sensor_type: str) -> bool:
        """Whether both globs match."""
        return fnmatchcase(sensor_type, self.sensor_type) and fnmatchcase(sensor_id, self.sensor_id)

    @property
    def weight(self) -> int:
        """How specific it is: the number of its literal characters."""
        return len(_WILDCARD.sub("", self.sensor_id)) + len(_WILDCARD.sub("", self.sensor_type))

    def __str__(self) -> str:
        return f"{self.sensor_id}/{self.sensor_type}"


def sort_by_specificity(rules: Iterable[tuple[Pattern, T]]) -> list[tuple[Pattern, T]]:
    """Rules in the order to apply them: the most specific last."""
    return sorted(rules, key=lambda rule: rule[0].weight)


class SeriesRuleCache(Generic[T]):
    """The result of the rules for each series, computed once: the distinct results and two bytes a series.

    `results` holds them in the order in which they were first met, `initial` ones first.
    """

    def __init__(self, resolve: Callable[[int], T], initial: Sequence[T] = ()) -> None:
        self._resolve = resolve
        self._kinds = np.full(1024, _UNKNOWN, np.int16)
        self._indexes: dict[T, int] = {}
        self.results: list[T] = []
        for result in initial:
            self._index(result)

    def find(self, series: NDArray[np.int32]) -> NDArray[np.int16]:
        """The index in `results` for each series number; shape (rows,)."""
        try:
            kinds = self._kinds[series]
        except IndexError:
            self._kinds = grow_array(self._kinds, int(series.max()), _UNKNOWN)
            kinds = self._kinds[series]
        if kinds.min() == _UNKNOWN:
            for number in np.unique(series[kinds == _UNKNOWN]).tolist():
                self._kinds[number] = self._index(self._resolve(number))
            kinds = self._kinds[series]
        return kinds

    def _index(self, result: T) -> int:
        index = self._indexes.setdefault(result, len(self.results))
        if index == len(self.results):
            self.results.append(result)
        return index


def mark_run_starts(*columns: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Which rows differ in any column from the row before, as the first one does; shape (rows,)."""
    starts = np.zeros(len(columns[0]), np.bool_)
    starts[:1] = True
    for column in columns:
        starts[1:] |= column[1:] != column[:-1]
    return starts


def grow_array(array: NDArray[np.generic], number: int, filling: float) -> NDArray:  # type: ignore[type-arg]  # of the same type as `array`
    """The array, or a larger copy that has an element at index `number`."""
    if number < len(array):
        return array
    rows = max(number + 1, 2 * len(array))
    larger = np.full((rows, *array.shape[1:]), filling, array.dtype)
    larger[: len(array)] = array
    return larger


def order_by_series(series: NDArray[np.int32], scratch: NDArray[np.int64]) -> NDArray[np.intp] | None:
    """The order that groups readings by series; None when no series has two."""
    if len(series) == 1:
        return None
    at = np.arange(len(series))
    scratch[series] = at
    if (scratch[series] == at).all():
        return None
    if series.max() <= _UINT16_MAX:
        series = series.astype(np.uint16)  # numpy sorts those by radix
    return np.argsort(series, kind="stable")


def newest_times_before(
    times: NDArray[np.int64], firsts: NDArray[np.bool_], known: NDArray[np.int64]
) -> NDArray[np.int64]:
    """For each reading the newest time of its series before it.

    `times` are grouped by series, `firsts` marks the first of each, `known` is the newest before the group.
    """
    before = np.empty_like(times)
    before[1:] = times[:-1]
    before[firsts] = NEVER_US
    if not (times >= before).all():
        ranks = np.argsort(np.argsort(times, kind="stable"), kind="stable")
        base = (np.cumsum(firsts) - 1) * len(times)
        highest = np.maximum.accumulate(ranks + base) - base
        by_rank = np.sort(times, kind="stable")
        before[1:] = by_rank[highest[:-1]]
        before[firsts] = NEVER_US
    return np.maximum(before, known)
