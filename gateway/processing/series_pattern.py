"""Glob patterns over sensor_id/sensor_type, and a cache of what rules give for each series number. Pure.

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

T = TypeVar("T")


class Pattern(NamedTuple):
    """A glob for each half of a series' name."""

    sensor_id: str
    sensor_type: str

    @classmethod
    def of(cls, text: str) -> Pattern:
        """The pattern a person wrote.

        Raises:
            ValueError: it has not the two halves.
        """
        sensor_id, slash, sensor_type = text.rpartition("/")
        if not (slash and sensor_id and sensor_type):
            raise ValueError('must be SENSOR_ID/SENSOR_TYPE, "*" where any will do, as in "*/temperature"')
        return cls(sensor_id, sensor_type)

    def matches(self, sensor_id: str, sensor_type: str) -> bool:
        """Whether a series is one of those it is for."""
        return fnmatchcase(sensor_type, self.sensor_type) and fnmatchcase(sensor_id, self.sensor_id)

    @property
    def weight(self) -> int:
        """How much it says: its characters that are not wild."""
        return len(_WILDCARD.sub("", self.sensor_id)) + len(_WILDCARD.sub("", self.sensor_type))

    def __str__(self) -> str:
        return f"{self.sensor_id}/{self.sensor_type}"


def sort_by_specificity(rules: Iterable[tuple[Pattern, T]]) -> list[tuple[Pattern, T]]:
    """Rules with the one that says the least first: who applies them in this order lets the right one win."""
    return sorted(rules, key=lambda rule: rule[0].weight)


class SeriesRuleCache(Generic[T]):
    """What rules come to for each series, found once a series number: a few kinds, and two bytes a series.

    `found` has the distinct outcomes, in the order in which they were first met; those given at the start
    are the first ones.
    """

    def __init__(self, kind_of: Callable[[int], T], first: Sequence[T] = ()) -> None:
        self._kind_of = kind_of
        self._kinds = np.full(1024, _UNKNOWN, np.int16)
        self._places: dict[T, int] = {}
        self.found: list[T] = []
        for kind in first:
            self._place(kind)

    def of(self, series: NDArray[np.int32]) -> NDArray[np.int16]:
        """For each series number, at which place of `found` its kind is; shape (rows,)."""
        try:
            kinds = self._kinds[series]
        except IndexError:
            self._kinds = grow_array(self._kinds, int(series.max()), _UNKNOWN)
            kinds = self._kinds[series]
        if kinds.min() == _UNKNOWN:
            for number in np.unique(series[kinds == _UNKNOWN]).tolist():
                self._kinds[number] = self._place(self._kind_of(number))
            kinds = self._kinds[series]
        return kinds

    def _place(self, kind: T) -> int:
        place = self._places.setdefault(kind, len(self.found))
        if place == len(self.found):
            self.found.append(kind)
        return place


def grow_array(array: NDArray[np.generic], number: int, filling: float) -> NDArray:  # type: ignore[type-arg]  # of the same type as `array`
    """An array that has room for `number` as an index of its first dimension."""
    rows = max(number + 1, 2 * len(array))
    larger = np.full((rows, *array.shape[1:]), filling, array.dtype)
    larger[: len(array)] = array
    return larger
