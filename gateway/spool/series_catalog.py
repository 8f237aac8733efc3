"""The spool's series numbers: each series in each state of its attributes has one, for ever.

The catalog is whole in memory (bounded by `max_series`); what is new in it is written by the transaction
that appends the first segment using it, so a segment never names a number the file does not know.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cloud_sync.model.records import Series
from gateway.spool.database import SQL

if TYPE_CHECKING:
    import sqlite3

    from numpy.typing import NDArray

    from gateway.spool.database import Database

DEFAULT_MAX_SERIES = 200_000


class SeriesCatalog:
    """Series to number and back."""

    def __init__(self, max_series: int = DEFAULT_MAX_SERIES) -> None:
        self.max_series = max_series
        self._numbers: dict[Series, int] = {}
        self._series: dict[int, Series] = {}
        self._unsaved: dict[int, Series] = {}
        self._next = 1
        self._first_states: dict[tuple[str, str], int] = {}
        self._states: dict[tuple[str, str], tuple[int, int]] = {}
        self._identities = np.zeros(1024, np.int32)

    @classmethod
    async def read(cls, database: Database, max_series: int = DEFAULT_MAX_SERIES) -> SeriesCatalog:
        """The catalog of an open spool."""
        catalog = cls(max_series)
        for number, series in await database.read(read_all_series):
            catalog._add(number, series)
        return catalog

    def __len__(self) -> int:
        return len(self._series)

    def __getitem__(self, number: int) -> Series:
        return self._series[number]

    def knows(self, numbers: NDArray[np.int32]) -> bool:
        """Whether every number names a series."""
        return self._series.keys() >= set(np.unique(numbers).tolist())

    def assign_number(self, series: Series) -> int | None:
        """The number of `series`, a new one if need be; None when the catalog is full."""
        number = self._numbers.get(series)
        if number is None and len(self._series) < self.max_series:
            number = self._next
            self._add(number, series)
            self._unsaved[number] = series
        return number

    def has(self, series: Series) -> bool:
        """Whether this state of a series has a number."""
        return series in self._numbers

    def assign_number_with_state_limit(self, series: Series, states_max: int) -> int | None:
        """The number of `series`; once it has had so many states of its attributes, that of the newest one.

        Bounds what a sender whose attributes always change (a position as location) can add to the catalog.
        """
        if series not in self._numbers:
            states, newest = self._states.get(series[:2], (0, 0))
            if states >= states_max:
                return newest
        return self.assign_number(series)

    def identities(self, numbers: NDArray[np.int32]) -> NDArray[np.int32]:
        """For each number, that of the first attribute state of its series: what a series is known by."""
        known = np.where((numbers >= 0) & (numbers < len(self._identities)), numbers, 0)
        return self._identities[known]

    def list_identities(self) -> NDArray[np.int32]:
        """The number of the first attribute state of every series, once each."""
        found = np.unique(self._identities)
        return found[found > 0]

    def find_identity(self, number: int) -> int:
        """The same for one number."""
        return int(self._identities[number])

    def after(self, number: int) -> list[tuple[int, Series]]:
        """The series with a larger number than this, in rising order."""
        return [(n, self._series[n]) for n in range(number + 1, self._next) if n in self._series]

    def unsaved_series(self) -> list[tuple[int, Series]]:
        """What the file does not know yet."""
        return list(self._unsaved.items())

    def saved(self, written: list[tuple[int, Series]]) -> None:
        """Record that a transaction with `written` is durable."""
        for number, _ in written:
            self._unsaved.pop(number, None)

    def _add(self, number: int, series: Series) -> None:
        self._numbers[series] = number
        self._series[number] = series
        self._next = max(self._next, number + 1)
        if number >= len(self._identities):
            self._identities = np.concatenate([self._identities, np.zeros(number + 1, np.int32)])
        name = series[:2]
        identity = self._first_states.setdefault(name, number)
        self._states[name] = (self._states.get(name, (0, 0))[0] + 1, number)
        self._identities[number] = identity


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
