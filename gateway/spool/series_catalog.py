"""The spool's series numbers: each series in each state of its attributes has one, for ever.

The catalog is whole in memory (bounded by `max_series`); what is new in it is written by the transaction
that appends the first segment using it, so a segment never names a number the file does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from cloud_sync.model.records import Series
from gateway.spool.database import SQL

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from gateway.spool.database import Database

DEFAULT_MAX_SERIES = 200_000


class KnownSeries(NamedTuple):
    """A series in its newest attribute state, and the numbers of all its states, oldest first."""

    series: Series
    numbers: list[int]

    @property
    def unit(self) -> str:
        """Its unit, "" when it has none."""
        return dict(self.series.attributes).get("unit", "")


class SeriesCatalog:
    """Series to number and back. What a series is known by is its identity: the number of its first state."""

    def __init__(self, max_series: int = DEFAULT_MAX_SERIES, rows: Iterable[tuple[int, Series]] = ()) -> None:
        self.max_series = max_series
        self._numbers: dict[Series, int] = {}
        self._series: dict[int, Series] = {}
        self._unsaved: dict[int, Series] = {}
        self._next = 1
        self._states: dict[tuple[str, str], list[int]] = {}
        self._identities = np.zeros(1024, np.int32)
        for number, series in rows:
            self._add(number, series)

    @classmethod
    async def read(cls, database: Database, max_series: int = DEFAULT_MAX_SERIES) -> SeriesCatalog:
        """The catalog of an open spool."""
        return cls(max_series, await database.read(read_all_series))

    def __len__(self) -> int:
        return len(self._series)

    def __getitem__(self, number: int) -> Series:
        return self._series[number]

    def __contains__(self, series: Series) -> bool:
        return series in self._numbers

    def knows(self, numbers: NDArray[np.int32]) -> bool:
        """Whether every number names a series."""
        return bool(self.identities(numbers).all())

    def find(self, sensor_id: str, sensor_type: str) -> KnownSeries | None:
        """A series by its name."""
        numbers = self._states.get((sensor_id, sensor_type))
        return None if numbers is None else KnownSeries(self._series[numbers[-1]], numbers)

    def list_known(self) -> list[KnownSeries]:
        """Every series once, sorted by name."""
        return [
            KnownSeries(self._series[numbers[-1]], numbers) for _, numbers in sorted(self._states.items())
        ]

    def assign_number(self, series: Series) -> int | None:
        """The number of `series`, a new one if necessary; None when the catalog is full."""
        number = self._numbers.get(series)
        if number is None and len(self._series) < self.max_series:
            number = self._next
            self._add(number, series)
            self._unsaved[number] = series
        return number

    def assign_number_with_state_limit(self, series: Series, states_max: int) -> int | None:
        """The number of `series`; once it has had so many attribute states, that of the newest one.

        Bounds what a sender whose attributes always change (a position as location) can add to the catalog.
        """
        known = self.find(series.sensor_id, series.sensor_type)
        if known is not None and len(known.numbers) >= states_max and series not in self._numbers:
            return known.numbers[-1]
        return self.assign_number(series)

    def identities(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """The identity of each number, 0 where it names no series."""
        known = np.where((numbers >= 0) & (numbers < len(self._identities)), numbers, 0)
        return self._identities[known]

    def list_identities(self) -> NDArray[np.int32]:
        """The identity of every series, once each."""
        found = np.unique(self._identities)
        return found[found > 0]

    def list_after(self, number: int) -> list[tuple[int, Series]]:
        """The series with a larger number than this, in rising order."""
        return [(n, self._series[n]) for n in range(number + 1, self._next) if n in self._series]

    def list_unsaved(self) -> list[tuple[int, Series]]:
        """What the file does not know yet."""
        return list(self._unsaved.items())

    def mark_saved(self, written: list[tuple[int, Series]]) -> None:
        """Record that a transaction with `written` is durable."""
        for number, _ in written:
            self._unsaved.pop(number, None)

    def _add(self, number: int, series: Series) -> None:
        self._numbers[series] = number
        self._series[number] = series
        self._next = max(self._next, number + 1)
        if number >= len(self._identities):
            self._identities = np.concatenate([self._identities, np.zeros(number + 1, np.int32)])
        states = self._states.setdefault(series[:2], [])
        states.append(number)
        self._identities[number] = states[0]


def read_all_series(connection: sqlite3.Connection) -> list[tuple[int, Series]]:
    """Every series of the file with its number."""
    return [
        (number, Series(sensor_id, sensor_type, tuple(sorted(msgspec.json.decode(attributes).items()))))
        for number, sensor_id, sensor_type, attributes in connection.execute(SQL["all_series"])
    ]


def write_series(connection: sqlite3.Connection, rows: list[tuple[int, Series]]) -> None:
    """Write new numbers; to be called inside the transaction that first uses them."""
    connection.executemany(
        SQL["add_series"],
        [
            (number, s.sensor_id, s.sensor_type, msgspec.json.encode(dict(s.attributes)).decode())
            for number, s in rows
        ],
    )
